"""Samples of real data sets are read as their makers meant them.

They run where CMID_REALDATA names a folder with the archives seg_dubai, seg_samples, cd and obb."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmid.base.errors import CmidError
from cmid.data.label_figures import items_figure
from cmid.data.label_files import DOTA_CLASSES
from cmid.data.labelled import IGNORE

ARCHIVES = os.environ.get("CMID_REALDATA")
DUBAI = dict(
    Land="#8429F6", Water="#E2A929", Building="#3C1098", Vegetation="#FEDD3A", Road="#6EC1E4", Unlabeled="#9B9B9B"
)
OWN_CLASSES = dict(classes=None, ignore=None)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    "Folder of an archive, unpacked once."
    if not ARCHIVES or not (Path(ARCHIVES) / "obb.tar.gz").exists():
        pytest.skip("CMID_REALDATA names no folder with seg_dubai, seg_samples, cd and obb")
    folder = tmp_path_factory.mktemp("real")

    def get(name):
        if not (folder / name).exists():
            with tarfile.open(Path(ARCHIVES) / f"{name}.tar.gz") as archive:
                archive.extractall(folder, filter="data")
        return folder / name

    return get


def dubai_entry(folder):
    return dict(folder=str(folder), splits=dict(train="Tile [1-6]/images/*", test="Tile [78]/images/*"))


@pytest.mark.slow
def test_dubai_with_its_own_class_file_stops(study, unpacked):
    "Its class file names other colours: all of them are listed with pixels and files; so is the stray black."
    folder = unpacked("seg_dubai")
    listed = json.loads((folder / "classes.json").read_text())["classes"]
    classes = {o["title"]: o["color"] for o in listed}
    with pytest.raises(CmidError) as e:
        study.read("segment", classes=classes, ignore=[], **dubai_entry(folder))
    message = str(e.value)
    assert "6 values in the masks" in message
    assert "#000000: 552,156 px in 9 files" in message
    assert "#8429F6: 51,850,363 px in 72 files" in message
    for name, colour in DUBAI.items():
        assert colour in message or name == "Unlabeled"


@pytest.mark.slow
def test_dubai(study, unpacked):
    entry = dubai_entry(unpacked("seg_dubai"))
    labelled = study.read("segment", classes=DUBAI, ignore=["#000000"], **entry)
    counts = sum(np.array(v) for v in labelled.manifest["histogram"].values())
    pixels = counts.sum() + sum(labelled.manifest["ignored"].values())
    assert {k: len(v) for k, v in labelled.splits.items()} == dict(train=54, test=18)
    assert pixels == labelled.sizes.prod(1).sum()
    assert [round(100 * n / pixels) for n in counts[:5]] == [52, 14, 13, 10, 9]
    assert round(100 * counts[5] / pixels, 1) == 0.5
    assert (labelled.sizes.min(0).tolist(), labelled.sizes.max(0).tolist()) == ([544, 509], [2062, 2149])


@pytest.mark.parametrize("layout, images, side", [("potsdam", 1, 512), ("vaihingen", 1, 512), ("loveda", 3, 1024)])
def test_segmentation_samples(study, unpacked, layout, images, side):
    folder = unpacked("seg_samples") / layout
    entry = OWN_CLASSES | dict(folder=str(folder), format=layout, splits=dict(train="img_dir/*"))
    labelled = study.read("segment", **entry)
    classes = len(labelled.classes)
    assert len(labelled) == images
    assert (labelled.sizes == side).all()
    assert classes == (7 if layout == "loveda" else 5)
    for i, name in enumerate(labelled.names):
        mask = np.asarray(Image.open(folder / name.replace("img_dir", "ann_dir"))).astype(int)
        assert (labelled.mask(i) == np.where((mask == 0) | (mask > classes), IGNORE, mask - 1)).all()


@pytest.mark.parametrize("layout, name, pairs", [("levir", "LEVIR", 11), ("dsifn", "DSIFN", 10)])
def test_change_samples(study, unpacked, layout, name, pairs):
    folder = unpacked("cd") / name
    labelled = study.read("change", folder=str(folder), format=layout, splits=dict(train="list/all.txt"))
    changed = [float(np.asarray(labelled.mask(i)).mean()) for i in range(len(labelled))]
    assert len(labelled) == pairs
    assert (labelled.sizes == 256).all()
    assert sum(share == 0 for share in changed) == (layout == "levir")
    assert not [o for o in labelled.manifest["audit"] if o["kind"] == "registration"]


def test_ucas_sample(study, unpacked):
    entry = dict(
        folder=str(unpacked("obb") / "UCAS50"),
        splits=dict(train="train.txt", val="images/val/*"),
        parts=dict(images="images", labels="labelTxt_derived"),
        classes=["plane", "car"],
    )
    labelled = study.read("detect", **entry)
    assert len(labelled) == 49
    assert sum(map(sum, labelled.manifest["histogram"].values())) == 375
    assert {k: len(v) for k, v in labelled.splits.items()} == dict(train=40, val=9)


def test_dota_sample(study, unpacked):
    folder = unpacked("obb") / "DOTA_samples"
    labelled = study.read("detect", folder=str(folder), splits=dict(train="images/*"), classes=None)
    assert labelled.classes == DOTA_CLASSES
    assert labelled.manifest["objects"] == [536, 64]
    assert labelled.names == ["images/P0706.png", "images/P1888.png"]
    assert labelled.manifest["gsd"][1] == pytest.approx(0.266170468393)
    assert items_figure(labelled).axes
