"""A study that is run once, edited and run again: what runs again, and what is left.

The tests share one study and stand in the order in which they edit it. Every stage runs in it once; after that, most
tests ask DVC what it would run, and run only what they look at.
"""

import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml

from cmid.study.result_schemas import read_answers
from cmid.study.results import stage_results
from cmid.study.smoke import SMOKE_MAPS
from cmid.tasks.card import task_scores
from cmid.tasks.load import load_task
from cmid.train.checkpoint import load_backbone
from tests.tools.study import INIT, TASKS, Study

BASELINE = "random-resnet18"
PRETRAIN = f"pretrain@{INIT}"
BOTH, ONE = f"inits: [{INIT}, {BASELINE}]", f"inits: [{INIT}]"
FLOORS = [
    ("probe", "scenes", "imagestats"),
    ("probe", "scenes", "randomconv"),
    ("segment", "land", "unet"),
    ("change", "dates", "unet"),
]  # stage, dataset and name of what has no backbone
RECORD = {
    "commit",
    "changed",
    "device",
    "versions",
    "seconds",
    "peak_memory_mb",
    "images_per_s",
    "data",
    "parameters",
    "run",
}
pytestmark = pytest.mark.slow


def kinds(stages):
    "Names of stages without their identities"
    return {o.split("@")[0] for o in stages}


