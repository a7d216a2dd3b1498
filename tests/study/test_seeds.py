"A study of several seeds: what is compared with what, what is left out, and that every doubt is said."

import json
import shutil

import numpy as np
import pytest
import yaml

from cmid.base.errors import CmidError
from cmid.base.files import load_yaml, write_json, write_whole
from cmid.base.paired import answer_interval, student_interval
from cmid.base.scores import pack_answers, unpack_answers
from cmid.study.examples import as_seed
from cmid.study.seeds import cost_table, seed_rows, seed_table

LINEAR = "linear probe, accuracy"


@pytest.fixture
def seeds(study, tmp_path):
    "Three runs with the same made-up results; two inits were pretrained, each as long."
    for init in ("cmid-resnet18", "cmid-resnet50"):
        record(study, init)
    others = {seed: shutil.copytree(study, tmp_path / f"seed-{seed}") for seed in (1, 2)}
    for seed, folder in others.items():
        as_seed(folder, seed)
    return {0: study} | others


@pytest.fixture(scope="module")
def equal(made, tmp_path_factory):
    "Three runs with the same scores, not to be changed."
    folder = tmp_path_factory.mktemp("equal")
    others = {seed: shutil.copytree(made, folder / f"seed-{seed}") for seed in (1, 2)}
    for seed, other in others.items():
        as_seed(other, seed)
    return {0: made} | others


def record(folder, init, **settings):
    "What a pretraining says of itself"
    parameters = dict(dataset="pool", split=None, epochs=5, batch=8) | settings
    run = dict(parameters=parameters, images=80, images_per_s=4.0, seconds=100, device="made up")
    write_json(folder / f"results/pretrain/{init}/run.json", run)


def answer(folder, init, right):
    "Other answers of the linear probe with all labels"
    at = folder / f"results/probe/scenes/{init}"
    for name, change in (("metrics", dict(correct=int(right.sum()), accuracy=float(right.mean()))), ("answers", None)):
        content = json.loads((at / f"{name}.json").read_text())
        if change:
            content["linear"]["1.0"] |= change
        else:
            content["linear"]["1.0"] = pack_answers(right)
        write_json(at / f"{name}.json", content)


def against(seeds, task=LINEAR, init="cmid-resnet18", baseline="random-resnet18", reference=None):
    "One comparison"
    row = next(o for o in seed_rows(seeds, reference) if (o["task"], o["init"]) == (task, init))
    return next(o for o in row["against"] if o["baseline"] == baseline)


def test_answers_are_paired_over_seeds_and_images(seeds):
    rng, drawn = np.random.default_rng(0), {}
    for init, skill in (("cmid-resnet18", 0.7), ("random-resnet18", 0.6)):
        drawn[init] = rng.random((3, 500)) < skill
        for folder, right in zip(seeds.values(), drawn[init]):
            answer(folder, init, right)
    found = against(seeds)
    expected = answer_interval(drawn["cmid-resnet18"], drawn["random-resnet18"])
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(expected)
    assert (found["seeds"], found["notes"]) == (3, [])
    assert found["says"] == ("better" if expected[1] > 0 else "the data do not decide")


def test_every_score_is_compared_with_the_baselines_of_its_architecture(equal):
    rows = seed_rows(equal)
    for row in rows:
        own = row["init"] == "cmid-resnet18"
        assert [o["baseline"] for o in row["against"]] == ["random-resnet18", "imagenet-resnet18"] * own
        assert [o["seeds"] for o in row["against"]] == [3, 3] * own
    assert len({row["task"] for row in rows}) == 10


def test_a_reference_is_compared_with_everything_but_itself(equal):
    for row in seed_rows(equal, "cmid-resnet18"):
        assert [o["baseline"] for o in row["against"]] == ["cmid-resnet18"] * (row["init"] != "cmid-resnet18")
    worse = against(equal, init="random-resnet18", baseline="cmid-resnet18", reference="cmid-resnet18")
    better = against(equal)
    assert worse["says"], better["says"] == ("worse", "better")
    assert worse["mean"] == pytest.approx(-better["mean"])


def test_an_unknown_reference_is_refused(equal):
    with pytest.raises(CmidError, match="reference: 'cmid-resnet8' is not an init of the study .did you mean"):
        seed_rows(equal, "cmid-resnet8")


