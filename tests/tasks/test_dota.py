"DOTA's protocol: tiles cut by an independent geometry library, average precision by a loop over everything, files read back."

import math
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch

from cmid.base.errors import CmidError
from cmid.data.labelled import windows
from cmid.tasks.boxes import to_convention, from_polygon, paired_iou, to_polygon
from cmid.base.precision import average_precision
from cmid.tasks.dota import cut_objects, detection_map, ranked_matches, merge_tiles, server_names, write_submission


def boxes_of(n, g, side=200.0, low=8.0, high=50.0):
    return np.column_stack([g.uniform(0, side, (n, 2)), g.uniform(low, high, (n, 2)), g.uniform(-4, 4, n)])


def corners(boxes):
    return to_polygon(torch.as_tensor(boxes)).numpy()


# Tiles ------------------------------------------------------------------------------------------------------------
def test_objects_of_tiles_are_those_of_shapely():
    "400 labelled quadrilaterals, bent and turned, in 9 tiles: which are there, which count, and what is left of them."
    g = np.random.default_rng(0)
    points = corners(boxes_of(400, g, 300.0)) + g.normal(0, 2, (400, 4, 2))
    points = points[shapely.is_valid(shapely.polygons(points))]
    n = len(points)
    objects = dict(polygons=points, classes=np.arange(n), difficult=g.random(n) < 0.1)
    where = windows(300, 300, 130, 45)
    kept = cuts = 0
    assert len(where) == 9
    for tile, (t, l, b, r) in zip(cut_objects(objects, where), where):
        inside = shapely.intersection(shapely.polygons(points), shapely.box(l, t, r, b))
        share = shapely.area(inside) / shapely.area(shapely.polygons(points))
        expected = np.flatnonzero(share > 0)
        clear = np.abs(share[expected] - 0.7) > 1e-9
        assert tile["classes"].tolist() == expected.tolist() and tile["polygons"].dtype == np.float32
        assert (tile["difficult"] == (objects["difficult"][expected] | (share[expected] < 0.7)))[clear].all()
        for k, p in zip(expected, tile["polygons"].astype(float) + [l, t]):
            if share[k] > 1 - 1e-12:
                assert np.abs(p - points[k]).max() < 1e-3
                continue  # whole: as it was labelled
            cuts += 1
            least = shapely.minimum_rotated_rectangle(inside[k])
            assert math.isclose(shapely.area(shapely.Polygon(p)), least.area, rel_tol=1e-3, abs_tol=0.02)
            assert shapely.covers(shapely.Polygon(p).buffer(0.01), inside[k])
        kept += len(expected)
    assert kept > 400 and cuts > 100


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
    assert cut_objects(objects, [(0, 0, 100, 100)])[0]["difficult"].tolist() == [False, True, True] and cut_objects(
        objects, [(0, 0, 100, 100)], 0.5
    )[0]["difficult"].tolist() == [False, False, True]


def test_objects_without_area():
    "A line is kept where it is whole, and has nothing to be cut; what only touches a tile is not in it."
    line = np.array(
        [
            [[10.0, 10.0], [30.0, 10.0], [30.0, 10.0], [10.0, 10.0]],
            [[90.0, 50.0], [120.0, 50.0], [120.0, 50.0], [90.0, 50.0]],
            [[100.0, 5.0], [110.0, 5.0], [110.0, 9.0], [100.0, 9.0]],
        ]
    )
    assert cut_objects(dict(polygons=line, classes=[4, 5, 6], difficult=[0, 0, 0]), [(0, 0, 100, 100)])[0][
        "classes"
    ].tolist() == [4]
    assert [
        len(o["classes"]) for o in cut_objects(dict(polygons=[], classes=[], difficult=[]), [(0, 0, 9, 9), (0, 9, 9, 18)])
    ] == [0, 0]


