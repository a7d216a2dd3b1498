"The DOTA protocol: tiles as of an independent geometry library, average precision as of loops, files read back."

import json
import math
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from PIL import Image

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.base.precision import average_precision
from cmid.data.labelled import windows
from cmid.tasks.boxes import from_polygon, paired_iou, to_convention, to_polygon
from cmid.tasks.dota import (
    MAX_SCORE_TEXTS,
    cut_objects,
    detection_map,
    detection_scene_figure,
    detections_figure,
    match_detections,
    merge_tiles,
    ranked_matches,
    scaled_tile,
    server_names,
    windows_by_scale,
    write_submission,
)

SETTINGS = Params(profile="paper").detect.model_copy(update=dict(tile=64, gap=16))


def random_boxes(n, g, side=200.0, low=8.0, high=50.0):
    return np.column_stack([g.uniform(0, side, (n, 2)), g.uniform(low, high, (n, 2)), g.uniform(-4, 4, n)])


def corners(boxes):
    return to_polygon(torch.as_tensor(boxes)).numpy()


# Tiles at several scales


@pytest.mark.parametrize("scale", (0.5, 0.37, 1.5, 2.5))
@pytest.mark.parametrize("bands", (1, 3, 13))
def test_a_scaled_tile_shows_each_point_where_its_boxes_say(scale, bands):
    "A ramp stays a ramp: the network sees at x what was at x / scale of the tile, to the rounding of whole numbers."
    image = np.broadcast_to(np.arange(100, dtype="uint8") * 2, (bands, 60, 100))
    x = scaled_tile(image, (3, 7, 50, 81), scale)
    assert x.dtype == torch.uint8
    assert x.shape == (bands, math.ceil(47 * scale), math.ceil(74 * scale))
    at = (torch.arange(x.shape[2]) + 0.5) / scale
    assert ((x - (at + 7 - 0.5) * 2).abs()[:, :, 4:-4] <= 0.6).all()


@pytest.mark.parametrize("scale", (0.5, 0.37, 1.5, 2.5))
def test_scaled_tiles_cover_the_image_and_are_no_larger_than_asked(scale):
    ((_, tiles),) = windows_by_scale((900, 1300), SETTINGS.model_copy(update=dict(scales=[scale])))
    assert (tiles[:, 2:] - tiles[:, :2]).max() * scale <= 64
    assert tiles[:, 2].max() == 900
    assert tiles[:, 3].max() == 1300


def test_each_scale_has_its_own_tiles():
    half, double = windows_by_scale((128, 200), SETTINGS.model_copy(update=dict(scales=[0.5, 2.0])))
    assert half[1].tolist() == [[0, 0, 128, 128], [0, 72, 128, 200]]
    assert double[1].tolist() == windows(128, 200, 32, 8).tolist()


SMALLEST = [((1, 1), 0.05, (1, 1)), ((1, 2), 0.2, (1, 1)), ((3, 40), 0.34, (2, 14)), ((1, 1), 0.2 - 2e-17, (1, 1))]


@pytest.mark.parametrize("size,scale,expected", SMALLEST)
def test_one_pixel_remains_of_the_smallest_image(size, scale, expected):
    x = scaled_tile(np.full((2, *size), 7, "uint8"), (0, 0, *size), scale)
    assert x.shape == (2, *expected)
    assert (x == 7).all()


def test_fine_patterns_are_averaged():
    "A checkerboard of single pixels is grey at a quarter of its size."
    board = (np.indices((64, 64)).sum(0) % 2 * 200).astype("uint8")
    x = scaled_tile(board[None], (0, 0, 64, 64), 0.25).float()
    assert x.shape == (1, 16, 16)
    assert (x - 100).abs().max() < 8


# Objects of tiles


