"Ambiguous labels stop the stage in one line, and equal data make equal stores."

import errno
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmid.base.errors import CmidError
from cmid.data import label_items, labels
from cmid.data.label_figures import classes_figure, items_figure, labels_metrics

NAMES = "train0", "train1", "test0"


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# --- what can be wrong: each function damages a valid set


def nothing(study):
    pass


def put(path, content):
    return lambda study: study.put(path, content)


def put_all(pattern, content):
    def damage(study):
        for name in NAMES:
            study.put(pattern.format(name), content)

    return damage


def remove(*paths):
    def damage(study):
        for path in paths:
            (study.data / path).unlink()

    return damage


def truncate(path):
    def damage(study):
        content = (study.data / path).read_bytes()
        (study.data / path).write_bytes(content[:-60])

    return damage


def mask_as_tiff(x):
    "A TIFF in place of the mask of train1."

    def damage(study):
        remove("masks/train1.png")(study)
        study.put_tiff("masks/train1.tif", x)

    return damage


def mask_as_jpeg(study):
    remove("masks/train1.png")(study)
    Image.fromarray(noise(40, 40)).save(study.data / "masks/train1.jpg", quality=20)


def extra_image(x):
    "One more training image with a mask."

    def damage(study):
        study.put_tiff("images/train9.tif", x)
        study.put("masks/train9.png", noise(40, 40) % 3)

    return damage


