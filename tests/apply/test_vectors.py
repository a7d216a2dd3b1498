"Boxes in map coordinates, as other programs read them."

import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.warp
import shapely
import torch
from rasterio.features import rasterize
from rasterio.transform import Affine

from cmid.apply import vectors
from cmid.apply.scene import open_scene
from cmid.base.errors import CmidError
from cmid.tasks.boxes import from_polygon, to_polygon
from tests.tools.placed import PLACES, plain_card, write_scene

BOXES = [[40.0, 30.0, 30.0, 10.0, 0.0], [90.0, 60.0, 40.0, 16.0, math.radians(35)], [30.0, 80.0, 24.0, 12.0, -1.2]]
NAMES = ["plane", "large ship"]
FOUND = dict(boxes=torch.tensor(BOXES), scores=torch.tensor([0.9, 0.5, 0.25]), classes=torch.tensor([0, 1, 1]))


@pytest.fixture(params=PLACES)
def scene(request, tmp_path):
    "A scene whose boxes are painted white."
    outlines = [(shapely.Polygon(o), 255) for o in to_polygon(FOUND["boxes"]).numpy()]
    pixels = np.repeat(rasterize(outlines, (110, 130), fill=0, dtype="uint8")[None], 3, 0)
    path = write_scene(tmp_path / f"{request.param}.tif", pixels, request.param)
    with open_scene(path, plain_card()) as opened:
        opened.painted, opened.place = pixels[0] > 0, request.param
        yield opened


def written(scene, folder, **options):
    with vectors.box_files(folder, scene.name, scene, NAMES, **options) as (write, files):
        write(FOUND)
    assert sorted(files) == sorted(o.name for o in folder.iterdir() if o.suffix != ".tif")
    return folder / scene.name


def read(path):
    "(coordinate system or None, polygons, columns), as GDAL reads them"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        about, _, shapes, columns = pyogrio.raw.read(path)
    return about["crs"], shapely.from_wkb(shapes), dict(zip(about["fields"].tolist(), columns))


def in_pixels(polygons, scene, crs=None):
    "Corners (n, 4, 2) in px, from map coordinates of the scene or of another system"
    points = np.array([shapely.get_coordinates(o)[:4] for o in polygons])
    if crs and scene.crs:
        back = rasterio.warp.transform(crs, scene.crs, *points.reshape(-1, 2).T.tolist())
        points = np.array(back).T.reshape(points.shape)
    if scene.transform is None:
        return points
    return np.stack(~scene.transform @ (points[..., 0], points[..., 1]), -1)


def same_corners(found, due, tolerance):
    return all(np.abs(a[:, None] - b).max(2).min(0).max() < tolerance for a, b in zip(found, due))


@pytest.mark.parametrize("suffix", ["geojson", "gpkg", "wgs84.geojson"])
def test_corners_come_back_at_their_pixels(scene, tmp_path, suffix):
    path = written(scene, tmp_path, gpkg=True).with_suffix(f".{suffix}")
    if suffix == "wgs84.geojson" and scene.crs is None:
        assert not path.exists()
        return
    crs, polygons, columns = read(path)
    found = in_pixels(polygons, scene, "EPSG:4326" if suffix.startswith("wgs") else None)
    assert same_corners(found, to_polygon(FOUND["boxes"].double()).numpy(), 0.01)
    assert columns["class"].tolist() == ["plane", "large ship", "large ship"]
    if suffix.startswith("wgs"):
        assert crs == "EPSG:4326"
    elif scene.crs is None:
        assert crs is None or "pixels" in crs or "Undefined" in crs or "Cartesian" in crs
    else:
        assert rasterio.CRS.from_user_input(crs) == scene.crs


def test_polygons_cover_the_painted_pixels(scene, tmp_path):
    "GDAL burns what it reads from the file into the grid of the image: the same pixels."
    _, polygons, _ = read(written(scene, tmp_path).with_suffix(".geojson"))
    transform = Affine.identity() if scene.transform is None else scene.transform
    burnt = rasterize([(o, 1) for o in polygons], scene.painted.shape, transform=transform)
    assert (burnt > 0).sum() > 500
    assert ((burnt > 0) != scene.painted).sum() <= 2  # centres of pixels that lie on an outline


