"Generated images: some of their bytes, and labels and masks that agree with what is in the image."

import hashlib

import numpy as np
import pytest

from cmid.data import sample, scenes

HASHES = [  # function, arguments, start of the SHA-256 of its files
    ("lists_item", (), "b6955675188ddd91"),
    ("pool_item", (0, 0), "985548497ab83c1f"),
    ("scene_item", ("farmland", 0, 0), "637b4b3667bcc4b2"),
    ("scene_item", ("orchard", 0, 0), "551b39327e41220d"),
    ("segmentation_item", ("train", 0, 0), "f18ab4e2e2e83aaf"),
    ("segmentation_item", ("val", 3, 0), "c1c96c9461c27995"),
    ("boxes_item", ("train", 0, 0), "a0b0a862caac8cc0"),
    ("change_item", ("train", 0, 0), "5eab88d89a87f4e1"),
    ("change_item", ("test", 7, 0), "6f32e970ac0f4f62"),
]


@pytest.mark.parametrize("name, arguments, expected", HASHES)
def test_same_bytes(name, arguments, expected):
    files = getattr(sample, name)(*arguments)
    content = b"".join(files[path] for path in sorted(files))
    assert hashlib.sha256(content).hexdigest()[:16] == expected


def test_labels_are_where_things_stand():
    _, land, things = scenes.scene("residential", "labels", 2)
    codes = {"car": 5, "truck": 5, "house": 2, "hall": 2}
    inner = [t for t in things if t.kind in codes and scenes.in_frame(t, 128, 0.5)]
    assert {"car", "house"} <= {t.kind for t in inner}
    for thing in inner:
        assert land.label[land.pixel(thing.y), land.pixel(thing.x)] == codes[thing.kind]


def test_change_is_where_the_mask_says(monkeypatch):
    flight = scenes.daylight("one flight")._replace(haze=0.0, deep=0.0, noise=0.0, cloud=0.0, mist=0.0)
    monkeypatch.setattr(scenes, "daylight", lambda *key: flight)
    a, b, mask = scenes.two_dates("residential", "one flight", changes=4)
    difference = np.abs(a.astype(int) - b).max(-1)
    changed = mask > 0
    assert changed.mean() > 0.02
    assert (difference[changed] > 8).mean() > 0.8
    assert (difference[~changed] > 8).mean() < 0.06  # cars that moved, slopes at an edge
