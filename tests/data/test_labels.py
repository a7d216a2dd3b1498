"""Labels: every layout is read as its maker meant it, the store gives back what the files hold, and whatever would make labels say something else stops in one line.

Real images are read where CMID_REALDATA names a folder with the archives seg_dubai, seg_samples, cd and obb."""

import errno
import json
import os
import pickle
import tarfile
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import yaml
from PIL import Image
from rasterio.transform import from_origin

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.data import labels as module
from cmid.data.labelled import IGNORE, Labelled
from cmid.data.box_files import read_dota
from cmid.data.label_figures import classes_figure, items_figure, labels_metrics
from cmid.data.label_files import DOTA_CLASSES
from cmid.data.labels import label_dataset
from cmid.data.masks import ClassTable, read_mask
from cmid.data.pairs import phase_offset

RNG = np.random.default_rng
noise = lambda *shape, seed=0: RNG(seed).integers(0, 256, shape, np.uint8)

# --- the tools: files of each kind, a study that reads them


def put(path, x):
    "An array as PNG or JPEG, bytes and text as they are."
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(x, np.ndarray):
        Image.fromarray(x).save(path)
    else:
        path.write_bytes(x if isinstance(x, bytes) else x.encode())


def tiff(path, x, at=None, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {} if at is None else dict(transform=from_origin(*at, 1, 1), crs="EPSG:32633")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=x.shape[0],
            height=x.shape[1],
            width=x.shape[2],
            dtype=x.dtype,
            **place,
            **kw,
        ) as f:
            f.write(x)


BASE = dict(
    segment=dict(
        task="segment",
        format="folders",
        folder="d",
        splits=dict(train="images/train*", test="images/test*"),
        parts=None,
        classes=dict(land=1, water=2),
        ignore=[0],
    ),
    change=dict(
        task="change",
        format="cdd",
        folder="d",
        splits=dict(train="A/train*", test="A/test*"),
        parts=None,
        classes=None,
        ignore=None,
    ),
    detect=dict(
        task="detect",
        format="dota",
        folder="d",
        splits=dict(train="images/train*", test="images/test*"),
        parts=None,
        classes=["ship", "plane"],
        ignore=None,
    ),
)
NAMES = "train0", "train1", "test0"


def files(root, task, side=40):
    "A good little set of a task, below `root`/d."
    for k, o in enumerate(NAMES):
        if task == "segment":
            put(root / f"d/images/{o}.png", noise(side, side, 3, seed=k))
            put(root / f"d/masks/{o}.png", noise(side, side, seed=k) % 3)
        if task == "change":
            [put(root / f"d/{d}/{o}.png", noise(side, side, 3, seed=k)) for d in "AB"]
            put(root / f"d/OUT/{o}.png", noise(side, side, seed=k) // 128 * 255)
        if task == "detect":
            put(root / f"d/images/{o}.png", noise(side, side, 3, seed=k))
            put(
                root / f"d/labelTxt/{o}.txt",
                f"imagesource:x\ngsd:0.5\n1 1 9 1 9 5 1 5 ship 0\n{k} 20 9 20 9 25 {k} 25 plane 1\n",
            )


def study(root, entry, labels=None):
    "Params of a study with this one task, called x."
    y = dict(
        profile="smoke",
        seed=0,
        device="cpu",
        deterministic=False,
        datasets={},
        tasks=dict(x=entry),
        labels=dict(bands=None, stretch=[2.0, 98.0], workers=1, shard_mb=1000) | (labels or {}),
        profiles=dict(smoke={}),
    )
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(y)), sort_keys=False))
    return Params(root)


def read(root, task, labels=None, **over):
    return label_dataset(study(root, BASE[task] | over, labels), "x")


def held(folder):
    return {o.name: o.read_bytes() for o in sorted(folder.iterdir())} if folder.exists() else {}


def found(labelled, kind):
    return [o for o in labelled.manifest["audit"] if o["kind"] == kind]


# --- bad input, as one table: task, how it is spoilt, changed settings, what the one line must say


def spoil(path, content):
    return lambda d: put(d / path, content)


def gone(*paths):
    return lambda d: [(d / o).unlink() for o in paths]


def line(text):
    return spoil("labelTxt/train1.txt", f"gsd:1\n1 1 9 1 9 5 1 5 ship 0\n\n{text}\n")


def cut(path):
    return lambda d: (d / path).write_bytes((d / path).read_bytes()[:-60])


def lists(text):
    return lambda d: put(d / "train.txt", text)


