"Labels where an image has no value are ignored, counted and reported."

import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp

from cmid.base.errors import CmidError
from cmid.data import label_audit, label_items, statistics
from cmid.data.label_figures import items_figure
from cmid.data.labelled import IGNORE
from cmid.settings.labels import LABEL_WARNINGS

ONE_TWO = dict(classes=dict(land=1, water=2), ignore=[])


def noise(*shape, seed=0, dtype="uint8"):
    return np.random.default_rng(seed).integers(1, 200, shape).astype(dtype)


def findings(labelled, kind):
    return [o for o in labelled.manifest["audit"] if o["kind"] == kind]


def finding(labelled, kind):
    (only,) = findings(labelled, kind)
    return only


def half_invalid(study, name, dtype="uint16", bands=3, **options):
    "An image without a value in its left half, and a mask of class 1, in which a square is class 2."
    image = noise(bands, 64, 64, seed=len(name), dtype=dtype)
    image[:, :, :32] = 0
    mask = np.ones((64, 64), np.uint8)
    mask[20:40, 40:60] = 2
    study.put_tiff(f"images/{name}.tif", image, **(options or dict(nodata=0)))
    study.put(f"masks/{name}.png", mask)


@pytest.mark.parametrize("dtype, bands", [("uint16", 3), ("uint8", 3), ("float32", 1), ("uint8", 5)])
def test_masks(study, dtype, bands):
    "The left half of each mask is ignored; both splits are counted."
    for name in study.names:
        half_invalid(study, name, dtype, bands)
    labelled = study.read("segment", **ONE_TWO)
    for i in range(3):
        mask = labelled.mask(i)
        assert (mask[:, :32] == IGNORE).all()
        assert (mask[:, 32:] < 2).all()
    assert labelled.manifest["histogram"]["train"] == [2 * (64 * 32 - 400), 800]
    assert labelled.manifest["ignored"] == labelled.manifest["over_invalid"] == dict(train=4096, test=2048)
    found = finding(labelled, "label-over-invalid")
    assert (found["level"], found["count"]) == ("warning", 3 * 2048)
    assert "50.00%" in found["text"]
    assert found["examples"][0] == "images/test0.tif 2,048"
    assert "ignored 4,096, 4,096 of them where an image has no value" in str(labelled)
    assert "ignored, no value" in [o.get_text() for o in items_figure(labelled).legends[0].texts]


def test_pixels_of_some_bands_keep_their_label(study):
    "A pixel has no value where all its bands have none."
    image = noise(2, 20, 20, dtype="uint16")
    image[:, 0, :3] = 0
    image[0, 5, :7] = 0
    for name in study.names:
        study.put_tiff(f"images/{name}.tif", image, nodata=0)
        study.put(f"masks/{name}.png", np.ones((20, 20), np.uint8))
    labelled = study.read("segment", **ONE_TWO)
    assert labelled.manifest["over_invalid"] == dict(train=6, test=3)
    assert finding(labelled, "label-over-invalid")["level"] == "note"  # less than a hundredth
    assert finding(labelled, "partly-invalid")["count"] == 21
    assert finding(labelled, "invalid-pixels")["count"] == 9
    assert (labelled.image(0)[0, 5, :7] == 0).all()
    assert (labelled.mask(0)[5] == 0).all()


def test_ignored_pixels_are_not_counted_again(study):
    for name in study.names:
        half_invalid(study, name)
        study.put(f"masks/{name}.png", np.where(np.arange(64) < 30, 9, 1)[None].repeat(64, 0).astype(np.uint8))
    labelled = study.read("segment", classes=dict(land=1, water=2), ignore=[9])
    assert labelled.manifest["over_invalid"]["test"] == 2 * 64
    assert labelled.manifest["ignored"]["test"] == 32 * 64


def test_blocks_of_rows_change_nothing(study, monkeypatch):
    for name in study.names:
        half_invalid(study, name)
    study.read("segment", **ONE_TWO)
    before = study.stored()
    monkeypatch.setattr(label_items, "PIXELS_AT_ONCE", 640)
    study.read("segment", **ONE_TWO)
    assert study.stored() == before


