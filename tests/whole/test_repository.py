"What is committed: sizes, forms, and nothing of the machine that it was made on."

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cmid.base import files

ROOT = Path(__file__).parents[2]
INI = ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini", encoding="utf-8")
INI = INI["DEFAULT"]
STAGES = sorted((ROOT / "nbs/pipeline").glob("*.ipynb"))
NUMBERED = sorted((ROOT / "nbs").glob("[0-9]_*/[0-9]*.ipynb"))  # a module each
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))  # which export nothing
LIBRARY = PAGES + NUMBERED


def stem(path):
    return path.stem


def tracked():
    "Files that Git knows and that are there."
    got = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if got.returncode:
        pytest.skip("this is no Git checkout")
    return [ROOT / o for o in got.stdout.split("\0") if o and (ROOT / o).is_file()]


def cells(path, kind="code"):
    return [o for o in json.loads(path.read_text(encoding="utf-8"))["cells"] if o["cell_type"] == kind]


def python(source):
    "Code without the lines that are IPython's."
    return "\n".join("pass" if o.lstrip().startswith(("%", "!")) else o for o in source.splitlines())


def said(output):
    "Text of a cell's output."
    data = output.get("data", {})
    return "".join("".join(o) for o in (output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))))


def text(path):
    "What people read of a file; of a notebook without its pictures."
    if path.suffix == ".ipynb":
        return "\n".join(
            "".join(c["source"]) + "\n" + "\n".join(said(o) for o in c.get("outputs", []))
            for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


# Size and traces


def test_sizes():
    large = {}
    for path in tracked():
        limit = 300_000 if path.suffix == ".ipynb" else 1_000_000
        if path.stat().st_size > limit:
            large[path.relative_to(ROOT).as_posix()] = path.stat().st_size
    assert not large, f"{large}: notebooks keep below 300 KB (smaller figures), other files below 1 MB (DVC takes them)"


HOMES = [r"home/\w+", r"Users/\w+", r"opt/\w+", r"mnt/\w+"]
FOLDERS = "|".join(["work", "root", "var/folders", *HOMES])
TRACES = re.compile(
    "|".join(
        [
            r"(?<![\w.+:/})~-])/(?:" + FOLDERS + r")(?![\w-])",
            r'https?://[^\s/"]*(?:proxy|mirror|artifactory|nexus|localhost)',
            r"https?://\d+\.\d+\.\d+\.\d+",
            r"(?:pypi|pythonhosted|anaconda)\.org",
            "--(?:(?:extra-)?index-url|trusted-host|find-links)",
        ]
    )
)


def test_traces_are_found():
    "Each sample is put together here, so that this file holds none."
    folders = "work", "root", "var/folders", "home/ann", "Users/ann", "opt/tool", "mnt/disk"
    found = [f"cd /{folder}/x" for folder in folders] + [f'"/{folder}"' for folder in folders]
    found += [f"https://{host}/simple" for host in ("pip-mirror.example", "nexus.example", "localhost:80", "10.0.0.1")]
    found += [f"see {host}.org/project/x" for host in ("pypi", "pythonhosted", "anaconda")]
    found += [f"pip --{option} x" for option in ("index-url", "extra-index-url", "trusted-host", "find-links")]
    for o in found:
        assert TRACES.search(o), o
    harmless = [f"https://example.org/{folder}/x" for folder in folders] + [f"{{d}}/{folder}" for folder in folders]
    harmless += [f"a/{folder}" for folder in folders] + ["network/a", "nvidia-curand==10.3.10.19"]
    for o in harmless:
        assert not TRACES.search(o), o


def test_no_traces_of_a_machine():
    mine = [folder for folder in (str(ROOT), str(Path.home())) if len(folder) > 5]
    found = {}
    for path in tracked():
        read = text(path)
        traces = [match[0] for match in TRACES.finditer(read)] + [folder for folder in mine if folder in read]
        if traces:
            found[path.relative_to(ROOT).as_posix()] = traces
    assert not found, f"{found}: paths and hosts of one machine mean nothing on another"


# Notebooks


@pytest.mark.parametrize("path", LIBRARY + STAGES, ids=stem)
def test_metadata(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert set(nb["metadata"]) == {"kernelspec"}
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    assert {k for o in nb["cells"] for k in o["metadata"]} <= {"tags"}, "run nbdev_clean"
    assert len({o["id"] for o in nb["cells"]}) == len(nb["cells"])


@pytest.mark.parametrize("path", STAGES, ids=stem)
def test_stage_form(path):
    code = cells(path)
    tags = [o["metadata"].get("tags", []) for o in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    assert not [o for c in code for o in c["outputs"]], (
        "stage notebooks are committed without outputs; their executed copies are in reports/"
    )
    others = [tag for i, tag in enumerate(tags) if tag and i != 1]
    assert tags[1] == ["parameters"] and not others, "the second cell, and no other, is tagged parameters"
    assert not [o for o in code if re.search(r"^#\| (default_exp|export)", "".join(o["source"]), flags=re.M)], (
        "what a stage computes belongs in a library notebook"
    )


def shows(source):
    "Whether a cell ends in a value, which an executed notebook shows."
    if source.lstrip().startswith(("%", "!")):
        return False
    body = ast.parse(python(source)).body
    last = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    quiet = source.rstrip().endswith(";") or last is None or isinstance(last, ast.Constant)
    return not quiet and (
        not isinstance(last, ast.Call) or getattr(last.func, "id", "") in ("print", "Markdown", "sorted", "len")
    )


def test_what_a_cell_shows():
    for source in ("x = 1\nx", "print(x)", "{k: v for k, v in x}"):
        assert shows(source), source
    quiet = "x = 1", "test_eq(a, b)", "%matplotlib inline", "def f(): return 1", '"words"', "x;", "with a: b"
    for source in quiet:
        assert not shows(source), source


@pytest.mark.parametrize("path", LIBRARY, ids=stem)
def test_library_is_executed(path):
    for o in cells(path):
        source = "".join(o["source"])
        assert not [x for x in o["outputs"] if x["output_type"] == "error"], source
        assert not [x for x in o["outputs"] if re.search(r"\w+Warning: |site-packages", said(x))], f"warns:\n{source}"
        assert o["outputs"] or not shows(source), f"run make notebooks: nothing stands below\n{source}"
        for output in o["outputs"]:
            drawn = any(kind.startswith("image/") for kind in output.get("data", {}))
            assert drawn or "<Figure size" not in said(output), f"add %matplotlib inline: no picture is shown\n{source}"


@pytest.mark.parametrize("path", LIBRARY, ids=stem)
def test_outputs_repeat(path):
    shown = "\n".join(said(x) for o in cells(path) for x in o["outputs"])
    found = re.findall(r" at 0x[0-9a-f]{6,}|/tmp/\w|\d(?:it|img)/s\b|\d%\|", shown)
    assert not found, "is another one each time"


@pytest.mark.parametrize("path", NUMBERED, ids=stem)
def test_library_form(path):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first, last = ("".join(found[i]["source"]) for i in (0, -1))
    assert re.match(r"# \S.*\n\n> \S", first), "the first cell is '# Title' and '> one line'"
    assert last.startswith("## Differences from the paper")
    assert len(last.splitlines()) > 1


def exported(path):
    "Name of the module that a notebook makes, without `cmid.`; None for a page."
    match = re.search(r"^#\| default_exp (\S+)", text(path), flags=re.M)
    return match and match[1]


MODULES = {exported(path): path for path in NUMBERED}


def test_every_module_has_one_notebook():
    paths = [path.relative_to(ROOT / "cmid").with_suffix("") for path in (ROOT / "cmid").rglob("*.py")]
    written = {".".join(path.parts) for path in paths if path.name not in ("__init__", "_modidx")}
    assert written == set(MODULES)
    assert len(MODULES) == len(NUMBERED)


@pytest.mark.parametrize("path", NUMBERED, ids=stem)
def test_a_notebook_is_named_like_its_module(path):
    package, module = exported(path).split(".")
    assert (path.parent.name[2:], path.stem[3:]) == (package, module)


@pytest.mark.parametrize("path", PAGES, ids=stem)
def test_pages_export_nothing(path):
    assert not exported(path)


def test_notebooks_of_a_package_have_numbers_of_their_own():
    numbers = [(path.parent.name, path.name[:2]) for path in NUMBERED]
    assert len(set(numbers)) == len(numbers)


def imported(source):
    "Modules of the package that code imports, with what is imported from them."
    nodes = [*ast.walk(ast.parse(python(source)))]
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.removeprefix("cmid.") for name in names if name.startswith("cmid.")}


def test_what_code_imports():
    code = (
        "%pip\nfrom cmid.method import views\nfrom cmid.viz.reconstruct import f\nimport cmid.method.model, numpy.cmid"
    )
    assert imported(code) == {"method.views", "viz.reconstruct.f", "method.model"}


def notebooks_used(path):
    "Notebooks whose modules a notebook imports, in any of its cells."
    names = set().union(*(imported("".join(cell["source"])) for cell in cells(path)))
    names |= {name.rpartition(".")[0] for name in names}
    return [MODULES[name] for name in names if name in MODULES]


@pytest.mark.parametrize("path", NUMBERED, ids=stem)
def test_exports_import_lower_numbers_only(path):
    "Earlier packages, and lower numbers of the same package: notebooks can be read in order."
    position = path.parent.name, path.name
    assert not [other for other in notebooks_used(path) if (other.parent.name, other.name) > position]


# Safety: the claims of nbs/safety.ipynb


def keyword(call, name):
    return next((o.value.value for o in call.keywords if o.arg == name and isinstance(o.value, ast.Constant)), None)


def is_unsafe(call):
    "Whether a call could run what a stranger wrote, or write where it should not."
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    return (
        name in ("eval", "exec", "os.system", "os.popen", "torch.jit.load", "torch.hub.load", "joblib.load")
        or name.startswith(("pickle.", "marshal.", "shelve.", "dill.", "cloudpickle."))
        or name == "torch.load"
        and keyword(call, "weights_only") is not True
        or keyword(call, "shell") is True
        or keyword(call, "allow_pickle") is True
        or name in ("yaml.load", "yaml.load_all")
        and ast.unparse(call.args[1] if len(call.args) > 1 else call) != "_Loader"
        or name in ("yaml.unsafe_load", "yaml.full_load")
        or last in ("extract", "extractall", "unpack_archive")
    )


def unsafe(source):
    return [ast.unparse(o) for o in ast.walk(ast.parse(python(source))) if isinstance(o, ast.Call) and is_unsafe(o)]


def test_unsafe_calls_are_found():
    for source in (
        "eval(x)",
        "pickle.loads(x)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "yaml.load(x)",
        "yaml.load(x, yaml.Loader)",
        "z.extractall(d)",
        "shutil.unpack_archive(p)",
        "os.system(x)",
    ):
        assert unsafe(source) == [source]
    for source in (
        "torch.load(p, map_location='cpu', weights_only=True)",
        "np.load(p)",
        "yaml.safe_load(x)",
        "yaml.load(x, _Loader)",
        "model.eval()",
        "z.testzip()",
        "load_file(p)",
    ):
        assert not unsafe(source)


def test_nothing_runs_what_a_stranger_wrote():
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "cmid").rglob("*.py")}
    sources |= {path: "\n".join("".join(cell["source"]) for cell in cells(path)) for path in STAGES}
    assert len(sources) > 30
    found = {path.name: unsafe(source) for path, source in sources.items()}
    assert not {name: calls for name, calls in found.items() if calls}