def test_from_tiles_and_back():
    "Objects that tiles hold whole, as if all were found in each, are once each what they were."
    g = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(np.arange(20, 400, 40.0), np.arange(20, 400, 40.0)), -1).reshape(-1, 2)
    n = len(grid)
    boxes = to_convention(
        torch.tensor(np.column_stack([grid, g.uniform(18, 30, n), g.uniform(6, 12, n), g.uniform(-1.5, 1.5, n)]))
    )
    classes = torch.tensor(g.integers(0, 3, n))
    where = windows(400, 400, 160, 60)
    tiles = cut_objects(
        dict(polygons=to_polygon(boxes).numpy(), classes=classes.numpy(), difficult=np.zeros(n, bool)), where, 0.999
    )
    found = [
        dict(
            boxes=from_polygon(torch.from_numpy(o["polygons"][~o["difficult"]]).double()),
            classes=torch.from_numpy(o["classes"][~o["difficult"]]),
        )
        for o in tiles
    ]
    for o in found:
        o["scores"] = torch.tensor(g.random(len(o["classes"])))
    assert sum(len(o["classes"]) for o in found) > n
    whole = merge_tiles(found, where, 0.3)
    assert len(whole["boxes"]) == n and (whole["scores"].diff() <= 0).all()
    truth = dict(boxes=boxes, classes=classes, difficult=np.zeros(n, bool))
    m = ranked_matches([whole], [truth], list("abc"), 0.95)
    assert all(math.isclose(detection_map(m, o)["map"], 1.0) for o in ("voc07", "area"))


def test_merging_nothing():
    none = dict(boxes=torch.zeros(0, 5), scores=torch.zeros(0), classes=torch.zeros(0, dtype=torch.long))
    out = merge_tiles([none] * 2, [(0, 0, 9, 9), (0, 5, 9, 14)], 0.1)
    assert [len(o) for o in out.values()] == [0, 0, 0]
    with pytest.raises(ValueError, match="1 tiles with detections, 2 windows"):
        merge_tiles([none], [(0, 0, 9, 9)] * 2, 0.1)


