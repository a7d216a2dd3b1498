"Overviews of maps: what is drawn is what the files hold, for scenes of any size, place and kind."

import json
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from rasterio.transform import Affine, from_origin

from cmid.apply import overview
from cmid.apply.maps import map_metrics, map_overview
from cmid.apply.overview import Frame, Panel, legend_entries, overview_figure, read_detections, reduced_scene
from cmid.apply.rasters import MapLook, write_class_map
from cmid.apply.scene import open_scene
from cmid.tasks.card import Source

UTM = rasterio.CRS.from_epsg(32632)
PLACE = from_origin(500_000, 5_400_000, 0.5, 0.5)
COLOURS = ["#ff0000", "#00ff00", "#0000ff"]


def card(task="segment", network="upernet", bands=3, **more):
    values = dict(task=task, network=network, classes=["road", "tree", "water"], colours=COLOURS, tile=64)
    values |= dict(in_chans=bands, bands=[str(i) for i in range(bands)], resolution=None, valid_range=None)
    return SimpleNamespace(source=Source(bands=None, types={}, nodata=None), **values | more)


def write(path, pixels, transform=PLACE, crs=UTM, nodata=None):
    "A GeoTIFF of (C, H, W)."
    count, height, width = pixels.shape
    place = {} if transform is None else dict(transform=transform, crs=crs)
    profile = dict(driver="GTiff", dtype="uint8", count=count, height=height, width=width, nodata=nodata, **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels)
    return path


def noise(*shape, low=1):
    return np.random.default_rng(0).integers(low, 256, shape, np.uint8)


def words(figure):
    "Everything that is written on a figure."
    figure.draw_without_rendering()
    found = [figure.get_suptitle()]
    for ax in figure.axes:
        labels = [*ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts]
        found += [ax.get_title(), *(o.get_text().strip() for o in labels)]
    for legend in [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]:
        found += [o.get_text() for o in legend.get_texts()]
    return [o for o in found if o]


# Pictures


@pytest.mark.parametrize("strip", [1, 2**23])
def test_reduced_pixels_are_means_of_valid_ones_whatever_the_strips(tmp_path, monkeypatch, strip):
    pixels = noise(3, 50, 70)
    pixels[:, 3:9, 20:33] = 0
    pixels[:, :8, :8] = 0  # a whole pixel of the picture without a value
    monkeypatch.setattr(overview, "_STRIP", strip)
    with open_scene(write(tmp_path / "a.tif", pixels, nodata=0), card()) as scene:
        picture = reduced_scene(scene, 9)[0]
    assert picture.shape == (7, 9, 3)  # 50 / 8 and 70 / 8, rounded up
    assert (picture[0, 0] == 255).all()
    for i, j in ((0, 2), (0, 3), (3, 4), (6, 8)):
        part = pixels[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].reshape(3, -1).astype(float)
        mean = part[:, part.any(0)].mean(1)
        np.testing.assert_array_equal(picture[i, j], np.rint(mean))


@pytest.mark.parametrize("bands", [1, 2, 5])
def test_bands_become_grey_or_colour(tmp_path, bands):
    pixels = noise(bands, 20, 30)
    with open_scene(write(tmp_path / "a.tif", pixels), card(bands=bands)) as scene:
        picture = reduced_scene(scene)[0]
    expected = pixels[:3] if bands > 2 else np.repeat(pixels[:1], 3, 0)
    np.testing.assert_array_equal(picture, expected.transpose(1, 2, 0))


def test_a_large_map_is_reduced_to_its_most_frequent_classes(tmp_path):
    classes = np.zeros((1500, 1500), np.uint8)
    classes[:, 800:] = 2
    classes[:700, :300] = 255
    look = MapLook(1500, 1500, PLACE, UTM, ["road", "tree", "water"], COLOURS)
    write_class_map(tmp_path / "map.tif", look, [classes])
    small = overview.reduced_classes(tmp_path / "map.tif", (300, 300))
    np.testing.assert_array_equal(small, classes[2::5, 2::5])
    colours = overview.coloured(small, COLOURS)
    assert colours[0, 0].tolist() == [255, 255, 255]
    assert colours[0, -1].tolist() == [0, 0, 255]