def bent_objects(n, g):
    "Labelled quadrilaterals, not quite rectangles."
    points = corners(random_boxes(n, g, 300.0)) + g.normal(0, 2, (n, 4, 2))
    points = points[shapely.is_valid(shapely.polygons(points))]
    return dict(polygons=points, classes=np.arange(len(points)), difficult=g.random(len(points)) < 0.1)


def check_polygon(found, whole, inside, share):
    "An object of a tile: as it was labelled where it is whole, else the least rectangle around what is inside."
    if share > 1 - 1e-12:
        assert np.abs(found - whole).max() < 1e-3
        return
    least = shapely.minimum_rotated_rectangle(inside)
    assert math.isclose(shapely.area(shapely.Polygon(found)), least.area, rel_tol=1e-3, abs_tol=0.02)
    assert shapely.covers(shapely.Polygon(found).buffer(0.01), inside)


def test_objects_of_tiles_are_those_of_shapely():
    "400 labelled quadrilaterals in 9 tiles: which are there, which count, and what is left of them."
    objects = bent_objects(400, np.random.default_rng(0))
    polygons = shapely.polygons(objects["polygons"])
    tiles = windows(300, 300, 130, 45)
    kept = clipped = 0
    assert len(tiles) == 9
    for tile, (top, left, bottom, right) in zip(cut_objects(objects, tiles), tiles):
        inside = shapely.intersection(polygons, shapely.box(left, top, right, bottom))
        share = shapely.area(inside) / shapely.area(polygons)
        expected = np.flatnonzero(share > 0)
        assert tile["classes"].tolist() == expected.tolist()
        assert tile["polygons"].dtype == np.float32
        clear = np.abs(share[expected] - 0.7) > 1e-9
        difficult = objects["difficult"][expected] | (share[expected] < 0.7)
        assert (tile["difficult"] == difficult)[clear].all()
        for k, found in zip(expected, tile["polygons"].astype(float) + [left, top]):
            check_polygon(found, objects["polygons"][k], inside[k], share[k])
        kept += len(expected)
        clipped += (share[expected] <= 1 - 1e-12).sum()
    assert kept > 400
    assert clipped > 100


def test_share_that_counts():
    "7 of 10 columns inside counts, 6 do not; a difficult object stays difficult."
    points = np.array(
        [
            [[93.0, 10.0], [103.0, 10.0], [103.0, 20.0], [93.0, 20.0]],
            [[94.0, 10.0], [104.0, 10.0], [104.0, 20.0], [94.0, 20.0]],
            [[5.0, 5.0], [9.0, 5.0], [9.0, 9.0], [5.0, 9.0]],
        ]
    )
    objects = dict(polygons=points, classes=np.arange(3), difficult=np.array([False, False, True]))
    tile = [(0, 0, 100, 100)]
    assert cut_objects(objects, tile)[0]["difficult"].tolist() == [False, True, True]
    assert cut_objects(objects, tile, 0.5)[0]["difficult"].tolist() == [False, False, True]


def test_objects_without_area():
    "A line is kept where it is whole, and has nothing to be clipped; what only touches a tile is not in it."
    lines = np.array(
        [
            [[10.0, 10.0], [30.0, 10.0], [30.0, 10.0], [10.0, 10.0]],
            [[90.0, 50.0], [120.0, 50.0], [120.0, 50.0], [90.0, 50.0]],
            [[100.0, 5.0], [110.0, 5.0], [110.0, 9.0], [100.0, 9.0]],
        ]
    )
    objects = dict(polygons=lines, classes=[4, 5, 6], difficult=[0, 0, 0])
    none = dict(polygons=[], classes=[], difficult=[])
    assert cut_objects(objects, [(0, 0, 100, 100)])[0]["classes"].tolist() == [4]
    assert [len(o["classes"]) for o in cut_objects(none, [(0, 0, 9, 9), (0, 9, 9, 18)])] == [0, 0]


def as_detections(tile, g):
    "The objects of a tile that are not difficult, as if all were detected."
    kept = ~tile["difficult"]
    return dict(
        boxes=from_polygon(torch.from_numpy(tile["polygons"][kept]).double()),
        scores=torch.tensor(g.random(kept.sum())),
        classes=torch.from_numpy(tile["classes"][kept]),
    )


