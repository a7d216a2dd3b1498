"Intervals and differences by hand, and results that are damaged or not of the same images."

import json
import re

import pytest

from cmid.base.errors import CmidError
from cmid.base.files import write_json
from cmid.base.scores import unpack_answers, wilson
from cmid.study import comparisons
from cmid.study.comparisons import accuracy_rows, probe_rows, score_rows, task_rows
from cmid.study.examples import example_results

DATASET = dict(segment="land", change="dates", detect="objects")


def test_intervals_by_hand(made):
    # 306 of 500: z = 1.96, p = .612: centre (p + z^2/2n) / (1 + z^2/n) = .611146, half width .042566
    setting = ("cmid-resnet18", "linear", 1.0)
    row = next(o for o in probe_rows(made) if (o["init"], o["probe"], o["fraction"]) == setting)
    assert row["correct"] == 306
    assert (row["low"], row["high"]) == wilson(306, 500)
    assert abs((row["low"] + row["high"]) / 2 - 0.611146) < 1e-5
    assert abs((row["high"] - row["low"]) / 2 - 0.042566) < 1e-5


def linear_differences(folder):
    "Differences of the linear probe with all labels, by baseline"
    rows = [o for o in probe_rows(folder) if o["init"] == "cmid-resnet18" and o["correct"] == 306]
    return {o["baseline"]: o for o in rows[0]["against"]}


def test_difference_by_hand(made):
    "Two images more, one right for each: of 502, n10 + 1 and n01 + 1 differ, d is their difference over 502."
    found = linear_differences(made)
    assert list(found) == ["random-resnet18", "imagenet-resnet18"]
    files = [f"results/probe/scenes/{init}/answers.json" for init in ("cmid-resnet18", "random-resnet18")]
    texts = [json.loads((made / file).read_text())["linear"]["1.0"] for file in files]
    a, b = (unpack_answers(text, 500) for text in texts)
    wins, losses = int((a & ~b).sum()) + 1, int((b & ~a).sum()) + 1
    mean = (wins - losses) / 502
    half = 1.964711 * ((wins + losses - 502 * mean**2) / 501 / 502) ** 0.5  # Student's t of 501
    assert found["random-resnet18"]["difference"] == pytest.approx(0.202)
    assert found["random-resnet18"]["low"] == pytest.approx(mean - half, abs=1e-6)
    assert found["random-resnet18"]["high"] == pytest.approx(mean + half, abs=1e-6)


@pytest.mark.parametrize("spoilt", ["no file", "other images", "no such share"])
def test_difference_of_counts_by_hand(study, change, spoilt):
    file = study / "results/probe/scenes/random-resnet18/answers.json"
    if spoilt == "no file":
        file.unlink()
    elif spoilt == "other images":
        change("probe/scenes/random-resnet18/answers.json", images="1" * 64)
    else:
        change("probe/scenes/random-resnet18/answers.json", linear={})
    found = linear_differences(study)
    (low, high), (other_low, other_high) = wilson(306, 500), wilson(205, 500)
    below = ((0.612 - low) ** 2 + (other_high - 0.41) ** 2) ** 0.5
    above = ((high - 0.612) ** 2 + (0.41 - other_low) ** 2) ** 0.5
    assert not found["random-resnet18"]["paired"]
    assert found["imagenet-resnet18"]["paired"]
    assert abs(found["random-resnet18"]["low"] - (0.202 - below)) < 1e-12
    assert abs(found["random-resnet18"]["high"] - (0.202 + above)) < 1e-12


def test_answers_of_another_run_are_refused(study, change):
    other = study / "results/probe/scenes/cmid-resnet18/answers.json"
    (study / "results/probe/scenes/random-resnet18/answers.json").write_text(other.read_text())
    with pytest.raises(CmidError, match="random-resnet18/answers.json: .* correct answers, but metrics.json"):
        probe_rows(study)


def test_other_labels_are_not_compared(study, change):
    change("probe/scenes/random-resnet18/run.json", parameters=dict(train="train_10", test="test"))
    assert list(linear_differences(study)) == ["imagenet-resnet18"]


def test_results_of_another_study_are_not_mixed_in(study):
    (study / "results/probe/scenes/cmid-resnet18").rename(study / "results/probe/scenes/byol-resnet18")
    others = {"random-resnet18", "imagenet-resnet18", "cmid-resnet50", "imagestats", "randomconv"}
    assert {o["init"] for o in probe_rows(study)} == others


def test_other_images_are_not_compared(study, change):
    path = "features/scenes/random-resnet18/embedding.json"
    label = json.loads((study / "results" / path).read_text())["label"]
    change(path, label=label[1:] + [0])
    rows = {o["init"]: o for o in score_rows(study, "features")}
    assert [o["baseline"] for o in rows["cmid-resnet18"]["against"]] == ["imagenet-resnet18"]


def test_other_data_are_not_compared(study, change):
    change("segment/land/random-resnet18/run.json", data="other")
    rows = {o["init"]: o for o in task_rows(study, "segment")}
    assert [o["baseline"] for o in rows["cmid-resnet18"]["against"]] == ["imagenet-resnet18"]