def georeferenced_pair(first, second):
    def damage(study):
        study.put_tiff("A/train9.tif", noise(3, 40, 40), first)
        study.put_tiff("B/train9.tif", noise(3, 40, 40), second)
        study.put("OUT/train9.png", noise(40, 40) // 128 * 255)

    return damage


def box_line(text):
    "Line 4 of the label file of train1."
    return put("labelTxt/train1.txt", f"gsd:1\n1 1 9 1 9 5 1 5 ship 0\n\n{text}\n")


def two_wrong_files(study):
    box_line("1 2 3")(study)
    study.put("labelTxt/test0.txt", "1 1 1 1\n")


STRAY = np.where(np.arange(1600).reshape(40, 40) < 7, 9, 1).astype(np.uint8)
COLOURED = np.where(STRAY[..., None] == 9, [255, 0, 0], [132, 41, 246]).astype(np.uint8)
HALF = noise(40, 40) // 128
BY_LIST = dict(splits=dict(train="train.txt", test="images/test*"))
MANY_CLASSES = {f"c{i}": i for i in range(300)}

SEGMENT = [
    (
        put("masks/train1.png", STRAY),
        {},
        ["1 value in the masks", "9: 7 px in 1 file (masks/train1.png)", "classes: {NAME: 9}"],
    ),
    (
        put_all("masks/{}.png", STRAY),
        {},
        ["9: 21 px in 3 files (masks/test0.png, masks/train0.png, masks/train1.png)"],
    ),
    (
        put_all("masks/{}.png", COLOURED),
        dict(classes=dict(land="#8429F6"), ignore=[]),
        ["#FF0000: 21 px in 3 files", "classes: {NAME: '#FF0000'}"],
    ),
    (put("masks/train1.png", COLOURED), {}, ["2 values", "#8429F6: 1,593 px", "#FF0000: 7 px"]),
    (mask_as_jpeg, {}, ["a JPEG changes the values", "more (a JPEG", "in 1 file (masks/train1.jpg)"]),
    (mask_as_tiff(np.full((1, 40, 40), 1.5, "float32")), {}, ["1.5: 1,600 px"]),
    (mask_as_tiff(np.full((1, 40, 40), -1, "int16")), {}, ["-1: 1,600 px"]),
    (
        mask_as_tiff(np.zeros((2, 40, 40), "uint8")),
        {},
        ["masks/train1.tif: 2 bands of uint8: a mask has one band"],
    ),
    (
        put("masks/train1.png", noise(40, 41) % 3),
        {},
        ["masks/train1.png: 41 x 40 pixels, but images/train1.png has 40 x 40"],
    ),
    (remove("masks/train1.png"), {}, ["images/train1.png has no masks", "tasks.x.parts"]),
    (put("masks/train1.tif", b""), {}, ["train1.png and train1.tif both belong to 'train1'; remove one of them"]),
    (truncate("masks/train1.png"), {}, ["masks/train1.png: ", "replace or remove it"]),
    (put("masks/train1.png", b""), {}, ["masks/train1.png: empty file"]),
    (put("images/train1.png", b""), {}, ["images/train1.png: empty file"]),
    (truncate("images/train1.png"), {}, ["images/train1.png: ", "replace or remove it"]),
    (put("images/train1.png", b"not an image at all"), {}, ["images/train1.png: no PNG, JPEG or TIFF inside"]),
    (
        extra_image(noise(4, 40, 40)),
        {},
        ["images/train9.tif has 4 bands of uint8", "most images have 3 of uint8"],
    ),
    (extra_image(noise(3, 40, 40).astype("uint16")), {}, ["images/train9.tif has 3 bands of uint16"]),
    (
        nothing,
        dict(labels=dict(bands=[0, 5])),
        ["params.yaml: labels.bands: [0, 5] are needed, but images/test0.png has 3"],
    ),
    (nothing, dict(folder="nowhere"), ["params.yaml: tasks.x.folder: nowhere is not a folder"]),
    (nothing, dict(splits=dict(train="img/*")), ["splits.train: 'img/*' matches no PNG, JPEG or TIFF below"]),
    (nothing, dict(splits=dict(train="/images/*")), ["'/images/*' is not a pattern"]),
    (nothing, dict(splits=dict(train=[])), ["tasks.x.splits.train: [] lists no image"]),
    (nothing, dict(splits=dict(train="masks/*")), ["is in no folder named 'images' or 'img_dir'", "parts"]),
    (
        nothing,
        dict(parts=dict(image="images", masks="masks")),
        ["tasks.x.parts.image: unknown key (did you mean 'images'"],
    ),
    (nothing, dict(parts=dict(images="images")), ["tasks.x.parts.masks: missing"]),
    (nothing, dict(classes=None), ["tasks.x.classes: missing"]),
    (nothing, dict(classes=["land", "water"]), ["tasks.x.classes: must be name: index or colour"]),
    (nothing, dict(classes=dict(land="purple")), ["tasks.x.classes.land: 'purple' is neither an index"]),
    (nothing, dict(classes=dict(land=70000)), ["70000 is neither an index"]),
    (
        nothing,
        dict(classes=dict(land=1, water=[2, 1])),
        ["tasks.x.classes.water: 1 is already under tasks.x.classes.land"],
    ),
    (nothing, dict(ignore=[1]), ["tasks.x.ignore: 1 is already under tasks.x.classes.land"]),
    (nothing, dict(classes=MANY_CLASSES, ignore=[]), ["have 300 values, at most 253 are allowed"]),
    (put("train.txt", "train0\n\ntrain7.png\n"), BY_LIST, ["train.txt:3: no image 'train7.png' below"]),
    (put("train.txt", "../../etc/passwd\n"), BY_LIST, ["train.txt:1: no image '../../etc/passwd' below"]),
    (put("train.txt", b"\xff\xfe"), BY_LIST, ["train.txt: is not UTF-8 text"]),
    (put("train.txt", "\n"), BY_LIST, ["tasks.x.splits.train: 'train.txt' lists no image"]),
    (nothing, BY_LIST, ["train.txt: cannot be read"]),
]
CHANGE = [
    (remove("B/train1.png"), {}, ["A/train1.png has no second"]),
    (
        remove("OUT/train0.png", "OUT/train1.png"),
        {},
        ["A/train0.png has no label; A/train1.png has no label"],
    ),
    (remove("OUT/test0.png"), {}, ["A/test0.png has no label"]),
    (
        put("B/train1.png", noise(40, 44, 3)),
        {},
        ["B/train1.png: 44 x 40 pixels, but A/train1.png has 40 x 40", "same place"],
    ),
    (
        put("OUT/train1.png", noise(44, 40) // 128 * 255),
        {},
        ["OUT/train1.png: 40 x 44 pixels, but A/train1.png has 40 x 40"],
    ),
    (
        put("OUT/train1.png", STRAY),
        {},
        ["9: 7 px in 1 file (OUT/train1.png)", "make the labels 0 and 255 without grey"],
    ),
    (put("OUT/train1.png", HALF), {}, ["labels hold 0, 1 (", "px) and 255 ("]),
    (
        nothing,
        dict(classes=dict(a=0, b=1, c=2)),
        ["tasks.x.classes: change needs exactly two classes, unchanged and changed (got a, b, c)"],
    ),
    (
        georeferenced_pair((0, 0), (3, 0)),
        {},
        ["A/train9.tif and B/train9.tif are at different places", "registered"],
    ),
]
DETECT = [
    (box_line("1 1 9 1 9 5 ship 0"), {}, ["labelTxt/train1.txt:4: 3 corners: a box has four"]),
    (box_line("1 1 9 1 9 5 1 5"), {}, ["train1.txt:4: 8 words; write x1 y1"]),
    (box_line("1 1 9 1 9 x 1 5 ship 0"), {}, ["train1.txt:4: ", "is not a box; write x1 y1"]),
    (box_line("1 1 9 1 9 5 1 5 ship 0 0"), {}, ["train1.txt:4: 11 words"]),
    (
        box_line("1 1 9 1 9 5 1 5 shop 0"),
        {},
        ["train1.txt:4: class 'shop' is neither under classes nor under ignore (did you mean 'ship'?)"],
    ),
    (box_line("1 1 9 1 9 5 1 5 ship hard"), {}, ["train1.txt:4: difficult is 'hard'; write 0 or 1"]),
    (box_line("1 1 nan 1 9 5 1 5 ship 0"), {}, ["train1.txt:4: a corner is not finite"]),
    (
        box_line("1 1 9 1 9 1e39 1 5 ship 0"),
        {},
        ["train1.txt:4: a corner is not finite, or far from any image"],
    ),
    (box_line("1 1 9 1 9 1 1 1 ship 0"), {}, ["train1.txt:4: the box has no area"]),
    (
        box_line("41 1 49 1 49 5 41 5 ship 0"),
        {},
        ["train1.txt:4: the box is outside its image of 40 x 40 pixels"],
    ),
    (box_line("40 1 49 1 49 5 40 5 ship 0"), {}, ["train1.txt:4: the box is outside its image"]),
    (box_line("\0\1"), {}, ["train1.txt:4: ", "is not a box"]),
    (two_wrong_files, {}, ["test0.txt:1: ", "train1.txt:4: "]),
    (put("labelTxt/train1.txt", b"\xff\xfe\x00"), {}, ["labelTxt/train1.txt: is not UTF-8 text"]),
    (
        remove("labelTxt/train1.txt"),
        {},
        ["images/train1.png has no labels", "an empty text file where there is no object"],
    ),
    (remove(*(f"labelTxt/{name}.txt" for name in NAMES)), {}, ["images/test0.png has no labels"]),
    (nothing, dict(classes=["ship", "ship", "plane"]), ["tasks.x.classes: 'ship' is listed twice"]),
    (
        nothing,
        dict(classes=["ship", "pla\x1b[2Jne"]),
        ["params.yaml: tasks.x", "classes: 'pla\\x1b[2Jne' has a control character; take it out"],
    ),
    (nothing, dict(ignore=["ship"]), ["tasks.x.classes: 'ship' is listed twice, or under ignore too"]),
    (nothing, dict(classes=dict(ship=1)), ["tasks.x.classes: must be a list of names"]),
]


def check_refusal(study, task, damage, settings, texts):
    "The stage fails in one line with these texts, and an older store stays as it was."
    study.fill(task).read(task)
    before = study.stored()
    damage(study)
    entry = dict(settings)
    with pytest.raises(CmidError) as e:
        study.read(task, entry.pop("labels", None), **entry)
    message = str(e.value)
    assert "\n" not in message
    assert len(message) < 2000
    for text in texts:
        assert text in message
    assert study.stored() == before
    assert [o.name for o in study.store.parent.iterdir()] == ["x"]


def numbered(cases):
    return [str(i) for i in range(len(cases))]


@pytest.mark.parametrize("damage, settings, texts", SEGMENT, ids=numbered(SEGMENT))
def test_bad_masks(study, damage, settings, texts):
    check_refusal(study, "segment", damage, settings, texts)


@pytest.mark.parametrize("damage, settings, texts", CHANGE, ids=numbered(CHANGE))
def test_bad_pairs(study, damage, settings, texts):
    check_refusal(study, "change", damage, settings, texts)


@pytest.mark.parametrize("damage, settings, texts", DETECT, ids=numbered(DETECT))
def test_bad_boxes(study, damage, settings, texts):
    check_refusal(study, "detect", damage, settings, texts)


def test_folder_of_others_is_refused(study):
    study.fill("segment")
    study.store.mkdir(parents=True)
    (study.store / "notes.txt").write_text("mine")
    with pytest.raises(CmidError, match="exists and was not written by the stage labels"):
        study.read("segment")
    part = study.store.rename(study.store.with_name("x.partial"))
    with pytest.raises(CmidError, match="holds files that the stage labels did not write"):
        study.read("segment")
    assert (part / "notes.txt").read_text() == "mine"


def test_full_disk_leaves_the_old_store(study, monkeypatch):
    study.fill("segment").read("segment")
    before = study.stored()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(labels._Shards, "add", full)
    with pytest.raises(CmidError, match="the disk is full"):
        study.read("segment")
    assert study.stored() == before
    assert not study.store.with_name("x.partial").exists()


# --- the store


@pytest.mark.parametrize("task", ["segment", "change", "detect"])
def test_equal_data_make_equal_stores(study, task):
    "With any number of threads; paths of this machine are not in it."
    labelled = study.fill(task).read(task, dict(workers=1))
    before = study.stored()
    study.read(task, dict(workers=3))
    assert study.stored() == before
    assert str(study.root) not in before["manifest.json"].decode()
    json.dumps(labels_metrics(labelled), allow_nan=False)
    assert items_figure(labelled).axes
    assert classes_figure(labelled).axes


def swap_pixels(path):
    "Two pixels of different classes change places, so that all counts stay."
    mask = np.array(Image.open(path))
    first, second = (tuple(np.argwhere(mask == value)[0]) for value in np.unique(mask)[-2:])
    mask[first], mask[second] = mask[second], mask[first]
    Image.fromarray(mask).save(path)


def move_corner(path):
    path.write_text(path.read_text().replace("9 1 9 5", "9 1 9 6"))


CHANGED_LABEL = dict(
    segment=("masks/train1.png", swap_pixels),
    change=("OUT/train1.png", swap_pixels),
    detect=("labelTxt/train1.txt", move_corner),
)


@pytest.mark.parametrize("task", CHANGED_LABEL)
def test_hash_covers_labels(study, task):
    "Images, their hashes and all counts are as before; only a label is another one."
    old = study.fill(task).read(task)
    path, change = CHANGED_LABEL[task]
    change(study.data / path)
    new = study.read(task)
    for key in ("hashes", "histogram", "ignored"):
        assert new.manifest[key] == old.manifest[key]
    assert new.hash != old.hash


def test_memory_does_not_grow_with_the_set(new_study):
    def peak(study, images):
        for i in range(images):
            study.put(f"images/train{i}.png", np.full((1000, 1000, 3), i, np.uint8))
            study.put(f"masks/train{i}.png", np.ones((1000, 1000), np.uint8))
        tracemalloc.start()
        study.read("segment", dict(workers=1), splits=dict(train="images/*"))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(new_study("large"), 16) < 1.15 * peak(new_study("small"), 4)


# --- bands and types


def wide_rasters(study):
    "16-bit images of four bands; a pixel of train0 has no value, test0 is brighter."
    images = {}
    for k, name in enumerate(NAMES):
        values = np.random.default_rng(k).integers(100, 4000, (4, 64, 64)) * (3 if name == "test0" else 1)
        images[name] = values.astype("uint16")
        study.put(f"masks/{name}.png", noise(64, 64) % 3)
    images["train0"][:, 0, 0] = 0
    for name, x in images.items():
        study.put_tiff(f"images/{name}.tif", x, nodata=0 if name == "train0" else None)
    return images


def test_wide_rasters_are_stretched_by_percentiles_of_training_images(study):
    "The 2nd and 98th percentile become 0 and 255, band by band; other splits follow; holes are 0."
    images = wide_rasters(study)
    labelled = study.read("segment", dict(bands=[3, 1]))
    training = np.concatenate([images[name][[3, 1]].reshape(2, -1) for name in NAMES[:2]], 1)
    low, high = np.percentile(training[:, training[0] > 0], [2, 98], axis=1)
    assert labelled.bands == 2
    assert np.allclose(labelled.manifest["stretch"]["low"], low)
    assert np.allclose(labelled.manifest["stretch"]["high"], high)
    low, scale = (o[:, None, None].astype("f4") for o in (low, 255 / (high - low)))
    for i, name in enumerate(labelled.names):
        x = images[Path(name).stem][[3, 1]].astype("f4")
        expected = np.rint(np.clip((x - low) * scale, 0, 255))
        assert abs(labelled.image(i) - expected).max() <= 1
    hole = labelled.image(labelled.names.index("images/train0.tif"))[:, 0, 0]
    assert (hole == 0).all()
    assert [o["count"] for o in labelled.manifest["audit"] if o["kind"] == "invalid-pixels"] == [1]


def test_what_a_map_needs_is_told(study):
    "Pixel type, nodata, the values that training images have, and the size of a pixel."
    images = wide_rasters(study)
    manifest = study.read("segment", dict(bands=[3, 1], nodata=0)).manifest
    assert (manifest["dtype"], manifest["nodata"], manifest["resolution"]) == ("uint16", 0, None)
    training = np.stack([images[name][[3, 1]] for name in NAMES[:2]])
    valid = training[:, :, 1:].swapaxes(0, 1).reshape(2, -1)  # without the row of the hole: its values are drawn too
    assert [low <= of_band.min() for (low, _), of_band in zip(manifest["value_range"], valid)] == [True, True]
    assert all(100 <= low and high < 4000 for low, high in manifest["value_range"])


def test_the_size_of_a_pixel_is_the_median_and_moves_no_hash(study):
    hashes = []
    for corners in ([None, None, None], [(5e5, 5e6), (6e5, 5e6), None]):
        for k, (name, corner) in enumerate(zip(NAMES, corners)):
            study.put_tiff(f"images/{name}.tif", noise(3, 20, 30, seed=k), corner)
            study.put(f"masks/{name}.png", noise(20, 30) % 3)
        labelled = study.read("segment")
        hashes.append(labelled.hash)
    assert abs(labelled.manifest["resolution"] - 1) < 1e-3
    assert hashes[0] == hashes[1]


def test_reading_in_blocks_changes_nothing(study, monkeypatch):
    wide_rasters(study)
    study.read("segment")
    before = study.stored()
    monkeypatch.setattr(label_items, "PIXELS_AT_ONCE", 640)
    study.read("segment")
    assert study.stored() == before


@pytest.mark.parametrize("bands", [1, 2, 13])
def test_any_number_of_bands(study, bands):
    for k, name in enumerate(NAMES):
        study.put_tiff(f"images/{name}.tif", noise(bands, 20, 30, seed=k))
        study.put(f"masks/{name}.png", noise(20, 30) % 3)
    labelled = study.read("segment")
    assert labelled.bands == bands
    assert (labelled.image(1) == noise(bands, 20, 30, seed=0)).all()
    assert items_figure(labelled).axes


def test_grey_among_colour_is_repeated(study):
    study.fill("segment")
    grey = noise(40, 40)
    study.put("images/train1.png", grey)
    labelled = study.read("segment")
    assert labelled.bands == 3
    assert (labelled.image(2) == grey).all()


@pytest.mark.parametrize("changed", [0, 1, 255])
def test_changed_is_1_or_255_and_nothing_may_change(study, changed):
    study.fill("change")
    for name in NAMES:
        study.put(f"OUT/{name}.png", HALF * np.uint8(changed))
    labelled = study.read("change")
    ones = int(HALF.sum()) if changed else 0
    assert labelled.manifest["histogram"]["test"] == [1600 - ones, ones]
    assert labelled.classes == ["unchanged", "changed"]
