"The benchmark as people run it, on a network that is small enough for a test."

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from cmid.base.errors import CmidError
from cmid.bench.bench import bench_table, cmid_bench, cmid_plan
from cmid.bench.finetune import TASK_PARTS
from cmid.bench.floor import PARTS
from cmid.bench.grid import grid, has_compiler, run_grid
from cmid.bench.inference import INFERENCE_PARTS
from cmid.bench.measure import machine
from cmid.bench.plan import plan_pretraining
from cmid.bench.targets import judge, measured_table, read_bench, read_failures

ROOT = Path(__file__).parents[2]
TINY = "--backbone", "test_resnet", "--side", 64, "--batch", 4, "--steps", 1, "--device", "cpu"


def run_bench(folder, *more):
    "`cmid_bench` in a process of its own."
    script = folder / "cmid_bench"
    script.write_text("import sys\nfrom cmid.bench.bench import cmid_bench\nsys.exit(cmid_bench())\n")
    command = [sys.executable, "-W", "ignore", str(script), *map(str, more)]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_one_line_of_json(tmp_path):
    how = "--precision", "bfloat16", "--accumulate", 2, "--gradient_checkpointing", "--disk", "--json"
    done = run_bench(tmp_path, *TINY, *how)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    got = json.loads(line)
    keys = {"step_over_floor", "images_per_s", "floor_s", "step_s", "parts", "peak_memory_mb", "device", "compiled"}
    assert keys <= set(got)
    assert (got["precision"], got["accumulate"]) == ("bfloat16", 2)
    assert got["gradient_checkpointing"]
    assert not got["compiled"]
    assert set(got["parts"]) == set(PARTS)
    from_disk = "loader_images_per_s", "end_to_end_s", "end_to_end_over_floor", "prepared_over_jpeg", "loader_over_step"
    assert min(got[key] for key in from_disk) > 0


def labels(text):
    "What the lines of a table for people say."
    return {line.split("  ")[0].strip() or line.split()[0] for line in text.splitlines()}


def test_a_table_for_people(capsys):
    cmid_bench(backbone="test_resnet", batch=4, steps=1, side=64, device="cpu")
    assert labels(capsys.readouterr().out) >= {"step / floor", "floor", "step", "peak memory", "arithmetic"}


MEASURED = [
    ("classify", TASK_PARTS),
    ("change", TASK_PARTS),
    pytest.param("detect", TASK_PARTS, marks=pytest.mark.slow),
    ("apply-change", INFERENCE_PARTS),
]


@pytest.mark.parametrize("task, parts", MEASURED)
def test_a_task_is_measured_as_pretraining_is(task, parts, capsys):
    tiny = dict(task=task, backbone="test_resnet", batch=2, steps=1, side=128, device="cpu")
    cmid_bench(**tiny, json=True)
    (line,) = capsys.readouterr().out.splitlines()
    got = json.loads(line)
    assert {*got["parts"]} == {*parts}
    assert got["images_per_s"] == pytest.approx(got.get("images", 2) / got["step_s"])
    assert (got["task"], got["backbone"], got["batch"], got["side"]) == (task, "test_resnet", 2, 128)
    assert labels(bench_table(got)) >= {task, "step / floor", "floor", "step", "peak memory", *parts}


@pytest.mark.parametrize(
    "more, said",
    [
        (dict(backbone="resnet5O"), "did you mean 'resnet50"),
        (dict(batch=-1), "pretrain.batch"),
        (dict(task="segmnet"), "did you mean 'segment'"),
        (dict(task="segment", compile="step"), "--compile: is measured of --task pretrain only"),
        (dict(task="embed", precision="float16"), "--precision: is measured"),
        (dict(task="detect", backbone="resnet5O"), "did you mean 'resnet50"),
        (dict(task="change", precision="float12"), "change.precision"),
        (dict(rows="segmnet", grid=True), "did you mean 'segment'"),
        (dict(rows="99", grid=True), "there are 1 to"),
        (dict(task="apply-segment", precision="float16"), "--precision: is measured of training only"),
        (dict(rows="segment"), "add --grid"),
        (dict(rows="99"), "there are 1 to"),
        (dict(rows="foo"), "'foo' is not a row"),
        (dict(rows="list", grid=True), "a list measures nothing"),
        (dict(rows="list", backbone="resnet18"), "--backbone: has no effect on --grid and --rows; leave it out"),
        (dict(rows="segment", grid=True, limit=0), "--limit"),
        (dict(limit=5), "--limit: is of the rows of --grid"),
        (dict(operators=True, rows="list"), "--rows: has no effect on --operators"),
        (dict(operators=True, steps=3), "--steps: has no effect on --operators"),
        (dict(operators=True, grid=True, rows="1"), "--rows: has no effect on --operators --grid"),
        (dict(operators=True, grid=True, limit=5), "--limit: has no effect on --operators --grid"),
        (dict(operators=True, grid=True, device="cuda"), "counts on the CPU, not on 'cuda'"),
        (dict(side=100), "multiple of 32"),
        (dict(steps=0), "--steps"),
        (dict(device="cuda:99"), "device"),
        (dict(precision="float12"), "precision"),
    ],
)
def test_mistakes_are_one_line(capsys, more, said):
    with pytest.raises(SystemExit):
        cmid_bench(**more)
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith("cmid_bench: ") and said in told.err
    assert not told.out


