"File names of any kind, lists and labels, and what the audit says of them."

import os
import sys
from unicodedata import normalize

import numpy as np
import pytest

from cmid.base.errors import CmidError
from cmid.data.listing import band_files
from cmid.data.look import class_figure, contact_sheet
from cmid.settings.dataset import Dataset


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


@pytest.mark.skipif(sys.platform != "linux", reason="file names have no control characters elsewhere")
def test_classes_are_a_line_of_text(images):
    images.classes()
    lists = images.lists(train="ash/ash_0.png a\x07sh\nbirch/birch_0.png birch\n")
    with pytest.raises(CmidError, match=r"train.txt: ash/ash_0.png: 'a\\x07sh' has a control character; take it out"):
        images.prepare(lists=lists)
    (images.path / "ash").rename(images.path / "a\tsh")
    with pytest.raises(CmidError, match=r"folders of classes: 'a\\tsh' has a control character; take it out"):
        images.prepare()
    assert images.prepare("none", labelled="none").labels is None


def test_stray_images_cost_the_others_no_label(images):
    "Above and below the class folders; where labels from folders are asked for, an image without one is an error."
    images.classes()
    images.picture("overview.png", 1)
    images.picture("ash/figures/1.png", 2)
    prepared = images.prepare()
    assert prepared.classes == ["ash", "birch", "cedar"]
    assert [prepared.source(i) for i in np.flatnonzero(prepared.labels < 0)] == ["ash/figures/1.png", "overview.png"]
    found = [o for o in prepared.audit if o["kind"] == "stray"]
    assert [(o["level"], o["examples"]) for o in found] == [("warning", ["ash/figures/1.png", "overview.png"])]
    with pytest.raises(CmidError, match="overview.png: is in no class folder"):
        images.prepare("strict", labelled="folders")
    assert "stray" not in findings(images.prepare("none", labelled="none"))


@pytest.mark.parametrize(
    "names, unused",
    [
        (["ash/0.png", "ash/1.png"], None),  # one folder
        (["ash/0.png", "birch/0.png", "c.png", "d.png"], ["ash", "birch"]),  # most images are elsewhere
        (["train/0.png", "test/0.png"], ["test", "train"]),
        (["images/0.png", "masks/0.png"], ["images", "masks"]),
        (["train/ash/0.png", "test/birch/0.png"], ["test/birch", "train/ash"]),
        (["2019/north/0.png", "2020/south/0.png"], None),
    ],
)
def test_folders_that_are_no_classes(images, names, unused):
    for i, name in enumerate(names):
        images.picture(name, i)
    prepared = images.prepare()
    assert prepared.classes is None
    assert findings(prepared).get("no-classes") == unused


HIDDEN = [".ipynb_checkpoints/a.png", "ash/._ash_0.png", ".hidden.png", "birch/__MACOSX/x.png", "@eaDir/x/y.png"]
HIDDEN += ["$RECYCLE.BIN/x.png", "System Volume Information/x.png", "lost+found/x.png", "#recycle/x.png"]


def test_hidden_and_generated_names(images):
    "They are no classes and no images, and cost nothing: the arrays are the same."
    images.classes()
    before = images.prepare("before")
    for i, name in enumerate(HIDDEN):
        images.picture(name, 100 + i)
    prepared = images.prepare()
    assert prepared.hash == before.hash
    assert [(o["level"], o["count"]) for o in prepared.audit if o["kind"] == "hidden"] == [("note", len(HIDDEN))]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_unicode_forms(images):
    "Names as a Mac's archive has them, a list as an editor writes it; folders of two forms are one class."
    for i in range(2):
        images.picture(normalize("NFD", f"São/ã_{i}.png"), i)
        images.picture(normalize("NFC", f"São/é_{i}.png"), 10 + i)
        images.picture(f"plain/{i}.png", 20 + i)
    prepared = images.prepare(lists=images.lists(train="São/ã_0.png\nã_1.png\n", test=normalize("NFD", "São/é_0.png")))
    assert prepared.classes == ["São", "plain"]
    assert [len(prepared.splits[split]) for split in ("train", "test")] == [2, 1]
    assert prepared.labels[prepared.splits["train"]].tolist() == [0, 0]
    assert [normalize("NFC", o) for o in findings(prepared)["unicode"]] == ["São/ = São/"]


