"One image more or less leaves nearly all shards as they were, and a million images need little memory."

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from cmid.data import prepare as preparing, survey
from cmid.data.dataset import NPY_HEADER
from cmid.data.listing import LeftOut
from cmid.data.survey import file_sha256

ITEM = 3 * 32 * 32  # bytes


def shard_hashes(prepared):
    return {file_sha256(prepared.folder / shard["file"]) for shard in prepared.manifest["shards"]}


def check_pixels(prepared, images):
    "Images here and there are those of their files."
    for i in (0, 149, 150, 299, 300, 301, len(prepared) - 1):
        expected = np.asarray(Image.open(images.path / prepared.source(i))).transpose(2, 0, 1)
        assert (prepared[i] == expected).all()


def test_one_image_more_or_less_changes_two_shards_at_most(images):
    "600 images in shards of about 30: one comes, one goes, and both are undone."
    images.pictures(600, size=(32, 32))
    options = dict(workers=1, shard_mb=30 * ITEM / 2**20)
    one = images.prepare("one", **options)
    sizes = [shard["count"] for shard in one.manifest["shards"]]
    assert 15 <= len(sizes) <= 40
    assert min(sizes[:-1]) >= 15
    assert max(sizes) <= 45
    images.picture("300a.png", 999, size=(32, 32))
    two = images.prepare("two", **options)
    check_pixels(two, images)
    (images.path / "150.png").unlink()
    three = images.prepare("three", **options)
    check_pixels(three, images)
    assert len(shard_hashes(two) - shard_hashes(one)) <= 2
    assert len(shard_hashes(three) - shard_hashes(two)) <= 2
    assert len(shard_hashes(three) & shard_hashes(one)) >= len(sizes) - 4
    assert (two[[600, 301, 150]] == np.stack([two[600], two[301], two[150]])).all()
    assert images.prepare("whole", workers=1).hash == three.hash
    images.picture("150.png", 150, size=(32, 32))
    (images.path / "300a.png").unlink()
    assert shard_hashes(images.prepare("four", **options)) == shard_hashes(one)


def test_a_new_tile_or_a_hole_moves_no_other_shard(images):
    for name in "abcd":
        noise = np.random.default_rng(ord(name)).integers(0, 256, (3, 320, 320), dtype="uint8")
        images.tiff(f"{name}.tif", noise)
    options = dict(tile=32, workers=1, shard_mb=20 * ITEM / 2**20)
    one = images.prepare("one", **options)
    narrow = np.random.default_rng(9).integers(0, 256, (3, 320, 64), dtype="uint8")
    images.tiff("b.tif", np.pad(narrow, ((0, 0), (0, 0), (0, 256))), nodata=0)
    two = images.prepare("two", **options)
    assert (len(one), len(two)) == (400, 320)
    assert two.source(120) == "c.tif[0:32, 0:32]"
    assert (two[120:] == one[200:]).all()
    assert len(shard_hashes(one) & shard_hashes(two)) >= 10  # those of a, c and d, but not where b begins and ends


def made_up_rows(job):
    "Rows as `make_items` gives them, without reading an image."
    with open(job.shard, "ab") as file:
        file.truncate(NPY_HEADER + (job.row + len(job.items)) * ITEM)
    return [
        dict(
            sha=f"{int(name[-12:-4]):064x}", array="00" * 16, sum=[1, 2, 3], square=[1, 2, 3], valid=[1024] * 3, holes=0
        )
        for name, _, _ in job.items
    ]


def made_up_headers(job):
    header = dict(width=32, height=32, bands=3, dtype="uint8", grey=False, reordered=False, notes=[], sha="")
    return [header for _ in job[1]]


@pytest.mark.slow
def test_an_image_more_needs_less_than_250_bytes(images, monkeypatch):
    """So a million images need less than 250 MB more than a thousand.

    Decoding, which keeps nothing, is left out; names, a list of bare names, class folders and the journals are not.
    """
    monkeypatch.setattr(preparing, "make_items", made_up_rows)
    monkeypatch.setattr(survey, "read_headers", made_up_headers)

    def peak(count):
        names = [f"{i // 100:05}/image_{i:08}.png" for i in range(count)]
        monkeypatch.setattr(preparing, "find_images", lambda folder: ([*names], LeftOut()))
        lists = images.lists(train="".join(f"image_{i:08}.png\n" for i in range(count)))
        tracemalloc.start()
        try:
            prepared = images.prepare(f"{count}", workers=1, lists=lists)
            assert len(prepared) == len(prepared.splits["train"]) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    few, many = peak(4_000), peak(12_000)
    assert 0 < many - few < 250 * 8_000
