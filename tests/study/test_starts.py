"Where networks come from, in report and tables: what pretraining went on from, baselines of another architecture."

import json
from pathlib import Path

import pytest

from cmid.base.files import load_yaml, write_json, write_whole
from cmid.study.comparisons import accuracy_rows, probe_rows, score_rows, task_rows
from cmid.study.examples import example_results
from cmid.study.report import report_page
from cmid.study.report_claims import headlines
from cmid.study.report_words import start_words
from cmid.study.study_tables import accuracy_table
from tests.study.conftest import STUDY

ROOT = Path(__file__).parents[2]
LITE0 = dict(architecture="tf_efficientnet_lite0", file="w.pth", layout="timm", mean=[0.5], std=[0.5], licence=None)
SAME = LITE0 | dict(architecture="resnet18")
OTHERS = {"random-convnext_atto": "convnext_atto", "file-lite0": "tf_efficientnet_lite0"}
START = dict(start="models/earlier", hash="0123456789abcdef", architecture="resnet18", method="byol", data_hash="1")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    "Made-up results of a study with baselines of other architectures; one run went on from given weights, by a recipe."
    folder = tmp_path_factory.mktemp("begun")
    values = load_yaml(ROOT / "params.yaml")
    inits = ["cmid-resnet18", "random-resnet18", "file-same", *OTHERS]
    values["study"] = STUDY | dict(backbones=["resnet18"], baselines=inits[1:], inits=inits)
    values["weight_files"] = dict(lite0=LITE0, same=SAME)
    write_whole(folder / "params.yaml", json.dumps(values))
    example_results(folder)
    file = folder / "results/pretrain/cmid-resnet18/run.json"
    write_json(file, json.loads(file.read_text()) | dict(start=START, changes=dict(mask_ratio=0.3)))
    return folder


def test_a_baseline_is_compared_with_by_its_architecture_and_not_by_its_name(begun):
    for row in (*probe_rows(begun), *score_rows(begun, "features"), *task_rows(begun, "segment")):
        against = {o["baseline"] for o in row["against"]}
        assert against == ({"random-resnet18", "file-same"} if row["init"] == "cmid-resnet18" else set())


def test_a_row_of_another_architecture_says_which(begun):
    for rows in (accuracy_rows(begun, "classify"), score_rows(begun, "correspondence"), task_rows(begun, "detect")):
        assert {row["init"]: row["other"] for row in rows if "other" in row} == OTHERS


def test_the_report_and_the_tables_name_the_architecture(begun, plain):
    page = " ".join(report_page(begun).split())
    assert "baseline, another architecture: tf_efficientnet_lite0" in page
    assert "baseline, another architecture: convnext_atto" in page
    head = accuracy_table([row for row in probe_rows(begun) if row["dataset"] == "scenes"]).splitlines()[0]
    assert "| file-lite0 (tf_efficientnet_lite0) |" in head
    assert "| random-convnext_atto |" in head
    assert "| file-same |" in head


def test_what_pretraining_went_on_from_is_said_beside_the_run_and_among_the_findings(begun, plain):
    words = "went on from models/earlier (byol), hash 01234567"
    assert f"cmid-resnet18 {words}: its scores include what these weights knew." in headlines(begun)
    assert f"Its recipe changes: mask_ratio 0.3. Training {words}." in " ".join(report_page(begun).split())
    assert start_words(START | dict(start="imagenet", method="imagenet, a1_in1k")) == (
        "went on from timm's ImageNet weights, hash 01234567"
    )
    assert start_words(None) == ""
