"Objects in scenes: the result of scoring, each object once, in little memory, also after an interruption."

import json

import numpy as np
import pytest
import torch

from cmid import load_task
from cmid.apply import objects
from cmid.apply.command import cmid_apply
from cmid.apply.mosaic import BatchRunner
from cmid.apply.scene import ApplyOptions, open_scene
from cmid.tasks.boxes import rotated_nms
from cmid.tasks.detect import detect_image
from tests.tools.networks import made_network
from tests.tools.placed import plain_card, write_scene
from tests.tools.spots import SpotDetector, painted


def boxes_of(path):
    "Boxes (n, 5: x, y, width, height, angle in degrees) and scores (n,) of a GeoJSON file"
    rows = [o["properties"] for o in json.loads(path.read_text())["features"]]
    numbers = [[row[k] for k in ("x", "y", "width", "height", "angle")] for row in rows]
    return np.array(numbers).reshape(-1, 5), np.array([row["score"] for row in rows])


def applied(network, pixels, folder, place="none", name="a", **options):
    "Facts, boxes and scores of a scene"
    folder.mkdir(exist_ok=True)
    path = write_scene(folder / f"{name}.tif", pixels, place, **options.pop("file", {}))
    with open_scene(path, network.card) as scene:
        facts = objects.apply_objects(network, scene, folder / "out", ApplyOptions(**options))
    return facts, *boxes_of(folder / "out" / f"{name}.geojson")


@pytest.mark.parametrize("scales", [[1.0], [1.0, 0.5, 1.5]])
def test_a_scene_has_the_detections_of_scoring(tmp_path, scales):
    settings = dict(scales=scales, score=0.2, batch=1, detections=30)
    network = load_task(made_network(tmp_path / "detect", "detect", classes=2, settings=settings))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 100, 150), dtype=np.uint8)
    due = detect_image(network.network, pixels, network.network.settings, network.card.mean, network.card.std)
    facts, boxes, scores = applied(network, pixels, tmp_path / "scene", batch=1)
    assert facts["boxes"] == len(due["scores"]) > 20
    order = np.lexsort((boxes[:, 1], boxes[:, 0], -scores))
    due_boxes, due_scores = due["boxes"].double().numpy(), due["scores"].double().numpy().round(6)
    due_boxes[:, 4] = np.degrees(due_boxes[:, 4])
    ranked = np.lexsort((due_boxes[:, 1].round(2), due_boxes[:, 0].round(2), -due_scores))
    assert np.allclose(scores[order], due_scores[ranked], atol=2e-6)
    assert np.allclose(boxes[order], due_boxes[ranked], atol=0.011)


def random_columns(rng, n, size, sides):
    "Random boxes, as `DETECTION_COLUMNS`"
    boxes = np.column_stack([rng.uniform(0, size, (n, 2)), np.exp(rng.uniform(*sides, (n, 2))), rng.uniform(-2, 2, n)])
    scores = np.ceil(rng.uniform(0, 1, n) * 99) / 99
    return dict(
        boxes=boxes.astype("f4"), scores=scores.astype("f4"), classes=rng.integers(0, 2, n), order=rng.permutation(n)
    )


