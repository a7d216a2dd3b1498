"Reading a prepared folder: any index, any shard, and what is damaged."

import json
import os
import pickle
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from cmid.base.errors import CmidError
from cmid.data.dataset import Prepared


@pytest.fixture
def many(images):
    "40 images in several shards, and the same pixels as one array."
    images.pictures(40, size=(32, 32))
    prepared = images.prepare(shard_mb=0.02)
    pixels = [np.asarray(Image.open(images.path / prepared.source(i))).transpose(2, 0, 1) for i in range(40)]
    assert len(prepared.manifest["shards"]) > 5
    assert len(prepared) == 40
    return prepared, np.stack(pixels)


def orders():
    order = np.append(np.random.default_rng(0).permutation(40), [3, 3, -1])
    return order, order[:1], [], [5, 2], slice(3, 30, 4), slice(None), np.arange(40) % 3 == 0, np.int32(7), -40


@pytest.mark.parametrize("index", orders(), ids=repr)
def test_indexing(many, index):
    prepared, pixels = many
    expected = pixels[np.asarray(index, int) if isinstance(index, list) else index]
    assert prepared[index].dtype == np.uint8
    assert prepared[index].shape == expected.shape
    assert (prepared[index] == expected).all()


def test_what_is_read_is_a_copy(many):
    prepared, pixels = many
    prepared[:][:] = 0
    prepared[0][:] = 0
    assert (prepared[0] == pixels[0]).all()


def test_pickled(many):
    prepared, pixels = many
    prepared[:]
    assert (pickle.loads(pickle.dumps(prepared)).images[[39, 0, 7]] == pixels[[39, 0, 7]]).all()


@pytest.mark.parametrize("index", [40, -41, [0, 40], np.ones(39, bool)], ids=repr)
def test_beyond_the_end(many, index):
    with pytest.raises(IndexError):
        many[0][index]


def test_a_folder_that_prepare_did_not_write(tmp_path):
    with pytest.raises(CmidError, match="cmid_prepare"):
        Prepared(tmp_path)


def test_a_shard_is_a_npy_file(images):
    images.pictures(3)
    prepared = images.prepare()
    assert (np.load(prepared.folder / "images-00000.npy", mmap_mode="r") == prepared[:]).all()


def test_another_format(images):
    images.pictures(3)
    folder = images.prepare().folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CmidError, match="format 99"):
        Prepared(folder)


def test_a_truncated_shard(images):
    images.pictures(3)
    folder = images.prepare().folder
    os.truncate(folder / "images-00000.npy", 5000)
    with pytest.raises(CmidError, match="truncated"):
        Prepared(folder)


def test_where_an_image_came_from_is_found_without_a_copy_of_the_table(images):
    "One line is longer than a block that is read at once."
    images.pictures(9)
    table = images.prepare().folder / "items.csv"
    lines = table.read_bytes().splitlines(True)
    long = lines[9].replace(b"008.png", b"x" * 3_000_000 + b".png")
    table.write_bytes(b"".join(lines[:9]) + long)
    prepared = Prepared(table.parent)
    tracemalloc.start()
    try:
        assert prepared.source(3) == "003.png"
        assert prepared.source(7) == "007.png"
        assert tracemalloc.get_traced_memory()[1] < 2.5e6
    finally:
        tracemalloc.stop()


def test_a_byte_of_the_table_that_csv_does_not_read(images):
    images.pictures(2, size=(32, 32))
    prepared = images.prepare()
    table = prepared.folder / "items.csv"
    table.write_bytes(table.read_bytes().replace(b".png", b"\rpng"))
    with pytest.raises(CmidError, match="items.csv: damaged at line 2: remove"):
        prepared.source(0)
