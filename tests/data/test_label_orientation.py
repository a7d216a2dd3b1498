"Orientation tags: image and mask are turned alike, or refused."

import numpy as np
import pytest
from PIL import Image

from cmid.base.errors import CmidError


def save(study, path, x, orientation):
    "Write pixels with an orientation tag, in a folder of the data."
    path = study.data / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".png").unlink(missing_ok=True)
    tag = {0x0112: orientation}
    if path.suffix == ".tif":
        Image.fromarray(x).save(path, tiffinfo=tag)
        return
    exif = Image.Exif()
    exif.update(tag)
    Image.fromarray(x).save(path, exif=exif)


IMAGE = np.full((40, 60, 3), 60, np.uint8)
IMAGE[:10, :20] = 220
MASK = np.full((40, 60), 1, np.uint8)
MASK[:10, :20] = 2


def fill(study, image, mask, kind="segment"):
    "Items with these orientation tags of image and mask, all in PNG or in TIFF."
    for k, name in enumerate(study.names):
        x = IMAGE + np.uint8(k)
        save(study, f"images/{name}.{'tif' if k else 'png'}", x, image)
        save(study, f"masks/{name}.{'tif' if k else 'png'}", MASK, mask)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_and_mask_are_turned_alike(study, orientation):
    "The bright corner of the image is the second class of the mask, wherever it is turned to."
    fill(study, orientation, orientation)
    labelled = study.read("segment", ignore=[])
    for i in range(3):
        assert ((labelled.image(i)[0] > 200) == (labelled.mask(i) == 1)).all()
        assert (labelled.sizes[i].tolist() == [60, 40]) == (orientation > 4)
    noted = [o for o in labelled.manifest["audit"] if "turned" in o["text"]]
    assert [o["count"] for o in noted] == [3] * (orientation > 1)


@pytest.mark.parametrize("image, mask", [(3, 1), (1, 3), (3, 2)])
def test_other_tag_of_the_mask_is_refused(study, image, mask):
    fill(study, image, mask)
    with pytest.raises(CmidError, match="masks/test0.tif: this label is .*turned.*, but images/test0.tif is") as e:
        study.read("segment", ignore=[])
    assert "save both upright, without the orientation tag" in str(e.value)
    assert "\n" not in str(e.value)


def fill_pairs(study, first, second, label):
    for k, name in enumerate(study.names):
        for folder, tag in (("A", first), ("B", second)):
            save(study, f"{folder}/{name}.png", IMAGE + np.uint8(k), tag)
        save(study, f"OUT/{name}.png", MASK // 2 * np.uint8(255), label)


def test_pairs_turned_alike(study):
    fill_pairs(study, 6, 6, 6)
    labelled = study.read("change")
    assert ((labelled.second(0)[0] > 200) == (labelled.mask(0) == 1)).all()
    assert labelled.sizes[0].tolist() == [60, 40]


@pytest.mark.parametrize("tags", [(3, 3, 1), (1, 3, 1), (3, 1, 1), (1, 1, 3)])
def test_pairs_turned_otherwise_are_refused(study, tags):
    fill_pairs(study, *tags)
    with pytest.raises(CmidError, match="OUT/test0.png: this label is .*turned.*; save both upright"):
        study.read("change")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_boxes_in_turned_images_are_refused(study, suffix):
    study.fill("detect")
    save(study, f"images/train1.{suffix}", IMAGE, 3)
    with pytest.raises(CmidError, match=rf"images/train1.{suffix}: is turned \(orientation tag 3\), and") as e:
        study.read("detect")
    assert "save it upright, without the orientation tag" in str(e.value)


def test_turned_images_without_boxes(study):
    "Of a split whose labels are secret."
    study.fill("detect")
    save(study, "images/test0.tif", IMAGE, 6)
    (study.data / "labelTxt/test0.txt").unlink()
    assert study.read("detect").sizes[0].tolist() == [60, 40]
