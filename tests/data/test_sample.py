"The sample data as a whole: the same bytes everywhere, layouts of published data sets, no class readable from colour."

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cmid.data import sample, scenes
from cmid.data.layout import CLASSES

pytestmark = pytest.mark.slow  # generates the whole data set once

ROOT = Path(__file__).parents[2]
KINDS = list(CLASSES)


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Run the command as pip's console script does, in a process of its own."
    script = tmp_path_factory.mktemp("bin") / "cmid_sample"
    script.write_text("import sys\nfrom cmid.data.sample import cmid_sample\nsys.exit(cmid_sample())\n")

    def run_command(*args, cwd):
        command = [sys.executable, str(script), *map(str, args)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True)

    return run_command


@pytest.fixture(scope="module")
def data(run, tmp_path_factory):
    "The whole data set, generated once."
    where = tmp_path_factory.mktemp("sample")
    done = run("data", cwd=where)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in where.iterdir()] == ["data"]  # nothing partial is left
    return where / "data"


@pytest.fixture(scope="module")
def scene_lists(data):
    "split -> [(file name, class index)]"
    lists = {}
    for split in ("train", "test"):
        lines = (data / "scenes" / f"{split}.txt").read_text().splitlines()
        rows = [line.split(" ") for line in lines]
        lists[split] = [(name, int(label)) for name, label in rows]
    return lists


def dvc_hash(folder, files):
    "The hash that DVC gives a folder."
    rows = []
    for path in files:
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        rows.append({"md5": digest, "relpath": path.relative_to(folder).as_posix()})
    rows = sorted(rows, key=lambda row: row["relpath"])
    return hashlib.md5(json.dumps(rows, sort_keys=True).encode()).hexdigest() + ".dir"


def test_same_bytes_as_committed(data):
    files = [p for p in data.rglob("*") if p.is_file()]
    (out,) = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"]
    size = sum(p.stat().st_size for p in files)
    assert (len(files), size) == (out["nfiles"], out["size"])
    assert dvc_hash(data, files) == out["md5"]
    assert size < 60e6


def test_items_do_not_depend_on_each_other(data):
    for make, args in sample.items(0)[::-97]:
        for path, content in make(*args).items():
            assert (data / path).read_bytes() == content, path


def test_another_seed_is_another_landscape(data):
    make, args = sample.items(1)[5]
    for path, content in make(*args).items():
        assert (data / path).read_bytes() != content


