"The store gives back what the files hold, and a damaged store is refused in one line."

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmid.base.errors import CmidError
from cmid.data.labelled import IGNORE, Labelled

LARGE = {"train5": (600, 400), "test6": (401, 333), "train7": (640, 512)}
SMALL_SHARDS = dict(shard_mb=1)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def pixels_of(study, labelled, i, folder):
    "What the file of an item holds."
    name = labelled.names[i].replace("images/", f"{folder}/").replace("A/", f"{folder}/")
    return np.asarray(Image.open(study.data / name))


def check_images(study, labelled, folder):
    assert len(labelled) == 6
    assert len(labelled.manifest["shards"]) >= 2
    for i in range(6):
        image = labelled.image(i)
        assert image.dtype == np.uint8
        assert not image.flags.writeable
        assert tuple(labelled.sizes[i]) == image.shape[1:]
        assert (image == pixels_of(study, labelled, i, folder).transpose(2, 0, 1)).all()


def check_splits(labelled):
    assert sorted(np.concatenate([*labelled.splits.values()])) == [*range(6)]
    assert labelled.splits["train"].dtype.kind == "i"
    with pytest.raises(IndexError):
        labelled.image(6)


def fill_segment(study):
    study.fill("segment")
    for k, (name, size) in enumerate(LARGE.items()):
        study.put(f"images/{name}.png", noise(*size, 3, seed=k))
        study.put(f"masks/{name}.png", noise(*size, seed=k) // 128 * 2)


def fill_change(study):
    study.fill("change")
    for k, (name, size) in enumerate(LARGE.items()):
        study.put(f"A/{name}.png", noise(*size, 3, seed=k))
        study.put(f"B/{name}.png", noise(*size, 3, seed=k + 9))
        study.put(f"OUT/{name}.png", noise(*size, seed=k) // 128 * 255)


def fill_detect(study):
    study.fill("detect")
    for k, (name, size) in enumerate(LARGE.items()):
        study.put(f"images/{name}.png", noise(*size, 3, seed=k))
        study.put(f"labelTxt/{name}.txt", "")


def test_segmentation(study):
    fill_segment(study)
    labelled = study.read("segment", SMALL_SHARDS)
    check_images(study, labelled, "images")
    check_splits(labelled)
    for i in range(6):
        mask = pixels_of(study, labelled, i, "masks").astype(int)
        assert (labelled.mask(i) == np.where(mask == 0, IGNORE, mask - 1)).all()


def test_change(study):
    fill_change(study)
    labelled = study.read("change", SMALL_SHARDS)
    check_images(study, labelled, "A")
    for i in range(6):
        assert (labelled.second(i) == pixels_of(study, labelled, i, "B").transpose(2, 0, 1)).all()
        assert (labelled.mask(i) == pixels_of(study, labelled, i, "OUT") // 255).all()


def test_detection(study):
    fill_detect(study)
    labelled = study.read("detect", SMALL_SHARDS)
    check_images(study, labelled, "images")
    objects = labelled.objects(labelled.names.index("images/train1.png"))
    assert objects["polygons"].dtype == np.float32
    assert objects["polygons"].tolist() == [[[1, 1], [9, 1], [9, 5], [1, 5]], [[1, 20], [9, 20], [9, 25], [1, 25]]]
    assert objects["classes"].tolist() == [0, 1]
    assert objects["difficult"].tolist() == [False, True]
    assert labelled.classes == ["ship", "plane"]
    assert labelled.manifest["gsd"].count(0.5) == 3
    assert labelled.manifest["resolution"] == 0.5
    for absent in (labelled.mask, labelled.second):
        with pytest.raises(CmidError, match="its task is detect"):
            absent(0)


@pytest.mark.parametrize("fill", [fill_segment, fill_change, fill_detect], ids=["segment", "change", "detect"])
def test_shards_do_not_depend_on_threads(study, fill):
    "Several shards, written by one thread and by three: the same bytes."
    fill(study)
    task = fill.__name__.removeprefix("fill_")
    assert len(study.read(task, SMALL_SHARDS | dict(workers=1)).manifest["shards"]) >= 2
    before = study.stored()
    study.read(task, SMALL_SHARDS | dict(workers=3))
    assert study.stored() == before


def test_store_can_be_pickled(study):
    labelled = study.fill("segment").read("segment")
    copy = pickle.loads(pickle.dumps(labelled))
    assert (copy.image(2) == labelled.image(2)).all()


def test_missing_store(tmp_path):
    with pytest.raises(CmidError, match="run cmid_stage labels -p dataset x"):
        Labelled(tmp_path / "x")


# --- damaged stores


def truncated_shard(folder, manifest):
    (folder / "images-00000.bin").write_bytes(b"0" * 9)


def missing_shard(folder, manifest):
    (folder / "images-00000.bin").unlink()


def other_boxes(folder, manifest):
    np.save(folder / "polygons.npy", np.zeros((1, 4, 2), "f4"))


def pickled_classes(folder, manifest):
    np.save(folder / "classes.npy", np.array([dict(a=1)] * 6, object), allow_pickle=True)


def unknown_class(folder, manifest):
    np.save(folder / "classes.npy", np.full(6, 7))


def no_hash(folder, manifest):
    manifest.pop("hash")


def no_size(folder, manifest):
    manifest["sizes"].pop()


DAMAGED_FILES = [truncated_shard, missing_shard, other_boxes, pickled_classes, unknown_class, no_hash, no_size]
DAMAGED_VALUES = {
    "another format": dict(format=99),
    "a huge size": dict(sizes=[[2**40, 40]] * 3),
    "a negative size": dict(sizes=[[-40, 40]] * 3),
    "float sizes": dict(sizes=[[40.0, 40.0]] * 3),
    "sizes of one": dict(sizes=[[40], [40], [40]]),
    "no classes": dict(classes=[]),
    "classes as text": dict(classes="ab"),
    "classes as numbers": dict(classes=[1, 2]),
    "a class twice": dict(classes=["ship", "ship"]),
    "fewer classes than counted": dict(classes=["ship"]),
    "more classes than counted": dict(classes=["ship", "plane", "car"]),
    "unknown task": dict(task="fly"),
    "task as a list": dict(task=[]),
    "bands as text": dict(bands="3"),
    "bands as truth": dict(bands=True),
    "names as numbers": dict(names=[1, 2, 3]),
    "names as text": dict(names="abc"),
    "a name twice": dict(names=["a", "b", "a"]),
    "hash as a number": dict(hash=5),
    "no text in hash": dict(hash=""),
    "splits as a list": dict(splits=[[0, 1], [2]]),
    "no splits": dict(splits={}),
    "an unknown item": dict(splits=dict(train=[99], test=[0])),
    "an item twice": dict(splits=dict(train=[1, 1], test=[0])),
    "float items": dict(splits=dict(train=[1.0, 2.5], test=[0])),
    "items as truth": dict(splits=dict(train=[True, 2], test=[0])),
    "items below 0": dict(splits=dict(train=[-1, 2], test=[0])),
    "an empty split": dict(splits=dict(train=[], test=[0])),
    "a split as a number": dict(splits=dict(train=1, test=[0])),
    "splits not counted": dict(splits=dict(train=[1, 2], val=[0])),
    "shards as text": dict(shards="x"),
    "a shard elsewhere": dict(shards=[dict(file="../../params.yaml", count=3)]),
    "unlabelled elsewhere": dict(unlabelled=["val"]),
    "no histogram": dict(histogram=None),
    "ignored as text": dict(ignored=dict(train="0", test="0")),
    "audit as text": dict(audit=["all well"]),
    "gsd as text": dict(gsd=[".5"] * 3),
    "negative objects": dict(objects=[-1, 4, 3]),
    "no pixel type": dict(dtype=None),
    "ranges of other bands": dict(value_range=[[0, 1]]),
    "a range of one": dict(value_range=[[0], [0], [0]]),
    "a range as text": dict(value_range=[["0", "1"]] * 3),
    "a resolution below 0": dict(resolution=-1.0),
    "a resolution as text": dict(resolution="1"),
    "bands read as text": dict(bands_read="012"),
    "nodata as text": dict(nodata="0"),
    "a stretch as a list": dict(stretch=[0, 1]),
}


@pytest.fixture(scope="module")
def sound(module_study):
    "Content of the files of a sound store."
    module_study.fill("detect").read("detect")
    return module_study.stored()


def refusal(folder, content, manifest, damage=None):
    "The error about a damaged copy of the store."
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    if damage:
        damage(folder, manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CmidError, match="remove it and run cmid_stage labels") as e:
        Labelled(folder)
    return str(e.value)


@pytest.mark.parametrize("damage", DAMAGED_FILES, ids=lambda o: o.__name__)
def test_damaged_files_are_refused(tmp_path, sound, damage):
    message = refusal(tmp_path / "x", sound, json.loads(sound["manifest.json"]), damage)
    assert "\n" not in message


class Trap:
    "Writes a file where it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_in_a_store_is_not_run(tmp_path, sound):
    def add_trap(folder, manifest):
        np.save(folder / "classes.npy", np.array([Trap(tmp_path / "ran")] * 6, object), allow_pickle=True)

    refusal(tmp_path / "x", sound, json.loads(sound["manifest.json"]), add_trap)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("values", DAMAGED_VALUES.values(), ids=DAMAGED_VALUES.keys())
def test_damaged_manifests_are_refused(tmp_path, sound, values):
    message = refusal(tmp_path / "x", sound, json.loads(sound["manifest.json"]) | values)
    assert "\n" not in message
    assert "Error" not in message  # it names the key, not a Python error
