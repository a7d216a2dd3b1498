"File names of any kind, lists, splits and labels, and what the audit says of them."

import os
import sys

import numpy as np
import pytest

from cmid.base.errors import CmidError
from cmid.data.audit import class_figure, contact_sheet


def findings(prepared):
    "Kind -> examples."
    return {finding["kind"]: finding["examples"] for finding in prepared.audit}


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_names_of_any_kind(images):
    strange = 'a b,"c" [1:2] ü 影.png'
    data = images.picture(strange).read_bytes()
    (images.path / "two\nlines.png").write_bytes(data)
    with open(os.fsencode(images.path) + b"/\xff.png", "wb") as file:
        file.write(data)
    prepared = images.prepare()
    assert {prepared.source(i) for i in range(len(prepared))} == {strange, os.fsdecode(b"\xff.png")}
    assert "line break" in (prepared.folder / "skipped.csv").read_text()


def test_class_folders(images):
    images.classes()
    prepared = images.prepare()
    assert prepared.classes == ["ash", "birch", "cedar"]
    assert prepared.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert prepared.manifest["histogram"] == dict(all=[3, 3, 3])
    assert prepared.manifest["labelled"] == "folders"
    assert images.prepare("none", labelled="none").labels is None


def test_folders_that_are_no_classes(images):
    "One folder is no class, nor are several if an image lies beside them."
    images.picture("ash/0.png")
    assert images.prepare("one").classes is None
    images.picture("birch/0.png", 1)
    images.picture("loose.png", 2)
    assert images.prepare("loose").classes is None


def test_lists(images):
    images.classes()
    lists = images.lists(
        train="\ufeffcedar/cedar_0.png\r\n\r\nash/ash_1.png\r\nash/ash_1.png\r\n",
        test="ash\\ash_0.png\nbirch_2.png\nash/none.png\n",
    )
    prepared = images.prepare(lists=lists)
    assert {split: [prepared.source(i) for i in items] for split, items in prepared.splits.items()} == dict(
        train=["cedar/cedar_0.png", "ash/ash_1.png"], test=["ash/ash_0.png", "birch/birch_2.png"]
    )
    assert prepared.splits["train"].dtype == np.int64
    assert prepared.manifest["histogram"] == dict(all=[3, 3, 3], train=[1, 0, 1], test=[1, 1, 0])
    found = findings(prepared)
    assert found["missing"] == ["ash/none.png"]
    assert found["repeated"] == ["ash/ash_1.png"]
    assert found["unknown label"] == ["birch"]


def test_numbered_labels_take_the_folders_names(images):
    images.classes()
    numbers = dict(ash=2, birch=0, cedar=1)
    lines = [f"{name}/{name}_{i}.png {number}\n" for name, number in numbers.items() for i in range(2)]
    prepared = images.prepare(lists=images.lists(train="".join(lines)))
    assert prepared.classes == ["birch", "cedar", "ash"]
    assert prepared.labels[prepared.splits["train"]].tolist() == [2, 2, 0, 0, 1, 1]
    assert (prepared.labels == -1).sum() == 3
    assert "unlabelled" in findings(prepared)


def test_labels_that_are_words(images):
    images.classes()
    prepared = images.prepare(lists=images.lists(train="ash_0.png leaf\nash_1.png wood\ncedar_1.png wood\n"))
    assert prepared.classes == ["leaf", "wood"]
    assert prepared.labels[prepared.splits["train"]].tolist() == [0, 1, 1]
    assert prepared.hash != images.prepare("folders").hash


def test_one_image_in_several_families(images):
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


def test_a_listed_file_that_is_damaged(images):
    images.classes()
    images.truncate("ash/ash_1.png", 900)
    prepared = images.prepare(lists=images.lists(train="ash_0.png\nash_1.png\nash_2.png\n"))
    assert [prepared.source(i) for i in prepared.splits["train"]] == ["ash/ash_0.png", "ash/ash_2.png"]
    assert findings(prepared)["unread"] == ["ash/ash_1.png"]


def test_copies_across_splits(images):
    images.classes()
    (images.path / "birch/copy.png").write_bytes((images.path / "ash/ash_0.png").read_bytes())
    prepared = images.prepare(lists=images.lists(train="ash_0.png\nbirch_0.png\n", test="copy.png\n"))
    found = findings(prepared)
    assert found["duplicate"] == ["ash/ash_0.png = birch/copy.png"]
    assert found["leak"] == ["ash/ash_0.png = birch/copy.png"]
    assert "train and test" in str(prepared)


def test_splits_of_tiles(images):
    for name in "ab":
        noise = np.random.default_rng(ord(name)).integers(0, 256, (3, 64, 64), dtype="uint8")
        images.tiff(f"{name}.tif", noise)
    prepared = images.prepare(tile=32, workers=1, lists=images.lists(train="b.tif", test="a.tif"))
    assert prepared.splits["train"].tolist() == [4, 5, 6, 7]
    assert prepared.splits["test"].tolist() == [0, 1, 2, 3]
    assert "leak" not in findings(prepared)


def test_figures(images):
    images.classes()
    prepared = images.prepare()
    titles = [ax.get_title() for ax in contact_sheet(prepared, 5).axes]
    assert [title for title in titles if title] == ["ash", "ash", "birch", "cedar", "cedar"]
    assert [label.get_text() for label in class_figure(prepared).axes[0].get_yticklabels()] == prepared.classes


def test_figures_of_one_image_without_classes(images):
    images.tiff("a.tif", np.ones((2, 9, 9), "uint8"))
    prepared = images.prepare()
    assert len(contact_sheet(prepared).axes) == 1
    with pytest.raises(CmidError, match="no classes"):
        class_figure(prepared)