def test_text_is_the_boxes_in_pixels(scene, tmp_path):
    lines = written(scene, tmp_path).with_suffix(".txt").read_text().splitlines()
    assert [o.split()[8:] for o in lines] == [
        ["plane", "0.900000"],
        *[["large%20ship", o] for o in ("0.500000", "0.250000")],
    ]
    corners = torch.tensor([[float(v) for v in o.split()[:8]] for o in lines]).view(-1, 4, 2)
    assert torch.allclose(from_polygon(corners)[:, :4], FOUND["boxes"][:, :4], atol=0.02)


def test_rings_turn_left(scene, tmp_path):
    for path in written(scene, tmp_path).parent.glob("*.geojson"):
        for feature in json.loads(path.read_text())["features"]:
            (ring,) = feature["geometry"]["coordinates"]
            assert ring[0] == ring[-1] and len(ring) == 5
            assert shapely.is_ccw(shapely.LinearRing(ring)), path


def test_bearing_and_metres(scene, tmp_path):
    path = written(scene, tmp_path).with_suffix(".geojson")
    features = [o["properties"] for o in json.loads(path.read_text())["features"]]
    if scene.crs is None:
        assert "bearing" not in features[0] and "coordinates" in json.loads(path.read_text())
        return
    sides = [(o["width_m"], o["height_m"]) for o in features]
    if scene.place in ("utm", "south-up", "rotated"):  # square pixels of 2 m, near the central meridian
        assert np.allclose(sides, 2 * FOUND["boxes"][:, 2:4].numpy() / 0.9996, atol=0.01)
    if scene.place in ("utm", "rotated"):  # y down: an angle on the screen is one on the compass
        due = [(90 + o["angle"] - 25 * (scene.place == "rotated")) % 180 for o in features]
        assert np.allclose([o["bearing"] for o in features], due, atol=0.05)
    if scene.place == "south-up":  # north is down
        assert np.allclose([o["bearing"] for o in features], [(90 - o["angle"]) % 180 for o in features], atol=0.05)
    if scene.place == "degrees":  # a pixel is narrower than high, by the cosine of the latitude
        assert math.isclose(sides[0][0] / 30 / (sides[0][1] / 10), math.cos(math.radians(47.9)), rel_tol=0.01)


def test_a_sheared_box_is_a_parallelogram(tmp_path):
    path = write_scene(tmp_path / "a.tif", np.zeros((3, 110, 130), np.uint8), "sheared")
    with open_scene(path, plain_card()) as scene:
        corners = vectors.outlines(FOUND, scene, NAMES).corners
    first, second = corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0]
    assert np.allclose(corners[:, 2] - corners[:, 3], first)
    cosine = (first * second).sum(1) / np.hypot(*first.T) / np.hypot(*second.T)
    assert np.abs(cosine).max() > 0.3


def fiji():
    "A scene across the meridian of 180 degrees"
    transform = Affine(100, 0, 810_000, 0, -100, 8_100_000)
    return SimpleNamespace(transform=transform, crs=rasterio.CRS.from_epsg(32760))


def test_a_polygon_across_180_degrees_is_cut(tmp_path):
    east = rasterio.warp.transform("EPSG:4326", "EPSG:32760", [180.0], [-17.0])
    x, y = ~fiji().transform @ (east[0][0], east[1][0])
    found = dict(boxes=torch.tensor([[x, y, 60.0, 20, 0.0]]), scores=torch.tensor([0.5]), classes=torch.tensor([0]))
    with vectors.box_files(tmp_path, "fiji", fiji(), NAMES) as (write, _):
        write(found)
    (feature,) = json.loads((tmp_path / "fiji.wgs84.geojson").read_text())["features"]
    assert feature["geometry"]["type"] == "MultiPolygon"
    parts = [shapely.Polygon(o[0]) for o in feature["geometry"]["coordinates"]]
    assert sorted(-180 <= o.bounds[0] and o.bounds[2] <= -179 for o in parts) == [False, True]
    degree = 111_320 * math.cos(math.radians(17)) * 110_650
    assert math.isclose(sum(o.area for o in parts) * degree, 6000 * 2000, rel_tol=0.02)
    assert all(shapely.is_ccw(o.exterior) for o in parts)
    assert math.isclose(feature["properties"]["width_m"], 6000, rel_tol=0.01)


