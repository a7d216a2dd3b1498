"Stages on any machine: side by side, in the very Python that was asked, without a home folder, in their own code."

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

import cmid
from cmid.base.errors import CmidError
from cmid.base.runtime import code_folder
from cmid.study.digest import cmid_digest
from cmid.study.runner import cmid_stage, run_notebook
from cmid.study.stage import Stage
from cmid.study.study import run_study
from cmid.study.train import code_of_pretraining

ROOT = Path(__file__).parents[2]
DOZEN = 12


def write_notebook(path, *cells):
    "A stage; its first cell holds its parameters."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in ("number = 0\nsmoke = False", *cells)])
    nb.cells[0].metadata["tags"] = ["parameters"]
    nb.metadata["kernelspec"] = dict(name="python3", language="python", display_name="python3")
    nbformat.write(nb, path)
    return path


def told(folder, code):
    "What one notebook finds out about its process."
    notebook = write_notebook(
        folder / "a.ipynb", code, f"import json; json.dump(found, open({str(folder / 'x')!r}, 'w'))"
    )
    run_notebook(notebook, folder / "out/a.ipynb", {})
    return json.loads((folder / "x").read_text())


# Side by side

MEET = """import json, time
from pathlib import Path
import psutil
from ipykernel.connect import get_connection_info
connection = get_connection_info(unpack=True)
names = [o for o in connection if o.endswith("_port")]
found = dict(
    transport=connection["transport"],
    files=[f"{connection['ip']}-{connection[o]}" for o in names],
    listens=[o.laddr.port for o in psutil.Process().net_connections("inet") if o.status == "LISTEN"],
)
here = Path(FOLDER)
(here / f"{number}.part").write_text(json.dumps(found))
(here / f"{number}.part").rename(here / f"{number}.json")
until = time.monotonic() + 120
while len(list(here.glob("*.json"))) < COUNT:
    assert time.monotonic() < until
    time.sleep(0.05)"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no sockets of this kind")
def test_a_dozen_stages_at_once_have_no_port_to_collide(tmp_path):
    "All of them live at the same time: each waits for the others. What connects them is named by its own folder."
    met = tmp_path / "met"
    met.mkdir()
    code = MEET.replace("FOLDER", repr(str(met))).replace("COUNT", str(DOZEN))
    notebook = write_notebook(tmp_path / "a.ipynb", code)

    def run(number):
        run_notebook(notebook, tmp_path / f"out/{number}.ipynb", dict(number=number))

    with ThreadPoolExecutor(DOZEN) as pool:
        list(pool.map(run, range(DOZEN)))
    found = [json.loads(o.read_text()) for o in met.glob("*.json")]
    assert len(found) == DOZEN
    assert {o["transport"] for o in found} == {"ipc"}
    files = [file for o in found for file in o["files"]]
    assert len({*files}) == 5 * DOZEN
    assert not [file for file in files if Path(file).parent.exists()], "the folders are removed"
    # One is ipykernel's own, for forked processes; the system chooses it when it is taken, so that it is free
    assert max(len(o["listens"]) for o in found) <= 1


# The Python that was asked


def foreign_kernel(folder, python, **env):
    "A kernel that is called python3, as servers for notebooks have."
    at = folder / "kernels/python3"
    at.mkdir(parents=True)
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (at / "kernel.json").write_text(json.dumps(dict(argv=argv, display_name="x", language="python", env=env)))
    return str(folder)


WHERE = "import sys, cmid; found = [sys.executable, cmid.__file__]"


def test_the_python_is_the_one_that_runs_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", foreign_kernel(tmp_path / "jupyter", "/bin/false"))
    assert told(tmp_path, WHERE) == [sys.executable, cmid.__file__]


def copy_of_the_code(folder):
    "Another checkout of the project, as far as its root shows it."
    (folder / "cmid").mkdir(parents=True)
    (folder / "cmid/__init__.py").write_text("__version__ = '0'\n")
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "nbs/pipeline").mkdir(parents=True)
    (folder / "nbs/pipeline/probe.ipynb").write_text((ROOT / "nbs/pipeline/probe.ipynb").read_text(encoding="utf-8"))
    (folder / "studies/tiny").mkdir(parents=True)
    (folder / "studies/tiny/params.yaml").write_text("seed: 1\n")
    return folder


def test_the_code_is_the_one_that_runs_the_command(tmp_path, monkeypatch):
    other = copy_of_the_code(tmp_path / "other")
    monkeypatch.setenv("JUPYTER_PATH", foreign_kernel(tmp_path / "jupyter", sys.executable, PYTHONPATH=str(other)))
    assert told(tmp_path, WHERE) == [sys.executable, cmid.__file__]


def test_nothing_of_the_users_profile_runs_in_a_stage(tmp_path, monkeypatch):
    startup = tmp_path / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("import numpy as np; seed = 1")
    (tmp_path / "startup.py").write_text("started = 2")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "startup.py"))
    assert told(tmp_path, "found = sorted({'np', 'seed', 'started'} & {*globals()})") == []


def test_a_home_folder_is_not_needed(tmp_path, monkeypatch):
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, "/proc/nowhere")  # nobody can make it, not even root
    kept = "import os; found = [os.environ['IPYTHONDIR'], os.path.isdir(os.environ['IPYTHONDIR'])]"
    place, was_there = told(tmp_path, kept)
    assert was_there
    assert not Path(place).exists(), "it is removed with the kernel"


def test_any_characters_in_the_path(tmp_path, monkeypatch):
    folder = tmp_path / "bü cher {number} {} 100%"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    assert told(folder, "found = number") == 0
    assert sorted(o.name for o in folder.iterdir()) == ["a.ipynb", "out", "x"]


def test_a_long_temporary_folder(tmp_path, monkeypatch):
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    assert told(tmp_path, "found = number") == 0
    assert not list(deep.iterdir())


# A study that has its own copy of the code, and a command of another


@pytest.fixture
def other(tmp_path, monkeypatch):
    "A clone that was not installed: `cmid` is another one's."
    folder = copy_of_the_code(tmp_path / "clone")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CMID_ROOT", str(folder))
    return folder


def files(folder):
    return {str(o.relative_to(folder)) for o in folder.rglob("*")}


@pytest.mark.parametrize(
    "command, argv",
    [(cmid_stage, ["probe"]), (cmid_stage, ["probe", "--smoke"]), (cmid_digest, [])],
    ids=["stage", "smoke", "digest"],
)
def test_commands_refuse_a_study_with_other_code(other, command, argv, monkeypatch, capsys):
    before = files(other)
    monkeypatch.setattr(sys, "argv", [command.__name__, *argv])
    with pytest.raises(SystemExit) as stopped:
        command()
    said = capsys.readouterr().err
    assert stopped.value.code == 1
    assert said.count("\n") == 1
    assert said.startswith(
        f"{command.__name__}: {ROOT / 'cmid'}: cmid is imported from here, but this study has its own"
    )
    assert f"PYTHONPATH={other}" in said
    assert files(other) == before


def test_stages_and_studies_refuse_a_study_with_other_code(other):
    for refused in (
        lambda: Stage("probe", "probe", dataset="scenes", init="random-resnet18"),
        lambda: Stage("probe", "probe", smoke=True, dataset="scenes", init="random-resnet18"),
        lambda: run_study(other / "studies/tiny"),
        code_of_pretraining,
    ):
        with pytest.raises(CmidError, match="cmid is imported from here, but this study has its own copy"):
            refused()


def test_a_study_without_code_and_a_link_to_the_code_are_accepted(other, tmp_path):
    (tmp_path / "study").mkdir()
    assert code_folder(tmp_path / "study") == Path(cmid.__file__).parent
    os.symlink(ROOT, tmp_path / "link")
    assert code_folder(tmp_path / "link") == Path(cmid.__file__).parent


def test_an_experiment_inside_of_the_checkout_runs_its_own_code(tmp_path):
    "DVC runs a queued experiment in such a folder, by the commands of the installed checkout."
    checkout, names = tmp_path / "checkout", shutil.ignore_patterns("__pycache__")
    experiment = checkout / ".dvc/tmp/exps/tmp1"
    for folder in (checkout, experiment):
        shutil.copytree(ROOT / "cmid", folder / "cmid", ignore=names)
        shutil.copy(ROOT / "params.yaml", folder)
    (experiment / "nbs/pipeline").mkdir(parents=True)
    write_notebook(experiment / "nbs/pipeline/say.ipynb", "import cmid; print('code', cmid.__file__)")
    script = tmp_path / "command"
    script.write_text("from cmid.study.runner import cmid_stage\ncmid_stage()\n")
    command = [sys.executable, "-W", "ignore", str(script), "say", "-p", "number", "1"]
    env = os.environ | dict(PYTHONPATH=str(checkout))
    env.pop("CMID_ROOT", None)
    done = subprocess.run(command, cwd=experiment, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"code {experiment / 'cmid/__init__.py'}\n"
