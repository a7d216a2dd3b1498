"Results that were made elsewhere, or by a part of a study: its parameters are those that they were made with."

import json
from pathlib import Path

import pytest

from cmid.base.files import load_yaml
from cmid.base.params import Params, check_all
from cmid.study.report_words import PROBE_NAMES
from cmid.study.study_tables import PUBLISHED_KEYS, study_root

ROOT = Path(__file__).parents[2]
COMMITS = {
    "aid-grid": "6f51631",
    "aid-h100": "f009c6e",
    "ucm-h100": "f009c6e",
    "ucm": "ad5f514",
}  # study -> what its results were made at


@pytest.fixture(scope="module", params=COMMITS)
def study(request):
    "The parameters of a study as a root of its own, its records, and their commit."
    folder = ROOT / "studies" / request.param
    with study_root(ROOT, folder) as root:
        yield check_all(Params(root)), sorted(folder.rglob("run.json")), COMMITS[request.param]


def settings_of(params, record):
    "What a run of these parameters would record."
    if record["stage"] == "baselines":
        return {}
    if record["stage"] == "pretrain":
        return params.recipe(record["init"].split("-")[0]).model_dump()
    return getattr(params, record["stage"]).model_dump()


def test_the_study_would_repeat_what_was_run(study):
    "Every recorded value is that of the study; a key that is newer than a record is not in it."
    params, records, _ = study
    assert len(records) > 8
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        settings = settings_of(params, record)
        for key, value in record["parameters"].items():
            assert settings[key] == value, f"{path}: {key}"
        assert record["run"]["profile"] == params.run.profile


def test_a_record_names_its_own_folder(study):
    _, records, commit = study
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        identity = [record[key] for key in ("dataset", "init") if key in record]
        assert path.parts[-2 - len(identity) : -1] == (record["stage"], *identity)
        seed = next((o for o in path.parts if o.startswith("seed-")), "seed-0")
        once = record["stage"] in ("prepare", "labels")  # a grid reads the images once, for all its seeds
        assert record["run"]["seed"] == (0 if once else int(seed.removeprefix("seed-")))
        assert (record["commit"][:7], record["changed"]) == (commit, False)


@pytest.mark.parametrize("path", sorted((ROOT / "studies/published").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_others_published_has_a_protocol_and_a_source(path):
    rows = load_yaml(path)["rows"]
    assert rows[0]["source"].startswith("[arXiv")
    for row in rows:
        assert tuple(row) == PUBLISHED_KEYS
        assert row["score"] in PROBE_NAMES
        percent = row["percent"] if isinstance(row["percent"], list) else [row["percent"]]
        assert percent == sorted(percent)
        assert all(1 < value <= 100 for value in percent)  # in %, not a share
        assert all(row[key].strip() for key in ("features", "protocol", "compare", "source"))
