"The benchmark as people run it, on a network that is small enough for a test."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmid.base.errors import CmidError
from cmid.bench.bench import cmid_bench, cmid_plan
from cmid.bench.floor import PARTS
from cmid.bench.plan import plan_pretraining
from cmid.bench.targets import judge, read_bench, run_grid

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


def test_a_table_for_people(capsys):
    cmid_bench("test_resnet", batch=4, steps=1, side=64, device="cpu")
    labels = {line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()}
    assert labels >= {"step / floor", "floor", "step", "peak memory", "arithmetic"}


@pytest.mark.parametrize(
    "more, said",
    [
        (dict(backbone="resnet5O"), "did you mean 'resnet50"),
        (dict(batch=0), "pretrain.batch"),
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


@pytest.mark.slow
def test_grid_is_written_whole_or_not_at_all(tmp_path):
    tiny = dict(backbone="test_resnet", batch=4, steps=1, side=64, precision="float32", profile="smoke")
    bad = tiny | dict(side=65)
    with pytest.raises(CmidError, match="multiple of 32"):
        run_grid("cpu", tmp_path, [bad])
    assert not list(tmp_path.iterdir())
    held = json.loads(run_grid("cpu", tmp_path, [tiny, bad]).read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["step-cpu.json"]
    assert {"commit", "changed", "versions", "machine", "rows"} <= set(held)
    assert len(held["rows"]) == len(held["failed"]) == 1
    assert "multiple of 32" in held["failed"][0]["why"]
    (row,) = read_bench(tmp_path)
    assert {verdict["verdict"] for verdict in judge([row])} == {"open"}  # no target concerns it
    hours = plan_pretraining("test_resnet", side=64, folder=tmp_path, images=1000, epochs=2)["hours"]
    assert hours == pytest.approx(2000 * row["step_s"] / 4 / 3600)


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