def test_yaml_makes_no_python_objects():
    assert issubclass(files._Loader, yaml.SafeLoader)
    assert not [tag for tag in files._Loader.yaml_constructors if tag and "python" in tag]


def test_what_is_ignored_is_explained():
    ignored = re.search(r"^EXPLAINED :=([^#\n]*)", (ROOT / "Makefile").read_text(), flags=re.M)[1].split()
    assert ignored
    page = text(ROOT / "nbs/safety.ipynb")
    assert all(weakness in page for weakness in ignored)


# Package

SCRIPTS = dict(o.split("=") for o in INI["console_scripts"].split())


@pytest.mark.parametrize("name", SCRIPTS)
def test_command_answers_help(name, tmp_path):
    "As the script does that pip makes of the entry."
    module, function = SCRIPTS[name].split(":")
    script = tmp_path / name
    script.write_text(
        f"import sys\nfrom {module} import {function}\nif __name__ == '__main__': sys.exit({function}())\n"
    )
    got = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--help"],
        cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert got.returncode == 0, got.stdout + got.stderr
    assert "usage" in got.stdout
    assert name in got.stdout


def test_style_refuses_what_the_oldest_python_does_not_parse():
    oldest = INI["min_python"]
    assert f'target-version = "py{oldest.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r"^style:.*\n(\t.*\n)*\t@ruff check ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    newer = "names = {'a': 1}\nprint(f'{names['a']}')\n"
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "tests/newer.py", "-"]
    done = subprocess.run(command, cwd=ROOT, input=newer, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"on Python {oldest}" in done.stdout


def test_lock_pins_every_requirement():
    pins = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        pin = Requirement(line)
        assert [o.operator for o in pin.specifier] == ["=="], line
        pins.setdefault(canonicalize_name(pin.name), []).append(next(iter(pin.specifier)).version)
    for line in (INI["requirements"] + " " + INI["dev_requirements"]).split():
        wanted = Requirement(line)
        found = pins.get(canonicalize_name(wanted.name))
        assert found, f"{line} is not in requirements.lock; run make lock"
        assert all(wanted.specifier.contains(o) for o in found), f"{line} against {found}; run make lock"


def test_licence_and_citation():
    "The whole standard text of Apache-2.0, and a citation of this version and of the paper."
    licence = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert licence == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license", "version"} <= set(cff)
    assert cff["version"] == INI["version"]
    assert cff["license"] == "Apache-2.0"
    assert cff["preferred-citation"]["doi"] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"## [{INI['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_hooks_are_local():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    assert {hook["language"] for hook in repositories[0]["hooks"]} == {"system"}


def test_the_site_names_every_package():
    "The navigation of the site has a title for each folder of notebooks."
    tree = ast.parse((ROOT / "docs/hooks.py").read_text(encoding="utf-8"))
    titles = next(o.value for o in tree.body if isinstance(o, ast.Assign) and o.targets[0].id == "PACKAGES")
    folders = sorted((ROOT / "nbs").glob("[0-9]_*"))
    assert [keyword.arg for keyword in titles.keywords] == [*(path.name[2:] for path in folders), "pipeline"]


def prose(path):
    return "\n".join("".join(o["source"]) for o in cells(path, "markdown"))


def anchors(path):
    "Anchors of a notebook's headings, as the site makes them."
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("path", [*LIBRARY, *STAGES], ids=stem)
def test_links_between_notebooks_lead_to_headings(path):
    links = re.findall(r"\]\(([\w./-]+\.ipynb)(?:#([\w-]+))?\)", prose(path))
    for link, anchor in links:
        assert (path.parent / link).is_file(), link
        assert not anchor or anchor.lower() in anchors(path.parent / link), f"{link}#{anchor}"