# Files for the server ---------------------------------------------------------------------------------------------
def read_back(files, names):
    "{class: [(image, score, polygon)]} as the server reads it"
    assert sorted(files) == sorted(f"Task1_{o}.txt" for o in names)
    rows = {o: [line.split(" ") for line in files[f"Task1_{o}.txt"].splitlines()] for o in names}
    assert all(len(r) == 10 for o in rows.values() for r in o)
    return {o: [(r[0], float(r[1]), np.array(r[2:], float).reshape(4, 2)) for r in v] for o, v in rows.items()}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_submission_read_back(kind, tmp_path):
    g = np.random.default_rng(2)
    names = ["plane", "small-vehicle", "helipad"]
    found = {
        f"P{i:04}": dict(
            boxes=torch.tensor(boxes_of(9, g, 9000.0)).float(),
            scores=torch.tensor(g.random(9)),
            classes=torch.tensor(g.integers(0, 2, 9)),
        )
        for i in range(4)
    }
    path = tmp_path / "out" / ("s.zip" if kind == "zip" else "s")
    write_submission(path, found, names)
    if kind == "zip":
        with zipfile.ZipFile(path) as z:
            files = {o: z.read(o).decode() for o in z.namelist()}
            assert {o.date_time for o in z.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        first = path.read_bytes()
        write_submission(path, found, names)
        assert path.read_bytes() == first  # repeats exactly
    else:
        files = {o.name: o.read_text() for o in path.iterdir()}
    assert [o.name for o in (tmp_path / "out").iterdir()] == [path.name]  # nothing half-written beside it
    rows = read_back(files, names)
    assert rows["helipad"] == [] and sum(map(len, rows.values())) == 36
    for c, name in enumerate(names):
        expected = [
            (i, s, b) for i, o in found.items() for s, b, k in zip(o["scores"], o["boxes"], o["classes"]) if k == c
        ]
        assert [r[0] for r in rows[name]] == [o[0] for o in expected]
        for (_, score, points), (_, s, b) in zip(rows[name], expected):
            assert (
                abs(score - s) < 1e-6
                and np.abs(points - corners(b[None].double())[0]).max() < 0.0051
                and paired_iou(from_polygon(torch.tensor(points)[None]), b[None].double()) > 0.99
            )


@pytest.mark.parametrize("image,name", [("P 1", "ship"), ("a/P1", "ship"), ("P1", "small vehicle"), ("", "ship")])
def test_names_that_lines_cannot_hold(image, name, tmp_path):
    none = dict(boxes=torch.zeros(0, 5), scores=torch.zeros(0), classes=torch.zeros(0))
    with pytest.raises(CmidError, match="cannot be written for DOTA"):
        write_submission(tmp_path / "s.zip", {image: none}, [name])
    assert not list(tmp_path.iterdir())


def test_names_of_ones_own_reach_the_server(tmp_path):
    "Spaces, slashes, equal names in two folders, bytes that are no text: each image has its lines, each class its file."
    files = ["val1/images/P1.png", "val2/images/P1.png", "val2/images/P 2.png", "P%202.png", "w\udce9.png"]
    said = []
    images, classes = server_names(files, ["air/port", "small car"], said.append)
    assert (
        len({*images}) == 5
        and images[:2] == ["val1%2Fimages%2FP1.png", "val2%2Fimages%2FP1.png"]
        and images[2:] == ["val2%2Fimages%2FP%202.png", "P%25202.png", "w%E9.png"]
        and classes == ["air%2Fport", "small%20car"]
    )
    assert [o.split(":")[0] for o in said] == ["note", "note"] and "'P1'" in said[0] and "7 names" in said[1]
    one = dict(boxes=torch.tensor([[9.0, 9.0, 8.0, 4.0, 0.0]]), scores=torch.tensor([0.5]), classes=torch.tensor([1]))
    write_submission(tmp_path / "s.zip", dict.fromkeys(images, one), classes)
    with zipfile.ZipFile(tmp_path / "s.zip") as z:
        rows = read_back({o: z.read(o).decode() for o in z.namelist()}, classes)
    assert [r[0] for r in rows["small%20car"]] == images and not rows["air%2Fport"]
    assert server_names(["b/P1.png", "a/P2.png"], ["ship"], said.append) == (["P1", "P2"], ["ship"]) and len(said) == 2


# Scores -----------------------------------------------------------------------------------------------------------
def naive(detections, truths, c, iou, metric):
    "Average precision of class c: loops, shapely, and recall in fractions"
    rows = sorted(
        (
            (-float(s), i, j)
            for i, o in enumerate(detections)
            for j, (s, k) in enumerate(zip(o["scores"], o["classes"]))
            if k == c
        )
    )
    taken, judged = set(), []
    objects = sum(1 for t in truths for k, h in zip(t["classes"], t["difficult"]) if k == c and not h)
    for _, i, j in rows:
        a = shapely.Polygon(corners(detections[i]["boxes"][j : j + 1])[0])
        best, which = -1, None
        for n, (p, k) in enumerate(zip(corners(truths[i]["boxes"]), truths[i]["classes"])):
            if k != c:
                continue
            b = shapely.Polygon(p)
            o = a.intersection(b).area / a.union(b).area
            if o > best + 1e-9:
                best, which = o, n
        if best > iou and truths[i]["difficult"][which]:
            continue
        hit = best > iou and (i, which) not in taken
        judged.append(hit)
        if hit:
            taken.add((i, which))
    if not objects:
        return None
    points = [(sum(judged[:n]), sum(judged[:n]) / n) for n in range(1, len(judged) + 1)]  # hits, precision
    if metric == "voc07":
        return sum(max((p for h, p in points if 10 * h >= k * objects), default=0) for k in range(11)) / 11
    return (
        sum(max(p for h, p in points if h >= n) for n in range(1, sum(judged) + 1)) / objects
    )  # each hit is a step of recall


def split_of(seed):
    "A split of a few images: near misses, duplicates, ties, other classes, difficult objects, images without either"
    g = np.random.default_rng(seed)
    detections, truths = [], []
    for i in range(g.integers(1, 7)):
        n = g.integers(0, 9)
        t = boxes_of(n, g, 120.0)
        k = g.integers(0, 4, n) % 3
        pick = g.integers(0, n, g.integers(0, 25)) if n else np.zeros(0, int)
        if n > 2:
            t[1] = t[0]
            k[1] = k[0]  # an object labelled twice
        b = t[pick] + g.normal(0, 1, (len(pick), 5)) * [3, 3, 4, 4, 0.1]
        b[:, 2:4] = b[:, 2:4].clip(1)
        b[: len(b) // 4] = t[pick][: len(b) // 4]
        b = np.concatenate([b, boxes_of(g.integers(0, 4), g, 120.0)])
        of = np.concatenate(
            [
                np.where(g.random(len(pick)) < 0.85, k[pick], g.integers(0, 3, len(pick))),
                g.integers(0, 3, len(b) - len(pick)),
            ]
        ).astype(int)
        s = g.random(len(b))
        detections.append(dict(boxes=b, scores=s.round(1) if seed % 2 else s, classes=of))
        truths.append(dict(boxes=t, classes=k, difficult=g.random(n) < 0.25))
    return detections, truths


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.75])
def test_average_precision_is_that_of_loops(iou):
    names = ["a", "b", "c", "nowhere"]
    seen = []
    for seed in range(25):
        detections, truths = split_of(seed)
        m = ranked_matches(detections, truths, names, iou)
        for metric in ("voc07", "area"):
            got, expected = (
                detection_map(m, metric),
                {o: naive(detections, truths, c, iou, metric) for c, o in enumerate(names)},
            )
            there = [o for o in expected.values() if o is not None]
            seen += there
            for o in names:
                ap = got["per_class"][o]["ap"]
                assert (ap is None) == (expected[o] is None) and (ap is None or abs(ap - expected[o]) < 1e-9), (
                    seed,
                    metric,
                    o,
                    ap,
                    expected[o],
                )
            assert got["map"] == pytest.approx(np.mean(there)) if there else got["map"] is None
        assert got["per_class"]["nowhere"]["ap"] is None and sum(
            o["detections"] for o in got["per_class"].values()
        ) == sum(len(o["scores"]) for o in detections)
    assert len(seen) > 100 and 0.1 < np.mean(seen) < 0.9