@pytest.mark.parametrize("west", [179.9, -180.1, 200.0, 359.0])
def test_longitudes_are_those_of_geojson(tmp_path, west):
    "Also of scenes that count from 0 to 360, that cross 180 degrees or end there."
    transform = Affine(0.001, 0, west, 0, -0.001, 10)
    scene = SimpleNamespace(name="a", transform=transform, crs=rasterio.CRS.from_epsg(4326))
    boxes = dict(FOUND, boxes=torch.tensor([[100.0, 30, 30, 10, 0], [95.0, 60, 10, 10, 0], [90.0, 60, 40, 16, 0.6]]))
    with vectors.box_files(tmp_path, "a", scene, NAMES) as (write, _):
        write(boxes)
    shapes = [
        shapely.geometry.shape(o["geometry"])
        for o in json.loads((tmp_path / "a.wgs84.geojson").read_text())["features"]
    ]
    assert all(o.is_valid and -180 <= o.bounds[0] and o.bounds[2] <= 180 for o in shapes)
    areas = [o.area / 0.001**2 for o in shapes]
    assert areas == pytest.approx([300, 100, 640], rel=1e-3)


def test_a_box_that_is_nowhere_on_the_earth_has_no_geometry(tmp_path):
    far = SimpleNamespace(transform=Affine(1, 0, 1e30, 0, -1, 1e30), crs=rasterio.CRS.from_epsg(32632))
    with vectors.box_files(tmp_path, "far", far, NAMES) as (write, _):
        write(FOUND)
    features = json.loads((tmp_path / "far.wgs84.geojson").read_text())["features"]
    assert [o["geometry"] for o in features] == [None] * 3
    assert features[0]["properties"]["bearing"] is None


def test_no_box_is_an_empty_layer(scene, tmp_path):
    with vectors.box_files(tmp_path, scene.name, scene, NAMES, gpkg=True) as (write, _):
        write({k: v[:0] for k, v in FOUND.items()})
    for suffix in ("geojson", "gpkg"):
        crs, polygons, _ = read(tmp_path / f"{scene.name}.{suffix}")
        assert len(polygons) == 0
    assert (tmp_path / f"{scene.name}.txt").read_text() == ""


def test_names_of_classes_survive(tmp_path):
    names = ['a "quoted" one', "Fläche\n2"]
    scene = SimpleNamespace(transform=None, crs=None)
    with vectors.box_files(tmp_path, "a", scene, names, gpkg=True) as (write, _):
        write(FOUND)
    for suffix in ("geojson", "gpkg"):
        assert set(read(tmp_path / f"a.{suffix}")[2]["class"]) == set(names)
    assert len((tmp_path / "a.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize("at", ["write", "end"])
def test_files_are_whole_or_not_at_all(tmp_path, monkeypatch, at):
    scene = SimpleNamespace(transform=None, crs=None)
    with vectors.box_files(tmp_path, "a", scene, NAMES, gpkg=True) as (write, _):
        write(FOUND)
    plain = vectors.pyogrio.raw.write

    def full(*args, append, **options):
        if append:
            raise pyogrio.errors.DataSourceError("database or disk is full")
        return plain(*args, append=append, **options)

    before = {o.name: o.read_bytes() for o in tmp_path.iterdir()}
    if at == "write":
        monkeypatch.setattr(vectors.pyogrio.raw, "write", full)
    with pytest.raises((CmidError, KeyboardInterrupt)) as caught:
        with vectors.box_files(tmp_path, "a", scene, NAMES, gpkg=True) as (write, _):
            write(FOUND | dict(boxes=FOUND["boxes"] + 1))
            raise KeyboardInterrupt
    assert at == "end" or "a.gpkg: cannot be written (database or disk is full)" in str(caught.value)
    assert {o.name: o.read_bytes() for o in tmp_path.iterdir()} == before
