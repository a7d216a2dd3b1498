"`cmid_prepare FOLDER --check`: what it says of a folder without preparing it, and what it leaves alone."

import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from cmid.base.errors import CmidError
from cmid.data import prepare_command
from cmid.data.prepare_command import advice, check_images, cmid_prepare
from cmid.data.survey import Request


def look(images, lists=None, side=32, tile=0, nodata=None):
    request = Request.checked(str(images.path), side, tile, None, (2, 98), 1000, None, "skip", nodata)
    check = check_images(request, lists or {})
    return check, yaml.safe_load("\n".join(advice(check, request).splitlines()[1:]))


def kinds(check, level="warning"):
    return [finding["kind"] for finding in check.manifest["audit"] if finding["level"] == level]


def bordered(images, count=4, **options):
    for i in range(count):
        pixels = np.random.default_rng(i).integers(2000, 6000, (4, 64, 64)).astype("uint16")
        pixels[:, :, :8] = 0
        images.tiff(f"{i}.tif", pixels, **options)


def test_the_advice_can_be_pasted(images):
    bordered(images)
    check, advised = look(images)
    assert kinds(check) == ["undeclared-fill"]
    assert advised == dict(tile=0, bands=None, nodata=0, accept=[])
    again, _ = look(images, nodata=advised["nodata"])
    assert not kinds(again)
    assert again.manifest["look"]["valid"] == pytest.approx(0.875)


def test_the_advice_names_the_bands_of_a_fill_value(images):
    for i in range(4):
        pixels = np.random.default_rng(i).integers(2000, 6000, (4, 64, 64)).astype("uint16")
        pixels[3, :, :8] = 0
        images.tiff(f"{i}.tif", pixels)
    _, advised = look(images)
    assert advised["nodata"] == [None, None, None, 0]


def test_it_is_what_prepare_says(images):
    images.classes()
    images.truncate("ash/ash_1.png", 900)
    lists = images.lists(train="ash_0.png\nbirch_0.png\n", holdout="cedar_1.png\n")
    check, _ = look(images, lists)
    prepared = images.prepare(lists=lists).manifest
    for key in ("bands", "side", "classes", "labelled", "splits", "stretch"):
        assert check.manifest[key] == prepared[key]
    assert check.manifest["look"]["types"] == prepared["look"]["types"]
    assert {"skipped"} <= {*kinds(check)} <= {finding["kind"] for finding in prepared["audit"]}
    assert "looked at 9 of 9 files" in str(check)


def test_a_part_of_many_files_is_read(images, monkeypatch):
    monkeypatch.setattr(prepare_command, "_CHECKED", 5)
    images.pictures(20)
    check, _ = look(images)
    assert check.files == 5
    assert check.manifest["counts"]["files"] == 20
    assert check.manifest["look"]["types"] == {"uint8": 5}


def test_large_files_are_advised_to_be_tiled(images):
    images.tiff("a.tif", np.random.default_rng(0).integers(0, 255, (3, 300, 200)).astype("uint8"))
    _, advised = look(images)
    assert advised["tile"] == 64


def test_masks_beside_images_are_named_and_no_nodata_is_advised(images):
    bordered(images)
    for i in range(4):
        images.tiff(f"masks/{i}.tif", np.zeros((4, 64, 64), "uint16"))
    check, advised = look(images)
    assert "label-folder" in kinds(check)
    assert advised["nodata"] is None


def test_nothing_is_written_among_the_images(images, monkeypatch, capsys):
    images.pictures(3)
    before = {path: path.stat().st_mtime_ns for path in images.path.rglob("*")}
    monkeypatch.chdir(images.path)
    cmid_prepare(".", check=True)
    assert {path: path.stat().st_mtime_ns for path in images.path.rglob("*")} == before
    picture = Path(tempfile.gettempdir()) / "in-check.png"
    assert str(picture) in capsys.readouterr().out
    picture.unlink()


def test_a_folder_of_nothing_valid(images, monkeypatch, capsys):
    monkeypatch.chdir(images.root)
    for i in range(3):
        images.tiff(f"{i}.tif", np.full((1, 32, 32), np.nan, "float32"))
    cmid_prepare(str(images.path), check=True)
    out = capsys.readouterr().out
    assert "valid    0.0% of the pixels" in out
    assert "pictures" not in out


def test_a_folder_that_is_not_there(images):
    with pytest.raises(CmidError, match="none: no such folder"):
        check_images(Request(str(images.root / "none"), 32), {})