def test_a_floor_is_a_reference_only_where_it_was_run(seeds):
    assert {row["task"] for row in seed_rows(seeds, "unet") if row["against"]} >= {"segmentation, mIoU"}
    values = load_yaml(seeds[0] / "params.yaml")
    values["study"] |= dict(floors=dict(probe=["imagestats"], segment=[], change=[]), apply={})
    write_whole(seeds[0] / "params.yaml", yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(CmidError, match="reference: 'unet' is not an init of the study"):
        seed_rows(seeds, "unet")


def test_one_seed_says_so(equal):
    one = against({0: equal[0]})
    assert one["says"] == "one seed: nothing is known about seeds"
    assert one["low"] > 0  # although the images alone would decide
    assert "one seed" in seed_table(seed_rows({0: equal[0]}))


@pytest.mark.parametrize(
    "stage, task, words",
    [
        ("segment/land", "segmentation, mIoU", "data"),
        ("change/dates", "change, BIT, F1", "data"),
        ("probe/scenes", LINEAR, "data"),
        ("correspondence", "correct matches", "data"),
    ],
)
def test_a_seed_with_other_data_is_left_out_and_named(seeds, stage, task, words):
    file = seeds[1] / f"results/{stage}/random-resnet18/run.json"
    write_json(file, json.loads(file.read_text()) | dict(data="other"))
    found = against(seeds, task)
    assert found["seeds"] == 2
    assert found["notes"][0] == f"seed 1 is left out: the two differ in their {words}"


def test_what_was_never_scored_on_the_same_data_is_not_comparable(seeds):
    for folder in seeds.values():
        file = folder / "results/probe/scenes/random-resnet18/run.json"
        write_json(file, json.loads(file.read_text()) | dict(parameters=dict(train="train_10", test="test")))
    found = against(seeds)
    assert (found["says"], found["mean"], found["seeds"]) == ("not comparable", None, 0)
    assert all("training split, test split" in note for note in found["notes"])


def test_seeds_of_other_data_say_so_and_are_unpaired(seeds):
    for init in ("cmid-resnet18", "random-resnet18"):
        at = seeds[2] / f"results/probe/scenes/{init}"
        write_json(at / "run.json", json.loads((at / "run.json").read_text()) | dict(data="other"))
        write_json(at / "answers.json", json.loads((at / "answers.json").read_text()) | dict(images="1" * 64))
    found = against(seeds)
    assert found["seeds"] == 3
    assert [note.split()[0] for note in found["notes"]] == ["answers", "the"]
    assert found["high"] - found["low"] > against({0: seeds[0], 1: seeds[1]})["high"] - found["low"]


def cut(folder, init, correct, images):
    "Probes that were tested on other images, of which they kept counts alone"
    at = folder / f"results/probe/scenes/{init}"
    (at / "answers.json").unlink()
    content = json.loads((at / "metrics.json").read_text())
    for score in [*content["linear"].values(), *content["knn"].values()]:
        score |= dict(correct=correct, accuracy=correct / images)
    write_json(at / "metrics.json", content | dict(test_images=images))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_seeds_with_other_numbers_of_test_images_count_as_much(seeds, order):
    for i, (right, other, images) in zip(order, ((600, 500, 1000), (80, 40, 100))):
        cut(seeds[i], "cmid-resnet18", right, images)
        cut(seeds[i], "random-resnet18", other, images)
    found = against({seed: seeds[seed] for seed in (0, 1)})
    assert found["mean"] == pytest.approx(0.25)
    assert found["seeds"] == 2
    assert found["notes"][1] == "the seeds do not share their number of test images"


def test_a_seed_of_other_settings_is_left_out_and_named(seeds):
    for folder in seeds.values():
        for init in ("cmid-resnet18", "random-resnet18"):
            file = folder / f"results/probe/scenes/{init}/run.json"
            other = dict(neighbours=5, metric="euclidean") if (folder, init[0]) == (seeds[1], "r") else {}
            parameters = dict(train="a", test="b", neighbours=20) | other
            write_json(file, json.loads(file.read_text()) | dict(parameters=parameters))
    assert against(seeds)["notes"] == []  # of the linear probe, which has no neighbours
    found = against(seeds, "kNN, accuracy")
    assert found["seeds"] == 2
    assert found["notes"] == ["seed 1 is left out: the two differ in their settings (metric, neighbours)"]


def test_runs_that_kept_counts_only_say_so(seeds):
    (seeds[1] / "results/probe/scenes/random-resnet18/answers.json").unlink()
    before = against({0: seeds[0], 2: seeds[2]})
    found = against(seeds)
    assert found["notes"] == ["answers were not kept for the same images, so images are unpaired"]
    assert found["high"] - found["low"] > before["high"] - before["low"]


def test_purity_of_images_chosen_by_each_seed_has_the_interval_of_seeds(seeds):
    for seed, folder in seeds.items():
        for init in ("cmid-resnet18", "random-resnet18"):
            file = folder / f"results/features/scenes/{init}/embedding.json"
            content = json.loads(file.read_text())
            moved = np.roll(content["label"], seed).tolist()
            purity = (np.array(content["purity"]) + 0.01 * seed * (init[0] == "c")).tolist()
            write_json(file, content | dict(label=moved, purity=purity))
            score = json.loads((file.parent / "metrics.json").read_text())
            score |= {key: score[key] + np.mean(purity) - score["purity"] for key in ("low", "high", "purity")}
            write_json(file.parent / "metrics.json", score)
    found = against(seeds, "purity of the feature space")
    values = [against({0: seeds[0]}, "purity of the feature space")["mean"] + 0.01 * seed for seed in seeds]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(student_interval(values))


def test_purity_of_other_images_is_not_comparable(seeds):
    file = seeds[1] / "results/features/scenes/random-resnet18/embedding.json"
    content = json.loads(file.read_text())
    write_json(file, content | dict(label=content["label"][1:] + [0]))
    found = against(seeds, "purity of the feature space")
    assert (found["says"], found["mean"]) == ("not comparable", None)
    assert found["notes"] == ["the two have no score of the same images"]


@pytest.mark.parametrize(
    "change, said", [(dict(purity=0.99, high=1.0), "0.99, but its images give"), (dict(low=0.9), "0.9 to")]
)
def test_a_purity_that_its_images_or_its_interval_contradict_is_refused(seeds, change, said):
    file = seeds[1] / "results/features/scenes/cmid-resnet18/metrics.json"
    write_json(file, json.loads(file.read_text()) | change)
    with pytest.raises(CmidError, match=f"seed-1/.*metrics.json: purity is .*{said}"):
        seed_rows(seeds)


def test_the_runs_of_one_seed_are_not_counted_twice(seeds):
    with pytest.raises(CmidError, match="run.json: run.seed is 0, among the results of seed 1; run them again"):
        seed_rows({0: seeds[0], 1: seeds[0]})


def test_unequal_cost_is_noted(seeds):
    reference = dict(init="cmid-resnet50", baseline="cmid-resnet18", reference="cmid-resnet18")
    assert against(seeds, **reference)["notes"] == []
    record(seeds[1], "cmid-resnet50", epochs=50)
    assert against(seeds, **reference)["notes"] == [
        "unequal cost: 400 / 4,000 images seen in pretraining against 400",
    ]
    for folder in seeds.values():
        record(folder, "cmid-resnet50", batch=16)
    assert against(seeds, **reference)["notes"] == ["unequal cost: 16 images in a batch against 8"]
    shutil.rmtree(seeds[2] / "results/pretrain/cmid-resnet50")
    assert against(seeds, **reference)["notes"] == ["its pretraining is not recorded"]
    assert against(seeds)["notes"] == []  # a baseline was not pretrained here


def test_what_pretraining_cost(seeds):
    record(seeds[1], "cmid-resnet50", epochs=50)
    lines = cost_table(seeds).splitlines()
    assert lines[2:] == [
        "| cmid-resnet18 | pool | 400 | 8 | 100 | 4 | made up | ? |",
        "| cmid-resnet50 | pool | 400 / 4,000 | 8 | 100 | 4 | made up | ? |",
    ]


def test_a_seed_without_the_run_is_counted(seeds):
    shutil.rmtree(seeds[2] / "results/probe/scenes/cmid-resnet18")
    rows = seed_rows(seeds)
    row = next(o for o in rows if (o["task"], o["init"]) == (LINEAR, "cmid-resnet18"))
    assert (len(row["scores"]), row["against"][0]["seeds"]) == (2, 2)
    line = next(line for line in seed_table(rows).splitlines() if f"{LINEAR} | cmid-resnet18" in line)
    assert "61.2 ± 0.0 (2 of 3 seeds)" in line


def test_answers_of_examples_are_as_many_as_their_metrics_say(equal):
    content = json.loads((equal[0] / "results/probe/scenes/cmid-resnet18/answers.json").read_text())
    assert unpack_answers(content["linear"]["1.0"], 500).sum() == 306


def test_a_baseline_of_another_architecture_names_it(seeds):
    for folder in seeds.values():
        values = load_yaml(folder / "params.yaml")
        values["study"]["backbones"] = ["resnet50"]
        values["study"]["inits"] = ["cmid-resnet50", "random-resnet18", "imagenet-resnet18"]
        values["study"]["apply"] = {}
        write_whole(folder / "params.yaml", yaml.safe_dump(values, sort_keys=False))
    rows = seed_rows(seeds, "random-resnet18")
    assert {row["init"]: row.get("other") for row in rows}["imagenet-resnet18"] == "resnet18"
