"Maps of classes and of change: where pixels lie on the map, what files say, what is left of an interrupted run."

import json
import os
import resource
import signal
from contextlib import contextmanager
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.shutil
import shapely
import torch
from PIL import Image
from rasterio.transform import Affine, from_origin

from cmid.apply import rasters as rasters_module
from cmid.apply.dense import apply_dense
from cmid.apply.scene import ApplyOptions, open_scene
from cmid.apply.scene_pairs import ScenePair
from cmid.base.errors import CmidError
from cmid.data.formats import quiet_decoders
from cmid.tasks.card import Source
from tests.tools import rasters

PLACES = dict(
    utm=dict(crs="EPSG:32632", transform=from_origin(5e5, 5.3e6, 0.5, 0.5)),
    degrees=dict(crs="EPSG:4326", transform=from_origin(9, 48, 1e-5, 1e-5)),
    south_up=dict(crs="EPSG:32632", transform=Affine(0.5, 0, 5e5, 0, 0.5, 5.3e6)),
    rotated=dict(crs="EPSG:32632", transform=Affine(0.4, 0.3, 5e5, 0.3, -0.4, 5.3e6)),
    no_system=dict(transform=from_origin(5e5, 5.3e6, 0.5, 0.5)),
    none={},
)


def card_for(task="segment", classes=("dark", "bright"), **entries):
    facts = dict(task=task, dataset="land", init="none", classes=list(classes), colours=["#102030", "#ffee00"])
    reading = dict(in_chans=1, bands=["grey"], source=Source(bands=None, types={}, nodata=None))
    windows = dict(tile=64, overlap=16, resolution=None, valid_range=None)
    return SimpleNamespace(**facts | reading | windows | entries)


def bright(x):
    "Logits of dark and bright."
    return torch.cat([0.5 - x, x - 0.5], 1) * 20


def changed(x):
    difference = (x[:, 0] - x[:, 1]).abs()
    return torch.cat([0.5 - difference, difference - 0.5], 1)


def write(path, pixels, **options):
    with quiet_decoders():
        return rasters.tiff(path, pixels, **options)


def pattern(height=150, width=210, rows=(37, 60), columns=(101, 133)):
    pixels = np.zeros((1, height, width), np.uint8)
    pixels[:, slice(*rows), slice(*columns)] = 255
    return pixels


