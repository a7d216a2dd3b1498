"Every layout is read as its makers meant it."

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from cmid.base.errors import CmidError
from cmid.data.label_figures import items_figure
from cmid.data.labelled import IGNORE

ISPRS_COLOURS = np.array(
    [
        [[255, 255, 255], [0, 0, 255], [0, 255, 255], [0, 255, 0]],
        [[255, 255, 0], [255, 0, 0], [0, 0, 0], [0, 0, 255]],
    ],
    np.uint8,
).transpose(2, 0, 1)
ISPRS_MASK = [[0, 1, 2, 3], [4, 255, 255, 1]]  # clutter and boundary are ignored
OWN_CLASSES = dict(classes=None, ignore=None)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_potsdam(study):
    "Endings of the ISPRS; eroded masks are preferred where both are there."
    whole = ISPRS_COLOURS.copy()
    whole[:, 1, 2] = 255
    entry = OWN_CLASSES | dict(format="potsdam", splits=dict(train="2_Ortho_RGB/*.tif"))
    study.put_tiff("2_Ortho_RGB/top_potsdam_2_10_RGB.tif", noise(3, 2, 4), (0, 0))
    study.put_tiff("5_Labels_all/top_potsdam_2_10_label.tif", whole)
    assert study.read("segment", **entry).mask(0).tolist() == [[0, 1, 2, 3], [4, 255, 0, 1]]

    study.put_tiff("5_Labels_all_noBoundary/top_potsdam_2_10_label_noBoundary.tif", ISPRS_COLOURS)
    labelled = study.read("segment", **entry)
    assert labelled.mask(0).tolist() == ISPRS_MASK
    assert len(labelled.classes) == 5
    assert labelled.manifest["ignored"] == dict(train=2)


def test_vaihingen(study):
    study.put_tiff("top/top_mosaic_09cm_area1.tif", noise(3, 2, 4))
    study.put_tiff("gts_eroded_for_participants/top_mosaic_09cm_area1_noBoundary.tif", ISPRS_COLOURS)
    labelled = study.read("segment", format="vaihingen", splits=dict(train="top/*"), **OWN_CLASSES)
    assert labelled.mask(0).tolist() == ISPRS_MASK


def test_tiles_of_mmsegmentation(study):
    study.put("img_dir/train/2_10_0_0.png", noise(2, 4, 3))
    study.put("ann_dir/train/2_10_0_0.png", np.array([[0, 1, 2, 3], [4, 5, 6, 1]], np.uint8))
    labelled = study.read("segment", format="potsdam", splits=dict(train="img_dir/train/*"), **OWN_CLASSES)
    assert labelled.mask(0).tolist() == [[255, 0, 1, 2], [3, 4, 255, 0]]


def test_loveda_and_a_test_split_without_masks(study):
    "A split whose labels are kept secret is reported and stored as ignored."
    for folder in ("Train/Urban", "Val/Rural", "Test/Rural"):
        study.put(f"{folder}/images_png/1.png", noise(8, 8, 3, seed=len(folder)))
    for folder in ("Train/Urban", "Val/Rural"):
        study.put(f"{folder}/masks_png/1.png", (np.arange(64) % 8).reshape(8, 8).astype(np.uint8))
    splits = {k: f"{k.title()}/*/images_png/*" for k in ("train", "val", "test")}
    labelled = study.read("segment", format="loveda", splits=splits, **OWN_CLASSES)
    train, test = int(labelled.splits["train"][0]), int(labelled.splits["test"][0])
    assert labelled.mask(train)[0].tolist() == [255, 0, 1, 2, 3, 4, 5, 6]
    assert (labelled.mask(test) == IGNORE).all()
    (finding,) = [o for o in labelled.manifest["audit"] if o["kind"] == "unlabelled"]
    assert finding["text"].startswith("images of test")
    assert items_figure(labelled).axes


def test_boxes_of_a_test_split_may_be_missing(study):
    study.fill("detect")
    (study.data / "labelTxt/test0.txt").unlink()
    labelled = study.read("detect")
    assert len(labelled.objects(0)["classes"]) == 0
    assert labelled.manifest["unlabelled"] == ["test"]


