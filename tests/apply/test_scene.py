"Scenes: read as the training images were, and with their places."

from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine, from_origin

from cmid.apply.scene import list_scenes, open_scene, scene_notes
from cmid.base.errors import CmidError
from cmid.data.formats import quiet_decoders
from cmid.data.label_items import PixelFormat, read_header, read_pixels
from cmid.data.rasters import open_image
from cmid.tasks.card import Limits, Source
from tests.tools import rasters


def card_for(dtype="uint8", channels=3, bands=None, nodata=None, low=20.0, high=4000.0, **entries):
    types = {} if dtype == "uint8" else {dtype: Limits(low=[low] * channels, high=[high] * channels)}
    facts = dict(bands=[f"band {i}" for i in range(channels)], in_chans=channels, resolution=None, valid_range=None)
    return SimpleNamespace(source=Source(bands=bands, types=types, nodata=nodata), **facts | entries)


def write(path, pixels, **options):
    with quiet_decoders():
        return rasters.tiff(path, pixels, **options)


@pytest.mark.parametrize("kind", rasters.KINDS)
def test_pixels_are_those_of_training(kind, tmp_path):
    "Read in windows by a scene, and read whole by the stage that prepares labelled images."
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        rasters.write(kind, 0, number, folder)
        path = next(o for o in sorted(folder.iterdir()) if o.suffix in (".tif", ".png", ".jpg"))
        header = read_header(path)
        if isinstance(header, str):
            with pytest.raises(CmidError, match="replace or remove it"):
                open_scene(path, card_for())
            continue
        with quiet_decoders():
            image = open_image(path)
            channels = image.bands
            image.close()
        card = card_for(header.dtype, channels, low=-30.0, high=3000.0)
        limits = card.source.types.get(header.dtype)
        pixels = PixelFormat(None, channels, limits and limits.low, limits and limits.high, None)
        with quiet_decoders():
            due, invalid = read_pixels(path, pixels)
        check_equals(path, card, due, invalid)