@pytest.mark.skipif(sys.platform != "linux", reason="one form is one file elsewhere")
def test_two_files_that_look_the_same(images):
    "A line means the file of its own form; one that is in neither form means none of them."
    names = [normalize(form, "ã/ã.png") for form in ("NFC", "NFD")]
    for i, name in enumerate(names):
        images.picture(name, i)
    text = f"{names[0]}\n{normalize('NFC', 'ã')}/{normalize('NFD', 'ã.png')}\n"
    prepared = images.prepare(lists=images.lists(train=text, test=names[1]))
    assert [prepared.source(prepared.splits[split][0]) for split in ("train", "test")] == names
    assert len(findings(prepared)["missing"]) == 1
    assert [len(o.split(" = ")) for o in findings(prepared)["unicode"]] == [2, 2]  # the files, and their folders


def test_hidden_lists_are_no_splits(images):
    images.lists(train="a.png", **{"._train": "\0"})
    assert [*Dataset(folder="in", lists=".").splits(images.root)] == ["train"]


@pytest.mark.skipif(sys.platform != "linux", reason="one form is one file elsewhere")
def test_labels_in_two_unicode_forms_are_one_class(images):
    images.pictures(3)
    text = f"000.png São\n001.png {normalize('NFD', 'São')}\n002.png x\n"
    assert images.prepare(lists=images.lists(train=text)).classes == ["São", "x"]


@pytest.mark.skipif(sys.platform != "linux", reason="names that differ in case only are one elsewhere")
def test_names_that_differ_in_case_only(images):
    for i, name in enumerate(["Ash/0.png", "ash/1.png", "birch/x.png", "birch/X.PNG"]):
        images.picture(name, i)
    prepared = images.prepare(lists=images.lists(train="ash/1.png\nAsh/1.png\nBIRCH/2.png\n"))
    found = findings(prepared)
    assert found["case"] == ["birch/X.PNG = birch/x.png", "Ash/ = ash/"]
    assert found["missing"] == ["Ash/1.png (did you mean ash/1.png?)", "BIRCH/2.png"]


def test_a_list_that_differs_in_case_only_is_refused_with_the_name(images):
    images.picture("ash/0.png")
    with pytest.raises(CmidError, match=r"first: Ash/0.PNG x \(did you mean ash/0.png\?\)"):
        images.prepare(lists=images.lists(train="Ash/0.PNG x\n"))


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
    assert found["unknown-label"] == ["birch"]


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


def test_a_listed_file_that_is_damaged(images):
    images.classes()
    images.truncate("ash/ash_1.png", 900)
    prepared = images.prepare(lists=images.lists(train="ash_0.png\nash_1.png\nash_2.png\n"))
    assert [prepared.source(i) for i in prepared.splits["train"]] == ["ash/ash_0.png", "ash/ash_2.png"]
    assert findings(prepared)["unread"] == ["ash/ash_1.png"]


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


BANDS = "B02", "B03", "B04", "B8A"


@pytest.mark.parametrize(
    "pattern",
    [
        "patch_{i}/{band}.tif",
        "S2A_{i}_{band}.tif",
        "{band}/scene_{i}.tif",
        "x/{i}_{band}_10m.tiff",
        "p{i}/L2_{band}.TIF",
    ],
)
def test_one_file_per_band_by_name(pattern):
    names = sorted(pattern.format(i=i, band=band) for i in range(3) for band in BANDS)
    found = band_files(names)
    assert found.bands == list(BANDS)
    assert [[names[file] for file in image] for image in found.files] == [
        [pattern.format(i=i, band=band) for band in BANDS] for i in range(3)
    ]


@pytest.mark.parametrize(
    "words", ["red green blue nir", "VV VH", "band1 band2", "Band_1 Band_2", "r g b", "SWIR1 SWIR2", "b1 b11"]
)
def test_words_for_bands(words):
    names = [f"{i}/{word}.tif" for i in range(2) for word in words.split()]
    assert set(band_files(names).bands) == set(words.split())


@pytest.mark.parametrize(
    "names",
    [
        [f"{folder}/{i}.png" for folder in ("ash", "birch") for i in (1, 2, 3)],
        ["scene_1.jpg", "scene_2.jpg", "tile_1.jpg", "tile_2.jpg"],
        [f"{folder}/b{i}.png" for folder in ("train", "test") for i in range(12)],  # numbered images of class b
        [f"x{i}_{band}.tif" for i in range(1) for band in BANDS],  # one image alone
        ["ash/1_r.png", "ash/1_g.png", "birch/1_r.png", "birch/1_g.png"],
        ["north/red.png", "south/green.png", "east/blue.png"],
        ["S2_B04_a.tif", "S2_B04_b.tif"],  # one band of each image
    ],
)
def test_names_that_are_no_bands(names):
    assert band_files(sorted(names)) is None