# Words around the pictures


def frame(transform=PLACE, crs=UTM, height=300, width=400):
    return Frame(height, width, transform, crs)


def drawn(place, panels=2):
    pictures = [Panel(f"panel {i}", np.zeros((30, 40, 3), np.uint8)) for i in range(panels)]
    return words(overview_figure(pictures, place, [("road 100.0 %", "#ff0000")]))


def test_a_north_up_scene_has_coordinates_bar_and_arrow():
    found = drawn(frame())
    assert {"500,000.0", "500,200.0", "5,400,000.0", "5,399,850.0", "50 m", "▲ N"} <= set(found)
    assert found[0] == "400 x 300 px, WGS 84 / UTM zone 32N (EPSG:32632)"


@pytest.mark.parametrize(
    "place, says",
    [
        (frame(None, None), "400 x 300 px, no coordinates"),
        (frame(crs=None), "no coordinate system"),
        (frame(Affine(0.3, 0.4, 500_000, 0.4, -0.3, 5_400_000)), "north is not up"),
        (frame(Affine(0.5, 0, 500_000, 0, 0.5, 5_400_000)), "north is not up"),
    ],
    ids=["pixels", "no system", "rotated", "upside down"],
)
def test_elsewhere_neither_bar_nor_arrow(place, says):
    found = drawn(place)
    assert says in found[0]
    assert "▲ N" not in found
    assert not [o for o in found if o.endswith((" m", " km"))]


def test_the_bar_is_true_where_a_degree_is_short():
    "At 60 degrees north a degree of longitude is half as long as one of latitude; pixels are drawn twice as high."
    place = frame(Affine(1e-4, 0, 9, 0, -1e-4, 60), rasterio.CRS.from_epsg(4326))
    figure = overview_figure([Panel("a", np.zeros((3, 4, 3), np.uint8))] * 2, place, [])
    east, south = place.metres()
    assert east == pytest.approx(1e-4 * 111195 * np.cos(np.radians(60 - 0.015)), rel=1e-3)
    assert south == pytest.approx(1e-4 * 111195, rel=1e-3)
    assert figure.axes[0].get_aspect() == pytest.approx(south / east)
    bar = next(line for line in figure.axes[1].lines if line.get_linewidth() == 2)
    assert np.ptp(bar.get_xdata()) * east == pytest.approx(500)
    assert "500 m" in words(figure)