LAYOUTS = dict(levir=("A", "B", "label"), dsifn=("t1", "t2", "mask"), folders=("A", "B", "OUT"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_name_pairs_with_and_without_suffix(study, layout):
    first, second, label = LAYOUTS[layout]
    suffix = "jpg" if layout == "dsifn" else "png"
    for k in range(3):
        for folder in (first, second):
            study.put(f"{folder}/p{k}.{suffix}", noise(8, 8, 3))
        study.put(f"{label}/p{k}.png", noise(8, 8) // 128 * 255)
    study.put("list/train.txt", "p0.png\np2\n")
    study.put("list/val.txt", f"{first}/p1.png\r\n")
    labelled = study.read("change", format=layout, splits=dict(train="list/train.txt", val="list/val.txt"))
    assert [Path(o).stem for o in labelled.names] == ["p0", "p1", "p2"]
    assert {k: v.tolist() for k, v in labelled.splits.items()} == dict(train=[0, 2], val=[1])


# --- names

COMPOSED = "São"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


@pytest.mark.parametrize("image, mask", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
@pytest.mark.parametrize("pattern", [f"{COMPOSED}/images/{COMPOSED}*", f"{DECOMPOSED}/**/images/*", "list.txt"])
def test_names_are_compared_in_one_unicode_form(study, image, mask, pattern):
    "Folders, images, masks, patterns and lists, each in the other form."
    study.put(f"{image}/images/{image}1.png", noise(8, 8, 3))
    study.put(f"{image}/{mask}s/{mask}1.png", noise(8, 8) % 3)
    study.put("list.txt", f"{mask}/images/{mask}1\n")
    parts = dict(images="images", masks=f"{image}s")
    labelled = study.read("segment", splits=dict(train=pattern), parts=parts)
    assert labelled.names == [f"{image}/images/{image}1.png"]
    assert sum(labelled.manifest["histogram"]["train"]) > 0


def test_hidden_names_are_left_out(study):
    "As of images: what programs make for themselves is neither an image nor a label."
    study.fill("segment")
    for hidden in ("images/._train0.png", "images/.ipynb_checkpoints/train0.png", "masks/.train1.png"):
        study.put(hidden, b"no image")
    study.put("masks/__MACOSX/train0.png", b"no image")
    labelled = study.read("segment", splits=dict(train="images/**/*", test="images/*"))
    assert labelled.names == ["images/test0.png", "images/train0.png", "images/train1.png"]
    assert [o["kind"] for o in labelled.manifest["audit"]].count("orphan") == 0


def test_names_that_differ_in_case_only_are_refused(study):
    study.fill("segment")
    (study.data / "masks/train1.png").rename(study.data / "masks/TRAIN1.png")
    with pytest.raises(CmidError, match="masks: TRAIN1.png and its image 'train1' differ in upper and lower case"):
        study.read("segment")


def test_labels_in_other_case_are_no_unlabelled_split(study):
    study.fill("segment")
    (study.data / "masks/test0.png").rename(study.data / "masks/Test0.png")
    with pytest.raises(CmidError, match="differ in upper and lower case; rename one"):
        study.read("segment")


def test_two_images_of_one_label_are_refused(study):
    "A stray copy in another format would be a second image of the same mask."
    study.fill("segment")
    study.put_tiff("images/train1.tif", noise(3, 40, 40))
    with pytest.raises(CmidError, match="train1.png and images/train1.tif have the same label, masks/train1.png"):
        study.read("segment")
    study.put("train.txt", "train0\ntrain1\n")
    with pytest.raises(CmidError, match="names 'train1', which can be train1.png or train1.tif; write the suffix"):
        study.read("segment", splits=dict(train="train.txt"))
    study.put("train.txt", "train0\ntrain1.tif\n")
    assert study.read("segment", splits=dict(train="train.txt")).names == ["images/train0.png", "images/train1.tif"]