NOT_OF_THE_GRID = dict(
    task="segment",
    backbone="resnet18",
    batch=4,
    steps=1,
    side=64,
    bands=4,
    precision="float32",
    compile="step",
    accumulate=2,
    gradient_checkpointing=True,
    disk=True,
    json=True,
)


@pytest.mark.parametrize("name", NOT_OF_THE_GRID)
@pytest.mark.parametrize("how", [dict(grid=True), dict(grid=True, operators=True)])
def test_the_grid_refuses_what_it_would_ignore(capsys, name, how):
    with pytest.raises(SystemExit):
        cmid_bench(**how, **{name: NOT_OF_THE_GRID[name]})
    told = capsys.readouterr()
    assert f"--{name}: has no effect on --" in told.err and len(told.err.splitlines()) == 1
    assert not told.out


def grid_file(folder, **elsewhere):
    "A file with one row and one failure, of a machine that differs from this one as given."
    row = dict(task="pretrain", backbone="resnet50", step_s=1.0)
    held = dict(commit="a", changed=False, versions={}, machine=machine() | elsewhere)
    path = folder / "step-cpu.json"
    path.write_text(json.dumps(held | dict(rows=[row], failed=[row | dict(backbone="resnet18", why="no memory")])))
    return path


@pytest.fixture
def unmeasurable(monkeypatch):
    "Rows that fail or are measured without a network: those of more than one turn fail."

    def measured(request, on, limit):
        if request["steps"] > 1:
            raise CmidError("too slow")
        return request | dict(step_s=2.0)

    monkeypatch.setattr("cmid.bench.grid._measured_apart", measured)


def asked(steps, backbone="resnet50"):
    return dict(task="pretrain", backbone=backbone, steps=steps)


def test_a_failure_takes_no_measured_row_away(tmp_path, unmeasurable):
    path = grid_file(tmp_path)
    with pytest.raises(CmidError, match="too slow.*; see .*step-cpu.json"):
        run_grid("cpu", tmp_path, [asked(2)])
    held = json.loads(path.read_text())
    assert [(row["backbone"], row["step_s"]) for row in held["rows"]] == [("resnet50", 1.0)]
    assert [(row["backbone"], row["why"]) for row in held["failed"]] == [
        ("resnet50", "too slow"),
        ("resnet18", "no memory"),
    ]
    run_grid("cpu", tmp_path, [asked(1), asked(1, "resnet18")])
    held = json.loads(path.read_text())
    assert [(row["backbone"], row["step_s"]) for row in held["rows"]] == [("resnet50", 2.0), ("resnet18", 2.0)]
    assert held["failed"] == []


def test_a_choice_of_rows_is_refused_for_a_file_of_another_machine(tmp_path, unmeasurable):
    path = grid_file(tmp_path, threads=99)
    before = path.read_text()
    with pytest.raises(CmidError, match=r"step-cpu.json was measured on another machine \(threads 99, here \d+\): "):
        run_grid("cpu", tmp_path, [asked(1)])
    assert path.read_text() == before


@pytest.mark.parametrize("steps", [1, 2])
def test_the_whole_grid_says_that_it_replaces_rows_of_another_machine(
    tmp_path, unmeasurable, monkeypatch, capsys, steps
):
    path = grid_file(tmp_path, threads=99)
    before = path.read_text()
    monkeypatch.setattr("cmid.bench.grid.grid", lambda *_: [asked(steps)])
    with pytest.raises(CmidError, match="step-cpu.json stays as it was") if steps > 1 else nullcontext():
        run_grid("cpu", tmp_path)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("replaces")]
    assert len(told) == 1 and f"{path} (threads 99, here " in told[0]
    rows = json.loads(path.read_text())["rows"]
    assert path.read_text() == before if steps > 1 else [row["step_s"] for row in rows] == [2.0]


