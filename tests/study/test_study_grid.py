"A grid: cells side by side, each once, stopped and resumed. A small command stands in for the pipeline but once."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import cmid.study.grid
from cmid.base.errors import CmidError
from cmid.base.files import load_yaml, take_lock
from cmid.base.params import DATASET_KEYS, Params, check_all, merge
from cmid.study.cells import Cell, cell_params
from cmid.study.grid import Grid, cell_key, run_cells, shared_facts
from cmid.study.jobs import Job, Pool, job_processes, log_lines
from cmid.study.study import run_study, study_params
from tests.tools.study import Study, environment

ROOT = Path(__file__).parents[2]
STAND_IN = """
import json, os, sys, time, yaml
from pathlib import Path
values = yaml.safe_load(Path("params.yaml").read_text())
init, seed, here = values["study"]["inits"][0], values["seed"], Path(os.environ["CMID_ROOT"])
home = here.parents[2]
log = home / "log"
def say(what):
    with open(log, "a") as file:
        print(what, init, seed, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"), file=file)
say("begin")
while (home / f"hold-{init}-{seed}").exists():
    time.sleep(0.05)
results = here / "results/probe/mine" / init
results.mkdir(parents=True, exist_ok=True)
(results / "metrics.json").write_text(json.dumps(seed))
say("end")
"""
PIPELINE = [sys.executable, "-c", STAND_IN]
COMMAND = f"""
import sys
from cmid.base.errors import cli
from cmid.study.grid import Grid, run_cells
@cli
def grid():
    run_cells(Grid(sys.argv[1]), (), 2, [sys.executable, "-c", {STAND_IN!r}])
grid()
"""
INITS = "cmid-resnet18", "random-resnet18"
CELLS = [f"{init}-seed-{seed}" for seed in (4, 9) for init in INITS]


def commit(folder):
    who = ["-c", "user.name=cmid", "-c", "user.email=cmid@example.com"]
    for args in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", *args], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def study(tmp_path, monkeypatch):
    "A grid of two inits and two seeds, in a repository without a pipeline."
    folder = tmp_path / "repo"
    (folder / "studies/tiny").mkdir(parents=True)
    values = load_yaml(ROOT / "params.yaml")
    named = {k: {o: "mine" for o in DATASET_KEYS if o in v} for k, v in values.items() if isinstance(v, dict)}
    images = dict(mine=dict(folder=str(tmp_path), lists=str(tmp_path)))
    own = merge(named, dict(profile="smoke", datasets=images, study=dict(probes=["mine"]), seeds=[4, 9]))
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    (folder / "studies/tiny/params.yaml").write_text(yaml.safe_dump(own))
    commit(folder)
    monkeypatch.setenv("CMID_ROOT", str(folder))
    return folder / "studies/tiny"


def run(study, *only, jobs=2):
    "States of the cells after a run."
    try:
        run_cells(Grid(study), only, jobs, PIPELINE)
    except CmidError as error:
        return str(error)
    return "ran"


def said(study):
    "What the stand-ins wrote, in order."
    log = study.parents[1] / "log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def begun(study):
    return sorted(f"{init}-seed-{seed}" for what, init, seed, *_ in said(study) if what == "begin")


def until(condition, seconds=60):
    "Wait for something to become true."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def hold(study, cell):
    init, seed = cell.split("-seed-")
    held = study.parents[1] / f"hold-{init}-{seed}"
    held.touch()
    return held


def started(study):
    "`cmid_study` as a process of its own, in a session of its own as under a shell."
    home = study.parents[1]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    env = os.environ | dict(PYTHONPATH=str(ROOT), CMID_ROOT=str(home), PYTHONWARNINGS="ignore")
    return subprocess.Popen([sys.executable, "-c", COMMAND, str(study)], cwd=home, env=env, **pipe)


# Scheduling