def test_matches_are_json_and_keep_their_ranking():
    import json

    detections, truths = split_of(3)
    m = ranked_matches(detections, truths, ["a", "b", "c"])
    assert json.loads(json.dumps(m)) == m
    for rows in m["matches"].values():
        assert [o[1] for o in rows] == sorted((o[1] for o in rows), reverse=True) and {o[2] for o in rows} <= {
            0,
            1,
            None,
        }
    assert {o[2] for rows in m["matches"].values() for o in rows} == {0, 1, None} and all(
        len(o) == len(truths) for o in m["truths"].values()
    )


@pytest.mark.parametrize("metric", ["voc07", "area"])
def test_an_image_that_counts_twice_is_two_images(metric):
    "Weights, as the bootstrap draws them, against a loop that counts an image's rows as often as it was drawn."
    detections, truths = split_of(4)
    n = len(truths)
    names = ["a", "b", "c"]
    m = ranked_matches(detections, truths, names)
    g = np.random.default_rng(0)
    times = g.integers(0, 3, (20, n))
    times[0] = 1
    seen = 0
    for o in names:
        rows = [r for r in m["matches"][o] if r[2] is not None]
        got = average_precision(m["matches"][o], m["truths"][o], times, metric)
        assert got[0] == pytest.approx(average_precision(m["matches"][o], m["truths"][o], metric=metric), nan_ok=True)
        for ap, draw in zip(got, times):
            objects, hits, claims, points = int(draw @ m["truths"][o]), 0, 0, []
            for i, _, hit in rows:
                hits += draw[i] * hit
                claims += draw[i]
                points.append((hits, hits / max(claims, 1), draw[i] * hit))
            if not objects:
                assert np.isnan(ap)
                continue
            if metric == "voc07":
                expected = (
                    sum(max((p for h, p, _ in points if 10 * h >= k * objects), default=0) for k in range(11)) / 11
                )
            else:
                expected = sum(s * max(p for _, p, _ in points[j:]) for j, (*_, s) in enumerate(points)) / objects
            assert ap == pytest.approx(expected)
            seen += 0 < expected < 1
    assert seen > 15