def test_from_tiles_and_back():
    "Objects that tiles hold whole, as if all were detected in each, are merged to what they were, once each."
    g = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(np.arange(20, 400, 40.0), np.arange(20, 400, 40.0)), -1).reshape(-1, 2)
    n = len(grid)
    numbers = np.column_stack([grid, g.uniform(18, 30, n), g.uniform(6, 12, n), g.uniform(-1.5, 1.5, n)])
    boxes, classes = to_convention(torch.tensor(numbers)), torch.tensor(g.integers(0, 3, n))
    objects = dict(polygons=to_polygon(boxes).numpy(), classes=classes.numpy(), difficult=np.zeros(n, bool))
    tiles = windows(400, 400, 160, 60)
    found = [as_detections(tile, g) for tile in cut_objects(objects, tiles, 0.999)]
    assert sum(len(o["classes"]) for o in found) > n
    merged = merge_tiles(found, tiles, 0.3)
    assert len(merged["boxes"]) == n
    assert (merged["scores"].diff() <= 0).all()
    truth = dict(boxes=boxes, classes=classes, difficult=np.zeros(n, bool))
    ranked = ranked_matches([merged], [truth], list("abc"), 0.95)
    for metric in ("voc07", "area"):
        assert math.isclose(detection_map(ranked, metric)["map"], 1.0)


def test_merging_nothing():
    none = dict(boxes=torch.zeros(0, 5), scores=torch.zeros(0), classes=torch.zeros(0, dtype=torch.long))
    merged = merge_tiles([none] * 2, [(0, 0, 9, 9), (0, 5, 9, 14)], 0.1)
    assert [len(o) for o in merged.values()] == [0, 0, 0]
    with pytest.raises(ValueError, match="1 tiles with detections, 2 windows"):
        merge_tiles([none], [(0, 0, 9, 9)] * 2, 0.1)


# Files for the server


def read_zip(path):
    with zipfile.ZipFile(path) as z:
        return {name: z.read(name).decode() for name in z.namelist()}


def read_back(files, names):
    "{class: [(image, score, polygon)]} as the server reads it."
    assert sorted(files) == sorted(f"Task1_{name}.txt" for name in names)
    found = {}
    for name in names:
        rows = [line.split(" ") for line in files[f"Task1_{name}.txt"].splitlines()]
        assert all(len(row) == 10 for row in rows)
        found[name] = [(row[0], float(row[1]), np.array(row[2:], float).reshape(4, 2)) for row in rows]
    return found


NAMES = ["plane", "small-vehicle", "helipad"]


@pytest.fixture
def submitted():
    "Detections in four images, none of them of the last class."
    g = np.random.default_rng(2)
    found = {}
    for i in range(4):
        boxes = torch.tensor(random_boxes(9, g, 9000.0)).float()
        scores, classes = torch.tensor(g.random(9)), torch.tensor(g.integers(0, 2, 9))
        found[f"P{i:04}"] = dict(boxes=boxes, scores=scores, classes=classes)
    return found


def check_rows(rows, submitted):
    "Every detection has its line, in the order of images."
    assert rows["helipad"] == []
    assert sum(map(len, rows.values())) == 36
    for c, name in enumerate(NAMES):
        expected = [
            (image, score, box)
            for image, o in submitted.items()
            for score, box, k in zip(o["scores"], o["boxes"].double(), o["classes"])
            if k == c
        ]
        assert [row[0] for row in rows[name]] == [row[0] for row in expected]
        for (_, score, points), (_, true_score, box) in zip(rows[name], expected):
            assert abs(score - true_score) < 1e-6
            assert np.abs(points - corners(box[None])[0]).max() < 0.0051
            assert paired_iou(from_polygon(torch.tensor(points)[None]), box[None]) > 0.99


