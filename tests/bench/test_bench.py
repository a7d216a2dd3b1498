"The benchmark as people run it, on a network that is small enough for a test."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmid.base.errors import CmidError
from cmid.bench.bench import cmid_bench
from cmid.bench.targets import judge, read_bench, run_grid
from cmid.bench.floor import PARTS
from cmid.data.scenes import plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    at = tmp_path_factory.mktemp("scripts")

    def run(name, *more):
        (at / name).write_text(
            f'import sys\nfrom cmid.bench.bench import {name}\nif __name__ == "__main__": sys.exit({name}())\n'
        )
        return subprocess.run(
            [sys.executable, "-W", "ignore", str(at / name), *map(str, more)],
            cwd=ROOT,
            env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
        )

    return run


TINY = "--backbone", "test_resnet", "--side", 64, "--batch", 4, "--steps", 1, "--device", "cpu"


def test_one_line_of_json(run):
    done = run(
        "cmid_bench",
        *TINY,
        "--precision",
        "bfloat16",
        "--accumulate",
        2,
        "--gradient_checkpointing",
        "--disk",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    got = json.loads(line)
    assert {
        "step_over_floor",
        "images_per_s",
        "floor_s",
        "step_s",
        "parts",
        "peak_memory_mb",
        "device",
        "precision",
        "compiled",
    } <= set(got)
    assert (got["precision"], got["accumulate"], got["gradient_checkpointing"], got["compiled"]) == (
        "bfloat16",
        2,
        True,
        False,
    ) and set(got["parts"]) == set(PARTS)
    assert (
        min(
            got[k]
            for k in (
                "loader_images_per_s",
                "end_to_end_s",
                "end_to_end_over_floor",
                "prepared_over_jpeg",
                "loader_over_step",
            )
        )
        > 0
    )


def test_a_table_for_people(run):
    done = run("cmid_bench", *TINY)
    assert done.returncode == 0 and {o.split("  ")[0].strip() for o in done.stdout.splitlines()} >= {
        "step / floor",
        "floor",
        "step",
        "peak memory",
    }, done.stderr


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
    assert len(told.err.splitlines()) == 1 and told.err.startswith("cmid_bench: ") and said in told.err and not told.out


def test_grid_is_written_whole_or_not_at_all(tmp_path):
    tiny = dict(backbone="test_resnet", batch=4, steps=1, side=64, precision="float32", profile="smoke")
    with pytest.raises(CmidError, match="multiple of 32"):
        run_grid("cpu", tmp_path, [tiny | dict(side=65)])
    assert not list(tmp_path.iterdir())
    held = json.loads(
        run_grid("cpu", tmp_path, [tiny, tiny | dict(side=65), tiny | dict(backbone="test_vit")]).read_text()
    )
    assert [o.name for o in tmp_path.iterdir()] == ["step-cpu.json"]
    assert (
        {"commit", "changed", "versions", "machine", "rows"} <= set(held)
        and len(held["rows"]) == 2
        and ["multiple of 32" in o["why"] for o in held["failed"]] == [True]
    )
    rows = read_bench(tmp_path)
    assert {o["verdict"] for o in judge(rows)} == {"open"}  # of no row that a target speaks of
    assert plan("test_vit", side=64, folder=tmp_path, images=1000, epochs=2)["hours"] == pytest.approx(
        2000 * rows[1]["step_s"] / 4 / 3600
    )


def test_plan(run):
    done = run("cmid_plan", "--images_per_s", 1000, "--json")
    got = json.loads(done.stdout)
    assert got["hours"] == pytest.approx(990_848 * 200 / 1000 / 3600) and got["measured"] is None
    done = run("cmid_plan", "--images_per_s", 1000, "--price", 2)
    assert "55.0 h" in done.stdout and "cost" in done.stdout
    done = run("cmid_plan", "--backbone", "test_vit")
    assert done.returncode == 1 and "no rate of test_vit" in done.stderr and len(done.stderr.splitlines()) == 1