def blobs(height, width):
    "Random squares of 5 px."
    noise = np.random.default_rng(0).integers(0, 256, (1, -(-height // 5), -(-width // 5)), np.uint8)
    return noise.repeat(5, 1).repeat(5, 2)[:, :height, :width]


def apply_to(path, out, network=bright, card=None, say=lambda line: None, **options):
    with open_scene(path, card or card_for()) as scene:
        return apply_dense(network, scene, out, ApplyOptions(**dict(batch=4, key="1") | options), say)


@pytest.mark.parametrize("name", PLACES)
def test_a_pattern_lies_where_it_lay(name, tmp_path):
    "The middle of a bright rectangle, on the map of the scene, of the raster and of the polygon."
    path = write(tmp_path / "scene", pattern(), **PLACES[name])
    facts = apply_to(path, tmp_path / "out", vector=True)
    with quiet_decoders(), rasterio.open(tmp_path / "out" / facts["files"][1]) as file:
        assert np.array_equal(file.read(1), pattern()[0] // 255)
        transform = file.transform
        assert file.crs == (rasterio.CRS.from_user_input(PLACES[name]["crs"]) if "crs" in PLACES[name] else None)
        table = file.colormap(1)
        assert (table[0], table[1], table[255][3]) == ((16, 32, 48, 255), (255, 238, 0, 255), 0)
    due = PLACES[name].get("transform", Affine.identity())
    assert transform == due
    rows = pyogrio.raw.read(tmp_path / "out" / "scene.gpkg")
    table = dict(zip(rows[0]["fields"], rows[3]))
    polygon = shapely.from_wkb(rows[2])[list(table["name"]).index("bright")]
    centre = due * ((101 + 133) / 2, (37 + 60) / 2)
    half_a_pixel = np.hypot(due.a, due.d) / 2
    assert np.hypot(polygon.centroid.x - centre[0], polygon.centroid.y - centre[1]) < half_a_pixel
    if name in ("utm", "south_up", "rotated"):
        area = table["area_m2"][list(table["name"]).index("bright")]
        assert area == pytest.approx(23 * 32 * abs(due.determinant), rel=1e-9)
    else:
        assert "area_m2" not in table


def test_what_the_file_says(tmp_path):
    pixels = pattern(700, 1100)
    pixels[:, :100, :50] = 7
    path = write(tmp_path / "scene", pixels, nodata=7, **PLACES["utm"])
    facts = apply_to(path, tmp_path / "out", probabilities=True)
    files = ["scene-probabilities.tif", "scene.tif", "scene.tif.aux.xml"]
    assert facts["files"] == files
    assert facts["invalid"] == pytest.approx(5000 / 770_000, abs=1e-6)
    assert facts["classes"] == dict(
        dark=pytest.approx(1 - 736 / 765_000, abs=1e-6), bright=pytest.approx(736 / 765_000, abs=1e-6)
    )
    with rasterio.open(tmp_path / "out" / "scene.tif") as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert (file.block_shapes, file.overviews(1)) == ([(512, 512)], [2, 4])
        assert file.profile["compress"] == "deflate" and file.nodata == 255
        assert json.loads(file.tags()["classes"]) == ["dark", "bright"]
        assert file.tags()["TIFFTAG_IMAGEDESCRIPTION"] == "Classes: 0 dark, 1 bright"
        assert (file.read(1)[:100, :50] == 255).all() and (file.read(1) == 255).sum() == 5000
        assert (file.dataset_mask() == 0).sum() == 5000
    with rasterio.open(tmp_path / "out" / "scene-probabilities.tif") as file:
        assert file.descriptions == ("dark", "bright") and file.nodata == 255
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        values = file.read(masked=True)
        assert (values.sum(0) - 254).max() <= 1 and values.mask.sum() == 10_000
    rasterio.shutil.copy(tmp_path / "out" / "scene.tif", tmp_path / "a.vrt", driver="VRT")
    virtual = ElementTree.parse(tmp_path / "a.vrt").getroot()
    assert [o.text for o in virtual.iter("Category")] == ["dark", "bright"]


def test_names_of_classes_are_escaped(tmp_path):
    classes = ["<a> & 'b'", 'grün "c"']
    path = write(tmp_path / "scene", pattern(), **PLACES["utm"])
    apply_to(path, tmp_path / "out", card=card_for(classes=classes), vector=True)
    rasterio.shutil.copy(tmp_path / "out" / "scene.tif", tmp_path / "a.vrt", driver="VRT")
    virtual = ElementTree.parse(tmp_path / "a.vrt").getroot()
    assert [o.text for o in virtual.iter("Category")] == classes
    rows = pyogrio.raw.read(tmp_path / "out" / "scene.gpkg")
    assert set(dict(zip(rows[0]["fields"], rows[3]))["name"]) == set(classes)


def test_a_picture_becomes_a_picture(tmp_path):
    Image.fromarray(pattern()[0]).save(tmp_path / "scene.png")
    facts = apply_to(tmp_path / "scene.png", tmp_path / "out")
    assert facts["files"] == ["scene.png", "scene.png.aux.xml"]
    with Image.open(tmp_path / "out" / "scene.png") as picture:
        assert picture.convert("RGB").getpixel((110, 50)) == (255, 238, 0)


def stopping_after(calls, network=bright, error=KeyboardInterrupt):
    def predict(x):
        calls[0] -= 1
        if calls[0] < 0:
            raise error
        return network(x)

    return predict


@pytest.mark.parametrize("calls", [1, 5, 11])
def test_a_stopped_run_ends_with_the_same_bytes(calls, tmp_path):
    path = write(tmp_path / "scene", blobs(400, 300), **PLACES["utm"])
    apply_to(path, tmp_path / "once", probabilities=True, vector=True)
    with pytest.raises(KeyboardInterrupt, match="run the same command to resume"):
        apply_to(path, tmp_path / "twice", stopping_after([calls]), probabilities=True, vector=True)
    assert not [o for o in (tmp_path / "twice").iterdir() if not o.name.startswith(".")]
    apply_to(path, tmp_path / "twice", probabilities=True, vector=True)
    for name in ("scene.tif", "scene-probabilities.tif", "scene.tif.aux.xml"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    assert not [o for o in (tmp_path / "twice").iterdir() if o.name.startswith(".")]


def test_finished_strips_are_not_computed_again(tmp_path):
    path = write(tmp_path / "scene", pattern(400, 300), **PLACES["utm"])
    with pytest.raises(ZeroDivisionError):
        apply_to(path, tmp_path / "out", stopping_after([20], error=ZeroDivisionError), batch=1)
    seen, lines = [], []

    def counted(x):
        seen.append(len(x))
        return bright(x)

    apply_to(path, tmp_path / "out", counted, batch=1, say=lines.append)
    assert lines == ["scene: resumed, 2 of 9 strips were finished"]
    assert sum(seen) == (9 - 2 + 1) * 7  # one row of windows again


@contextmanager
def files_of_at_most(size):
    "Files cannot grow beyond a size, as on a disk that fills."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [3_000, 20_000, 60_000])
def test_a_disk_that_fills(size, tmp_path):
    "While strips, the plain file and the final one are written: nothing has its final name, and the rest is resumed."
    path = write(tmp_path / "scene", blobs(900, 1000), **PLACES["utm"])
    apply_to(path, tmp_path / "once", vector=True)
    with files_of_at_most(size), pytest.raises((CmidError, OSError)) as error:
        apply_to(path, tmp_path / "out", vector=True)
    assert "\n" not in str(error.value)
    assert not [o for o in (tmp_path / "out").iterdir() if not o.name.startswith(".")]
    apply_to(path, tmp_path / "out", vector=True)
    assert (tmp_path / "out" / "scene.tif").read_bytes() == (tmp_path / "once" / "scene.tif").read_bytes()


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.99])
def test_a_file_that_was_written_short_is_not_called_done(kept, tmp_path, monkeypatch):
    "GDAL does not raise an error for every full disk: the file is read again before it gets its name."
    finish = rasters_module._finish

    def short(plain, path, resampling):
        finish(plain, path, resampling)
        os.truncate(path, int(kept * path.stat().st_size))

    path = write(tmp_path / "scene", blobs(900, 1000), **PLACES["utm"])
    monkeypatch.setattr(rasters_module, "_finish", short)
    with pytest.raises(CmidError, match="scene.tif: (cannot be written|was not written whole)"):
        apply_to(path, tmp_path / "out")
    assert not [o for o in (tmp_path / "out").iterdir() if not o.name.startswith(".")]


def test_change_between_dates_of_unequal_extent(tmp_path):
    first, second = pattern(), np.zeros((1, 150, 210), np.uint8)
    second[:, 40:60, 111:] = 255  # on the grid of the second date, which begins 10 columns to the right
    before = write(tmp_path / "before", first, **PLACES["utm"])
    after = write(tmp_path / "after", second, crs="EPSG:32632", transform=from_origin(5e5 + 5, 5.3e6, 0.5, 0.5))
    card = card_for("change", ("unchanged", "changed"))
    with open_scene(before, card) as one, open_scene(after, card) as two:
        pair = ScenePair(one, two, "town")
        assert "95% of the first one" in pair.notes()[0]
        apply_dense(changed, pair, tmp_path / "out", ApplyOptions(key="1", batch=4))
    due = (first[0, :, 10:] != second[0, :, :200]).astype(np.uint8)
    with rasterio.open(tmp_path / "out" / "town.tif") as file:
        assert np.array_equal(file.read(1), due)
        assert file.transform == from_origin(5e5 + 5, 5.3e6, 0.5, 0.5)


def test_a_pixel_without_a_value_in_one_date_has_no_change(tmp_path):
    first, second = pattern(), pattern()
    first[:, :20] = second[:, :, :30] = 9
    card = card_for("change", ("unchanged", "changed"))
    paths = [write(tmp_path / name, pixels, nodata=9, **PLACES["utm"]) for name, pixels in zip("ab", (first, second))]
    with open_scene(paths[0], card) as one, open_scene(paths[1], card) as two:
        facts = apply_dense(changed, ScenePair(one, two, "a"), tmp_path / "out", ApplyOptions(key="1"))
    assert facts["invalid"] == pytest.approx((20 * 210 + 130 * 30) / (150 * 210), abs=1e-6)
    assert facts["classes"]["unchanged"] == 1