@pytest.mark.parametrize("iou", [1e-3, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("sides", [(0, 3), (0, 6), (2, 2.2)], ids=["small", "any", "alike"])
def test_streamed_merging_is_merging_at_once(iou, sides):
    rng = np.random.default_rng([int(iou * 1000), int(sides[1])])
    every = random_columns(rng, 600, 300, sides)
    every["scores"][:3] = np.nan
    every["boxes"][5, 2] = np.inf
    ranked = {k: torch.from_numpy(v[np.argsort(every["order"])]) for k, v in every.items()}
    kept = rotated_nms(ranked["boxes"], ranked["scores"], iou, ranked["classes"])
    merge, found = objects.StreamedMerge(iou), []
    lines = [*range(0, 300, 40), np.inf]
    for low, line in zip(lines, lines[1:]):
        rows = (every["boxes"][:, 1] >= low) & (every["boxes"][:, 1] < line)
        found.append(merge.add({k: v[rows] for k, v in every.items()}, line))
    assert not len(merge.pending["scores"])
    assert set(np.concatenate([o["order"] for o in found])) == set(ranked["order"][kept].tolist())


def test_finished_boxes_do_not_wait():
    "What waits is near the line, so that memory does not grow with the scene."
    rng, waiting = np.random.default_rng(0), []
    merge = objects.StreamedMerge(0.1)
    for row in range(20):
        found = random_columns(rng, 200, 100, (1, 2))
        found["boxes"][:, 1] += 100 * row
        merge.add(found, 100 * (row + 1))
        waiting.append(len(merge.pending["scores"]))
    assert max(waiting[10:]) < 1.5 * max(waiting[:10]) < 500


@pytest.mark.parametrize("sides", [(20, 10), (12, 12), (10, 30), (50, 8)], ids=["wide", "square", "high", "long"])
def test_an_object_on_borders_is_found_once(tmp_path, sides):
    "Wherever it lies: across one border, where four windows meet, and longer than the part that windows share."
    spots, (w, h) = [], sides
    network = SpotDetector(least=(0.6 if max(sides) > 40 else 0.7) * w * h)
    for k in range(60):
        spots.append((60 * (k % 6) + (7 * k) % (58 - w), 60 * (k // 6) + (5 * k) % (58 - h), w, h))
    _, boxes, _ = applied(network, painted((600, 360), spots), tmp_path)
    centres = np.array([[x + w / 2, y + h / 2] for x, y, w, h in spots])
    near = (np.abs(boxes[:, None, :2] - centres) < (w / 2, h / 2)).all(2)
    assert (near.sum(0) == 1).all() and (near.sum(1) == 1).all()
    if max(sides) <= 16:  # some window shows all of it
        assert np.allclose(boxes[near.argmax(0), :2], centres) and np.allclose(boxes[:, 2:4], sides)


def test_windows_without_a_value_are_left_out_and_boxes_there_dropped(tmp_path):
    pixels = painted((200, 300), [(20, 20, 20, 12), (150, 20, 20, 12), (250, 150, 20, 12)])
    pixels[:, 60:, :] = np.where(pixels[:, 60:, :] == 20, 0, pixels[:, 60:, :])
    pixels[:, 22:30, 24:36] = 0  # the middle of the first
    network = SpotDetector()
    network.of_window = lambda bright: SpotDetector.of_window(network, bright | (bright.sum() == 160))
    facts, boxes, _ = applied(network, pixels, tmp_path, file=dict(nodata=0))
    whole = SpotDetector()
    rows = objects.window_rows((200, 300), whole.network.settings)
    without = [(pixels[:, t:b, l:r] == 0).all() for row in rows for t, l, b, r in row.windows]  # noqa: E741
    assert facts["empty_windows"] == sum(without) > 0
    assert facts["boxes_on_invalid"] >= 1 and facts["windows"] == len(without)
    assert sorted(boxes[:, 0].round().tolist()) == [160, 260]


def test_a_stopped_run_is_resumed(tmp_path):
    spots = [(x, y, 14, 9) for x in range(5, 280, 40) for y in range(5, 380, 37)]
    pixels = painted((400, 300), spots)
    once, again = SpotDetector(), SpotDetector()
    facts, *_ = applied(once, pixels, tmp_path / "once", "utm", batch=2, key="k")
    with pytest.raises(KeyboardInterrupt):
        applied(SpotDetector(last=24), pixels, tmp_path / "twice", "utm", batch=2, key="k")
    out = tmp_path / "twice" / "out"
    assert [o.name for o in out.iterdir()] == [".a.part"]
    later, *_ = applied(again, pixels, tmp_path / "twice", "utm", batch=2, key="k")
    assert later == facts and 0 < again.seen < once.seen
    for file in facts["files"]:
        assert (out / file).read_bytes() == (tmp_path / "once" / "out" / file).read_bytes()
    assert sorted(o.name for o in out.iterdir()) == facts["files"]


def test_work_of_another_key_begins_anew(tmp_path):
    pixels = painted((400, 300), [(20, 20, 14, 9)])
    with pytest.raises(KeyboardInterrupt):
        applied(SpotDetector(last=24), pixels, tmp_path, batch=2, key="k")
    network = SpotDetector()
    facts, *_ = applied(network, pixels, tmp_path, batch=2, key="another")
    assert network.seen == facts["windows"]


def test_least_score(tmp_path):
    pixels = painted((100, 100), [(4, 4, 8, 6), (30, 30, 30, 30)])
    network = SpotDetector(score=0.8)
    found = [len(applied(network, pixels, tmp_path, score=score)[2]) for score in (None, 0.5, 0.88, 0.95)]
    assert found == [2, 2, 1, 0]
    assert network.network.settings.score == 0.8


@pytest.mark.parametrize("limit", [1, 3 * 64 * 150])
def test_a_row_of_windows_is_read_in_groups(tmp_path, monkeypatch, limit):
    pixels = painted((130, 400), [(x, 40, 14, 30) for x in range(5, 380, 30)])
    _, due, _ = applied(SpotDetector(), pixels, tmp_path)
    monkeypatch.setattr(objects, "_RUN_BYTES", limit)
    network, read = SpotDetector(), []
    with open_scene(tmp_path / "a.tif", plain_card()) as scene:
        plain = scene.read
        scene.read = lambda *window: read.append(window) or plain(*window)
        objects.apply_objects(network, scene, tmp_path / "out", ApplyOptions())
    assert max(width for *_, width in read) == (64 if limit == 1 else 112)
    assert np.array_equal(boxes_of(tmp_path / "out" / "a.geojson")[0], due)


def test_windows_of_a_row_are_computed_at_once(tmp_path):
    path = write_scene(tmp_path / "a.tif", painted((64, 400), [(30, 20, 20, 10)]), "none")
    sizes, network = [], SpotDetector()
    runner = BatchRunner(lambda x: sizes.append(len(x)) or network(x / 255), torch.device("cpu"), 4)
    with open_scene(path, plain_card()) as scene:
        (row,) = objects.window_rows((64, 400), network.network.settings)
        objects.detect_row(scene, row, runner)
    assert sizes == [4, 4]


def test_the_command_finds_objects(tmp_path, capsys):
    model = made_network(tmp_path / "detect-ships-random", "detect", settings=dict(score=0.1, batch=2))
    (tmp_path / "scenes" / "north").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 100, 130), dtype=np.uint8)
    for name in ("a", "north/a"):
        write_scene(tmp_path / "scenes" / f"{name}.tif", pixels, "utm")
    call = [str(model), str(tmp_path / "scenes"), str(tmp_path / "out"), "--score", "0.22", "--vector"]
    cmid_apply(call)
    files = sorted(o.relative_to(tmp_path / "out").as_posix() for o in (tmp_path / "out").rglob("a.*"))
    suffixes = "geojson", "gpkg", "txt", "wgs84.geojson"
    assert files == [f"{name}.{suffix}" for name in ("a", "north/a") for suffix in suffixes]
    _, scores = boxes_of(tmp_path / "out" / "a.geojson")
    assert len(scores) and scores.min() >= 0.22
    facts = json.loads((tmp_path / "out" / "summary.json").read_text())["scenes"]["north/a"]
    assert facts["boxes"] == len(scores)
    assert f"a: {len(scores)} object" in capsys.readouterr().out
    cmid_apply(call)
    assert "north/a: up to date" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cmid_apply([*call[:3], "--score", "2"])
    assert capsys.readouterr().err == "cmid_apply: --score: must be from 0 to 1, got 2.0\n"