def test_draws_need_little_memory():
    "2,000 draws of 4,000 detections: one table of all would be 64 MB, and there were six."
    import tracemalloc

    g = np.random.default_rng(0)
    rows = [
        [int(i), float(s), int(h)]
        for i, s, h in zip(g.integers(0, 50, 4000), np.sort(g.random(4000))[::-1], g.random(4000) < 0.5)
    ]
    times = g.multinomial(50, [1 / 50] * 50, 2000)
    for metric in ("voc07", "area"):
        tracemalloc.start()
        ap = average_precision(rows, [60] * 50, times, metric)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (
            most < 1e8
            and len(ap) == 2000
            and all(
                ap[k] == pytest.approx(average_precision(rows, [60] * 50, times[k : k + 1], metric)[0], rel=1e-12)
                for k in (0, 261, 262, 263, 1999)
            )
        )  # 262 draws a block
    with pytest.raises(ValueError, match="no metric 'foo'"):
        average_precision(rows, [60] * 50, metric="foo")


def test_order_of_images_and_of_numbers():
    "Scores differ: nothing depends on the order of images. Tensors and arrays, polygons and boxes are the same."
    detections, truths = split_of(8)
    whole = detection_map(ranked_matches(detections, truths, ["a", "b", "c"]))
    back = detection_map(ranked_matches(detections[::-1], truths[::-1], ["a", "b", "c"]))
    assert whole == back and whole["map"] > 0
    tensors = [{k: torch.as_tensor(v) for k, v in o.items()} for o in detections]
    polygons = [dict(polygons=corners(o["boxes"]), classes=o["classes"], difficult=o["difficult"]) for o in truths]
    assert detection_map(ranked_matches(tensors, polygons, ["a", "b", "c"])) == whole


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
    "Real labels, cut to 1024 px tiles with a gap of 200 and put together again: every object that fits into a tile is found once."
    from PIL import Image

    from cmid.data.box_files import read_dota

    with tarfile.open(Path(os.environ["CMID_REALDATA"]) / "obb.tar.gz") as f:
        f.extractall(tmp_path, filter="data")
    files = sorted(tmp_path.glob("**/DOTA_samples/labelTxt/*.txt"))
    assert len(files) == 2
    for path in files:
        names = sorted({line.split()[8] for line in path.read_text().splitlines() if len(line.split()) >= 9})
        truth = read_dota(path, names)
        with Image.open(next(path.parent.parent.glob(f"images/{path.stem}.*"))) as im:
            where = windows(im.height, im.width, 1024, 200)
        tiles = [{k: o[~tile["difficult"]] for k, o in tile.items()} for tile in cut_objects(truth, where, 0.999)]
        found = [
            dict(
                boxes=from_polygon(torch.from_numpy(o["polygons"]).double()),
                classes=torch.from_numpy(o["classes"]),
                scores=torch.ones(len(o["classes"]), dtype=torch.float64),
            )
            for o in tiles
        ]
        assert detection_map(ranked_matches([merge_tiles(found, where, 0.8)], [truth], names))["map"] > 0.99