def test_every_cell_runs_once_and_what_is_done_is_left_alone(study, capsys):
    assert run(study) == "ran"
    assert begun(study) == sorted(CELLS)
    assert run(study) == "ran"
    assert begun(study) == sorted(CELLS)
    assert capsys.readouterr().out.splitlines()[-1] == "4 left alone"
    found = {o.relative_to(study).as_posix(): json.loads(o.read_text()) for o in study.rglob("metrics.json")}
    assert found == {f"seed-{seed}/results/probe/mine/{init}/metrics.json": seed for seed in (4, 9) for init in INITS}


def test_no_more_than_so_many_run_at_once(study):
    held = [hold(study, cell) for cell in CELLS]
    process = started(study)
    until(lambda: len(begun(study)) == 2)
    time.sleep(0.5)  # a third would begin now
    assert len(begun(study)) == 2
    for path in held:
        path.unlink()
    process.communicate(timeout=60)
    running = 0
    for what, *_ in said(study):
        running += 1 if what == "begin" else -1
        assert running <= 2
    assert begun(study) == sorted(CELLS)


def test_jobs_share_gpus_and_cores(study, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    run(study, jobs=2)
    cores = len(os.sched_getaffinity(0))
    assert {o[3] for o in said(study)} == {"2,7", "5"}
    assert {o[4] for o in said(study)} == {str(max(1, cores // 2))}


def test_only_runs_the_cells_that_are_named(study):
    run(study, CELLS[2])
    assert begun(study) == [CELLS[2]]
    with pytest.raises(CmidError, match="has no such cell .did you mean"):
        Grid(study).chosen(["cmid-resnet18-seed-5"])


def test_a_change_runs_again_what_depends_on_it(study):
    run(study)
    own = load_yaml(study / "params.yaml")
    (study / "params.yaml").write_text(yaml.dump(own | dict(recipes=dict(cmid=dict(temperature=0.3)))))
    run(study)
    assert begun(study) == sorted([*CELLS, CELLS[0], CELLS[2]]), "a recipe: its own runs"
    (study / "seed-9/results/probe/mine/random-resnet18/metrics.json").unlink()
    run(study)
    assert begun(study)[-1] == CELLS[3] and len(begun(study)) == 7, "results that are gone: their cell"


def test_images_code_and_stages_are_part_of_what_cells_depend_on(study, tmp_path):
    work = tmp_path / "images"
    (work / "digests").mkdir(parents=True)
    seen = {shared_facts(work)}
    files = {"digests/probe.json": "{}", "dvc.yaml": "stages: {}", "digests/start.json": "{}"}
    entry = dict(outs=[dict(path="prepared/mine", md5="1")])
    for name, text in {**files, "dvc.lock": json.dumps(dict(stages={"prepare@mine": entry}))}.items():
        (work / name).write_text(text)
        seen.add(shared_facts(work))
    entry["outs"][0]["md5"] = "2"
    (work / "dvc.lock").write_text(json.dumps(dict(stages={"prepare@mine": entry})))
    seen.add(shared_facts(work))
    assert len(seen) == 6
    (work / "digests/report.json").write_text("{}")
    assert shared_facts(work) in seen, "the report is no part of a cell"
    grid = Grid(study)
    assert len({cell_key(grid, cell, facts) for cell in grid.cells for facts in seen}) == 4 * 6


# Failures, kills and stops


def test_a_failure_does_not_cost_the_others(study, capsys):
    clone = study.parents[1] / ".studies/tiny" / CELLS[1]
    (clone / "results/probe/mine").mkdir(parents=True)
    (clone / "results/probe/mine/random-resnet18").touch()  # a file where a folder should be
    assert run(study) == "1 failed, see above; run again to resume"
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "3 done, 1 failed"
    reason = next(line for line in out.splitlines() if line.startswith(f"failed: {CELLS[1]}: "))
    assert "is not a clone of the repository; move it away" in reason
    assert begun(study) == sorted(set(CELLS) - {CELLS[1]})


def test_a_killed_cell_is_run_again_alone(study, capsys):
    held = hold(study, CELLS[1])
    place = study.parents[1] / ".studies/tiny"
    process = started(study)
    until(lambda: len(said(study)) == 7)  # all have begun, three have ended: the held one may begin last
    for child in job_processes(place / CELLS[1]):
        os.kill(child.pid, signal.SIGKILL)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert f"failed: {CELLS[1]}: was killed (signal 9) (log: {place}/logs/{CELLS[1]}.log)" in out
    held.unlink()
    assert run(study) == "ran"
    assert begun(study) == sorted([*CELLS, CELLS[1]])


def test_ctrl_c_stops_all_and_running_again_resumes(study):
    held = [hold(study, cell) for cell in CELLS]
    process = started(study)
    until(lambda: len(said(study)) == 2)
    os.kill(process.pid, signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert out.splitlines()[-2:] == ["4 not run", "grid: stopped; run again to resume"]
    place = study.parents[1] / ".studies/tiny"
    assert not [o for cell in CELLS for o in job_processes(place / cell)]
    for path in held:
        path.unlink()
    assert run(study) == "ran"
    assert len(begun(study)) == 6


def test_two_at_once_share_the_work(study):
    held = [hold(study, cell) for cell in CELLS[:2]]
    first = started(study)
    until(lambda: len(said(study)) == 2)
    second = started(study)
    until(lambda: len([o for o in said(study) if o[0] == "end"]) == 2)
    out = second.communicate(timeout=60)[0]
    assert second.returncode == 0
    assert out.splitlines()[-1] == "2 done, 2 left alone"
    assert f"left alone: {CELLS[0]}: is being run by process" in out
    for path in held:
        path.unlink()
    assert first.communicate(timeout=60)[0].splitlines()[-1] == "2 done, 2 left alone"
    assert begun(study) == sorted(CELLS)
    assert len([*study.rglob("metrics.json")]) == 4


def test_a_second_signal_kills(tmp_path):
    "A command that takes no notice of Ctrl-C."
    pool = Pool(1)
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )

    def do(job, slot):
        pool.command(job, [sys.executable, "-c", deaf], tmp_path, dict(os.environ))
        return "done", ""

    def show():
        if job.log.exists() and "deaf" in log_lines(job.log):
            pool.stop()

    job = Job("deaf", do, tmp_path / "log")
    pool.run([job], show)
    assert [job.state, pool.times >= 2] == ["stopped", True]
    assert not job_processes(tmp_path)


def test_nohup_lets_a_grid_run_on_when_the_terminal_closes(tmp_path):
    def do(job, slot):
        time.sleep(0.5)
        return "done", ""

    pool, job = Pool(1), Job("quiet", do, tmp_path / "log")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        pool.run([job], lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [job.state, pool.times] == ["done", 0]


def test_places_of_earlier_layouts_are_named(study, capsys):
    old = study.parents[1] / ".studies/tiny-seed-4/.git"
    old.mkdir(parents=True)
    run(study, CELLS[0])
    assert f"note: {old.parent} and the like are not used any more; remove them" in capsys.readouterr().out
    (study.parents[1] / ".studies/tiny/.git").mkdir()
    assert "is the clone of a study without seeds" in run(study)


def test_a_recipe_that_no_init_uses_is_named(study, capsys):
    own = load_yaml(study / "params.yaml")
    own["study"]["methods"] = ["cmid", "mim"]
    (study / "params.yaml").write_text(yaml.safe_dump(own))
    assert run(study) == "ran"
    (line,) = (o for o in capsys.readouterr().out.splitlines() if o.startswith("note: study.methods"))
    assert line == "note: study.methods lists mim, but study.inits no mim-<backbone>: it is not run"
    assert begun(study) == sorted(CELLS)


# Results that are there already


@pytest.mark.parametrize("name", ["seed-9", "seed-9/results"])
def test_results_that_a_link_leads_to_are_not_replaced(study, tmp_path, name):
    others = tmp_path / "others/probe/mine/cmid-resnet18"
    others.mkdir(parents=True)
    (others / "metrics.json").write_text("theirs")
    link = study / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "others")
    assert f"{link}: is a link to {tmp_path / 'others'}, whose files would be replaced; remove the link" in run(study)
    assert begun(study) == []
    assert contents(tmp_path / "others") == {"probe/mine/cmid-resnet18/metrics.json": "theirs"}


FAILING = """
import os, sys
from pathlib import Path
for name in ("prepare/mine", "pretrain/cmid-resnet18", "baselines/random-resnet18"):
    folder = Path(os.environ["CMID_ROOT"]) / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text("half")
sys.exit("cmid_stage: no room")
"""


def contents(folder):
    return {o.relative_to(folder).as_posix(): o.read_text() for o in sorted(folder.rglob("*.json"))}


@pytest.mark.parametrize("clones", ["kept", "gone"])
def test_cells_that_fail_leave_all_results_as_they_are(study, clones):
    run(study)
    before = contents(study)
    assert len(before) == 4
    if clones == "gone":
        shutil.rmtree(study.parents[1] / ".studies")
    with pytest.raises(CmidError, match="4 failed"):
        run_cells(Grid(study, ["profiles.smoke.pretrain.epochs=7"]), (), 2, [sys.executable, "-c", FAILING])
    assert contents(study) == before
    run(study)
    assert {o: text for o, text in contents(study).items() if "/probe/" in o} == before


def test_a_study_that_fails_leaves_all_results_as_they_are(study):
    own = load_yaml(study / "params.yaml")
    (study / "params.yaml").write_text(yaml.dump({k: v for k, v in own.items() if k != "seeds"}))
    run_study(study, (), PIPELINE)
    before = contents(study)
    assert list(before) == ["results/probe/mine/cmid-resnet18/metrics.json"]
    (study / "results").rename(study / ".results.replaced")  # as a process leaves it that is killed between two renames
    with pytest.raises(CmidError, match="ended with status 1"):
        run_study(study, (), [sys.executable, "-c", FAILING])
    assert contents(study) == before


def test_results_that_were_changed_come_back_again(study):
    run(study)
    before = contents(study)
    (study / "seed-9/results/probe/mine/random-resnet18/metrics.json").write_text("0")
    run(study)
    assert begun(study) == sorted([*CELLS, CELLS[3]])
    assert contents(study) == before


def with_stages(study, stages, more):
    "Give the project a dvc.yaml, and the study these stages."
    repo = study.parents[1]
    (repo / "dvc.yaml").write_text(yaml.dump(dict(stages=stages)))
    own = load_yaml(study / "params.yaml")
    (study / "params.yaml").write_text(yaml.dump(merge(own, more | dict(stages=[*stages]))))
    commit(repo)


def test_a_changed_scene_is_drawn_again(study, tmp_path):
    scene = tmp_path / "scenes/a.tif"
    scene.parent.mkdir()
    scene.write_text("before")
    drawn = dict(model="classify-mine-random-resnet18", folder=str(scene.parent), images="*.tif", second=None)
    stages = dict(classify=dict(cmd="x"), apply=dict(cmd="x", foreach="${study.apply}"))
    with_stages(study, stages, dict(study=dict(apply=dict(town=drawn))))
    run(study)
    scene.write_text("after")
    run(study)
    assert begun(study) == sorted([*CELLS, CELLS[1], CELLS[3]]), "those that draw it"


# What cells take from elsewhere


def test_backbones_are_borrowed_by_the_cells_that_use_them(study, capsys):
    floor = dict(cmd="x", matrix=dict(init="${study.floors.probe}"))
    with_stages(study, dict(probe=dict(cmd="x"), probe_floor=floor), dict(models="other"))
    for name in CELLS[:3]:
        model = study.parents[1] / ".studies/other" / name / "models" / name.partition("-seed-")[0]
        model.mkdir(parents=True)
        (model / "card.json").write_text("{}")
    assert run(study) == "1 failed, see above; run again to resume"
    out = capsys.readouterr().out
    assert f"failed: {CELLS[3]}: models: .studies/other/models/random-resnet18 is not there" in out
    assert out.splitlines()[-1] == "5 done, 1 failed"


def test_images_are_lent_while_nobody_changes_them(study, monkeypatch):
    free = []

    def lend(images, work):
        descriptor = take_lock(images.parent / ".locks" / images.name)
        free.append(descriptor is not None)
        return []

    monkeypatch.setattr(cmid.study.grid, "lend_images", lend)
    assert run(study) == "ran"
    assert free == [False] * 4


def test_images_of_other_settings_are_not_lent(study, monkeypatch, capsys):
    facts = iter(["ours", "ours", "theirs", "ours", "ours"])
    monkeypatch.setattr(cmid.study.grid, "shared_facts", lambda work: next(facts))
    assert run(study, jobs=1) == "1 failed, see above; run again to resume"
    out = capsys.readouterr().out
    assert f"failed: {CELLS[1]}: " in out and "prepared other images" in out
    assert begun(study) == sorted(set(CELLS) - {CELLS[1]})


# Parameters


def filled(path):
    "Parameters of a study, with folders that are there."
    own = load_yaml(path)
    values = study_params(load_yaml(ROOT / "params.yaml"), own)
    for group, keys in (("datasets", ("folder", "lists")), ("tasks", ("folder",))):
        for entry in values[group].values():
            entry |= {key: "." for key in keys}
    return own, values


@pytest.mark.parametrize("path", sorted(ROOT.glob("studies/*/params.yaml")), ids=lambda path: path.parent.name)
def test_parameters_of_every_study_and_cell_are_valid(path, tmp_path):
    own, values = filled(path)
    inits = values["study"]["inits"]
    cells = [Cell(init, seed) for init in [*inits, None] for seed in own.get("seeds", [])[:1]]
    for narrowed in [values, *(cell_params(values, cell) for cell in cells)]:
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(narrowed))
        check_all(Params(tmp_path))


def test_the_grid_of_aid_is_the_one_that_is_described():
    own, values = filled(ROOT / "studies/aid-grid/params.yaml")
    recipes = ["cmid", "published", "nolocal", "contrast", "mim", "byol"]
    assert values["study"]["methods"] == recipes
    assert values["study"]["inits"] == [f"{recipe}-resnet18" for recipe in recipes] + ["random-resnet18"]
    pretrain = merge(values["pretrain"], values["profiles"]["small"]["pretrain"])
    assert [own["seeds"], pretrain["epochs"], pretrain["batch"]] == [[0, 1, 2], 40, 128]
    assert values["profiles"]["small"]["prepare"]["side"] == 128


# The whole path


@pytest.mark.slow
def test_a_real_grid_prepares_images_once(tmp_path):
    copy = Study(tmp_path)
    own = dict(seeds=[0, 1], stages=["probe"], study=dict(methods=[], inits=["random-resnet18"]))
    (tmp_path / "studies/tiny").mkdir(parents=True)
    (tmp_path / "studies/tiny/params.yaml").write_text(yaml.safe_dump(own))
    copy.commit()
    command = ["cmid_study", "studies/tiny", "--jobs", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    place = tmp_path / ".studies/tiny"
    clones = [place / name for name in ("images", "random-resnet18-seed-0", "random-resnet18-seed-1")]
    for clone in clones[1:]:
        ran = [line for line in log_lines(place / f"logs/{clone.name}.log") if line.startswith("Running stage")]
        assert ran and not [line for line in ran if "prepare@" in line or "labels@" in line]
    files = [o.relative_to(clones[0]) for o in (clones[0] / "prepared").rglob("*") if o.is_file()]
    assert len(files) > 10
    for file in files:
        assert len({(clone / file).stat().st_ino for clone in clones}) == 1, f"{file} is there twice"
    seeds = [json.loads((clone / "results/probe/scenes/random-resnet18/run.json").read_text()) for clone in clones[1:]]
    assert [o["run"]["seed"] for o in seeds] == [0, 1]
    again = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert "2 left alone" in again.stdout.splitlines(), again.stdout + again.stderr


@pytest.mark.parametrize(
    "assignment, said",
    [
        ("pretrain.epochs=x", "params.yaml: pretrain.epochs: should be a valid integer (got 'x')"),
        ("profile=zz", "params.yaml: profile: 'zz' is not under profiles"),
        ("recipes=null", "studies/aid-grid/params.yaml over the project's params.yaml: recipes: missing; add the line"),
        ("datasets=5", "params.yaml: datasets: must hold datasets by name"),
    ],
)
def test_a_list_is_of_cells_that_would_run(monkeypatch, capsys, assignment, said):
    study = str(ROOT / "studies/aid-grid")
    monkeypatch.setattr(sys, "argv", ["cmid_study", study, "--list"])
    cmid.study.grid.cmid_study()
    assert "cmid-resnet18-seed-0" in capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys, "argv", ["cmid_study", study, "--list", "--set", assignment])
    with pytest.raises(SystemExit):
        cmid.study.grid.cmid_study()
    assert said in capsys.readouterr().err


def refused(folder, *args):
    "The one line that `cmid_study` ends with."
    command = [sys.executable, "-c", "from cmid.study.grid import cmid_study; cmid_study()", str(folder), *args]
    home = Path(os.environ["CMID_ROOT"])
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    (line,) = done.stderr.splitlines()
    return line


def test_results_that_are_not_a_studys_are_left_alone(study):
    home = study.parents[1]
    (home / "results/probe").mkdir(parents=True)
    (home / "results/probe/metrics.json").write_text("ours")
    (home / "studies/up").symlink_to("..")
    (home / "studies/circle").symlink_to("circle")
    for folder in (".", "studies", "studies/tiny/..", home):
        assert "is not a study; a study is a folder of " in refused(folder)
    assert f"studies/up: is not a study, but leads to {home}; " in refused("studies/up")
    assert "studies/circle: is a link that leads around in a circle" in refused("studies/circle")
    assert contents(home / "results") == {"probe/metrics.json": "ours"}
    assert not (home / ".studies").exists()


@pytest.mark.parametrize(
    "own, said",
    [
        (dict(stages=[["a"]]), "/studies/tiny/params.yaml: stages: dvc.yaml has no stage ['a']"),
        (dict(stages=[dict(a=1)]), "/studies/tiny/params.yaml: stages: dvc.yaml has no stage {'a': 1}"),
        (dict(models=5), "/studies/tiny/params.yaml: models: 5 is not a valid name"),
        (dict(seeds=[-1]), "/studies/tiny/params.yaml: seeds: -1 is not within 0 and 4294967295"),
        (dict(seeds=[2**32]), "/studies/tiny/params.yaml: seeds: 4294967296 is not within 0 and 4294967295"),
        (dict(seeds=[1.5]), "/studies/tiny/params.yaml: seeds: must be a list of whole numbers"),
        (
            dict(profiles=5),
            "studies/tiny/params.yaml over the project's params.yaml: profiles: must hold profiles by name",
        ),
        (
            dict(datasets=5),
            "studies/tiny/params.yaml over the project's params.yaml: datasets: must hold datasets by name",
        ),
    ],
)
def test_a_wrong_key_is_named_before_anything_is_cloned(study, own, said):
    (study / "params.yaml").write_text(yaml.safe_dump(load_yaml(study / "params.yaml") | own))
    for args in ([], ["--list"]):
        assert said in refused("studies/tiny", *args)
    assert not (study.parents[1] / ".studies").exists()


def test_a_list_of_the_pipeline_that_is_no_parameter_is_named(study):
    stage = dict(matrix=dict(init="${study.init}"), cmd="true")
    (study.parents[1] / "dvc.yaml").write_text(yaml.safe_dump(dict(stages=dict(probe=stage))))
    said = "dvc.yaml: ${study.init}: params.yaml has no study.init (did you mean 'inits'?)"
    for args in ([], ["--list"]):
        assert said in refused("studies/tiny", *args)


@pytest.mark.parametrize("text", ["{}", "stages: 5"])
def test_a_pipeline_without_stages_is_named(study, text):
    (study.parents[1] / "dvc.yaml").write_text(text)
    for args in ([], ["--list"]):
        assert "/dvc.yaml: stages: must hold stages by name (got " in refused("studies/tiny", *args)
