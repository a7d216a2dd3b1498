"Contracts between dvc.yaml, params.yaml and the stage notebooks."

import json
import re
from pathlib import Path

import papermill
import pytest
import yaml

from cmid.base.params import SECTIONS, Params
from cmid.settings.study import Floors

ROOT = Path(__file__).parents[2]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
BODY = {name: stage.get("do", stage) for name, stage in DVC.items()}
NOTEBOOKS = sorted(o.stem for o in (ROOT / "nbs/pipeline").glob("*.ipynb"))
FLOORS = [o for o in BODY if o.endswith("_floor")]  # the same stages without a backbone
SHARED = {"profile", "seed", "device", "deterministic"}
UNSEEDED = "prepare", "labels"  # all seeds of a study see the same images


def defaults(stage):
    found = papermill.inspect_notebook(str(ROOT / f"nbs/pipeline/{stage}.ipynb"))
    return {name: parameter["default"] for name, parameter in found.items()}


def code_of(stage):
    cells = json.loads((ROOT / f"nbs/pipeline/{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "".join("".join(o["source"]) for o in cells if o["cell_type"] == "code")


def outputs(body):
    "(path, flags) of everything that a stage writes"
    found = []
    for kind in ("outs", "metrics", "plots"):
        for out in body.get(kind, []):
            found.append(next(iter(out.items())) if isinstance(out, dict) else (out, {}))
    return found


def test_every_notebook_is_a_stage():
    assert set(NOTEBOOKS) == set(BODY) - {"folders", "digest", *FLOORS}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_is_its_stage_without_a_backbone(floor):
    stage = floor.removesuffix("_floor")
    due = BODY[stage] | dict(matrix=BODY[stage]["matrix"] | dict(init=f"${{study.floors.{stage}}}"))
    due["deps"] = [o for o in due["deps"] if not o.startswith("models/")]
    assert BODY[floor] | dict(desc=due["desc"]) == due
    assert len(due["deps"]) == len(BODY[stage]["deps"]) - 1


def test_every_floor_has_a_stage():
    assert FLOORS == [f"{stage}_floor" for stage in Floors.model_fields]


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_parameters_are_known(stage):
    "papermill would set a misspelt -p without a word."
    command = BODY[stage]["cmd"].split()
    assert command[:2] == ["cmid_stage", stage]
    given = {command[i + 1] for i, word in enumerate(command) if word == "-p"}
    known = defaults(stage)
    assert given == set(known) - {"smoke"}, "identity is given by dvc.yaml, and nothing else"
    assert known["smoke"] == "True", "alone, a stage runs on generated imagery"


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_depends_on_its_digest(stage):
    assert f"digests/{stage}.json" in BODY[stage]["deps"]
    assert f"digests/{stage}.json" in DVC["digest"]["outs"]
    assert not [o for o in BODY[stage]["deps"] if o.startswith(("nbs", "cmid"))], "prose would retrain"


def test_only_the_search_for_links_always_runs():
    assert [name for name, body in BODY.items() if body.get("always_changed")] == ["folders"]
    readers = {stage for stage, body in BODY.items() if "${item.folder}" in body.get("deps", [])}
    assert readers == {"prepare", "labels", "apply"}
    assert all("digests/folders.json" in BODY[stage]["deps"] for stage in readers)


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_parameters_that_are_read_are_tracked(stage):
    "A stage that reads a section reruns when the section or the profile's changes."
    tracked = set(BODY[stage]["params"])
    found = re.search(r"Stage\(\s*['\"](\w+)['\"],\s*(['\"](\w+)['\"]|None)", code_of(stage))
    assert found
    assert found[1] == stage
    assert tracked & SHARED == SHARED - ({"seed"} if stage in UNSEEDED else set())
    if found[3]:
        assert {found[3], f"profiles.${{profile}}.{found[3]}"} <= tracked


@pytest.mark.parametrize("name", BODY)
def test_no_output_below_data_and_metrics_only_in_git(name):
    for path, flags in outputs(BODY[name]):
        assert not path.startswith("data/")
        if flags.get("cache") is False:
            assert path.startswith("results/"), path
            assert path.endswith(".json"), path


@pytest.mark.parametrize("profile", list(Params(ROOT).values["profiles"]))
def test_profiles(profile):
    params = Params(ROOT, profile)
    for section in SECTIONS:
        getattr(params, section)
    assert set(params.overlay) == set(SECTIONS) - {"study"}, "dvc.yaml names every section of every profile"


PUBLISHED = dict(
    epochs=200,
    batch=64,
    warmup_epochs=10,
    weight_decay=0.02,
    betas=[0.98, 0.92, 0.99],
    mask_ratio=0.6,
    queue=65536,
    temperature=0.2,
    prototypes=2048,
    teacher_temperature=[0.04, 0.07],
    teacher_temperature_epochs=50,
    momentum=[0.996, 1.0],
)


def test_paper_profile_is_the_published_recipe():
    params = Params(ROOT, "paper")
    assert params.prepare.side == 224
    assert {key: getattr(params.pretrain, key) for key in PUBLISHED} == PUBLISHED