def expected(inits):
    "Every stage of the study"
    return {
        "digest",
        "prepare@pool",
        "prepare@scenes",
        PRETRAIN,
        f"baselines@{BASELINE}",
        f"reconstruct@{INIT}",
        "report",
        *(f"labels@{o}" for o in TASKS.values()),
        *(f"{stage}@{dataset}-{i}" for stage, dataset in TASKS.items() for i in inits),
        *(f"{stage}@scenes-{i}" for stage in ("probe", "classify", "features") for i in inits),
        *(f"{stage}@{i}" for stage in ("attention", "correspondence") for i in inits),
        *(f"{stage}_floor@{dataset}-{i}" for stage, dataset, i in FLOORS),
        *(f"apply@{entry}" for entry in SMOKE_MAPS),
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = Study(tmp_path_factory.mktemp("study"))
    study.dvc("stage", "list", "--name-only")
    study.planned = study.said.split()
    study.edit("params.yaml", re.escape(BOTH), ONE)
    study.ran = study.dvc("repro")
    return study


# What runs, and what is left


def test_every_run_of_the_study_is_planned(study):
    assert set(study.planned) == expected([INIT, BASELINE]) | {"folders"}


def test_everything_runs_once(study):
    assert set(study.ran) == expected([INIT])
    assert study.dvc("repro") == []


def test_what_pretraining_leaves(study):
    backbones = {o.parent.name for o in (study.folder / "models").glob("*/extras.safetensors")}
    assert backbones == {INIT, BASELINE}
    assert RECORD <= set(study.json(f"results/pretrain/{INIT}/run.json"))
    curve = study.folder / f"results/pretrain/{INIT}/curves/plots/metrics/total.tsv"
    assert len(curve.read_text().splitlines()) == 7  # a head, 2 epochs of 3 steps
    assert "resnet18" in (study.folder / f"reports/pretrain-{INIT}.ipynb").read_text()


def test_every_stage_is_scored_and_in_the_report(study):
    assert study.metrics("probe", "scenes", INIT)["test_images"] == 3
    for stage, dataset in TASKS.items():
        assert study.metrics(stage, dataset, INIT)["images"] == 2
    summary = study.metrics("report")
    assert summary["missing"] == 0
    assert set(summary["segment"]["land"]) == {INIT, "unet"}
    assert set(summary["change"]["dates"][INIT]) == {"bit", "difference"}
    assert set(summary["change"]["dates"]["unet"]) == {"unet"}
    page = (study.folder / "reports/report.html").read_text()
    assert "<html" in page
    assert "Oriented detection" in page


def test_maps_are_drawn_and_in_the_report(study):
    for entry, values in SMOKE_MAPS.items():
        assert study.metrics("apply", entry)["scenes"] == 1
        record = study.json(f"results/apply/{entry}/run.json")
        assert record["model"] == values["model"]
        assert all((study.folder / "maps" / entry / file).is_file() for file in record["files"])
    page = (study.folder / "reports/report.html").read_text()
    assert page.count('alt="Map ') == len(SMOKE_MAPS)
    assert '<a href="../maps/land-map/landscape.tif">' in page


def test_what_has_no_backbone_is_scored_beside_them(study):
    page = (study.folder / "reports/report.html").read_text().replace("<wbr>", "")
    for name in ("image statistics, no network", "random convolutions", "U-Net from scratch"):
        assert f'<th scope="row">{name}</th>' in page
    for run in FLOORS:
        record = study.json(Path("results", *run, "run.json"))
        assert (record["pretraining_data"], record["made_by"]) == (None, None)
        assert record["data"] == study.json(Path("results", *run[:2], INIT, "run.json"))["data"]
    for task in ("segment-land", "change-dates"):
        network = load_task(study.folder / f"models/{task}-unet")
        assert (network.card.network, network.card.backbone) == ("unet", None)
    assert {o.name for o in (study.folder / "models").iterdir()} & {"imagestats", "randomconv", "unet"} == set()


def test_answers_are_kept_image_by_image_of_one_list(study):
    "They fit metrics.json, which `read_answers` checks; floors and backbones, probes and fine-tuning score one list."
    runs = [*stage_results(study.folder, "probe").items(), *stage_results(study.folder, "classify").items()]
    assert {init for (_, init), _ in runs} >= {INIT, "imagestats", "randomconv"}
    found = [read_answers(result) for _, result in runs]
    assert all(len(answers) > 1 for answers in found)
    assert len({answers["images"] for answers in found}) == 1


def test_fine_tuned_networks_are_kept_with_their_scores(study):
    for stage, dataset in (TASKS | dict(classify="scenes")).items():
        network = load_task(study.folder / f"models/{stage}-{dataset}-{INIT}")
        metrics, run = study.metrics(stage, dataset, INIT), study.json(f"results/{stage}/{dataset}/{INIT}/run.json")
        assert {name: score.model_dump() for name, score in network.card.scores.items()} == task_scores(stage, metrics)
        assert network.card.data_hash == run["data"]
        assert network.card.provenance["commit"] == run["commit"]
        assert network.card.backbone["data_hash"] == run["pretraining_data"]


def test_timm_loads_the_export_by_itself(study):
    weights = str(study.folder / f"models/{INIT}/model.safetensors")
    network = timm.create_model("resnet18", num_classes=0, checkpoint_path=weights)
    encoder, _ = load_backbone(study.folder / "models" / INIT)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(network.eval().forward_features(x), encoder(x)[-1])


def test_an_init_may_be_added_and_left_out(study):
    study.edit("params.yaml", re.escape(ONE), BOTH)
    probe = f"probe@scenes-{BASELINE}"
    assert study.dvc("repro", probe) == ["digest", probe]
    assert study.metrics("probe", "scenes", BASELINE)["test_images"] == 3
    study.edit("params.yaml", re.escape(BOTH), ONE)
    shutil.rmtree(study.folder / "results/probe/scenes" / BASELINE)  # the report depends on the folder


# What an edit runs again


def test_prose_reruns_nothing_but_digests(study):
    before = study.metrics("pretrain", INIT)
    study.edit("nbs/pipeline/pretrain.ipynb", "# Pretrain", "# Pretraining, in other words")
    study.edit("cmid/method/views.py", '^"""', '"""In other words: ')
    assert set(study.dvc("repro")) == {"digest"}
    assert study.metrics("pretrain", INIT) == before


def test_an_experiment_is_listed_and_keeps_checkpoints(study):
    def checkpoints():
        return {o: o.read_bytes() for o in (study.folder / "checkpoints").rglob("*.ckpt")}

    before = checkpoints()
    study.dvc("exp", "run", "-n", "fewer", "-S", "profiles.smoke.probe.neighbours=2", f"probe@scenes-{INIT}")
    assert before
    assert checkpoints() == before
    assert study.metrics("probe", "scenes", INIT)["knn"]["1.0"]["k"] == 2
    study.dvc("exp", "show", "--md", "--only-changed")
    assert "[fewer]" in study.said
    assert "neighbours" in study.said


def test_code_reruns_what_reaches_it(study):
    "A module of a task, and the cell of a stage: asked for here, not run."
    study.edit("cmid/tasks/probe.py", "^import", "import sys\nimport")
    study.edit("nbs/pipeline/reconstruct.ipynb", re.escape("stage.finish("), "_ = 1; stage.finish(")
    assert study.dvc("repro", "digest") == ["digest"]
    wanted = study.dvc("repro", "--dry")
    assert {f"probe@scenes-{INIT}", f"reconstruct@{INIT}", "report"} <= set(wanted)
    assert kinds(wanted) >= {"probe_floor"}
    assert not kinds(wanted) & {"prepare", "labels", "pretrain", "segment", "change", "detect", "segment_floor"}


def test_wrong_parameters_are_refused_in_one_line_before_anything_is_removed(study):
    folders = "results", "models", "prepared", "reports"

    def files():
        found = (o for folder in folders for o in (study.folder / folder).rglob("*") if o.is_file())
        return {o: o.stat().st_mtime_ns for o in found}

    before = files()
    study.edit("params.yaml", "neighbours: 2, regularisation", "neighbors: 2, regularisation")
    study.dvc("repro", fails=True)
    assert files() == before
    assert "cmid_digest: params.yaml: probe.neighbors: unknown key (did you mean 'neighbours'?)" in study.said
    assert "Traceback" not in study.said
    study.edit("params.yaml", "neighbors: 2, regularisation", "neighbours: 2, regularisation")


def test_code_of_the_method_trains_anew(study):
    "Not only the stage runs again: it must not use the checkpoint of the old code."
    before = study.metrics("pretrain", INIT)
    study.edit("cmid/method/reconstruction.py", r"return spatial \+", "return 2 * spatial +")
    assert set(study.dvc("repro", "pretrain")) == {"digest", PRETRAIN}
    assert "resuming after step" not in study.said
    assert study.metrics("pretrain", INIT)["reconstruction"] != before["reconstruction"]
    wanted = study.dvc("repro", "--dry")
    assert {"probe", "attention", "segment", "report"} <= kinds(wanted)
    assert "prepare" not in kinds(wanted)


def test_a_run_that_collapses_fails_in_one_line_and_leaves_the_old_model(study):
    before = study.model()
    study.edit("params.yaml", "pretrain: {epochs: 2,", "pretrain: {lr: 30.0, epochs: 2,")
    study.dvc("repro", "pretrain", fails=True)
    collapsed = r"collapsed: .* \(healthy: about|.* is not finite at step \d+ \(learning rate 30\)"
    assert re.search(rf"cmid_stage: ({collapsed})", study.said), study.said[-2000:]
    assert "Traceback" not in study.said
    assert "checkpoints of other parameters or code (" in study.said
    assert study.model() == before, "DVC removed it before the stage ran"
    study.edit("params.yaml", "pretrain: {lr: 30.0, epochs: 2,", "pretrain: {epochs: 2,")
    study.dvc("repro", "pretrain")
    assert study.model() == before


def test_a_study_without_labels(study):
    path = study.folder / "params.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["study"] |= dict(probes=[], segment=[], change=[], detect=[], apply={})
    del values["datasets"]["scenes"]
    values["tasks"] = {}
    for section, key in (("health", "labelled"), ("attention", "dataset"), ("correspondence", "dataset")):
        values[section][key] = "pool"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    for stage in ("probe", "classify", "features", "labels", *TASKS):
        shutil.rmtree(study.folder / "results" / stage)  # as in a fresh clone
    study.dvc("repro", "pretrain")
    assert "note: health was" in study.said
    wanted = study.dvc("repro", "--dry")
    assert kinds(wanted) >= {"attention", "correspondence", "report"}
    floors = {f"{stage}_floor" for stage, _, _ in FLOORS}
    assert not kinds(wanted) & {"probe", "classify", "features", "labels", *TASKS, *floors}
    study.dvc("repro", "--single-item", "report")
    assert study.metrics("report")["probe"] == {}
