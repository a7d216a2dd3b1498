"Images that two splits share, whatever the splits are called."

from itertools import combinations

import numpy as np
import pytest

from cmid.base.errors import CmidError
from cmid.data.audit import duplicate_findings, label_findings, overlap_findings
from cmid.data.look import audit_table

NAMES = [f"{i}.png" for i in range(100)]


def levels(**splits):
    "Levels of the findings about files in two splits."
    return [o["level"] for o in overlap_findings(splits, NAMES)]


def leaks(**splits):
    "Texts of the leaks where files 0 and 1 are equal."
    sha = np.array([7, 7, 8, 9], "u8")
    found = duplicate_findings(np.arange(4), sha, NAMES, {k: np.array(v) for k, v in splits.items()})
    return [(o["text"].removeprefix("exact copies across "), o["examples"]) for o in found if o["kind"] == "leak"]


@pytest.mark.parametrize(
    "pair",
    ["train test", "train validation", "training valid", "dev test", "train_80 test_20", "train80 test20", "TRAIN Test"]
    + ["fold1_train fold1_test", "train-1 val-1", "train_ucm test_ucm"],
)
def test_the_parts_of_one_division_share_no_file(pair):
    first, second = pair.split()
    with pytest.raises(CmidError, match=f"lists {first} and {second} have 1 image in common, the first is '3.png'"):
        levels(**{first: [1, 3], second: [3, 4]})
    assert leaks(**{first: [0, 2], second: [1, 3]}) == [(f"{first} and {second}", ["0.png = 1.png"])]


@pytest.mark.parametrize(
    "pair", ["train holdout", "query gallery", "train_80 test", "a b", "2019 2020", "trainval test"]
)
def test_any_two_splits_are_compared(pair):
    first, second = pair.split()
    assert levels(**{first: [1, 3], second: [3, 4]}) == ["warning"]
    assert leaks(**{first: [0, 2], second: [1, 2]}) == [(f"{first} and {second}", ["0.png = 1.png"])]


@pytest.mark.parametrize(
    "pair",
    ["train_10 train_50", "train_1 test_2", "fold1_train fold2_test", "val trainval", "train pretrain", "val valid"],
)
def test_splits_that_may_share_files(pair):
    "A note where they do; where they do not, they are two parts as well, and a copy is a leak."
    first, second = pair.split()
    assert levels(**{first: [1, 3], second: [3, 4]}) == ["note"]
    assert leaks(**{first: [0, 2], second: [1, 2]}) == []
    assert leaks(**{first: [0, 2], second: [1, 3]}) == [(f"{first} and {second}", ["0.png = 1.png"])]


def test_three_parts_that_add_up_to_100():
    assert levels(train_60=[1, 2], val_20=[3], test_20=[2]) == ["warning"]
    assert levels(train_60=[1, 2], test_30=[2]) == ["note"]


def test_a_file_that_is_in_both_is_no_copy_of_itself():
    assert leaks(a=[0, 2], b=[0, 3]) == []
    assert leaks(a=[0, 1], b=[0, 3]) == [("a and b", ["1.png = 0.png"])]


def test_counts_are_those_of_sets():
    "Of many lists, over more files than are compared at a time."
    rng = np.random.default_rng(0)
    splits = {f"s{chr(97 + i)}": rng.choice(200_000, 50_000, replace=False) for i in range(8)}
    due = [len(set(splits[a].tolist()) & set(splits[b].tolist())) for a, b in combinations(splits, 2)]
    assert [o["count"] for o in overlap_findings(splits, range(200_000))] == due


@pytest.mark.parametrize("split, found", [("validation", ["water"]), ("holdout", ["water"]), ("train_2", None)])
def test_classes_that_training_lacks(split, found):
    labels = np.array([0, 1, -1])
    kinds = {
        o["kind"]: o["examples"] for o in label_findings(["field", "water"], labels, {"train_1": [0], split: [1, 2]})
    }
    assert kinds.get("unknown-label") == found


def test_nested_lists(images):
    images.classes()
    lists = images.lists(
        train_20="ash_0.png\n",
        test_80="ash_1.png\nash_2.png\n",
        train_50="ash_0.png\nash_1.png\n",
        test_50="ash_2.png\n",
    )
    prepared = images.prepare(lists=lists)
    assert len(prepared) == 9
    assert prepared.splits["train_50"].tolist() == [0, 1]
    assert [finding["kind"] for finding in prepared.audit].count("overlap") == 3


@pytest.mark.parametrize("name", ["test", "validation", "holdout"])
def test_copies_across_splits(images, name):
    images.classes()
    (images.path / "birch/copy.png").write_bytes((images.path / "ash/ash_0.png").read_bytes())
    lists = images.lists(train="ash_0.png\nbirch_0.png\n", **{name: "copy.png\n"})
    prepared = images.prepare(lists=lists)
    found = {finding["kind"]: finding["examples"] for finding in prepared.audit}
    assert found["duplicate"] == [f"ash/ash_0.png (train) = birch/copy.png ({name})"]
    assert found["leak"] == ["ash/ash_0.png = birch/copy.png"]
    assert f"train and {name}" in audit_table(prepared.manifest)


def test_splits_of_tiles(images):
    for name in "ab":
        noise = np.random.default_rng(ord(name)).integers(0, 256, (3, 64, 64), dtype="uint8")
        images.tiff(f"{name}.tif", noise)
    prepared = images.prepare(tile=32, workers=1, lists=images.lists(train="b.tif", test="a.tif"))
    assert prepared.splits["train"].tolist() == [4, 5, 6, 7]
    assert prepared.splits["test"].tolist() == [0, 1, 2, 3]
    assert "leak" not in {finding["kind"] for finding in prepared.audit}