SETTINGS = dict(train="train_20", test="test_80", neighbours=20, regularisation=[0.1, 1.0], epochs=5, images=64)


@pytest.fixture
def settings(study):
    "Record settings of each run of a stage; those of the random start are other ones."

    def recorded(stage, **other):
        for file in (study / "results" / stage).rglob("run.json"):
            mine = SETTINGS | (other if file.parent.name == "random-resnet18" else {})
            write_json(file, json.loads(file.read_text()) | dict(parameters=mine))

    return recorded


def baselines_of(rows):
    "Baselines that the pretrained backbone is compared with"
    return {o["baseline"] for row in rows if row["init"] == "cmid-resnet18" for o in row["against"]}


@pytest.mark.parametrize("other", [dict(neighbours=5), dict(metric="euclidean"), dict(scaler="standard")])
def test_knn_of_other_settings_is_not_compared(study, settings, other):
    settings("probe", **other)
    assert baselines_of(o for o in probe_rows(study) if o["probe"] == "knn") == {"imagenet-resnet18"}


def test_settings_that_a_score_does_not_depend_on_may_differ(study, settings):
    settings("probe", neighbours=5, batch=8, fractions=[1.0])
    both = {"random-resnet18", "imagenet-resnet18"}
    assert baselines_of(o for o in probe_rows(study) if o["probe"] == "linear") == both
    settings("probe", metric="cosine", vote="weighted", scaler="none")  # as runs did that do not name them
    assert baselines_of(probe_rows(study)) == both


@pytest.mark.parametrize("stage, other", [("classify", "epochs"), ("segment", "epochs"), ("correspondence", "images")])
def test_runs_of_other_settings_are_not_compared(study, settings, stage, other):
    settings(stage, **{other: 7})
    rows = dict(classify=accuracy_rows, segment=task_rows, correspondence=score_rows)[stage](study, stage)
    assert baselines_of(rows) == {"imagenet-resnet18"}


def test_examples_do_not_replace_results(study):
    with pytest.raises(CmidError, match="results already"):
        example_results(study)


def segment_damages(metrics):
    return [
        (dict(per_image=[[1, 2]]), "per_image has another number of images"),
        (dict(per_image=[[1, 2]] * 8), "per_image has another number of classes"),
        (dict(per_class=None), "per_class"),
        (dict(per_class={}), "per_class has other classes"),
        (dict(miou="x", per_image="x"), "per_image"),
    ]


def change_damages(metrics):
    head = metrics["heads"]["bit"]
    return [
        (dict(heads=dict(foo=head)), "heads.foo"),
        (dict(heads=3), "heads"),
        (dict(heads=dict(bit=head | dict(per_image=[[1, 2]] * 8))), "heads.bit.per_image.0"),
        (dict(heads=dict(bit=head | dict(per_image=[]))), "per_image has another number of images"),
    ]


def detect_damages(metrics):
    matches = metrics["matches"]
    name = next(iter(matches))
    return [
        (dict(images=3), "truths has another number of images"),
        (dict(matches=matches | {name: [[99, 0.9, 1]]}), "matches names images that are not there"),
        (dict(matches=matches | {name: [[-1, 0.9, 1]]}), "matches names images that are not there"),
        (dict(metric="foo"), "metric"),
        (dict(truths={}), "have different classes"),
        (dict(truths={}, matches={}), "have different classes"),
        (dict(matches=[3]), "matches"),
    ]


DAMAGES = dict(segment=segment_damages, change=change_damages, detect=detect_damages)


@pytest.mark.parametrize("stage", DATASET)
def test_damaged_scores_are_named(study, stage):
    file = study / "results" / stage / DATASET[stage] / "cmid-resnet18/metrics.json"
    metrics = json.loads(file.read_text())
    for damage, said in DAMAGES[stage](metrics):
        write_json(file, metrics | damage)
        line = rf"cmid-resnet18/metrics.json: is damaged \(.*{re.escape(said)}.*\); run its stage again"
        with pytest.raises(CmidError, match=line):
            task_rows(study, stage)
    write_json(file, {k: v for k, v in metrics.items() if k != "images"})
    with pytest.raises(CmidError, match="metrics.json: has no images; run its stage again"):
        task_rows(study, stage)


def test_scores_are_counted_once_as_long_as_files_stay(study, change, monkeypatch):
    counted = []
    bootstrap = comparisons.bootstrap_scores

    def counting(stage, *args):
        counted.append(stage)
        return bootstrap(stage, *args)

    monkeypatch.setattr(comparisons, "bootstrap_scores", counting)
    for _ in range(2):
        for stage in DATASET:
            task_rows(study, stage)
    assert len(counted) == 4 * (1 + 2 + 1) + 2  # four backbones; change has two heads; two U-Nets
    task_rows(study, "detect")[0]["init"] = "mine"
    assert task_rows(study, "detect")[0]["init"] == "cmid-resnet18"
    change("detect/objects/cmid-resnet18/metrics.json", scored_on_training=True)
    assert task_rows(study, "detect")[0]["on_training"]
    assert len(counted) == 4 * (1 + 2 + 1) + 2 + 4