def test_either_date_of_a_pair(study):
    study.fill("change")
    for name in study.names:
        for date, hole in (("A", np.s_[:, :4]), ("B", np.s_[:, :, :5])):
            image = noise(3, 40, 40)
            image[hole] = 0
            (study.data / f"{date}/{name}.png").unlink()
            study.put_tiff(f"{date}/{name}.tif", image, nodata=0)
    labelled = study.read("change")
    mask = labelled.mask(0)
    assert (mask[:4] == IGNORE).all()
    assert (mask[:, :5] == IGNORE).all()
    assert (mask[4:, 5:] < 2).all()
    assert labelled.manifest["over_invalid"]["test"] == 40 * 40 - 36 * 35
    assert "ignored, no value" in [o.get_text() for o in items_figure(labelled).legends[0].texts]


def test_boxes(study):
    "An object is removed where at least half of what is inside the image has no value."
    image = noise(3, 40, 40, dtype="uint8")
    image[:, :, :20] = 0
    boxes = {5: True, 15: True, 16: False, 25: False, -8: True}  # left edge of a box of 10 px -> removed
    lines = [f"{x} 2 {x + 10} 2 {x + 10} 8 {x} 8 ship 0" for x in boxes]
    for name in study.names:
        study.put_tiff(f"images/{name}.tif", image, nodata=0)
        study.put(f"labelTxt/{name}.txt", "\n".join(lines))
    labelled = study.read("detect")
    assert labelled.objects(0)["polygons"][:, 0, 0].tolist() == [x for x, removed in boxes.items() if not removed]
    assert labelled.manifest["ignored"] == labelled.manifest["over_invalid"] == dict(train=6, test=3)
    assert labelled.manifest["histogram"]["test"] == [2, 0]
    found = finding(labelled, "label-over-invalid")
    assert (found["level"], found["count"], found["examples"][0]) == ("warning", 9, "images/test0.tif 3")


def test_images_without_holes_have_no_findings(study):
    labelled = study.fill("segment").read("segment")
    assert labelled.manifest["over_invalid"] == dict(train=0, test=0)
    kinds = {"label-over-invalid", "invalid-pixels", "partly-invalid", "mask-no-value", "nodata-class"}
    assert not kinds & {o["kind"] for o in labelled.manifest["audit"]}


# --- values that params.yaml declares


def test_declared_nodata(study):
    "labels.nodata stands beside what the files say: stretch and labels know of it."
    for name in study.names:
        half_invalid(study, name, "int16", photometric="MINISBLACK")
    undeclared = study.read("segment", **ONE_TWO)
    assert undeclared.manifest["stretch"]["low"] == [0, 0, 0]
    assert finding(undeclared, "undeclared-fill")["level"] == "warning"
    labelled = study.read("segment", dict(nodata=0), **ONE_TWO)
    assert min(labelled.manifest["stretch"]["low"]) > 0
    assert labelled.manifest["over_invalid"]["test"] == 2048
    assert not findings(labelled, "undeclared-fill")
    assert study.read("segment", dict(nodata=[0, 0, 0]), **ONE_TWO).hash == labelled.hash
    with pytest.raises(CmidError, match="labels.nodata: has 2 values, but images/test0.tif has 3"):
        study.read("segment", dict(nodata=[0, 0]), **ONE_TWO)


def test_stretch_without_a_valid_pixel_is_refused(study):
    for name in study.names:
        half_invalid(study, name)
    with pytest.raises(CmidError, match="labels.stretch: band 1 has no valid pixel") as e:
        image = noise(3, 64, 64, dtype="uint16")
        image[1] = 0
        for name in study.names:
            study.put_tiff(f"images/{name}.tif", image, nodata=0)
        study.read("segment", **ONE_TWO)
    assert "\n" not in str(e.value)


# --- masks with holes of their own


