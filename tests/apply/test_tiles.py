"Classes of images and tiles: the pixels of `prepare`, places to half a pixel, and a map of their classes."

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from PIL import Image

from cmid import load_task
from cmid.apply import items, tiles
from cmid.apply.command import cmid_apply
from cmid.apply.scene import ApplyOptions, list_scenes
from cmid.base.errors import CmidError
from cmid.data.prepare import prepare
from tests.tools.networks import made_network
from tests.tools.placed import PLACES, plain_card, write_scene


class Brightness(torch.nn.Module):
    "Knows dark and bright images; stops with the image `last`."

    def __init__(self, side=32, tile=0, last=None, names=("dark", "bright")):
        super().__init__()
        self.none = torch.nn.Parameter(torch.zeros(1))
        colours = ["#000000", "#ffffff"]
        self.card = plain_card(side=side, tile=tile, classes=[*names], colours=colours)
        self.seen, self.last = 0, last

    def forward(self, x):
        self.seen += len(x)
        if self.last is not None and self.seen > self.last:
            raise KeyboardInterrupt
        bright = x.mean((1, 2, 3))
        return 8 * torch.stack([0.5 - bright, bright - 0.5], 1)


def run(network, images, out, **options):
    "Facts, and the rows of the table"
    facts = tiles.apply_tiles(network, list_scenes(images, out), out, ApplyOptions(**options))
    return facts, pq.read_table(out / "classes.parquet").to_pylist()


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images" / "north").mkdir(parents=True)
    return tmp_path / "images"


def rasters(folder):
    "Images of several kinds and sizes"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (90, 41), dtype=np.uint8)).save(folder / "north" / "b.jpg")
    holes = rng.integers(1, 256, (3, 64, 100), dtype=np.uint8)
    holes[:, :40, :40] = 0
    write_scene(folder / "c.tif", holes, "utm", nodata=0)


@pytest.mark.parametrize("tile", [0, 40])
def test_items_are_those_of_prepare(images, tmp_path, tile):
    rasters(images)
    prepared = prepare(images, tmp_path / "prepared", side=32, tile=tile, workers=1)
    with open(tmp_path / "prepared" / "items.csv", encoding="utf-8") as file:
        due = [(row["source"], row["window"]) for row in csv.DictReader(file)]
    planned = items.plan_items(list_scenes(images, tmp_path / "out"), plain_card(), 32, tile)
    rows = [row for batch in planned.batches(3) for row in batch.rows]
    assert [(row.path, tiles.item_name("", row.window)) for row in rows] == due
    assert np.array_equal(np.stack([row.pixels for row in rows]), prepared[np.arange(len(rows))])


