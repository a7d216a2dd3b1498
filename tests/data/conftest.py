"A small study with labels of one task, for the tests of labelled images."

import json
import warnings

import numpy as np
import pytest
import rasterio
import yaml
from PIL import Image
from rasterio.transform import from_origin

from cmid.base.params import Params
from cmid.data.labels import label_dataset
from cmid.data.prepare import prepare

ENTRIES = dict(
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
LABELS = dict(bands=None, stretch=[2.0, 98.0], nodata=None, accept=[], workers=1, shard_mb=1000)
BOXES = "imagesource:x\ngsd:0.5\n1 1 9 1 9 5 1 5 ship 0\n{k} 20 9 20 9 25 {k} 25 plane 1\n"


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


class LabelStudy:
    "A study with one task, called x, whose images and labels are in the folder d."

    names = "train0", "train1", "test0"

    def __init__(self, root):
        self.root = root
        self.data = root / "d"
        self.store = root / "prepared/x"

    def put(self, path, content):
        "Write an array as PNG or JPEG, bytes and text as they are; `path` is relative to the data."
        path = self.data / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            Image.fromarray(content).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def put_tiff(self, path, x, corner=None, **options):
        "Write (C, H, W) as TIFF, georeferenced by its upper left corner where one is given."
        path = self.data / path
        path.parent.mkdir(parents=True, exist_ok=True)
        bands, height, width = x.shape
        options |= dict(count=bands, height=height, width=width, dtype=x.dtype)
        if corner is not None:
            options |= dict(transform=from_origin(*corner, 1, 1), crs="EPSG:32633")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with rasterio.open(path, "w", driver="GTiff", **options) as file:
                file.write(x)

    def fill(self, task, side=40):
        "Write a small valid set of a task."
        for k, name in enumerate(self.names):
            self._fill_item(task, name, k, side)
        return self

    def _fill_item(self, task, name, k, side):
        image = random_bytes(side, side, 3, seed=k)
        mask = random_bytes(side, side, seed=k)
        if task == "change":
            self.put(f"A/{name}.png", image)
            self.put(f"B/{name}.png", image)
            self.put(f"OUT/{name}.png", mask // 128 * 255)
            return
        self.put(f"images/{name}.png", image)
        if task == "segment":
            self.put(f"masks/{name}.png", mask % 3)
        else:
            self.put(f"labelTxt/{name}.txt", BOXES.format(k=k))

    def params(self, entry, labels=None):
        values = dict(
            profile="smoke",
            seed=0,
            device="cpu",
            deterministic=False,
            datasets={},
            tasks=dict(x=entry),
            labels=LABELS | (labels or {}),
            profiles=dict(smoke={}),
        )
        plain = json.loads(json.dumps(values))
        (self.root / "params.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        return Params(self.root)

    def read(self, task, labels=None, **entry):
        "Run the stage; keywords replace keys of the task's entry, `labels` keys of the section labels."
        return label_dataset(self.params(ENTRIES[task] | entry, labels), "x")

    def stored(self):
        "Content of the files of the store."
        return {o.name: o.read_bytes() for o in sorted(self.store.iterdir())} if self.store.exists() else {}


@pytest.fixture
def study(tmp_path):
    return LabelStudy(tmp_path)


@pytest.fixture
def new_study(tmp_path):
    "Makes a study in a folder of the given name."

    def make(name):
        (tmp_path / name).mkdir()
        return LabelStudy(tmp_path / name)

    return make


@pytest.fixture(scope="module")
def module_study(tmp_path_factory):
    "A study that all tests of a file share."
    return LabelStudy(tmp_path_factory.mktemp("study"))


class ImageFolder:
    "A folder of images with lists beside it, and what `prepare` makes of them."

    def __init__(self, root):
        self.root, self.path = root, root / "in"
        self.path.mkdir()

    def tiff(self, name, pixels, driver="GTiff", **options):
        "Write (C, h, w)."
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = dict(zip(("count", "height", "width"), pixels.shape))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with rasterio.open(path, "w", driver=driver, dtype=pixels.dtype, **shape, **options) as file:
                file.write(pixels)
        return path

    def picture(self, name, seed=0, size=(40, 50), mode="RGB", **options):
        "Write noise as a PNG or JPEG."
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype="uint8")
        Image.fromarray(noise).convert(mode).save(path, **options)
        return path

    def pictures(self, count, **options):
        for i in range(count):
            self.picture(f"{i:03}.png", i, **options)

    def truncate(self, name, size):
        (self.path / name).write_bytes((self.path / name).read_bytes()[:size])

    def classes(self):
        "Three class folders of three images."
        for name in "ash", "birch", "cedar":
            for i in range(3):
                self.picture(f"{name}/{name}_{i}.png", sum(map(ord, name)) + i)

    def lists(self, **texts):
        for split, text in texts.items():
            (self.root / f"{split}.txt").write_bytes(text.encode())
        return {split: self.root / f"{split}.txt" for split in texts}

    def prepare(self, out="out", side=32, **options):
        return prepare(self.path, self.root / out, side=side, **options)


@pytest.fixture
def images(tmp_path):
    "A folder to write images into."
    return ImageFolder(tmp_path)