def test_submission_as_a_folder(submitted, tmp_path):
    path = tmp_path / "out" / "s"
    write_submission(path, submitted, NAMES)
    assert [o.name for o in path.parent.iterdir()] == ["s"]  # nothing half-written beside it
    check_rows(read_back({file.name: file.read_text() for file in path.iterdir()}, NAMES), submitted)


def test_submission_as_a_zip_file(submitted, tmp_path):
    path = tmp_path / "out" / "s.zip"
    write_submission(path, submitted, NAMES)
    assert [o.name for o in path.parent.iterdir()] == ["s.zip"]
    check_rows(read_back(read_zip(path), NAMES), submitted)
    with zipfile.ZipFile(path) as z:
        assert {o.date_time for o in z.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    first = path.read_bytes()
    write_submission(path, submitted, NAMES)
    assert path.read_bytes() == first  # repeats exactly


@pytest.mark.parametrize("image,name", [("P 1", "ship"), ("a/P1", "ship"), ("P1", "small vehicle"), ("", "ship")])
def test_names_that_lines_cannot_hold(image, name, tmp_path):
    none = dict(boxes=torch.zeros(0, 5), scores=torch.zeros(0), classes=torch.zeros(0))
    with pytest.raises(CmidError, match="cannot be written for DOTA"):
        write_submission(tmp_path / "s.zip", {image: none}, [name])
    assert not list(tmp_path.iterdir())


def test_any_names_reach_the_server(tmp_path):
    "Spaces, slashes, equal names in two folders, bytes that are no text: each image and class has its own."
    files = ["val1/images/P1.png", "val2/images/P1.png", "val2/images/P 2.png", "P%202.png", "w\udce9.png"]
    said = []
    images, classes = server_names(files, ["air/port", "small car"], said.append)
    assert images[:2] == ["val1%2Fimages%2FP1.png", "val2%2Fimages%2FP1.png"]
    assert images[2:] == ["val2%2Fimages%2FP%202.png", "P%25202.png", "w%E9.png"]
    assert classes == ["air%2Fport", "small%20car"]
    assert [line.split(":")[0] for line in said] == ["note", "note"]
    assert "'P1'" in said[0]
    assert "7 names" in said[1]
    one = dict(boxes=torch.tensor([[9.0, 9.0, 8.0, 4.0, 0.0]]), scores=torch.tensor([0.5]), classes=torch.tensor([1]))
    write_submission(tmp_path / "s.zip", dict.fromkeys(images, one), classes)
    rows = read_back(read_zip(tmp_path / "s.zip"), classes)
    assert [row[0] for row in rows["small%20car"]] == images
    assert not rows["air%2Fport"]


def test_plain_names_stay_and_nothing_is_said():
    said = []
    assert server_names(["b/P1.png", "a/P2.png"], ["ship"], said.append) == (["P1", "P2"], ["ship"])
    assert not said


# Scores


def most_overlapped(box, truth, c):
    "(IoU, index) of the object of a class that a box overlaps most, by shapely; (-1, None) for none."
    a = shapely.Polygon(corners(box[None])[0])
    best, which = -1, None
    for n, (points, k) in enumerate(zip(corners(truth["boxes"]), truth["classes"])):
        b = shapely.Polygon(points)
        iou = a.intersection(b).area / a.union(b).area if k == c else -1
        if iou > best + 1e-9:
            best, which = iou, n
    return best, which


def hits_of(detections, truths, c, iou):
    "For each detection of a class that counts, by falling score: is it a hit?"
    rows = [
        (-float(score), i, j)
        for i, o in enumerate(detections)
        for j, (score, k) in enumerate(zip(o["scores"], o["classes"]))
        if k == c
    ]
    taken, hits = set(), []
    for _, i, j in sorted(rows):
        best, which = most_overlapped(detections[i]["boxes"][j], truths[i], c)
        if best > iou and truths[i]["difficult"][which]:
            continue
        hits.append(best > iou and (i, which) not in taken)
        if hits[-1]:
            taken.add((i, which))
    return hits


def naive_precision(detections, truths, c, iou, metric):
    "Average precision of class c: loops, shapely, and recall in fractions; None where there is no object."
    hits = hits_of(detections, truths, c, iou)
    objects = sum(1 for t in truths for k, hard in zip(t["classes"], t["difficult"]) if k == c and not hard)
    if not objects:
        return None
    points = [(sum(hits[:n]), sum(hits[:n]) / n) for n in range(1, len(hits) + 1)]  # hits, precision
    if metric == "voc07":
        return sum(max((p for h, p in points if 10 * h >= k * objects), default=0) for k in range(11)) / 11
    return sum(max(p for h, p in points if h >= n) for n in range(1, sum(hits) + 1)) / objects


def image_of_split(g, tied):
    "Detections and ground truth of one image: near misses, duplicates, other classes, difficult objects."
    n = g.integers(0, 9)
    objects = random_boxes(n, g, 120.0)
    kinds = g.integers(0, 4, n) % 3
    pick = g.integers(0, n, g.integers(0, 25)) if n else np.zeros(0, int)
    if n > 2:
        objects[1], kinds[1] = objects[0], kinds[0]  # an object labelled twice
    boxes = objects[pick] + g.normal(0, 1, (len(pick), 5)) * [3, 3, 4, 4, 0.1]
    boxes[:, 2:4] = boxes[:, 2:4].clip(1)
    boxes[: len(boxes) // 4] = objects[pick][: len(boxes) // 4]
    stray = random_boxes(g.integers(0, 4), g, 120.0)
    right = np.where(g.random(len(pick)) < 0.85, kinds[pick], g.integers(0, 3, len(pick)))
    classes = np.concatenate([right, g.integers(0, 3, len(stray))]).astype(int)
    scores = g.random(len(classes))
    found = dict(boxes=np.concatenate([boxes, stray]), scores=scores.round(1) if tied else scores, classes=classes)
    return found, dict(boxes=objects, classes=kinds, difficult=g.random(n) < 0.25)


def split_of(seed):
    "Detections and ground truth of a few images; with ties for odd seeds."
    g = np.random.default_rng(seed)
    images = [image_of_split(g, seed % 2) for _ in range(g.integers(1, 7))]
    return [found for found, _ in images], [truth for _, truth in images]


@pytest.mark.parametrize("metric", ["voc07", "area"])
@pytest.mark.parametrize("iou", [0.3, 0.5, 0.75])
def test_average_precision_is_that_of_loops(iou, metric):
    names = ["a", "b", "c", "nowhere"]
    seen = []
    for seed in range(25):
        detections, truths = split_of(seed)
        found = detection_map(ranked_matches(detections, truths, names, iou), metric)
        scores = [naive_precision(detections, truths, c, iou, metric) for c in range(4)]
        for name, expected in zip(names, scores):
            ap = found["per_class"][name]["ap"]
            assert ap == (None if expected is None else pytest.approx(expected, abs=1e-9)), (seed, name)
        known = [o for o in scores if o is not None]
        assert found["map"] == (pytest.approx(np.mean(known)) if known else None)
        assert found["per_class"]["nowhere"]["ap"] is None
        counts = [o["detections"] for o in found["per_class"].values()]
        assert sum(counts) == sum(len(o["scores"]) for o in detections)
        seen += known
    assert len(seen) > 50
    assert 0.1 < np.mean(seen) < 0.9


def test_matches_are_json_and_keep_their_ranking():
    detections, truths = split_of(3)
    ranked = ranked_matches(detections, truths, ["a", "b", "c"])
    assert json.loads(json.dumps(ranked)) == ranked
    kinds = set()
    for rows in ranked["matches"].values():
        scores = [row[1] for row in rows]
        assert scores == sorted(scores, reverse=True)
        kinds |= {row[2] for row in rows}
    assert kinds == {0, 1, None}
    assert all(len(counts) == len(truths) for counts in ranked["truths"].values())


def weighted_precision(rows, objects, draw, metric):
    "Average precision by a loop that counts an image's rows as often as it was drawn; NaN without objects."
    if not objects:
        return math.nan
    hits = claims = 0
    points = []
    for i, _, hit in rows:
        hits += draw[i] * hit
        claims += draw[i]
        points.append((hits, hits / max(claims, 1), draw[i] * hit))
    if metric == "voc07":
        return sum(max((p for h, p, _ in points if 10 * h >= k * objects), default=0) for k in range(11)) / 11
    return sum(step * max(p for _, p, _ in points[j:]) for j, (*_, step) in enumerate(points)) / objects


@pytest.mark.parametrize("metric", ["voc07", "area"])
def test_an_image_that_counts_twice_is_two_images(metric):
    "Weights, as the bootstrap draws them."
    detections, truths = split_of(4)
    ranked = ranked_matches(detections, truths, ["a", "b", "c"])
    times = np.random.default_rng(0).integers(0, 3, (20, len(truths)))
    times[0] = 1
    seen = 0
    for name, matches in ranked["matches"].items():
        objects = ranked["truths"][name]
        rows = [row for row in matches if row[2] is not None]
        found = average_precision(matches, objects, times, metric)
        assert found[0] == pytest.approx(average_precision(matches, objects, metric=metric), nan_ok=True)
        for ap, draw in zip(found, times):
            expected = weighted_precision(rows, int(draw @ objects), draw, metric)
            assert ap == pytest.approx(expected, nan_ok=True)
            seen += 0 < expected < 1
    assert seen > 15


@pytest.mark.parametrize("metric", ["voc07", "area"])
def test_draws_need_little_memory(metric):
    "2,000 draws of 4,000 detections: one table of all would be 64 MB, and six are needed."
    g = np.random.default_rng(0)
    scores = np.sort(g.random(4000))[::-1]
    rows = [[int(i), float(s), int(hit)] for i, s, hit in zip(g.integers(0, 50, 4000), scores, g.random(4000) < 0.5)]
    times = g.multinomial(50, [1 / 50] * 50, 2000)
    tracemalloc.start()
    ap = average_precision(rows, [60] * 50, times, metric)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1e8
    assert len(ap) == 2000
    for k in (0, 261, 262, 263, 1999):  # 262 draws a block
        alone = average_precision(rows, [60] * 50, times[k : k + 1], metric)[0]
        assert ap[k] == pytest.approx(alone, rel=1e-12)


def test_unknown_metric():
    with pytest.raises(ValueError, match="no metric 'foo'"):
        average_precision([], [1], metric="foo")


def test_order_of_images_and_type_of_numbers_do_not_matter():
    "Scores differ, so nothing depends on the order of images. Tensors and arrays, polygons and boxes are the same."
    detections, truths = split_of(8)
    names = ["a", "b", "c"]
    expected = detection_map(ranked_matches(detections, truths, names))
    assert expected["map"] > 0
    assert detection_map(ranked_matches(detections[::-1], truths[::-1], names)) == expected
    tensors = [{k: torch.as_tensor(v) for k, v in o.items()} for o in detections]
    polygons = [dict(polygons=corners(o["boxes"]), classes=o["classes"], difficult=o["difficult"]) for o in truths]
    assert detection_map(ranked_matches(tensors, polygons, names)) == expected


def test_lists_that_do_not_fit():
    detections, truths = split_of(4)
    assert len(truths) > 1
    with pytest.raises(ValueError, match="detections of"):
        ranked_matches(detections[:1], truths, ["a"])
    i = next(i for i, o in enumerate(detections) if len(o["scores"]))
    detections[i]["scores"][0] = math.nan
    with pytest.raises(ValueError, match="1 scores are not finite"):
        ranked_matches(detections, truths, ["a"])


@pytest.mark.skipif("CMID_REALDATA" not in os.environ, reason="CMID_REALDATA names no folder of real archives")
def test_real_labels_of_dota(tmp_path):
    "Real labels, cut to 1024 px tiles with a gap of 200 and merged: every object that fits into a tile is found once."
    from cmid.data.box_files import read_dota

    with tarfile.open(Path(os.environ["CMID_REALDATA"]) / "obb.tar.gz") as f:
        f.extractall(tmp_path, filter="data")
    files = sorted(tmp_path.glob("**/DOTA_samples/labelTxt/*.txt"))
    assert len(files) == 2
    for path in files:
        lines = [line.split() for line in path.read_text().splitlines()]
        names = sorted({line[8] for line in lines if len(line) >= 9})
        truth = read_dota(path, names)
        with Image.open(next(path.parent.parent.glob(f"images/{path.stem}.*"))) as image:
            tiles = windows(image.height, image.width, 1024, 200)
        g = np.random.default_rng(0)
        found = [as_detections(tile, g) for tile in cut_objects(truth, tiles, 0.999)]
        ranked = ranked_matches([merge_tiles(found, tiles, 0.8)], [truth], names)
        assert detection_map(ranked)["map"] > 0.99


# Figures


class TwoShips:
    "One labelled image with two objects of two classes, of which one may be difficult."

    sizes = np.array([[90, 90]])
    boxes = torch.tensor([[20.0, 20.0, 24.0, 8.0, 0.4], [60.0, 60.0, 24.0, 8.0, -0.4]])

    def __init__(self, difficult=(False, False), labelled=True):
        kept = slice(2 if labelled else 0)
        every = dict(polygons=to_polygon(self.boxes).numpy(), classes=np.arange(2), difficult=np.array(difficult))
        self.kept = {k: v[kept] for k, v in every.items()}

    def image(self, i):
        return np.zeros((3, 90, 90), "uint8")

    def objects(self, i):
        return self.kept

    def found(self, n=2):
        "Both objects, or the first n."
        scores, classes = torch.tensor([0.9, 0.8]), torch.tensor([0, 1])
        return dict(boxes=self.boxes[:n], scores=scores[:n], classes=classes[:n])

    def title(self, found, known=True):
        return detections_figure(self, [0], [found], known=known).axes[0].get_title()


def test_difficult_objects_are_neither_missed_nor_false():
    data = TwoShips(difficult=(False, True))
    hits, false, missed = (o.tolist() for o in match_detections(data.found(), data.objects(0)))
    assert (hits, false, missed) == ([True, False], [False, False], [False, False])
    hits, false, missed = (o.tolist() for o in match_detections(data.found(0), data.objects(0)))
    assert (hits, false, missed) == ([], [], [True, False])
    assert data.title(data.found()) == "1 of 1 found, 0 false"
    assert data.title(data.found(0)) == "0 of 1 found, 0 false"


def test_without_labels_nothing_is_false():
    data = TwoShips(labelled=False)
    assert data.title(data.found()) == "0 of 0 found, 2 false"
    assert data.title(data.found(), known=False) == "2 found, without labels"


@pytest.mark.parametrize("n,texts", [(3, 3), (MAX_SCORE_TEXTS, MAX_SCORE_TEXTS), (MAX_SCORE_TEXTS + 1, 0)])
def test_scores_are_written_where_they_can_be_read(n, texts):
    boxes = torch.tensor(random_boxes(n, np.random.default_rng(0), 90.0)).float()
    found = dict(boxes=boxes, scores=torch.ones(n), classes=torch.zeros(n, dtype=torch.long))
    figure = detection_scene_figure(np.zeros((3, 90, 90), "uint8"), found, ["ship"], [(1.0, [(0, 0, 90, 90)])])
    assert len(figure.axes[0].texts) == texts
    assert "1 tile;" in figure.axes[0].get_title()
    figure.canvas.draw()
