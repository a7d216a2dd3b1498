"The benchmark as people run it, on a network that is small enough for a test."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmid.base.errors import CmidError
from cmid.bench.bench import bench_table, cmid_bench, cmid_plan
from cmid.bench.finetune import TASK_PARTS
from cmid.bench.floor import PARTS
from cmid.bench.grid import grid, run_grid
from cmid.bench.inference import INFERENCE_PARTS
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
        (dict(rows="segment"), "add --grid"),
        (dict(rows="segment", grid=True, limit=0), "--limit"),
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
    held = json.loads(path.read_text())  # the rows of other measurements stay
    assert [row["task"] for row in held["rows"]] == ["embed"]
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
