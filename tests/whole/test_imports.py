"No command and no stage loads a library that it does not use: the heavy ones cost each of them a second or more."

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


def loaded(code):
    "Heavy libraries that are there after some code, in a process of its own."
    code += f"\nimport sys; print('loaded', *(o for o in {HEAVY!r} if o in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {*done.stdout.splitlines()[-1].split()[1:]}


def begun(stage):
    "A stage up to where it knows its parameters: its identity, its imports and its `Stage`, which here takes the project for its study."
    cells = [
        "".join(o["source"])
        for o in json.loads((ROOT / f"nbs/pipeline/{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
        if o["cell_type"] == "code"
    ]
    lines = [o for o in "\n".join(cells[:2]).splitlines() if not o.startswith("%")]
    last = next(i for i, o in enumerate(lines) if o.startswith("stage = Stage("))
    return "\n".join(
        [
            "import cmid.study.stage",
            "cmid.study.stage._smoke = lambda upstream: cmid.study.stage.root()",
            "cmid.study.stage._hold = lambda *_: None",
            *lines[: last + 1],
        ]
    )


def test_the_package_itself_loads_nothing():
    names = loaded("import sys; before = {*sys.modules}; import cmid; print(*{*sys.modules} - before)")
    assert not names
    assert not loaded("import numpy; import cmid.base.params, cmid.study.digest, cmid.study.stage, cmid.study.study")


@pytest.mark.parametrize(
    "stage, uses",
    dict(
        prepare={"rasterio"},
        labels={"rasterio"},
        report=set(),
        attention={"torch", "timm", "rasterio"},
        correspondence={"torch", "timm", "rasterio"},
        reconstruct={"torch", "timm", "rasterio"},
    ).items(),
)
def test_a_stage_loads_what_it_uses(stage, uses):
    assert loaded(begun(stage)) == uses


@pytest.mark.parametrize(
    "stage, spared",
    dict(
        probe={"fastai", "segmentation_models_pytorch", "dvclive"},
        features={"fastai", "segmentation_models_pytorch", "dvclive"},
        change={"segmentation_models_pytorch", "dvclive"},
        detect={"segmentation_models_pytorch", "dvclive"},
    ).items(),
)
def test_a_stage_that_computes_spares_what_others_use(stage, spared):
    names = loaded(begun(stage))
    assert "torch" in names and not names & spared