def test_holes_of_masks_are_reported(study):
    study.fill("segment")
    for name in study.names:
        (study.data / f"masks/{name}.png").unlink()
        mask = np.ones((1, 40, 40), np.uint8)
        mask[0, :3] = 7
        study.put_tiff(f"masks/{name}.tif", mask, nodata=7)
    labelled = study.read("segment", **ONE_TWO)
    assert (labelled.mask(0)[:3] == IGNORE).all()
    assert finding(labelled, "mask-no-value")["count"] == 3 * 120
    assert labelled.manifest["ignored"]["test"] == 120
    assert labelled.manifest["over_invalid"]["test"] == 0
    kept = study.read("segment", classes=dict(land=1, water=7), ignore=[])
    assert kept.manifest["histogram"]["test"] == [1600 - 120, 120]
    assert "water as nodata: it stays this class" in finding(kept, "nodata-class")["text"]


# --- findings that are accepted


def test_accepted_findings_are_shown(study):
    for name in study.names:
        half_invalid(study, name)
    labelled = study.read("segment", dict(accept=["label-over-invalid"]), **ONE_TWO)
    assert finding(labelled, "label-over-invalid")["level"] == "accepted"
    assert re.search("accepted label-over-invalid: [0-9,]+ labelled pixels where an image has no value", str(labelled))
    with pytest.raises(CmidError, match="labels.accept: no warning is called 'label-over-invalit' .did you mean"):
        study.read("segment", dict(accept=["label-over-invalit"]), **ONE_TWO)


def test_every_warning_can_be_accepted():
    "The kinds in the sources of the audit are those of the settings."
    text = "".join(Path(module.__file__).read_text() for module in (label_audit, statistics))
    kinds = re.findall(r'"([a-z-]+)",\s+"warning"', text)
    assert {*kinds, "label-over-invalid", "outside", "repeated"} == {*LABEL_WARNINGS}


def rasters_in_order(study, orders):
    "Images whose three bands are these colours; the band of each colour has one value."
    values = dict(red=90, green=60, blue=30)
    for name, order in zip(study.names, orders):
        image = np.stack([np.full((20, 20), values[o], np.uint8) for o in order])
        study.put_tiff(f"images/{name}.tif", image, photometric="MINISBLACK")
        with rasterio.open(study.data / f"images/{name}.tif", "r+") as file:
            file.colorinterp = [ColorInterp[o] for o in order]
        study.put(f"masks/{name}.png", np.ones((20, 20), np.uint8))


def test_order_of_bands(study):
    "Red, green and blue are put in order; where bands are asked for by number, mixed orders are a warning."
    rgb, bgr = ("red", "green", "blue"), ("blue", "green", "red")
    rasters_in_order(study, [bgr, rgb, rgb])
    labelled = study.read("segment", **ONE_TWO)
    for i in range(3):
        assert labelled.image(i)[:, 0, 0].tolist() == [90, 60, 30]
    assert finding(labelled, "band-order")["examples"] == ["images/train0.tif"]
    by_number = study.read("segment", dict(bands=[0, 1, 2]), **ONE_TWO)
    assert finding(by_number, "mixed-band-order")["examples"] == ["images/train0.tif"]


def test_grey_images_are_noted(study):
    study.fill("segment")
    study.put("images/train1.png", noise(40, 40))
    assert finding(study.read("segment"), "grey")["examples"] == ["images/train1.png"]


def test_copies_across_any_splits(study):
    "Also with other masks, and in another format."
    study.fill("segment")
    copied = np.asarray(Image.open(study.data / "images/train0.png")).transpose(2, 0, 1)
    study.put_tiff("images/far0.tif", copied)
    study.put("masks/far0.png", np.ones((40, 40), np.uint8))
    labelled = study.read("segment", splits=dict(first="images/t*", holdout="images/far*"))
    found = finding(labelled, "leak")
    assert (found["level"], found["text"]) == ("warning", "images of holdout that are in first too")
    assert found["examples"] == ["images/far0.tif"]