def test_a_damaged_file_is_not_replaced(tmp_path, unmeasurable):
    path = tmp_path / "step-cpu.json"
    path.write_text("{}")
    with pytest.raises(CmidError, match="step-cpu.json: is not a measurement of cmid_bench"):
        run_grid("cpu", tmp_path)
    assert path.read_text() == "{}"


def test_the_compiler_is_the_one_that_torch_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not has_compiler()
    for name in ("g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert has_compiler()
    monkeypatch.setenv("CXX", "g++ -O1")
    assert has_compiler()
    monkeypatch.setenv("CXX", "icpx")
    assert not has_compiler()


def test_a_compiled_step_says_so(monkeypatch, capsys):
    parts = dict(heads=0.0, losses=0.2)
    measured = dict(step_over_floor=1.2, floor_s=1.0, step_s=1.2, images_per_s=3.0, peak_memory_mb=1.0)
    measured |= dict(parts=parts, parts_over_floor=parts, compiled=True)
    monkeypatch.setattr("cmid.bench.bench.measure_row", lambda *_, **__: measured)
    cmid_bench(compile="step", device="cpu")
    first, *table = capsys.readouterr().out.splitlines()
    assert "takes minutes" in first
    (line,) = (line for line in table if "heads" in line)
    assert line.endswith("(compiled together: part of losses)")
    cmid_bench(compile="step", device="cpu", json=True)
    assert json.loads(capsys.readouterr().out) == measured


def test_rows_are_listed(capsys):
    cmid_bench(rows="list", device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(1, 1 + len(lines)))
    assert len(lines) in (len(grid("cpu")), len(grid("cpu", compiler=False)))
    assert any("--task segment --backbone resnet18" in line for line in lines)


@pytest.mark.slow
def test_rows_without_a_choice_are_listed(tmp_path):
    done = run_bench(tmp_path, "--device", "cpu", "--rows")
    assert done.returncode == 0, done.stderr
    assert "--task apply-segment" in done.stdout


@pytest.mark.slow
def test_a_row_that_fails_is_a_row(tmp_path, capsys):
    tiny = dict(backbone="test_resnet", batch=4, steps=1, side=64, profile="smoke")
    pretrain = tiny | dict(precision="float32")
    bad = pretrain | dict(side=65)
    path = run_grid("cpu", tmp_path, [pretrain, bad, tiny | dict(task="embed")])
    assert "embed" not in capsys.readouterr().err
    held = json.loads(path.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["step-cpu.json"]
    assert {"commit", "changed", "versions", "machine", "rows"} <= set(held)
    assert "multiple of 32" in held["failed"][0]["why"]
    row, embedded = read_bench(tmp_path)
    assert (row["task"], embedded["task"]) == ("pretrain", "embed")
    assert "| failed: " in measured_table([row], read_failures(tmp_path))
    assert {verdict["verdict"] for verdict in judge([row])} == {"open"}  # no target concerns it
    hours = plan_pretraining("test_resnet", side=64, folder=tmp_path, images=1000, epochs=2)["hours"]
    assert hours == pytest.approx(2000 * row["step_s"] / 4 / 3600)
    with pytest.raises(CmidError, match=r"took longer than 0.1 s; raise --limit\); see"):
        run_grid("cpu", tmp_path, [pretrain], limit=0.1)
    held = json.loads(path.read_text())  # the rows that were measured stay
    assert [row["task"] for row in held["rows"]] == ["pretrain", "embed"]
    assert [row["why"].split(";")[0] for row in held["failed"]][0] == "took longer than 0.1 s"
    assert len(held["failed"]) == 2


def test_plan(capsys):
    cmid_plan(images_per_s=1000.0, json=True)
    got = json.loads(capsys.readouterr().out)
    assert got["hours"] == pytest.approx(990_848 * 200 / 1000 / 3600)
    assert got["measured"] is None
    cmid_plan(images_per_s=1000.0, price=2.0)
    out = capsys.readouterr().out
    assert "55.0 h" in out and "cost" in out
    with pytest.raises(SystemExit):
        cmid_plan("test_vit")
    told = capsys.readouterr()
    assert "no rate of test_vit" in told.err and len(told.err.splitlines()) == 1
