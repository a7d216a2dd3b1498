"Every layout is read as its makers meant it."

from pathlib import Path

import numpy as np
import pytest

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