def pair_at(a, b):
    return lambda d: [
        (
            tiff(d / "A/train9.tif", noise(3, 40, 40), a),
            tiff(d / "B/train9.tif", noise(3, 40, 40), b),
            put(d / "OUT/train9.png", noise(40, 40) // 128 * 255),
        )
    ]


def nothing(d):
    pass


stray = np.where(np.arange(1600).reshape(40, 40) < 7, 9, 1).astype(np.uint8)
coloured = np.where(stray[..., None] == 9, [255, 0, 0], [132, 41, 246]).astype(np.uint8)
LIST = dict(splits=dict(train="train.txt", test="images/test*"))
BAD = [
    (
        "segment",
        spoil("masks/train1.png", stray),
        {},
        ["1 value in the masks", "9: 7 px in 1 file (masks/train1.png)", "classes: {NAME: 9}"],
    ),
    (
        "segment",
        lambda d: [put(d / f"masks/{o}.png", stray) for o in NAMES],
        {},
        ["9: 21 px in 3 files (masks/test0.png, masks/train0.png, masks/train1.png)"],
    ),
    (
        "segment",
        lambda d: [put(d / f"masks/{o}.png", coloured) for o in NAMES],
        dict(classes=dict(land="#8429F6"), ignore=[]),
        ["#FF0000: 21 px in 3 files", "classes: {NAME: '#FF0000'}"],
    ),
    ("segment", spoil("masks/train1.png", coloured), {}, ["2 values", "#8429F6: 1,593 px", "#FF0000: 7 px"]),
    (
        "segment",
        lambda d: [
            gone("masks/train1.png")(d),
            Image.fromarray(noise(40, 40)).save(d / "masks/train1.jpg", quality=20),
        ],
        {},
        ["a JPEG changes the values", "more values", "in 1 file (masks/train1.jpg)"],
    ),
    (
        "segment",
        lambda d: [gone("masks/train1.png")(d), tiff(d / "masks/train1.tif", np.full((1, 40, 40), 1.5, "float32"))],
        {},
        ["1.5: 1,600 px"],
    ),
    (
        "segment",
        lambda d: [gone("masks/train1.png")(d), tiff(d / "masks/train1.tif", np.full((1, 40, 40), -1, "int16"))],
        {},
        ["-1: 1,600 px"],
    ),
    (
        "segment",
        lambda d: [gone("masks/train1.png")(d), tiff(d / "masks/train1.tif", np.zeros((2, 40, 40), "uint8"))],
        {},
        ["masks/train1.tif: 2 bands of uint8: a mask has one band"],
    ),
    (
        "segment",
        spoil("masks/train1.png", noise(40, 41) % 3),
        {},
        ["masks/train1.png: 41 x 40 pixels, but images/train1.png has 40 x 40"],
    ),
    ("segment", gone("masks/train1.png"), {}, ["images/train1.png has no masks", "tasks.x.parts"]),
    ("segment", spoil("masks/train1.tif", b""), {}, ["train1.png and train1.tif are both what belongs to 'train1'"]),
    ("segment", cut("masks/train1.png"), {}, ["masks/train1.png: ", "replace or remove it"]),
    ("segment", spoil("masks/train1.png", b""), {}, ["masks/train1.png: empty file"]),
    ("segment", spoil("images/train1.png", b""), {}, ["images/train1.png: empty file"]),
    ("segment", cut("images/train1.png"), {}, ["images/train1.png: ", "replace or remove it"]),
    (
        "segment",
        spoil("images/train1.png", b"not an image at all, by its bytes"),
        {},
        ["images/train1.png: no PNG, JPEG or TIFF inside"],
    ),
    (
        "segment",
        lambda d: tiff(d / "images/train9.tif", noise(4, 40, 40)) or put(d / "masks/train9.png", noise(40, 40) % 3),
        {},
        ["images/train9.tif has 4 bands of uint8", "most images have 3 of uint8"],
    ),
    (
        "segment",
        lambda d: (
            tiff(d / "images/train9.tif", noise(3, 40, 40).astype("uint16"))
            or put(d / "masks/train9.png", noise(40, 40) % 3)
        ),
        {},
        ["images/train9.tif has 3 bands of uint16"],
    ),
    (
        "segment",
        nothing,
        dict(labels=dict(bands=[0, 5])),
        ["params.yaml: labels.bands: [0, 5] were asked for, but images/test0.png has 3"],
    ),
    ("segment", nothing, dict(folder="nowhere"), ["params.yaml: tasks.x.folder: nowhere is no folder"]),
    (
        "segment",
        nothing,
        dict(splits=dict(train="img/*")),
        ["tasks.x.splits.train: 'img/*' fits no PNG, JPEG or TIFF below"],
    ),
    ("segment", nothing, dict(splits=dict(train="/images/*")), ["'/images/*' is no pattern"]),
    ("segment", nothing, dict(splits=dict(train=[])), ["tasks.x.splits.train: [] lists no image"]),
    ("segment", nothing, dict(splits=dict(train="masks/*")), ["lies in no folder 'images' or 'img_dir'", "parts"]),
    (
        "segment",
        nothing,
        dict(parts=dict(image="images", masks="masks")),
        ["tasks.x.parts.image: unknown key (did you mean 'images'"],
    ),
    ("segment", nothing, dict(parts=dict(images="images")), ["tasks.x.parts.masks: missing"]),
    ("segment", nothing, dict(classes=None), ["tasks.x.classes: missing"]),
    ("segment", nothing, dict(classes=["land", "water"]), ["tasks.x.classes: must be name: index or colour"]),
    ("segment", nothing, dict(classes=dict(land="purple")), ["tasks.x.classes.land: 'purple' is neither an index"]),
    ("segment", nothing, dict(classes=dict(land=70000)), ["70000 is neither an index"]),
    (
        "segment",
        nothing,
        dict(classes=dict(land=1, water=[2, 1])),
        ["tasks.x.classes.water: 1 is under tasks.x.classes.land already"],
    ),
    ("segment", nothing, dict(ignore=[1]), ["tasks.x.ignore: 1 is under tasks.x.classes.land already"]),
    (
        "segment",
        nothing,
        dict(classes={f"c{i}": i for i in range(300)}, ignore=[]),
        ["300 values are more than the 253"],
    ),
    ("segment", lists("train0\n\ntrain7.png\n"), LIST, ["train.txt:3: 'train7.png' names no image below"]),
    ("segment", lists("../../etc/passwd\n"), LIST, ["train.txt:1:", "names no image below"]),
    ("segment", lists(b"\xff\xfe"), LIST, ["train.txt: is no UTF-8 text"]),
    ("segment", lists("\n"), LIST, ["tasks.x.splits.train: 'train.txt' lists no image"]),
    ("segment", nothing, LIST, ["train.txt: cannot be read"]),
    ("change", gone("B/train1.png"), {}, ["A/train1.png has no second"]),
    ("change", gone("OUT/train0.png", "OUT/train1.png"), {}, ["A/train0.png has no label; A/train1.png has no label"]),
    ("change", gone("OUT/test0.png"), {}, ["A/test0.png has no label"]),
    (
        "change",
        spoil("B/train1.png", noise(40, 44, 3)),
        {},
        ["B/train1.png: 44 x 40 pixels, but A/train1.png has 40 x 40", "same place"],
    ),
    (
        "change",
        spoil("OUT/train1.png", noise(44, 40) // 128 * 255),
        {},
        ["OUT/train1.png: 40 x 44 pixels, but A/train1.png has 40 x 40"],
    ),
    (
        "change",
        spoil("OUT/train1.png", stray),
        {},
        ["9: 7 px in 1 file (OUT/train1.png)", "make the labels 0 and 255 without grey"],
    ),
    ("change", spoil("OUT/train1.png", noise(40, 40) // 128), {}, ["labels hold 0, 1 (", "px) and 255 ("]),
    (
        "change",
        nothing,
        dict(classes=dict(a=0, b=1, c=2)),
        ["tasks.x.classes: change has two, unchanged and changed (got a, b, c)"],
    ),
    ("change", pair_at((0, 0), (3, 0)), {}, ["A/train9.tif and B/train9.tif lie at different places", "registered"]),
    ("detect", line("1 1 9 1 9 5 ship 0"), {}, ["labelTxt/train1.txt:4: 3 corners: a box has four"]),
    ("detect", line("1 1 9 1 9 5 1 5"), {}, ["train1.txt:4: 8 words; write x1 y1"]),
    ("detect", line("1 1 9 1 9 x 1 5 ship 0"), {}, ["train1.txt:4: ", "is no box; write x1 y1"]),
    ("detect", line("1 1 9 1 9 5 1 5 ship 0 0"), {}, ["train1.txt:4: 11 words"]),
    (
        "detect",
        line("1 1 9 1 9 5 1 5 shop 0"),
        {},
        ["train1.txt:4: class 'shop' is neither under classes nor under ignore (did you mean 'ship'?)"],
    ),
    ("detect", line("1 1 9 1 9 5 1 5 ship hard"), {}, ["train1.txt:4: difficult is 'hard'; write 0 or 1"]),
    ("detect", line("1 1 nan 1 9 5 1 5 ship 0"), {}, ["train1.txt:4: a corner is not finite"]),
    ("detect", line("1 1 9 1 9 1e39 1 5 ship 0"), {}, ["train1.txt:4: a corner is not finite, or far from any image"]),
    ("detect", line("1 1 9 1 9 1 1 1 ship 0"), {}, ["train1.txt:4: the box has no area"]),
    (
        "detect",
        line("41 1 49 1 49 5 41 5 ship 0"),
        {},
        ["train1.txt:4: the box lies outside its image of 40 x 40 pixels"],
    ),
    ("detect", line("40 1 49 1 49 5 40 5 ship 0"), {}, ["train1.txt:4: the box lies outside its image"]),
    ("detect", line("\0\1"), {}, ["train1.txt:4: ", "is no box"]),
    (
        "detect",
        lambda d: [line("1 2 3")(d), put(d / "labelTxt/test0.txt", "1 1 1 1\n")],
        {},
        ["test0.txt:1: ", "train1.txt:4: "],
    ),
    ("detect", spoil("labelTxt/train1.txt", b"\xff\xfe\x00"), {}, ["labelTxt/train1.txt: is no UTF-8 text"]),
    (
        "detect",
        gone("labelTxt/train1.txt"),
        {},
        ["images/train1.png has no labels", "an empty text file where there is no object"],
    ),
    ("detect", gone(*(f"labelTxt/{o}.txt" for o in NAMES)), {}, ["images/test0.png has no labels"]),
    ("detect", nothing, dict(classes=["ship", "ship", "plane"]), ["tasks.x.classes: 'ship' is there twice"]),
    ("detect", nothing, dict(ignore=["ship"]), ["tasks.x.classes: 'ship' is there twice, or under ignore too"]),
    ("detect", nothing, dict(classes=dict(ship=1)), ["tasks.x.classes: must be a list of names"]),
]


@pytest.mark.parametrize("task, break_it, over, says", BAD, ids=[f"{i}-{o[0]}" for i, o in enumerate(BAD)])
def test_bad_input_is_one_line_and_changes_nothing(tmp_path, task, break_it, over, says):
    files(tmp_path, task)
    read(tmp_path, task)
    before = held(tmp_path / "prepared/x")
    break_it(tmp_path / "d")
    over = dict(over)
    with pytest.raises(CmidError) as e:
        read(tmp_path, task, over.pop("labels", None), **over)
    assert "\n" not in str(e.value) and len(str(e.value)) < 2000 and not [o for o in says if o not in str(e.value)], (
        str(e.value)
    )
    assert held(tmp_path / "prepared/x") == before and [o.name for o in (tmp_path / "prepared").iterdir()] == ["x"]


def test_a_folder_of_others_is_refused(tmp_path):
    files(tmp_path, "segment")
    put(tmp_path / "prepared/x/notes.txt", "mine")
    with pytest.raises(CmidError, match="is no folder of the stage labels"):
        read(tmp_path, "segment")
    (tmp_path / "prepared/x").rename(tmp_path / "prepared/x.partial")
    with pytest.raises(CmidError, match="did not write"):
        read(tmp_path, "segment")
    assert (tmp_path / "prepared/x.partial/notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    files(tmp_path, "segment")
    read(tmp_path, "segment")
    before = held(tmp_path / "prepared/x")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module._Shards, "add", full)
    with pytest.raises(CmidError, match="the disk is full"):
        read(tmp_path, "segment")
    assert held(tmp_path / "prepared/x") == before and not (tmp_path / "prepared/x.partial").exists()


# --- the store


@pytest.mark.parametrize("task", BASE)
def test_the_store_gives_back_the_files(tmp_path, task):
    "Items of different sizes, several to a shard and several shards; twice, and with other numbers of threads, the same bytes."
    files(tmp_path, task)
    for k, (o, (h, w)) in enumerate({"train5": (600, 400), "test6": (401, 333), "train7": (640, 512)}.items()):
        for d in ("images",) if task != "change" else "AB":
            put(tmp_path / f"d/{d}/{o}.png", noise(h, w, 3, seed=ord(d[0])))
        if task != "detect":
            put(
                tmp_path / f"d/{dict(segment='masks', change='OUT')[task]}/{o}.png",
                noise(h, w, seed=k) // 128 * dict(segment=2, change=255)[task],
            )
        else:
            put(tmp_path / f"d/labelTxt/{o}.txt", "")
    labelled = read(tmp_path, task, dict(shard_mb=1))
    at = lambda i, d: np.asarray(
        Image.open(tmp_path / "d" / labelled.names[i].replace("images/", f"{d}/").replace("A/", f"{d}/"))
    )
    assert (
        len(labelled) == 6
        and len(labelled.manifest["shards"]) >= 2
        and sorted(np.concatenate([*labelled.splits.values()])) == [*range(6)]
        and labelled.splits["train"].dtype.kind == "i"
    )
    for i in range(6):
        x = labelled.image(i)
        assert x.dtype == np.uint8 and not x.flags.writeable and tuple(labelled.sizes[i]) == x.shape[1:]
        assert (x == at(i, "A" if task == "change" else "images").transpose(2, 0, 1)).all()
        if task == "change":
            assert (labelled.second(i) == at(i, "B").transpose(2, 0, 1)).all() and (
                labelled.mask(i) == at(i, "OUT") // 255
            ).all()
        if task == "segment":
            m = at(i, "masks").astype(int)
            assert (labelled.mask(i) == np.where(m == 0, IGNORE, m - 1)).all()
    with pytest.raises(IndexError):
        labelled.image(6)
    before = held(labelled.folder)
    copy = pickle.loads(pickle.dumps(labelled))
    assert (copy.image(3) == labelled.image(3)).all()
    for workers in (1, 3):
        assert held(read(tmp_path, task, dict(shard_mb=1, workers=workers)).folder) == before
    json.dumps(labels_metrics(labelled), allow_nan=False)
    assert str(tmp_path) not in before["manifest.json"].decode()
    assert items_figure(labelled).axes and classes_figure(labelled).axes


def test_objects_are_what_the_lines_say(tmp_path):
    files(tmp_path, "detect")
    l = read(tmp_path, "detect")
    i = l.names.index("images/train1.png")
    o = l.objects(i)
    assert o["polygons"].dtype == np.float32 and o["polygons"].tolist() == [
        [[1, 1], [9, 1], [9, 5], [1, 5]],
        [[1, 20], [9, 20], [9, 25], [1, 25]],
    ]
    assert (
        o["classes"].tolist() == [0, 1]
        and o["difficult"].tolist() == [False, True]
        and l.classes == ["ship", "plane"]
        and l.manifest["gsd"] == [0.5] * 3
    )
    for what in (l.mask, l.second):
        with pytest.raises(CmidError, match="it is for detect"):
            what(0)


def test_a_carriage_return_a_mark_and_no_difficulty(tmp_path):
    put(
        tmp_path / "P.txt",
        b"\xef\xbb\xbfimagesource:GoogleEarth\r\ngsd:null\r\n0 0 4 0 4 2 0 2 7\r\n0 0 4 0 4 2 0 2 7\r\n0 0 4 0 4 2 0 2 tent 2\r\n",
    )
    o = read_dota(tmp_path / "P.txt", ["7"], ["tent"])
    assert (o["classes"].tolist(), o["difficult"].tolist(), o["gsd"], o["ignored"], o["repeated"]) == (
        [0, 0],
        [False, False],
        None,
        1,
        1,
    )


ALTER = {
    "cut shard": lambda f, m: (f / "images-00000.bin").write_bytes(b"0" * 9),
    "no shard": lambda f, m: (f / "images-00000.bin").unlink(),
    "format": lambda f, m: m.update(format=99),
    "split": lambda f, m: m["splits"].update(train=[99]),
    "sizes": lambda f, m: m["sizes"].pop(),
    "huge": lambda f, m: m["sizes"][0].__setitem__(0, 2**40),
    "negative": lambda f, m: m["sizes"][0].__setitem__(0, -40),
    "classes": lambda f, m: m.update(classes=[]),
    "task": lambda f, m: m.update(task="fly"),
    "bands": lambda f, m: m.update(bands="3"),
    "elsewhere": lambda f, m: m["shards"][0].update(file="../../params.yaml"),
    "no hash": lambda f, m: m.pop("hash"),
    "boxes": lambda f, m: np.save(f / "polygons.npy", np.zeros((1, 4, 2), "f4")),
    "pickle": lambda f, m: np.save(f / "classes.npy", np.array([dict(a=1)] * 6, object), allow_pickle=True),
    "counts": lambda f, m: m.update(objects=[-1, 4, 3]),
    "class": lambda f, m: np.save(f / "classes.npy", np.full(6, 7)),
}

M = lambda **over: lambda f, m: m.update(over)
ALTER |= {
    k: M(**v)
    for k, v in {
        "classes as text": dict(classes="ab"),
        "classes as numbers": dict(classes=[1, 2]),
        "a class twice": dict(classes=["ship", "ship"]),
        "fewer classes than counted": dict(classes=["ship"]),
        "more classes than counted": dict(classes=["ship", "plane", "car"]),
        "names as numbers": dict(names=[1, 2, 3]),
        "names as text": dict(names="abc"),
        "a name twice": dict(names=["a", "b", "a"]),
        "hash as a number": dict(hash=5),
        "no text in hash": dict(hash=""),
        "task as a list": dict(task=[]),
        "bands as truth": dict(bands=True),
        "splits as a list": dict(splits=[[0, 1], [2]]),
        "no splits": dict(splits={}),
        "an item twice": dict(splits=dict(train=[1, 1], test=[0])),
        "items as parts": dict(splits=dict(train=[1.0, 2.5], test=[0])),
        "items as truth": dict(splits=dict(train=[True, 2], test=[0])),
        "items below 0": dict(splits=dict(train=[-1, 2], test=[0])),
        "an empty split": dict(splits=dict(train=[], test=[0])),
        "a split as a number": dict(splits=dict(train=1, test=[0])),
        "splits not counted": dict(splits=dict(train=[1, 2], val=[0])),
        "sizes as parts": dict(sizes=[[40.0, 40.0]] * 3),
        "sizes of one": dict(sizes=[[40], [40], [40]]),
        "shards as text": dict(shards="x"),
        "unlabelled elsewhere": dict(unlabelled=["val"]),
        "histogram of nothing": dict(histogram=None),
        "ignored as text": dict(ignored=dict(train="0", test="0")),
        "audit as text": dict(audit=["all well"]),
        "gsd as text": dict(gsd=[".5"] * 3),
    }.items()
}


@pytest.mark.parametrize("how", ALTER)
def test_an_altered_store_is_refused_in_one_line(tmp_path, how):
    files(tmp_path, "detect")
    folder = read(tmp_path, "detect").folder
    m = json.loads((folder / "manifest.json").read_text())
    ALTER[how](folder, m)
    (folder / "manifest.json").write_text(json.dumps(m))
    with pytest.raises(CmidError, match="remove|cmid_stage labels") as e:
        Labelled(folder)
    assert (
        "\n" not in str(e.value)
        and "Error" not in str(e.value)
        or how in ("no hash", "boxes", "pickle", "class", "format")
    ), str(e.value)


@pytest.mark.parametrize("task", BASE)
def test_labels_are_in_the_hash(tmp_path, task):
    "Two pixels of different classes change places, so that every count stays, or two boxes of a file; images and their hashes are as they were."
    files(tmp_path, task)
    old = read(tmp_path, task)
    again = read(tmp_path, task)
    assert again.hash == old.hash
    if task == "detect":
        f = tmp_path / "d/labelTxt/train1.txt"
        f.write_text(f.read_text().replace("9 1 9 5", "9 1 9 6"))
    else:
        f = tmp_path / "d" / dict(segment="masks", change="OUT")[task] / "train1.png"
        x = np.array(Image.open(f))
        a, b = (np.argwhere(x == v)[0] for v in np.unique(x)[-2:])
        x[tuple(a)], x[tuple(b)] = x[tuple(b)], x[tuple(a)]
        put(f, x)
    new = read(tmp_path, task)
    assert all(new.manifest[k] == old.manifest[k] for k in ("hashes", "histogram", "ignored")) and new.hash != old.hash


def test_copies_are_found_in_one_pass():
    "The items of a split are asked for a few times, however many there are; groups and leaks are those of a count by hand."

    class Asked(dict):
        times = 0

        def __getitem__(self, k):
            self.times += 1
            return super().__getitem__(k)

    n = 3000
    splits = Asked(train=[*range(n)], test=[*range(n, 2 * n)])
    results = [SimpleNamespace(sha=f"{i % n // 2}") for i in range(2 * n)]  # groups of four: two in each split
    same, leak = module._copies(None, [f"i{i}" for i in range(2 * n)], splits, results)
    assert (same["count"], leak["count"], same["examples"][0], leak["examples"][0]) == (
        n // 2 * 3,
        n,
        f"i0 = i1 = i{n} = i{n + 1}",
        f"i{n}",
    ) and splits.times < 5


def test_no_store_is_said(tmp_path):
    with pytest.raises(CmidError, match="run cmid_stage labels -p dataset x"):
        Labelled(tmp_path / "x")


def test_memory_does_not_grow_with_the_set(tmp_path):
    "Four times the images, the same peak."

    def peak(n, at):
        for i in range(n):
            put(at / f"d/images/train{i}.png", np.full((1000, 1000, 3), i, np.uint8))
            put(at / f"d/masks/train{i}.png", np.ones((1000, 1000), np.uint8))
        tracemalloc.start()
        read(at, "segment", dict(workers=1), splits=dict(train="images/*"))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(16, tmp_path / "b") < 1.15 * peak(4, tmp_path / "a")


# --- layouts


def test_raw_potsdam_and_vaihingen(tmp_path):
    "Colours and tails of the ISPRS; eroded labels come first where both are there; clutter and boundary are ignored."
    rgb = np.array(
        [
            [[255, 255, 255], [0, 0, 255], [0, 255, 255], [0, 255, 0]],
            [[255, 255, 0], [255, 0, 0], [0, 0, 0], [0, 0, 255]],
        ],
        np.uint8,
    ).transpose(2, 0, 1)
    whole = rgb.copy()
    whole[:, 1, 2] = 255
    tiff(tmp_path / "d/2_Ortho_RGB/top_potsdam_2_10_RGB.tif", noise(3, 2, 4), (0, 0))
    entry = dict(format="potsdam", classes=None, ignore=None, splits=dict(train="2_Ortho_RGB/*.tif"))
    tiff(tmp_path / "d/5_Labels_all/top_potsdam_2_10_label.tif", whole)
    assert read(tmp_path, "segment", **entry).mask(0).tolist() == [[0, 1, 2, 3], [4, 255, 0, 1]]
    tiff(tmp_path / "d/5_Labels_all_noBoundary/top_potsdam_2_10_label_noBoundary.tif", rgb)
    l = read(tmp_path, "segment", **entry)
    assert (
        l.mask(0).tolist() == [[0, 1, 2, 3], [4, 255, 255, 1]]
        and len(l.classes) == 5
        and l.manifest["ignored"] == dict(train=2)
    )
    tiff(tmp_path / "v/top/top_mosaic_09cm_area1.tif", noise(3, 2, 4))
    tiff(tmp_path / "v/gts_eroded_for_participants/top_mosaic_09cm_area1_noBoundary.tif", rgb)
    assert read(
        tmp_path, "segment", format="vaihingen", folder="v", classes=None, ignore=None, splits=dict(train="top/*")
    ).mask(0).tolist() == [[0, 1, 2, 3], [4, 255, 255, 1]]
    put(tmp_path / "t/img_dir/train/2_10_0_0.png", noise(2, 4, 3))
    put(tmp_path / "t/ann_dir/train/2_10_0_0.png", np.array([[0, 1, 2, 3], [4, 5, 6, 1]], np.uint8))
    assert read(
        tmp_path,
        "segment",
        format="potsdam",
        folder="t",
        classes=None,
        ignore=None,
        splits=dict(train="img_dir/train/*"),
    ).mask(0).tolist() == [[255, 0, 1, 2], [3, 4, 255, 0]]


def test_loveda_and_a_test_split_without_masks(tmp_path):
    "Submission splits have no labels: said, stored as ignored; but some split must have them."
    for o in ("Train/Urban", "Val/Rural", "Test/Rural"):
        put(tmp_path / f"d/{o}/images_png/1.png", noise(8, 8, 3, seed=len(o)))
    for o in ("Train/Urban", "Val/Rural"):
        put(tmp_path / f"d/{o}/masks_png/1.png", (np.arange(64) % 8).reshape(8, 8).astype(np.uint8))
    l = read(
        tmp_path,
        "segment",
        format="loveda",
        classes=None,
        ignore=None,
        splits={k: f"{k.title()}/*/images_png/*" for k in ("train", "val", "test")},
    )
    assert (
        l.mask(int(l.splits["train"][0]))[0].tolist() == [255, 0, 1, 2, 3, 4, 5, 6]
        and (l.mask(int(l.splits["test"][0])) == IGNORE).all()
        and found(l, "unlabelled")[0]["text"].startswith("images of test")
        and items_figure(l)
    )
    files(tmp_path / "o", "detect")
    (tmp_path / "o/d/labelTxt/test0.txt").unlink()
    l = read(tmp_path / "o", "detect")
    assert len(l.objects(0)["classes"]) == 0 and l.manifest["unlabelled"] == ["test"]


@pytest.mark.parametrize(
    "layout, folders", [("levir", ("A", "B", "label")), ("dsifn", ("t1", "t2", "mask")), ("folders", ("A", "B", "OUT"))]
)
def test_lists_name_pairs_with_and_without_suffix(tmp_path, layout, folders):
    for k in range(3):
        for d in folders:
            put(
                tmp_path / f"d/{d}/p{k}.{'jpg' if layout == 'dsifn' and d != 'mask' else 'png'}",
                noise(8, 8) // 128 * 255 if d == folders[2] else noise(8, 8, 3),
            )
    put(tmp_path / "d/list/train.txt", "p0.png\np2\n")
    put(tmp_path / "d/list/val.txt", f"{folders[0]}/p1.png\r\n")
    l = read(tmp_path, "change", format=layout, splits=dict(train="list/train.txt", val="list/val.txt"))
    assert [Path(o).stem for o in l.names] == ["p0", "p1", "p2"] and {
        k: v.tolist() for k, v in l.splits.items()
    } == dict(train=[0, 2], val=[1])


def test_palettes_bits_and_16_bit_masks(tmp_path):
    table, colours = Table(dict(a=1, b=300), [0]), Table(dict(a="#FF0000", b="#FFFFFF"), ["000000"])
    x = np.array([[0, 1], [1, 0]], np.uint8)
    p = Image.fromarray(x)
    p.putpalette([0, 0, 0, 255, 0, 0])
    p.save(tmp_path / "p.png")
    Image.fromarray(x > 0).save(tmp_path / "1.png")
    assert (
        read_mask(tmp_path / "p.png", table)[0].tolist()
        == read_mask(tmp_path / "p.png", colours)[0].tolist()
        == read_mask(tmp_path / "1.png", table)[0].tolist()
        == [[255, 0], [0, 255]]
    )
    assert read_mask(tmp_path / "p.png", Table(dict(a=["#00FF00", 1]), [0]))[0].tolist() == [
        [255, 0],
        [0, 255],
    ]  # its colours are unknown: indices
    tiff(tmp_path / "16.tif", np.array([[[0, 1], [300, 300]]], "uint16"))
    tiff(tmp_path / "f.tif", np.array([[[0, 1], [300, 300]]], "float32"))
    tiff(tmp_path / "rgba.tif", np.stack([x * 255, x * 0, x * 0, x * 7]))
    for o in ("16.tif", "f.tif"):
        assert (
            read_mask(tmp_path / o, table)[0].tolist() == [[255, 0], [1, 1]] and not read_mask(tmp_path / o, table)[2]
        )
    assert read_mask(tmp_path / "rgba.tif", colours)[0].tolist() == [[255, 0], [0, 255]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            tmp_path / "lut.tif", "w", driver="GTiff", count=1, height=2, width=2, dtype="uint8", photometric="palette"
        ) as f:
            f.write(x[None])
            f.write_colormap(1, {0: (0, 0, 0, 255), 1: (255, 0, 0, 255)})
    assert (
        read_mask(tmp_path / "lut.tif", table)[0].tolist()
        == read_mask(tmp_path / "lut.tif", colours)[0].tolist()
        == [[255, 0], [0, 255]]
    )


def test_a_mask_of_many_rows_is_counted_whole(tmp_path, monkeypatch):
    x = noise(301, 97) % 4
    put(tmp_path / "m.png", x)
    one = read_mask(tmp_path / "m.png", t := Table(dict(a=1, b=2), [0]))
    monkeypatch.setattr(module, "ROWS", 1000)
    many = read_mask(tmp_path / "m.png", t)
    assert (
        (one[0] == many[0]).all()
        and (one[1] == many[1]).all()
        and one[2] == many[2] == {"3": (x == 3).sum()}
        and one[1][:3].tolist() == [(x == v).sum() for v in (1, 2, 0)]
    )


# --- bands and types


def test_wide_rasters_are_stretched_over_what_is_learnt_from(tmp_path, monkeypatch):
    "2nd and 98th percentile of the training images become 0 and 255, a band at a time; other splits follow, cut off; holes are 0."
    x = {
        o: (RNG(k).integers(100, 4000, (4, 64, 64)) * (3 if o == "test0" else 1)).astype("uint16")
        for k, o in enumerate(NAMES)
    }
    for o, v in x.items():
        tiff(tmp_path / f"d/images/{o}.tif", v, nodata=0 if o == "train0" else None)
        put(tmp_path / f"d/masks/{o}.png", noise(64, 64) % 3)
    x["train0"][:, 0, 0] = 0
    tiff(tmp_path / "d/images/train0.tif", x["train0"], nodata=0)
    l = read(tmp_path, "segment", dict(bands=[3, 1]))
    learnt = np.concatenate([x[o][[3, 1]].reshape(2, -1) for o in NAMES[:2]], 1)
    learnt = learnt[:, learnt[0] > 0]
    low, high = np.percentile(learnt, [2, 98], axis=1)
    assert (
        l.bands == 2
        and np.allclose(l.manifest["stretch"]["low"], low)
        and np.allclose(l.manifest["stretch"]["high"], high)
    )
    for i, o in enumerate(l.names):
        due = np.rint(
            np.clip(
                (x[Path(o).stem][[3, 1]].astype("f4") - low[:, None, None].astype("f4"))
                * (255 / (high - low)[:, None, None].astype("f4")),
                0,
                255,
            )
        )
        assert abs(l.image(i) - due).max() <= 1
    assert (l.image(l.names.index("images/train0.tif"))[:, 0, 0] == 0).all() and found(l, "no value")[0]["count"] == 1
    monkeypatch.setattr(module, "ROWS", 640)
    before = held(l.folder)
    assert held(read(tmp_path, "segment", dict(bands=[3, 1])).folder) == before


@pytest.mark.parametrize("bands", [1, 2, 13])
def test_any_number_of_bands(tmp_path, bands):
    for k, o in enumerate(NAMES):
        tiff(tmp_path / f"d/images/{o}.tif", noise(bands, 20, 30, seed=k))
        put(tmp_path / f"d/masks/{o}.png", noise(20, 30) % 3)
    l = read(tmp_path, "segment")
    assert l.bands == bands and (l.image(1) == noise(bands, 20, 30, seed=0)).all() and items_figure(l).axes


def test_grey_among_colour_is_made_colour(tmp_path):
    files(tmp_path, "segment")
    put(tmp_path / "d/images/train1.png", g := noise(40, 40))
    l = read(tmp_path, "segment")
    assert l.bands == 3 and (l.image(2) == g).all()


# --- what is noticed


def test_what_is_noticed_is_told(tmp_path):
    files(tmp_path, "segment")
    put(tmp_path / "d/images/test0.png", noise(40, 40, 3, seed=0))
    put(tmp_path / "d/masks/lonely.png", noise(40, 40) % 3)
    l = read(tmp_path, "segment", classes=dict(land=[1, 2], rock=7))
    assert (found(l, "leak")[0]["count"], found(l, "duplicate")[0]["examples"]) == (
        1,
        ["images/test0.png = images/train0.png"],
    )
    assert (
        found(l, "orphan")[0]["examples"] == ["masks/lonely.png"]
        and found(l, "absent class")[0]["examples"] == ["rock"]
        and "warning" in str(l)
    )
    twice = read(tmp_path, "segment", splits=dict(train="images/*", test="images/train*"))
    assert (
        len(twice) == 3
        and found(twice, "leak")[0]["count"] == 2
        and "images of test that are in train too" in str(twice)
    )


def test_boxes_over_the_edge_twice_or_none(tmp_path):
    files(tmp_path, "detect")
    put(tmp_path / "d/labelTxt/train1.txt", "-3 1 9 1 9 5 -3 5 plane 0\n" * 2)
    put(tmp_path / "d/labelTxt/train0.txt", "")
    l = read(tmp_path, "detect", classes=["ship"], ignore=["plane"])
    assert (
        len(l.objects(l.names.index("images/train1.png"))["classes"]) == 0
        and l.manifest["ignored"] == dict(train=2, test=1)
        and found(l, "empty")[0]["count"] == 2
        and "classes of test that are not in train" in str(l)
    )
    l = read(tmp_path, "detect")
    assert (found(l, "outside")[0]["count"], found(l, "repeated")[0]["count"]) == (2, 1)


def test_moved_dates_are_named(tmp_path):
    from cmid.data.scenes import scene

    files(tmp_path, "change", 128)
    ground = scene("town", "moved", size=160)[0]
    for o, (dy, dx) in dict(train0=(0, 0), train1=(5, -7), test0=(1, 1)).items():
        put(tmp_path / f"d/A/{o}.png", ground[16:144, 16:144])
        put(tmp_path / f"d/B/{o}.png", ground[16 - dy : 144 - dy, 16 - dx : 144 - dx])
    l = read(tmp_path, "change")
    assert [o["examples"] for o in found(l, "registration")] == [["A/train1.png (5, -7)"]]


def test_offset_of_unlike_images_does_not_stand_out():
    assert all(
        offset(noise(3, 128, 128, seed=i), noise(3, 128, 128, seed=100 + i))[1] < module.CLEAR / 2 for i in range(20)
    )


def test_georeferenced_pairs_that_fit_are_read(tmp_path):
    files(tmp_path, "change")
    pair_at((10, 20), (10.2, 20))(tmp_path / "d")
    assert len(read(tmp_path, "change")) == 4
    tiff(tmp_path / "d/OUT/train9.tif", noise(1, 40, 40) // 128 * 255, (99, 0))
    (tmp_path / "d/OUT/train9.png").unlink()
    assert found(read(tmp_path, "change"), "registration")[0]["examples"] == ["A/train9.tif"]


@pytest.mark.parametrize("changed", [1, 255, None])
def test_changed_is_1_or_255_and_nothing_may_change(tmp_path, changed):
    files(tmp_path, "change")
    for o in NAMES:
        put(tmp_path / f"d/OUT/{o}.png", noise(40, 40) // 128 * np.uint8(changed or 0))
    l = read(tmp_path, "change")
    assert l.manifest["histogram"]["test"] == (
        [1600, 0] if changed is None else [(noise(40, 40) < 128).sum(), (noise(40, 40) >= 128).sum()]
    ) and l.classes == ["unchanged", "changed"]


def test_labels_of_dates_may_be_jpeg(tmp_path):
    "CDD is handed out like this: cut at 128, and said; masks of classes stay exact."
    files(tmp_path, "change", 64)
    truth = np.zeros((64, 64), np.uint8)
    truth[9:31, 17:50] = 255
    (tmp_path / "d/OUT/train1.png").unlink()
    Image.fromarray(truth).save(tmp_path / "d/OUT/train1.jpg", quality=75)
    saved = np.asarray(Image.open(tmp_path / "d/OUT/train1.jpg"))
    l = read(tmp_path, "change")
    assert (l.mask(l.names.index("A/train1.png")) == truth // 255).all()
    assert found(l, "lossy")[0]["count"] == ((saved > 0) & (saved < 255)).sum() > 0 and found(l, "lossy")[0][
        "examples"
    ] == ["A/train1.png"]
    with pytest.raises(CmidError, match="a JPEG changes the values"):
        read(tmp_path, "change", classes=dict(a=0, b=255))


def test_a_turned_image_is_said(tmp_path):
    files(tmp_path, "detect")
    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "d/images/train1.png").unlink()
    Image.fromarray(noise(40, 40, 3)).save(tmp_path / "d/images/train1.jpg", exif=exif)
    assert [o for o in read(tmp_path, "detect").manifest["audit"] if o["level"] == "warning"][-1][
        "text"
    ] == "images turned as EXIF says"


# --- real images

REAL = os.environ.get("CMID_REALDATA")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "Folders of the archives, unpacked once."
    if not REAL or not (Path(REAL) / "obb.tar.gz").exists():
        pytest.skip("CMID_REALDATA names no folder with seg_dubai, seg_samples, cd and obb")
    at = tmp_path_factory.mktemp("real")

    def get(name):
        if not (at / name).exists():
            with tarfile.open(Path(REAL) / f"{name}.tar.gz") as f:
                f.extractall(at, filter="data")
        return at / name

    return get


DUBAI = dict(
    Land="#8429F6", Water="#E2A929", Building="#3C1098", Vegetation="#FEDD3A", Road="#6EC1E4", Unlabeled="#9B9B9B"
)


def test_dubai_with_its_own_class_file_stops(tmp_path, real):
    "Its class file names other colours: all of them are listed, with pixels and files; so is the stray black."
    at = real("seg_dubai")
    own = {o["title"]: o["color"] for o in json.loads((at / "classes.json").read_text())["classes"]}
    entry = dict(folder=str(at), splits=dict(train="Tile [1-6]/images/*", test="Tile [78]/images/*"), ignore=[])
    with pytest.raises(CmidError) as e:
        read(tmp_path, "segment", classes=own, **entry)
    assert (
        "6 values in the masks" in str(e.value)
        and all(v in str(e.value) for k, v in DUBAI.items() if k != "Unlabeled")
        and "#000000: 552,156 px in 9 files" in str(e.value)
        and "#8429F6: 51,850,363 px in 72 files" in str(e.value)
    )
    l = read(tmp_path, "segment", classes=DUBAI, **entry | dict(ignore=["#000000"]))
    n = sum(np.array(v) for v in l.manifest["histogram"].values())
    all_ = n.sum() + sum(l.manifest["ignored"].values())
    assert {k: len(v) for k, v in l.splits.items()} == dict(train=54, test=18) and all_ == l.sizes.prod(1).sum()
    assert (
        [round(100 * v / all_) for v in n[:5]] == [52, 14, 13, 10, 9]
        and round(100 * n[5] / all_, 1) == 0.5
        and (l.sizes.min(0).tolist(), l.sizes.max(0).tolist()) == ([544, 509], [2062, 2149])
    )


@pytest.mark.parametrize("layout, images, side", [("potsdam", 1, 512), ("vaihingen", 1, 512), ("loveda", 3, 1024)])
def test_segmentation_samples(tmp_path, real, layout, images, side):
    at = real("seg_samples") / layout
    l = read(
        tmp_path, "segment", folder=str(at), format=layout, splits=dict(train="img_dir/*"), classes=None, ignore=None
    )
    assert len(l) == images and (l.sizes == side).all() and len(l.classes) == (7 if layout == "loveda" else 5)
    for i, o in enumerate(l.names):
        m = np.asarray(Image.open(at / o.replace("img_dir", "ann_dir"))).astype(int)
        assert (l.mask(i) == np.where((m == 0) | (m > len(l.classes)), IGNORE, m - 1)).all()


@pytest.mark.parametrize("layout, name, pairs", [("levir", "LEVIR", 11), ("dsifn", "DSIFN", 10)])
def test_change_samples(tmp_path, real, layout, name, pairs):
    l = read(tmp_path, "change", folder=str(real("cd") / name), format=layout, splits=dict(train="list/all.txt"))
    share = [float(np.asarray(l.mask(i)).mean()) for i in range(len(l))]
    assert (
        len(l) == pairs
        and (l.sizes == 256).all()
        and sum(o == 0 for o in share) == (layout == "levir")
        and not found(l, "registration")
    )


def test_oriented_samples(tmp_path, real):
    at = real("obb")
    l = read(
        tmp_path,
        "detect",
        folder=str(at / "UCAS50"),
        splits=dict(train="train.txt", val="images/val/*"),
        parts=dict(images="images", labels="labelTxt_derived"),
        classes=["plane", "car"],
    )
    assert (len(l), sum(map(sum, l.manifest["histogram"].values())), {k: len(v) for k, v in l.splits.items()}) == (
        49,
        375,
        dict(train=40, val=9),
    )
    l = read(tmp_path, "detect", folder=str(at / "DOTA_samples"), splits=dict(train="images/*"), classes=None)
    assert (
        l.classes == DOTA
        and l.manifest["objects"] == [536, 64]
        and l.names == ["images/P0706.png", "images/P1888.png"]
        and items_figure(l)
        and l.manifest["gsd"][1] == pytest.approx(0.266170468393)
    )
