"The generated landscape: one world at two dates, whatever its size, and ground truth that agrees with its pixels."

import hashlib

import numpy as np
import pytest
import rasterio

from cmid.base.encode import TILE
from cmid.base.errors import CmidError
from cmid.data import landscape
from cmid.data.landscape import DATES, GSD, block_at, block_plan, write_landscape
from cmid.data.sample import cmid_sample
from cmid.data.scenes import SOLID, corners

SIZE = 600  # px: three blocks, the last one cut
CODES = {"small-vehicle": 5, "large-vehicle": 5, "building": 2, "ship": 6}
HASHES = dict(image="0996b78fbec20a19", truth="277ad9d89dc35d1b")  # of a landscape of 300 px


def pixels(path):
    with rasterio.open(path) as source:
        assert source.crs.to_epsg() == 32632
        assert source.transform[:6] == (GSD, 0, 500000, 0, -GSD, 5400000)
        return source.read().transpose(1, 2, 0).squeeze()


def boxes(path):
    "Corners (n, 4, 2) in pixels, and names."
    rows = [line.split() for line in path.read_text().splitlines()[2:]]
    return np.array([row[:8] for row in rows], float).reshape(-1, 4, 2), [row[8] for row in rows]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("landscape")
    write_landscape(folder, SIZE)
    return folder


def test_same_bytes(tmp_path):
    write_landscape(tmp_path, 300)
    images = b"".join((tmp_path / date / "landscape.tif").read_bytes() for date in DATES)
    truth = b"".join(path.read_bytes() for path in sorted((tmp_path / "truth").iterdir()))
    found = dict(image=images, truth=truth)
    assert {name: hashlib.sha256(content).hexdigest()[:16] for name, content in found.items()} == HASHES


def test_what_a_folder_holds(world):
    names = {path.relative_to(world).as_posix() for path in world.rglob("*") if path.is_file()}
    masks = {f"truth/{o}" for o in ("first.tif", "second.tif", "change.tif", "first.txt", "second.txt")}
    assert names == masks | {f"{date}/landscape.tif" for date in DATES}
    assert {pixels(world / date / "landscape.tif").shape for date in DATES} == {(SIZE, SIZE, 3)}
    assert {pixels(world / "truth" / f"{name}.tif").shape for name in (*DATES, "change")} == {(SIZE, SIZE)}


def test_a_larger_landscape_is_the_same_world(world, tmp_path):
    "Equal to the last bit, but for the blocks that the smaller one's edge cuts and what their light reaches."
    write_landscape(tmp_path, 512)
    inner = slice(0, 512 - landscape.MARGIN)
    for name in ("first/landscape.tif", "second/landscape.tif", "truth/first.tif", "truth/change.tif"):
        np.testing.assert_array_equal(pixels(world / name)[inner, inner], pixels(tmp_path / name)[inner, inner])


@pytest.mark.parametrize("date", DATES)
def test_boxes_are_where_the_mask_says(world, date):
    corner, names = boxes(world / "truth" / f"{date}.txt")
    mask = pixels(world / "truth" / f"{date}.tif")
    assert {"small-vehicle", "large-vehicle", "building"} <= set(names)
    assert corner.min() >= 0
    assert corner.max() <= SIZE
    x, y = corner.mean(1).astype(int).T
    for name, code in zip(names, mask[y, x]):
        assert code in (CODES[name], 0)


def test_the_change_mask_is_where_the_dates_differ(world):
    "Without vehicles, whose classes the dates' masks hold."
    first, second = (pixels(world / "truth" / f"{date}.tif") for date in DATES)
    change = pixels(world / "truth/change.tif")
    assert set(np.unique(change)) == {0, 255}
    known = (first > 0) & (second > 0) & (first != 5) & (second != 5)
    same = change[known & (first == second)]
    assert (same == 0).mean() > 0.99  # what hides beneath a crown may have changed
    assert (change[known & (first != second)] == 255).mean() > 0.95  # seasons move the edge of a meadow


def test_nothing_solid_reaches_over_a_block_or_the_edge():
    for row, column, end in ((0, 0, TILE / 2), (2, 1, SIZE - 2.5 * TILE)):
        things = [o for o in block_plan(row, column, SIZE, 0) if o.kind in SOLID]
        assert things
        for thing in things:
            assert all(abs(x) <= TILE / 2 * GSD and y <= end * GSD for x, y in corners(thing))


def test_vehicles_and_buildings_differ_between_the_dates():
    hidden = [{o.kind for o in block_at(1, 1, 1024, 0, date)[1]} for date in DATES]
    assert "car" in hidden[0] & hidden[1]
    assert hidden[0] ^ hidden[1] & {"house", "hall", "pave", "road"}


@pytest.mark.parametrize("size", [0, 31, 32769])
def test_a_side_out_of_range_is_refused(tmp_path, size):
    with pytest.raises(CmidError, match=f"landscape: {size} px is out of range: choose a side of 32 to 32768 px"):
        write_landscape(tmp_path / "new", size)
    assert not any(tmp_path.iterdir())


def test_the_command_writes_a_landscape_alone(tmp_path):
    cmid_sample.__wrapped__.__wrapped__(tmp_path / "big", landscape=64)
    assert {path.name for path in tmp_path.iterdir()} == {"big"}
    assert {path.name for path in (tmp_path / "big").iterdir()} == {*DATES, "truth"}