def check_equals(path, card, due, invalid):
    height, width = due.shape[1:]
    with open_scene(path, card) as scene:
        assert (scene.height, scene.width) == (height, width)
        step = max(1, height // 3), max(1, width // 2)
        for top in range(0, height, step[0]):
            for left in range(0, width, step[1]):
                part = np.s_[top : top + step[0], left : left + step[1]]
                shape = due[0][part].shape
                pixels, without = scene.read(top, left, *shape)
                assert np.array_equal(pixels, due[(slice(None), *part)])
                expected = np.zeros(shape, bool) if invalid is None else invalid[part]
                assert np.array_equal(np.zeros(shape, bool) if without is None else without, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_transform_is_that_of_upright_pixels(orientation, tmp_path):
    "A marked pixel of the stored raster has the same place on the map, whichever way the tag turns it."
    pixels = np.zeros((1, 5, 7), np.uint8)
    pixels[0, 1, 5] = 200
    stored = Affine(0.4, 0.1, 1000, 0.1, -0.4, 2000)
    path = write(tmp_path / "a", pixels, crs="EPSG:32632", transform=stored)
    rasters.set_tag(path, rasters.ORIENTATION, orientation)
    with open_scene(path, card_for(channels=1)) as scene:
        upright, _ = scene.read(0, 0, scene.height, scene.width)
        row, column = np.argwhere(upright[0] == 200)[0]
        assert np.allclose(scene.transform * (column + 0.5, row + 0.5), stored * (5.5, 1.5))


def test_places_of_many_kinds(tmp_path):
    pixels = np.zeros((3, 4, 6), np.uint8)
    places = dict(
        utm=dict(crs="EPSG:32632", transform=from_origin(5e5, 5.3e6, 0.5, 0.5)),
        degrees=dict(crs="EPSG:4326", transform=from_origin(9, 48, 1e-5, 1e-5)),
        south_up=dict(crs="EPSG:32632", transform=Affine(0.5, 0, 5e5, 0, 0.5, 5.3e6)),
        rotated=dict(crs="EPSG:32632", transform=Affine(0.4, 0.3, 5e5, 0.3, -0.4, 5.3e6)),
        no_system=dict(transform=from_origin(5e5, 5.3e6, 0.5, 0.5)),
    )
    for name, place in places.items():
        with open_scene(write(tmp_path / name, pixels, **place), card_for()) as scene:
            assert scene.transform == place["transform"]
            assert scene.crs == (CRS.from_user_input(place["crs"]) if "crs" in place else None)
    for name, place in dict(none={}, counts=dict(transform=Affine(1, 0, 0, 0, -1, 4))).items():
        with open_scene(write(tmp_path / name, pixels, **place), card_for()) as scene:
            assert (scene.transform, scene.crs, scene.resolution) == (None, None, None)


def test_a_world_file_counts(tmp_path):
    from PIL import Image

    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.pgw").write_text("0.5\n0\n0\n-0.5\n1000.25\n1999.75\n")
    with open_scene(tmp_path / "a.png", card_for()) as scene:
        assert scene.transform == from_origin(1000, 2000, 0.5, 0.5)


def test_ground_control_points_are_refused(tmp_path):
    path = write(tmp_path / "a", np.zeros((3, 4, 6), np.uint8))
    points = [rasterio.control.GroundControlPoint(r, c, 9 + c / 100, 48 - r / 100) for r, c in ((0, 0), (0, 6), (4, 0))]
    with quiet_decoders(), rasterio.open(path, "r+") as file:
        file.gcps = points, CRS.from_epsg(4326)
    with pytest.raises(CmidError, match="ground control points.*gdalwarp"):
        open_scene(path, card_for())


def test_grey_pictures_become_rgb_and_other_bands_do_not(tmp_path):
    from PIL import Image

    Image.fromarray(np.full((4, 6), 7, np.uint8)).save(tmp_path / "a.png")
    with open_scene(tmp_path / "a.png", card_for()) as scene:
        pixels, _ = scene.read(0, 0, 4, 6)
        assert pixels.shape == (3, 4, 6) and (pixels == 7).all()
    for channels in (1, 2, 4):
        path = write(tmp_path / str(channels), np.zeros((channels, 4, 6), np.uint8))
        with pytest.raises(CmidError, match=f"has {channels} band"):
            open_scene(path, card_for())


def test_an_alpha_that_is_no_mask_is_named(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 60), np.uint8)
    path = write(tmp_path / "a", pixels, photometric="RGB", alpha="YES")
    hint = "its band 4 is called alpha but is no mask: drop it with gdal_translate -b 1 -b 2 -b 3 IN.tif OUT.tif"
    with pytest.raises(CmidError, match=f"has 4 bands, .*; {hint}$"):
        open_scene(path, card_for())
    for other in (card_for(channels=2), card_for(channels=5)):
        with pytest.raises(CmidError, match="give a scene with these bands alone"):
            open_scene(path, other)
    with open_scene(path, card_for(channels=4)) as scene:
        assert (scene.read(0, 0, 40, 60)[0] == pixels).all()


def test_bytes_are_read_as_bytes_by_networks_that_saw_bytes(tmp_path):
    path = write(tmp_path / "a", np.full((3, 4, 6), 7, np.uint8))
    with pytest.raises(CmidError, match="pixels of uint8, but the network was trained on uint16 only"):
        open_scene(path, card_for("uint16"))
    both = card_for("uint16")
    both.source.types["uint8"] = Limits(low=[0] * 3, high=[255] * 3)
    with open_scene(path, both) as scene:
        assert (scene.read(0, 0, 4, 6)[0] == 7).all()


def test_large_tiles_are_read_column_by_column(tmp_path, monkeypatch):
    from cmid.apply import scene as module

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 5000, (2, 300, 500)).astype("uint16")
    pixels[:, 100:150, 200:300] = 0
    path = write(tmp_path / "a", pixels, tiled=True, blockxsize=64, blockysize=32, nodata=0)
    with open_scene(path, card_for("uint16", 2)) as scene:
        due = scene.read(10, 33, 280, 401)
        monkeypatch.setattr(module, "_PIECE", 10_000)
        assert len(scene._pieces(10, 33, 280, 401)) == 7
        found = scene.read(10, 33, 280, 401)
    assert all(np.array_equal(a, b) for a, b in zip(due, found))


def test_a_scene_of_another_scale_is_noted(tmp_path):
    reflectance = np.random.default_rng(0).random((3, 300, 300)).astype("float32")
    path = write(tmp_path / "a", reflectance)
    card = card_for("float32", valid_range=[[100.0, 8000.0]] * 3)
    with open_scene(path, card) as scene:
        notes = scene_notes(scene)
    assert len(notes) == 2 and notes[0].startswith("100% of its values lie outside")
    with open_scene(path, card_for("float32", low=0.02, high=0.98, valid_range=[[0.0, 1.0]] * 3)) as scene:
        assert scene_notes(scene) == []
    empty = write(tmp_path / "empty", np.zeros((3, 8, 8), np.uint8), nodata=0)
    with open_scene(empty, card_for()) as scene:
        assert scene_notes(scene) == []


def test_scenes_of_one_name_and_links(tmp_path):
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    for name in ("a.tif", "b/a.tif"):
        (folder / name).touch()
    assert [name for _, name in list_scenes(folder, tmp_path / "out")] == ["a", "b/a"]
    (folder / "b/a.png").touch()
    with pytest.raises(CmidError, match="rename one"):
        list_scenes(folder, tmp_path / "out")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(CmidError, match="is inside of the images"):
        list_scenes(folder, tmp_path / "link" / "maps")
