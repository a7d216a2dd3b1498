"No command and no stage loads a library that it does not use: the heavy ones cost each of them a second or more."

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "timm",
    "fastai",
    "sklearn",
    "segmentation_models_pytorch",
    "dvclive",
    "papermill",
    "nbconvert",
    "pandas",
    "rasterio",
    "matplotlib.pyplot",
)
IN_PLACE = """import cmid.study.stage
cmid.study.stage._smoke_root = lambda upstream: cmid.study.stage.root()
cmid.study.stage.hold_folder = lambda *_: None
"""  # a stage takes the project for its study, and locks nothing


def loaded(code):
    "Heavy libraries that are there after some code, in a process of its own."
    code += f"\nimport sys\nprint('loaded', *(o for o in {HEAVY!r} if o in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {*done.stdout.splitlines()[-1].split()[1:]}


def beginning(stage):
    "A stage up to where it knows its parameters: its identity, its imports and its `Stage`."
    notebook = json.loads((ROOT / f"nbs/pipeline/{stage}.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(o["source"]) for o in notebook["cells"] if o["cell_type"] == "code"]
    lines = [o for o in "\n".join(cells[:2]).splitlines() if not o.startswith("%")]
    end = next(o.end_lineno for o in ast.parse("\n".join(lines)).body if ast.unparse(o).startswith("stage = Stage("))
    return "\n".join(lines[:end])


def loaded_by_stages(stages):
    return loaded(IN_PLACE + "\n".join(map(beginning, stages)))


def test_commands_load_nothing_heavy():
    modules = "base.params", "study.digest", "study.stage", "study.runner", "study.study"
    assert not loaded("import numpy\n" + "\n".join(f"import cmid.{o}" for o in modules))


def test_digest_loads_nothing_heavy():
    "DVC runs it first each time: its work must take less than a second."
    code = """from cmid.base.files import root
from cmid.study.digest import check_study, stage_digests
assert len(stage_digests(root())) > 10
check_study(root())"""
    assert not loaded(code)


@pytest.mark.parametrize(
    "stages, uses",
    [
        (("prepare", "labels"), {"rasterio"}),
        (("report",), set()),
        (("attention", "correspondence", "reconstruct"), {"torch", "timm"}),
    ],
    ids=["images", "report", "figures"],
)
def test_stages_load_what_they_use(stages, uses):
    assert loaded_by_stages(stages) == uses


@pytest.mark.parametrize(
    "stages, spared",
    [
        (("probe", "features"), {"fastai", "segmentation_models_pytorch", "dvclive"}),
        (("change", "detect"), {"segmentation_models_pytorch", "dvclive"}),
    ],
    ids=["scores", "tasks"],
)
def test_stages_that_compute_spare_what_others_use(stages, spared):
    names = loaded_by_stages(stages)
    assert "torch" in names
    assert not names & spared