@pytest.mark.parametrize("height, width", [(100, 100), (100, 1000), (1000, 100), (1, 5000)])
@pytest.mark.parametrize("panels", [2, 3])
def test_no_word_lies_over_a_picture(height, width, panels):
    pictures = [Panel(f"panel {i}", np.zeros((max(1, height // 10), width // 10, 3), np.uint8)) for i in range(panels)]
    figure = overview_figure(pictures, frame(height=height, width=width), [(f"class {i}", "red") for i in range(9)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    shown = [ax for ax in figure.axes if ax.axison]
    texts = [o for ax in shown for o in (*ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts, ax.title)]
    texts += [o for legend in figure.legends for o in legend.get_texts()]
    boxes = [o.get_window_extent(renderer) for o in texts if o.get_text()]
    for box in boxes:
        assert sum(box.overlaps(other) for other in boxes) == 1, "words lie over each other"
    for ax in shown:
        inside = ax.get_window_extent(renderer).padded(-1)
        assert not [box for box in boxes if inside.overlaps(box)]


def test_names_are_drawn_as_they_are():
    found = words(overview_figure([Panel("a", np.zeros((3, 3, 3), np.uint8))] * 2, frame(), [("$x_1$ & ü 3 %", "red")]))
    assert "$x_1$ & ü 3 %" in found


def test_the_legend_names_what_occurs():
    counts = dict(road=999_500, tree=0, water=500)
    assert legend_entries(counts, COLOURS, True, 0.1) == [
        ("road > 99.9 %", COLOURS[0]),
        ("water < 0.1 %", COLOURS[2]),
        ("no value 10.0 %", "white"),
    ]
    assert legend_entries(dict.fromkeys(counts, 0), COLOURS, True) == []


# What was found


def test_objects_are_counted_and_drawn_in_the_colours_of_their_classes(tmp_path):
    scene = write(tmp_path / "scenes/a b.tif", noise(3, 64, 64))
    lines = "1 1 9 1 9 9 1 9 tree 0.9\n20 20 30 20 30 30 20 30 water 0.8\n20 40 30 40 30 50 20 50 water 0.7\n"
    out = tmp_path / "maps"
    out.mkdir()
    (out / "a b.txt").write_text(lines)
    summary = dict(scenes={"a b": dict(boxes=3, files=["a b.txt"])}, options={})
    detect = card("detect", "oriented-rcnn")
    metrics = map_metrics(detect, summary, out)
    assert metrics["classes"] == dict(road=0, tree=1, water=2)
    figure, name = map_overview(detect, summary, scene.parent, None, out)
    assert name == "a b"
    (boxes,) = figure.axes[1].collections
    assert boxes.get_edgecolors()[:, :3].tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert {"tree 1", "water 2"} <= set(words(figure))


def test_no_object_at_all(tmp_path):
    scene = write(tmp_path / "a.tif", noise(3, 64, 64))
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps/a.txt").write_text("")
    assert read_detections(tmp_path / "maps/a.txt", [])[0].shape == (0, 4, 2)
    summary = dict(scenes=dict(a=dict(boxes=0, files=["a.txt"])), options={})
    figure, _ = map_overview(card("detect"), summary, scene, None, tmp_path / "maps")
    assert not figure.axes[1].collections


def test_the_largest_scene_is_drawn_with_its_own_shares(tmp_path):
    out, facts = tmp_path / "maps", {}
    out.mkdir()
    for name, size, c in (("big", 40, 1), ("small", 20, 0)):
        write(tmp_path / f"scenes/{name}.tif", noise(3, size, size))
        look = MapLook(size, size, PLACE, UTM, ["road", "tree", "water"], COLOURS)
        write_class_map(out / f"{name}.tif", look, [np.full((size, size), c, np.uint8)])
        shares = {o: float(i == c) for i, o in enumerate(("road", "tree", "water"))}
        facts[name] = dict(height=size, width=size, classes=shares, invalid=0.0, files=[f"{name}.tif"])
    summary = dict(scenes=facts, options={})
    metrics = map_metrics(card(), summary, out)
    assert metrics == dict(
        task="segment", scenes=2, counted="shares", classes=dict(road=0.2, tree=0.8, water=0.0), invalid=0.0
    )
    json.dumps(metrics, allow_nan=False)
    figure, name = map_overview(card(), summary, tmp_path / "scenes", None, out)
    assert name == "big"
    assert "tree 100.0 %" in words(figure)
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array()[0, 0], [0, 255, 0])


def test_two_dates_stand_above_their_map_which_has_no_coordinates(tmp_path):
    for date, value in (("first", 10), ("second", 200)):
        (tmp_path / date).mkdir()
        Image.fromarray(np.full((30, 40, 3), value, np.uint8)).save(tmp_path / date / "a.png")
    out = tmp_path / "maps"
    out.mkdir()
    look = MapLook(30, 40, None, None, ["unchanged", "changed"], COLOURS[:2])
    write_class_map(out / "a.png", look, [np.ones((30, 40), np.uint8)])
    facts = dict(height=30, width=40, classes=dict(unchanged=0.0, changed=1.0), invalid=0.0, files=["a.png"])
    change = card("change", "bit", classes=["unchanged", "changed"], colours=COLOURS[:2])
    summary = dict(scenes=dict(a=facts), options={})
    figure, _ = map_overview(change, summary, tmp_path / "first", tmp_path / "second", out)
    values = [ax.images[0].get_array()[0, 0].tolist() for ax in figure.axes if ax.images]
    assert values == [[10, 10, 10], [200, 200, 200], [0, 255, 0]]
    assert words(figure)[:4] == ["40 x 30 px, no coordinates", "first date", "second date", "change"]
