"What does not stop the stage is reported: copies, leaks, orphans, shifts, JPEG labels, boxes at the edge."

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cmid.base.errors import CmidError
from cmid.data import label_audit
from cmid.data.scenes import scene


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def findings(labelled, kind):
    return [o for o in labelled.manifest["audit"] if o["kind"] == kind]


def finding(labelled, kind):
    (only,) = findings(labelled, kind)
    return only


def test_copies_leaks_orphans_and_absent_classes(study):
    study.fill("segment")
    study.put("images/test0.png", noise(40, 40, 3, seed=0))
    study.put("masks/lonely.png", noise(40, 40) % 3)
    labelled = study.read("segment", classes=dict(land=[1, 2], rock=7))
    assert finding(labelled, "leak")["count"] == 1
    assert finding(labelled, "duplicate")["examples"] == ["images/test0.png = images/train0.png"]
    assert finding(labelled, "orphan")["examples"] == ["masks/lonely.png"]
    assert finding(labelled, "absent-class")["examples"] == ["rock"]
    assert "warning" in str(labelled)


def test_image_in_two_splits(study):
    study.fill("segment")
    labelled = study.read("segment", splits=dict(train="images/*", test="images/train*"))
    assert len(labelled) == 3
    assert finding(labelled, "leak")["count"] == 2
    assert "images of test that are in train too" in str(labelled)


def test_copies_are_found_in_one_pass():
    "Splits are read a few times, however many items there are; groups and leaks are counted by hand."

    class CountedReads(dict):
        reads = 0

        def __getitem__(self, key):
            self.reads += 1
            return super().__getitem__(key)

    n = 3000
    names = [f"i{i}" for i in range(2 * n)]
    splits = CountedReads(train=[*range(n)], test=[*range(n, 2 * n)])
    records = [SimpleNamespace(image_hash=f"{i % n // 2}") for i in range(2 * n)]  # groups of four, two in each split
    copies, leaks = label_audit._copies(names, splits, records)
    assert (copies["count"], leaks["count"]) == (n // 2 * 3, n)
    assert copies["examples"][0] == f"i0 = i1 = i{n} = i{n + 1}"
    assert leaks["examples"][0] == f"i{n}"
    assert splits.reads < 5


def test_boxes_at_the_edge_and_repeated(study):
    study.fill("detect")
    study.put("labelTxt/train1.txt", "-3 1 9 1 9 5 -3 5 plane 0\n" * 2)
    labelled = study.read("detect")
    assert finding(labelled, "outside")["count"] == 2
    assert finding(labelled, "repeated")["count"] == 1


def test_ignored_objects_and_empty_images(study):
    study.fill("detect")
    study.put("labelTxt/train1.txt", "-3 1 9 1 9 5 -3 5 plane 0\n" * 2)
    study.put("labelTxt/train0.txt", "")
    labelled = study.read("detect", classes=["ship"], ignore=["plane"])
    assert len(labelled.objects(labelled.names.index("images/train1.png"))["classes"]) == 0
    assert labelled.manifest["ignored"] == dict(train=2, test=1)
    assert finding(labelled, "empty")["count"] == 2
    assert "classes of test that are not in train" in str(labelled)


def test_shifted_dates_are_named(study):
    study.fill("change", 128)
    ground = scene("town", "moved", size=160)[0]
    for name, (dy, dx) in dict(train0=(0, 0), train1=(5, -7), test0=(1, 1)).items():
        study.put(f"A/{name}.png", ground[16:144, 16:144])
        study.put(f"B/{name}.png", ground[16 - dy : 144 - dy, 16 - dx : 144 - dx])
    assert finding(study.read("change"), "registration")["examples"] == ["A/train1.png (5, -7)"]


def test_georeferenced_pairs(study):
    "A fifth of a pixel between two dates is accepted; a label that is elsewhere is reported."
    study.fill("change")
    study.put_tiff("A/train9.tif", noise(3, 40, 40), (10, 20))
    study.put_tiff("B/train9.tif", noise(3, 40, 40), (10.2, 20))
    study.put("OUT/train9.png", noise(40, 40) // 128 * 255)
    labelled = study.read("change")
    assert len(labelled) == 4
    assert not findings(labelled, "registration")
    study.put_tiff("OUT/train9.tif", noise(1, 40, 40) // 128 * 255, (99, 0))
    (study.data / "OUT/train9.png").unlink()
    assert finding(study.read("change"), "registration")["examples"] == ["A/train9.tif"]


def test_labels_of_dates_may_be_jpeg(study):
    "CDD is distributed like this: cut at 128, and reported. Other class tables need exact values."
    study.fill("change", 64)
    label = np.zeros((64, 64), np.uint8)
    label[9:31, 17:50] = 255
    (study.data / "OUT/train1.png").unlink()
    Image.fromarray(label).save(study.data / "OUT/train1.jpg", quality=75)
    saved = np.asarray(Image.open(study.data / "OUT/train1.jpg"))
    inexact = ((saved > 0) & (saved < 255)).sum()
    labelled = study.read("change")
    assert (labelled.mask(labelled.names.index("A/train1.png")) == label // 255).all()
    assert finding(labelled, "lossy")["count"] == inexact > 0
    assert finding(labelled, "lossy")["examples"] == ["A/train1.png"]
    with pytest.raises(CmidError, match="a JPEG changes the values"):
        study.read("change", classes=dict(a=0, b=255))
