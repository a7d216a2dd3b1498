"Made-up results of a study, for the tests of what reads them."

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cmid.base.files import load_yaml, write_json, write_whole
from cmid.study import report_html
from cmid.study.examples import example_results

ROOT = Path(__file__).parents[2]
INITS = ["cmid-resnet18", "random-resnet18", "imagenet-resnet18", "cmid-resnet50"]
SCENE = dict(folder="data/landscape", images="first", second=None)
MAPS = {
    "land-map": SCENE | dict(model="segment-land-cmid-resnet18"),
    "change-map": SCENE | dict(model="change-dates-unet", second="second"),
    "object-map": SCENE | dict(model="detect-objects-cmid-resnet18"),
}
STUDY = dict(
    backbones=["resnet18", "resnet50"],
    methods=["cmid"],
    baselines=["random-resnet18", "imagenet-resnet18"],
    inits=INITS,
    floors=dict(probe=["imagestats", "randomconv"], segment=["unet"], change=["unet"]),
    probes=["scenes"],
    segment=["land"],
    change=["dates"],
    detect=["objects"],
    apply=MAPS,
)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    "Made-up results of a study with four backbones; not to be changed."
    folder = tmp_path_factory.mktemp("made")
    values = load_yaml(ROOT / "params.yaml")
    values["profiles"] = {"sample": values["profiles"]["sample"]}
    values |= dict(profile="sample", study=STUDY)
    write_whole(folder / "params.yaml", yaml.safe_dump(values, sort_keys=False))
    example_results(folder)
    return folder


@pytest.fixture
def study(made, tmp_path):
    "A copy of the made-up results."
    return shutil.copytree(made, tmp_path / "study")


@pytest.fixture
def plain(monkeypatch):
    "Figures are made but not rendered, which is most of a report's time."

    def drawn(draw, ink):
        draw()
        return "data:image/png;base64,"

    monkeypatch.setattr(report_html, "_drawn_uri", drawn)
    monkeypatch.setattr(report_html, "_saved_uri", lambda path: "data:image/png;base64,")


@pytest.fixture
def change(study):
    "Change keys of a JSON file below the study's results."

    def changed(path, **keys):
        file = study / "results" / path
        write_json(file, json.loads(file.read_text()) | keys)

    return changed