def test_refuses_a_folder_that_exists(run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("mine")
    done = run("data", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "cmid_sample: data exists: move it away or name another folder (nothing was written)"
    assert [p.name for p in tmp_path.rglob("*")] == ["data", "mine"]


def test_pool(data):
    files = list((data / "pool").iterdir())
    assert len(files) >= 384
    assert {pixels(p).shape for p in files} == {(128, 128, 3)}
    assert len({p.read_bytes() for p in files}) == len(files)


def test_scenes(data, scene_lists):
    names = {split: [name for name, _ in rows] for split, rows in scene_lists.items()}
    assert not set(names["train"]) & set(names["test"])
    every = names["train"] + names["test"]
    root = data / "scenes"
    assert sorted(every) == sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    for split, share in (("train", 0.4), ("test", 0.6)):
        for name, label in scene_lists[split]:
            assert KINDS[label] == name.split("/")[0]
        counts = np.bincount([label for _, label in scene_lists[split]])
        assert len(counts) >= 6
        assert len(set(counts)) == 1
        assert sum(counts) == share * len(every)
    assert {pixels(root / name).shape for name in every} == {(128, 128, 3)}


def test_mean_colour_does_not_tell_the_class(data, scene_lists):
    colours, labels = {}, {}
    for split, rows in scene_lists.items():
        colours[split] = np.array([pixels(data / "scenes" / name).mean((0, 1)) for name, _ in rows])
        labels[split] = np.array([label for _, label in rows])
    centres = np.stack([colours["train"][labels["train"] == c].mean(0) for c in range(len(KINDS))])
    distances = ((colours["test"][:, None] - centres) ** 2).sum(-1)
    assert (distances.argmin(1) == labels["test"]).mean() < 0.45


def test_segmentation(data):
    root, seen = data / "segmentation", np.zeros(256, int)
    for split in ("train", "val"):
        images, masks = ({p.name for p in (root / part / split).iterdir()} for part in ("img_dir", "ann_dir"))
        assert images
        assert images == masks
        for name in images:
            mask = pixels(root / "ann_dir" / split / name)
            seen += np.bincount(mask.ravel(), minlength=256)
            assert mask.shape == (256, 256)
            assert pixels(root / "img_dir" / split / name).shape == (256, 256, 3)
    assert (seen[:7] > 0.01 * seen.sum()).all()  # 0 is ignored; each of the others occurs
    assert not seen[7:].any()


def read_boxes(path):
    "Polygons (N, 4, 2), class names, and difficult flags of a DOTA file."
    lines = path.read_text().splitlines()
    assert lines[0].startswith("imagesource:")
    assert float(lines[1].removeprefix("gsd:")) > 0
    rows = [line.split(" ") for line in lines[2:]]
    polygons = np.array([row[:8] for row in rows], float).reshape(-1, 4, 2)
    return polygons, [row[8] for row in rows], [row[9] for row in rows]


def check_rectangles(polygons):
    "Clockwise (as y points down), with right angles up to a decimal; gives the angles of the first sides in degrees."
    side, following = polygons - np.roll(polygons, 1, 1), np.roll(polygons, -1, 1) - polygons
    assert (side[..., 0] * following[..., 1] - side[..., 1] * following[..., 0] > 0).all()
    dots = np.abs((side * following).sum(-1))
    assert dots.max(initial=0) < 0.3 * np.abs(side).max(initial=1)
    return np.degrees(np.arctan2(following[:, 0, 1], following[:, 0, 0]))


def test_boxes(data):
    names, difficult, angles = set(), set(), []
    for split in ("train", "val"):
        root = data / "boxes" / split
        assert {p.stem for p in (root / "images").iterdir()} == {p.stem for p in (root / "labelTxt").iterdir()}
        for path in (root / "labelTxt").iterdir():
            polygons, its_names, its_difficult = read_boxes(path)
            names |= set(its_names)
            difficult |= set(its_difficult)
            assert pixels(root / "images" / f"{path.stem}.png").shape == (256, 256, 3)
            assert (polygons >= 0).all()
            assert (polygons <= 256).all()
            angles += list(check_rectangles(polygons))
    assert names == set(scenes.BOXES.values())
    assert difficult == {"0", "1"}
    assert (np.histogram(np.mod(angles, 180), 12)[0] > 0).all()  # every angle occurs


def test_change(data):
    for split in ("train", "val", "test"):
        a, b, out = (sorted((data / "change" / split / part).iterdir()) for part in ("A", "B", "OUT"))
        assert [p.name for p in a] == [p.name for p in b] == [p.name for p in out]
        masks = np.stack([pixels(p) for p in out])
        assert set(np.unique(masks)) == {0, 255}
        assert masks.shape[1:] == (128, 128)
        empty = ~masks.any((1, 2))
        assert empty.any()
        assert (~empty).sum() > 3 * empty.sum()
        for p, q in zip(a, b):
            assert (pixels(p) != pixels(q)).mean() > 0.5  # season and sun change every image


def test_landscape(data):
    root = data / "landscape"
    for date in ("first", "second"):
        assert pixels(root / date / "landscape.tif").shape == (1024, 1024, 3)
        polygons, names, _ = read_boxes(root / "truth" / f"{date}.txt")
        assert set(names) == set(scenes.BOXES.values())
        check_rectangles(polygons)
        assert set(np.unique(pixels(root / "truth" / f"{date}.tif"))) == set(range(7))
    assert 0.02 < (pixels(root / "truth/change.tif") > 0).mean() < 0.2
