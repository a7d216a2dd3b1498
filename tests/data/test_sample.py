"The generated data set: its bytes, its layouts, and that it is no giveaway."

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cmid.data import sample

ROOT = Path(__file__).parents[2]
KINDS = list(sample.CLASSES)


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    script = tmp_path_factory.mktemp("bin") / "cmid_sample"  # what pip makes of a console script
    script.write_text("import sys\nfrom cmid.data.sample import cmid_sample\nsys.exit(cmid_sample())\n")
    return lambda *args, cwd: subprocess.run(
        [sys.executable, str(script), *map(str, args)], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def data(run, tmp_path_factory):
    where = tmp_path_factory.mktemp("sample")
    done = run("data", cwd=where)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in where.iterdir()] == ["data"]  # nothing partial is left
    return where / "data"


def test_same_bytes_as_committed(data):
    files = [p for p in data.rglob("*") if p.is_file()]
    rows = sorted(
        ({"md5": hashlib.md5(p.read_bytes()).hexdigest(), "relpath": p.relative_to(data).as_posix()} for p in files),
        key=lambda r: r["relpath"],
    )
    (out,) = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"]
    size = sum(p.stat().st_size for p in files)
    assert (len(files), size) == (out["nfiles"], out["size"])
    assert (
        hashlib.md5(json.dumps(rows, sort_keys=True).encode()).hexdigest() + ".dir" == out["md5"]
    )  # how DVC names a folder
    assert size < 40e6


def test_items_do_not_depend_on_each_other(data):
    for make, args in sample.items(0)[::-97]:
        for path, content in make(*args).items():
            assert (data / path).read_bytes() == content, path


def test_another_seed_is_another_landscape(data):
    make, args = sample.items(1)[5]
    for path, content in make(*args).items():
        assert (data / path).read_bytes() != content


def test_refuses_what_exists(run, tmp_path):
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


def test_scenes(data):
    lists = {
        s: [line.split(" ") for line in (data / "scenes" / f"{s}.txt").read_text().splitlines()]
        for s in ("train", "test")
    }
    names = {s: [name for name, _ in rows] for s, rows in lists.items()}
    assert not set(names["train"]) & set(names["test"])
    assert sorted(names["train"] + names["test"]) == sorted(
        p.relative_to(data / "scenes").as_posix() for p in (data / "scenes").rglob("*.png")
    )
    assert all(KINDS[int(label)] == name.split("/")[0] for rows in lists.values() for name, label in rows)
    for s, share in (("train", 0.8), ("test", 0.2)):
        count = np.bincount([int(label) for _, label in lists[s]])
        assert (
            len(count) >= 6
            and len(set(count)) == 1
            and sum(count) == share * (len(names["train"]) + len(names["test"]))
        )
    assert {pixels(data / "scenes" / n).shape for n in names["train"] + names["test"]} == {(128, 128, 3)}


def test_mean_colour_does_not_tell_the_class(data):
    rows = {
        s: [line.split(" ") for line in (data / "scenes" / f"{s}.txt").read_text().splitlines()]
        for s in ("train", "test")
    }
    x, y = (
        {s: np.array(v) for s, v in o.items()}
        for o in (
            {s: [pixels(data / "scenes" / n).mean((0, 1)) for n, _ in r] for s, r in rows.items()},
            {s: [int(c) for _, c in r] for s, r in rows.items()},
        )
    )
    centres = np.stack([x["train"][y["train"] == c].mean(0) for c in range(len(KINDS))])
    guess = ((x["test"][:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (guess == y["test"]).mean() < 0.45


def test_segmentation(data):
    root, seen = data / "segmentation", np.zeros(256, int)
    for split in ("train", "val"):
        images, labels = ({p.name for p in (root / d / split).iterdir()} for d in ("img_dir", "ann_dir"))
        assert images == labels and images
        for name in images:
            label = pixels(root / "ann_dir" / split / name)
            seen += np.bincount(label.ravel(), minlength=256)
            assert pixels(root / "img_dir" / split / name).shape == (256, 256, 3) and label.shape == (256, 256)
    assert (seen[:7] > 0.01 * seen.sum()).all() and not seen[7:].any()  # 0 is ignored; each of the others is seen


def test_labels_are_where_things_stand():
    _, land, things = sample.scene("residential", "labels", 2)
    codes = {"car": 5, "truck": 5, "house": 2, "hall": 2}
    inner = [t for t in things if t.kind in codes and sample.whole(t, 128, 0.5)]
    assert {"car", "house"} <= {t.kind for t in inner}
    for t in inner:
        assert land.label[land.pixel(t.y), land.pixel(t.x)] == codes[t.kind]


def boxes_in(path):
    head, rows = (lines := path.read_text().splitlines())[:2], [line.split(" ") for line in lines[2:]]
    assert head[0].startswith("imagesource:") and float(head[1].removeprefix("gsd:")) > 0
    return np.array([r[:8] for r in rows], float).reshape(-1, 4, 2), [r[8] for r in rows], [r[9] for r in rows]


def test_boxes(data):
    names, hard, angles = set(), set(), []
    for split in ("train", "val"):
        root = data / "boxes" / split
        assert {p.stem for p in (root / "images").iterdir()} == {p.stem for p in (root / "labelTxt").iterdir()}
        for path in (root / "labelTxt").iterdir():
            image = pixels(root / "images" / f"{path.stem}.png")
            p, n, h = boxes_in(path)
            names |= set(n)
            hard |= set(h)
            assert image.shape == (256, 256, 3) and (p >= 0).all() and (p <= 256).all()
            side, turned = p - np.roll(p, 1, 1), np.roll(p, -1, 1) - p
            assert (
                side[..., 0] * turned[..., 1] - side[..., 1] * turned[..., 0] > 0
            ).all()  # clockwise, as y points down
            assert np.abs((side * turned).sum(-1)).max(initial=0) < 0.3 * np.abs(side).max(
                initial=1
            )  # right angles, up to a decimal
            angles += list(np.degrees(np.arctan2(turned[:, 0, 1], turned[:, 0, 0])))
    assert names == set(sample.BOXES.values()) and hard == {"0", "1"}
    assert (np.histogram(np.mod(angles, 180), 12)[0] > 0).all()  # every angle


def test_change(data):
    for split in ("train", "val", "test"):
        a, b, out = (sorted((data / "change" / split / d).iterdir()) for d in ("A", "B", "OUT"))
        assert [p.name for p in a] == [p.name for p in b] == [p.name for p in out]
        masks = np.stack([pixels(p) for p in out])
        assert set(np.unique(masks)) == {0, 255} and masks.shape[1:] == (128, 128)
        empty = ~masks.any((1, 2))
        assert empty.any() and (~empty).sum() > 3 * empty.sum()
        assert all((pixels(p) != pixels(q)).mean() > 0.5 for p, q in zip(a, b))  # season and sun change everywhere


def test_change_is_where_the_mask_says(monkeypatch):
    flight = sample.daylight("one flight")._replace(haze=0.0, deep=0.0, noise=0.0)
    monkeypatch.setattr(sample, "daylight", lambda *key: flight)
    a, b, mask = sample.two_dates("residential", "one flight", changes=4)
    far = np.abs(a.astype(int) - b).max(-1)
    inside = mask > 0
    assert inside.mean() > 0.02
    assert (far[inside] > 8).mean() > 0.8  # what changed looks different
    assert (far[~inside] > 8).mean() < 0.06  # the rest: cars that moved, slopes at an edge