def test_a_kept_network_classifies_as_in_scoring(images, tmp_path):
    rasters(images)
    network = load_task(made_network(tmp_path / "classify", "classify", classes=4, side=32))
    _, rows = run(network, images, tmp_path / "out", tile=40, batch=1)
    planned = items.plan_items(list_scenes(images, tmp_path / "out"), network.card, 32, 40)
    seen = [row.pixels for row in planned.rows() if row.pixels is not None]
    with torch.no_grad():
        due = torch.cat([network(torch.from_numpy(o[None]).float() / 255) for o in seen]).softmax(1).numpy()
    found = np.array([[row[f"p_{name}"] for name in network.card.classes] for row in rows])
    assert np.allclose(found, due, atol=1e-6)
    assert [row["class"] for row in rows] == [network.card.classes[k] for k in due.argmax(1)]
    assert np.allclose([row["probability"] for row in rows], due.max(1), atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_places_and_map_of_tiles(images, tmp_path, place):
    "One tile is bright: its centre and its pixels of the map lie where the scene has it; nothing leaves the scene."
    pixels = np.full((3, 100, 130), 10, np.uint8)
    pixels[:, 32:64, 64:96] = 250
    write_scene(images / "north" / "a.tif", pixels, place)
    facts, rows = run(Brightness(tile=32), images, tmp_path / "out")
    (bright,) = (row for row in rows if row["class"] == "bright")
    crs, transform = PLACES[place]
    assert (bright["row"], bright["column"], bright["height"], bright["width"]) == (32, 64, 32, 32)
    assert bright["crs"] == crs and len(rows) == 4 * 5
    suffix = "png" if crs is None else "tif"
    assert facts["files"][2:] == [f"north/a.{suffix}", f"north/a.{suffix}.aux.xml"]
    with rasterio.open(tmp_path / "out" / "north" / f"a.{suffix}") as file:
        grid, table, tags = file.read(1), file.colormap(1), file.tags()
        assert (file.shape, file.nodata if crs else 255) == ((100, 130), 255)
        assert np.array_equal(grid == 1, pixels[0] == 250) and (grid != 1).sum() == (grid == 0).sum()
        if crs is None:
            assert bright["x"] is bright["lon"] is None
            return
        assert (file.crs, json.loads(tags["classes"])) == (crs, ["dark", "bright"])
        assert file.transform.almost_equals(PLACES[place][1], 1e-9)
        assert table[1][:3] == (255, 255, 255) and "32 px" in tags["tile"]
        corners = file.xy(32, 64, offset="ul"), file.xy(63, 95, offset="lr")
        centre = np.mean(corners, 0)
    due = transform @ (64 + 16, 32 + 16)
    half = 0.5 * max(abs(transform.a), abs(transform.e))
    assert np.allclose(centre, due, atol=1e-3 * half) and np.allclose((bright["x"], bright["y"]), due, atol=1e-3 * half)
    back = rasterio.warp.transform("EPSG:4326", crs, [bright["lon"]], [bright["lat"]])
    assert np.allclose(np.ravel(back), due, atol=0.01 * half)


def test_the_last_tile_ends_at_the_edge(images, tmp_path):
    pixels = np.full((3, 40, 50), 10, np.uint8)
    pixels[:, 8:, 18:] = 250
    write_scene(images / "a.tif", pixels, "utm")
    _, rows = run(Brightness(tile=32), images, tmp_path / "out")
    assert [(row["row"], row["column"], row["class"]) for row in rows][-1] == (8, 18, "bright")
    due = np.zeros((40, 50), np.uint8)
    due[:, 32:] = 1  # columns 18 to 31 belong to the dark tiles before them, too
    with rasterio.open(tmp_path / "out" / "a.tif") as file:
        assert np.array_equal(file.read(1), due)


def test_tiles_without_a_value_have_none(images, tmp_path):
    pixels = np.full((3, 64, 96), 10, np.uint8)
    pixels[:, :32, :64] = 0
    write_scene(images / "a.tif", pixels, "utm", nodata=0)
    facts, rows = run(Brightness(tile=32), images, tmp_path / "out")
    assert (facts["rows"], facts["empty"], facts["skipped"], len(rows)) == (4, 2, 0, 4)
    with rasterio.open(tmp_path / "out" / "a.tif") as file:
        found = file.read(1)
    due = np.zeros((64, 96), np.uint8)
    due[:32, :64] = 255
    assert np.array_equal(found, due)


def test_what_cannot_be_read_is_listed(images, tmp_path):
    rasters(images)
    (images / "broken.tif").write_bytes((images / "c.tif").read_bytes()[:3000])
    write_scene(images / "deep.tif", np.zeros((3, 40, 40), np.uint16), "utm")
    write_scene(images / "many.tif", np.zeros((5, 40, 40), np.uint8), "utm")
    for tile in (0, 40):
        facts, rows = run(Brightness(), images, tmp_path / "out", tile=tile)
        with open(tmp_path / "out" / "classes.skipped.csv", encoding="utf-8") as file:
            listed = {row["file"].partition("[")[0]: row["reason"] for row in csv.DictReader(file)}
        assert sorted(listed) == ["broken.tif", "deep.tif", "many.tif"]
        assert "uint16" in listed["deep.tif"] and "5 bands" in listed["many.tif"]
        assert sorted({row["path"] for row in rows}) == ["a.png", "c.tif", "north/b.jpg"]
        assert facts["skipped"] >= 3
    for name in listed:
        (images / name).unlink()
    facts, _ = run(Brightness(), images, tmp_path / "out")
    assert facts["skipped"] == 0 and not (tmp_path / "out" / "classes.skipped.csv").exists()


def test_nothing_that_can_be_read_is_an_error(images, tmp_path):
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(CmidError, match="not one image or tile can be classified .*broken.png"):
        run(Brightness(), images, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("tile", [0, 32])
def test_a_stopped_run_is_resumed(images, tmp_path, monkeypatch, tile):
    monkeypatch.setattr(tiles, "make_pieces", lambda *args: items.make_pieces(*args, piece=8))
    rng = np.random.default_rng(0)
    for k in range(20):
        write_scene(images / f"{k:02}.tif", rng.integers(0, 256, (3, 64, 40), dtype=np.uint8), "utm")
    once, again = Brightness(tile=tile), Brightness(tile=tile)
    facts, rows = run(once, images, tmp_path / "once", key="k")
    with pytest.raises(KeyboardInterrupt):
        run(Brightness(tile=tile, last=12), images, tmp_path / "twice", key="k")
    assert [o.name for o in (tmp_path / "twice").iterdir()] == [".classes.part"]
    later, found = run(again, images, tmp_path / "twice", key="k")
    assert (later, found) == (facts, rows) and again.seen == once.seen - 8
    for name in facts["files"]:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name
    assert (
        sorted(o.relative_to(tmp_path / "twice").as_posix() for o in (tmp_path / "twice").iterdir()) == facts["files"]
    )


def test_both_tables_are_the_same(images, tmp_path):
    rasters(images)
    _, rows = run(Brightness(names=("a,b", 'c "d"')), images, tmp_path / "out", tile=40)
    with open(tmp_path / "out" / "classes.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(rows[0])
    for line, row in zip(lines, rows, strict=True):
        for name, value in row.items():
            if isinstance(value, float):
                assert float(line[name]) == pytest.approx(value, rel=1e-6)
            else:
                assert line[name] == ("" if value is None else str(value))


def test_the_command_classifies(images, tmp_path, capsys):
    rasters(images)
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    model = made_network(tmp_path / "classify-land-random", "classify", classes=4, side=32)
    cmid_apply([str(model), str(images), str(tmp_path / "out"), "--tile", "40"])
    said = capsys.readouterr().out
    count = len(pq.read_table(tmp_path / "out" / "classes.parquet"))
    assert f"classes: {count} rows; skipped 1, see classes.skipped.csv" in said
    maps = ["a.png", "c.tif", "north/b.png"]
    assert all((tmp_path / "out" / name).is_file() for name in maps)
    cmid_apply([str(model), str(images), str(tmp_path / "out"), "--tile", "40"])
    assert "classes: up to date" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cmid_apply([str(model), str(images), str(tmp_path / "other"), "--score", "0.5"])
    assert "--score: is for detect, but this network is for classify" in capsys.readouterr().err
