"Any raster becomes uint8 arrays, damaged files are named, and what is interrupted goes on where it was."

import csv
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import numpy as np
import pytest
import rasterio
from PIL import Image

from cmid.base.errors import CmidError
from cmid.data import prepare as images, rasters, survey
from cmid.data.audit import class_figure, contact_sheet
from cmid.data.dataset import NPY_HEADER, Prepared
from cmid.data.prepare import prepare
from cmid.data.survey import file_sha256

RNG = lambda seed=0: np.random.default_rng(seed)


def tiff(path, x, **kw):
    "Write (C, h, w) as a TIFF."
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver="GTiff", count=x.shape[0], height=x.shape[1], width=x.shape[2], dtype=x.dtype, **kw
        ) as f:
            f.write(x)
    return path


def picture(path, seed=0, size=(40, 50), mode="RGB", **kw):
    "Write noise as a PNG or JPEG."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG(seed).integers(0, 256, (*size, 3), dtype="uint8")).convert(mode).save(path, **kw)
    return path


def pictures(folder, n=6, **kw):
    return [picture(folder / f"{i:03}.png", i, **kw) for i in range(n)]


def skipped(p):
    return dict(
        csv.reader((p.folder / "skipped.csv").read_text(encoding="utf-8", errors="surrogateescape").splitlines()[1:])
    )


def kinds(p):
    return [o["kind"] for o in p.audit]


def contents(folder):
    return {o.name: o.read_bytes() for o in sorted(folder.iterdir())}


# --- every kind of raster


@pytest.mark.parametrize("bands", [1, 3, 4, 13])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(33, 70), (1, 9)])
def test_rasters(tmp_path, bands, dtype, shape):
    for i in range(3):
        tiff(tmp_path / "in" / f"{i}.tif", (RNG(i).random((bands, *shape)) * 120).astype(dtype))
    p = prepare(tmp_path / "in", tmp_path / "out", side=32)
    assert p[:].shape == (3, bands, 32, 32) and p[:].dtype == np.uint8 and p.bands == bands and p.side == 32
    assert (p.manifest["stretch"] is None) == (dtype == "uint8")
    x = p[:] / 255
    assert np.allclose(p.mean, x.mean((0, 2, 3))) and np.allclose(p.std, x.std((0, 2, 3)))


def test_same_size_is_untouched(tmp_path):
    x = RNG().integers(0, 256, (4, 32, 32), dtype="uint8")
    tiff(tmp_path / "in/a.tif", x)
    assert (prepare(tmp_path / "in", tmp_path / "out", side=32)[0] == x).all()


def test_resize_is_pillows_bicubic(tmp_path):
    f = picture(tmp_path / "in/a.png", size=(90, 61))
    want = np.asarray(Image.open(f).resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (prepare(tmp_path / "in", tmp_path / "out", side=32)[0] == want).all()


def test_stretch_is_of_the_data_set(tmp_path):
    "Two images of 1000 pixels hold 0..999 and 1000..1999: percentiles 10 and 90 of all are 199.9 and 1799.1."
    for i in range(2):
        tiff(tmp_path / "in" / f"{i}.tif", np.arange(1000 * i, 1000 * i + 1024, dtype="uint16").reshape(1, 32, 32))
    p = prepare(tmp_path / "in", tmp_path / "out", side=32, stretch=(10, 90))
    every = np.concatenate([np.arange(1000 * i, 1000 * i + 1024) for i in range(2)])
    low, high = np.percentile(every, (10, 90))
    assert np.allclose([p.manifest["stretch"]["low"], p.manifest["stretch"]["high"]], [[low], [high]])
    want = np.clip((every - low) / (high - low), 0, 1) * 255
    assert np.abs(p[:].reshape(-1) - want).max() <= 0.51


def test_bands_are_chosen_from_zero(tmp_path):
    x = RNG().integers(0, 256, (5, 32, 32), dtype="uint8")
    tiff(tmp_path / "in/a.tif", x)
    tiff(tmp_path / "in/b.tif", x[:2])
    p = prepare(tmp_path / "in", tmp_path / "out", side=32, bands=[4, 0])
    assert (
        (p[0] == x[[4, 0]]).all()
        and len(p) == 1
        and skipped(p) == {"b.tif": "band count 2, bands [4, 0] were asked for"}
    )


def test_16_bit_png(tmp_path):
    x = RNG().integers(0, 60000, (3, 32, 32)).astype("uint16")
    (tmp_path / "in").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(tmp_path / "in/a.png", "w", driver="PNG", count=3, height=32, width=32, dtype="uint16") as f:
            f.write(x)
    p = prepare(tmp_path / "in", tmp_path / "out", side=32, stretch=(0, 100))
    s = p.manifest["stretch"]
    want = (x - np.reshape(s["low"], (3, 1, 1))) / np.reshape(np.subtract(s["high"], s["low"]), (3, 1, 1)) * 255
    assert p.bands == 3 and np.abs(p[0] - want).max() < 0.52


def test_pictures_of_every_mode(tmp_path):
    d = tmp_path / "in"
    picture(d / "rgb.png")
    for mode in ("P", "RGBA", "L", "1", "LA"):
        picture(d / f"{mode}.png", mode=mode)
    picture(d / "cmyk.jpg", mode="CMYK")
    picture(d / "grey.jpg", mode="L")
    picture(d / "two words é.PNG")
    Image.open(d / "P.png").save(d / "palette.tif")
    Image.open(d / "cmyk.jpg").save(d / "cmyk.tif")
    p = prepare(d, tmp_path / "out", side=32)
    at = {p.source(i): p[i] for i in range(len(p))}
    assert len(at) == 11 and p.bands == 3 and not skipped(p)
    assert (
        (at["RGBA.png"] == at["rgb.png"]).all()
        and (at["two words é.PNG"] == at["rgb.png"]).all()
        and (at["palette.tif"] == at["P.png"]).all()
    )
    assert np.ptp(at["L.png"], axis=0).max() == 0 and np.abs(at["cmyk.tif"].astype(int) - at["cmyk.jpg"]).max() <= 2
    notes = {o["text"]: o["count"] for o in p.audit}
    assert (
        notes["files grey made RGB"] == 4
        and notes["files transparency dropped"] == 2
        and notes["files palette made RGB"] == 2
        and notes["files CMYK made RGB"] == 2
    )


def test_bilevel_is_black_and_white(tmp_path):
    (tmp_path / "in").mkdir()
    x = np.zeros((32, 32), bool)
    x[:16] = True
    for o in ("a.png", "b.tif"):
        Image.fromarray(x).save(tmp_path / "in" / o)
    assert (prepare(tmp_path / "in", tmp_path / "out", side=32)[:] == x * 255).all()


def test_exif_rotation(tmp_path):
    x = np.zeros((32, 64, 3), "uint8")
    x[:, :32] = 255
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(x).save(tmp_path / "in/a.png", exif=exif)
    p = prepare(tmp_path / "in", tmp_path / "out", side=32)
    row = list(csv.DictReader(open(tmp_path / "out/items.csv")))[0]
    assert (row["width"], row["height"]) == ("32", "64") and p[0][:, :12].min() > 250 and p[0][:, 20:].max() < 5


def test_nan_and_nodata_become_zero(tmp_path):
    x = np.full((2, 32, 32), 5, "float32")
    x[:, ::2] = 9
    x[0, 0, 0] = np.nan
    x[1, 3, 3] = -1
    tiff(tmp_path / "in/a.tif", x, nodata=-1)
    y = x[:1] * np.nan
    tiff(tmp_path / "in/b.tif", np.concatenate([y, y]))
    p = prepare(tmp_path / "in", tmp_path / "out", side=32, stretch=(0, 100))
    assert (
        p[0][0, 0, 0] == 0
        and p[0][1, 3, 3] == 0
        and p[0][0, 0, 1] == 255
        and p[0][0, 1, 1] == 0
        and p.manifest["stretch"]["low"] == [5, 5]
    )
    assert skipped(p) == {"b.tif": "not one pixel has a value"} and {"no value", "note"} <= set(kinds(p))


def test_nodata_of_8_bits(tmp_path):
    x = np.full((3, 32, 32), 200, "uint8")
    x[:, 5] = 255
    tiff(tmp_path / "in/a.tif", x, nodata=255)
    assert (prepare(tmp_path / "in", tmp_path / "out", side=32)[0] == np.where(x == 255, 0, 200)).all()


def test_tiles_cover_the_raster(tmp_path):
    x = RNG().integers(0, 256, (4, 150, 100), dtype="uint8")
    tiff(tmp_path / "in/a.tif", x, tiled=True, blockxsize=64, blockysize=64)
    tiff(tmp_path / "in/small.tif", x[:, :20, :64])
    p = prepare(tmp_path / "in", tmp_path / "out", side=64, tile=64, workers=1)
    seen = np.zeros((150, 100), int)
    for i in range(len(p)):
        name, _, w = p.source(i).partition("[")
        (a, b), (c, d) = (map(int, o.split(":")) for o in w.strip("]").split(", "))
        if name == "a.tif":
            assert (p[i] == x[:, a:b, c:d]).all()
            seen[a:b, c:d] += 1
    assert len(p) == 7 and seen.min() == 1 and p.source(6) == "small.tif[0:20, 0:64]"


def test_tiles_of_a_picture_and_without_value(tmp_path):
    f = picture(tmp_path / "in/a.png", size=(64, 96))
    x = np.asarray(Image.open(f)).transpose(2, 0, 1)
    y = np.zeros((3, 64, 64), "uint8")
    y[:, :32, :32] = 9
    tiff(tmp_path / "in/b.tif", y, nodata=0)
    p = prepare(tmp_path / "in", tmp_path / "out", side=32, tile=32, workers=2)
    assert len(p) == 7 and (p[4] == x[:, 32:64, 32:64]).all() and p.source(6) == "b.tif[0:32, 0:32]"
    assert [o["count"] for o in p.audit if o["kind"] == "no value"] == [3] and p.manifest["counts"]["skipped"] == 0


def test_a_large_raster_is_reduced_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cmid.data.rasters.LARGE", 2**16)
    ramp = np.broadcast_to(np.arange(512, dtype="uint8")[None, None] // 2, (1, 512, 512)).astype("uint8")
    tiff(tmp_path / "in/a.tif", ramp, blockysize=16, blockxsize=16, tiled=True)
    reads = []
    real = rasters.RasterioImage.read
    monkeypatch.setattr(
        rasters.RasterioImage,
        "read",
        lambda self, window=None, bands=None, shape=None: (reads.append(shape), real(self, window, bands, shape))[1],
    )
    p = prepare(tmp_path / "in", tmp_path / "out", side=32, workers=1)
    want = np.asarray(Image.fromarray(ramp[0]).resize((32, 32), Image.Resampling.BICUBIC))
    assert reads == [(128, 128)] and np.abs(p[0].astype(int)[0] - want).max() <= 3


# --- files that differ (bad input as such: test_bad_input.py)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_names_of_any_kind(tmp_path):
    d = tmp_path / "in"
    data = picture(d / 'a b,"c" [1:2] ü 影.png').read_bytes()
    (d / "two\nlines.png").write_bytes(data)
    with open(os.fsencode(d) + b"/\xff.png", "wb") as f:
        f.write(data)
    p = prepare(d, tmp_path / "out", side=32)
    assert {p.source(i) for i in range(len(p))} == {
        'a b,"c" [1:2] ü 影.png',
        os.fsdecode(b"\xff.png"),
    } and "line break" in (tmp_path / "out/skipped.csv").read_text()


def test_mixed_band_counts_keep_the_most(tmp_path):
    for i, n in enumerate((4, 4, 13, 1)):
        tiff(tmp_path / "in" / f"{i}.tif", RNG(i).integers(0, 256, (n, 32, 32), dtype="uint8"))
    p = prepare(tmp_path / "in", tmp_path / "out", side=32)
    assert (
        p.bands == 4
        and skipped(p) == {"2.tif": "band count 13, most files have 4", "3.tif": "band count 1, most files have 4"}
        and "mixed bands" in kinds(p)
    )


def test_on_error_raise(tmp_path):
    pictures(tmp_path / "in", 4)
    prepare(tmp_path / "in", tmp_path / "fine", side=32, on_error="raise")
    (tmp_path / "in/002.png").write_bytes((tmp_path / "in/002.png").read_bytes()[:2000])
    for _ in range(2):
        with pytest.raises(CmidError, match="002.png"):
            prepare(tmp_path / "in", tmp_path / "out", side=32, on_error="raise")
    assert len(prepare(tmp_path / "in", tmp_path / "out", side=32)) == 3


def test_strangers_files_are_left_alone(tmp_path):
    pictures(tmp_path / "in", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(CmidError, match="no prepared folder"):
        prepare(tmp_path / "in", tmp_path / "out", side=32)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial/mine.txt").write_text("mine")
    prepare(tmp_path / "in", tmp_path / "new", side=32)
    assert (tmp_path / "out/mine.txt").exists() and (tmp_path / "new/mine.txt").exists()


def test_disk_too_small(tmp_path, monkeypatch):
    pictures(tmp_path / "in", 2)
    usage = type("Usage", (), dict(total=0, used=0, free=1000))
    monkeypatch.setattr("shutil.disk_usage", lambda p: usage)
    with pytest.raises(CmidError, match="the disk is full .* MB needed"):
        prepare(tmp_path / "in", tmp_path / "out", side=32)


# --- lists and labels


def tree(d):
    for c in ("ash", "birch", "cedar"):
        for i in range(3):
            picture(d / c / f"{c}_{i}.png", sum(map(ord, c)) + i)
    return d


def listed(tmp_path, **lines):
    for k, v in lines.items():
        (tmp_path / f"{k}.txt").write_bytes(v.encode())
    return {k: tmp_path / f"{k}.txt" for k in lines}


def test_class_folders(tmp_path):
    p = prepare(tree(tmp_path / "in"), tmp_path / "out", side=32)
    assert (
        p.classes == ["ash", "birch", "cedar"]
        and p.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        and p.manifest["histogram"] == dict(all=[3, 3, 3])
        and p.manifest["labelled"] == "folders"
    )
    assert (
        prepare(tmp_path / "in", tmp_path / "no", side=32, labelled="none").labels is None
        and prepare(tmp_path / "in/ash", tmp_path / "one", side=32).labels is None
    )
    picture(tmp_path / "in/loose.png", 99)
    assert prepare(tmp_path / "in", tmp_path / "loose", side=32).classes is None


def test_lists(tmp_path):
    lists = listed(
        tmp_path,
        train="\ufeffcedar/cedar_0.png\r\n\r\nash/ash_1.png\r\nash/ash_1.png\r\n",
        test="ash\\ash_0.png\nbirch_2.png\nash/none.png\n",
    )
    p = prepare(tree(tmp_path / "in"), tmp_path / "out", side=32, lists=lists)
    assert {k: [p.source(i) for i in v] for k, v in p.splits.items()} == dict(
        train=["cedar/cedar_0.png", "ash/ash_1.png"], test=["ash/ash_0.png", "birch/birch_2.png"]
    )
    assert (
        p.manifest["histogram"] == dict(all=[3, 3, 3], train=[1, 0, 1], test=[1, 1, 0])
        and p.splits["train"].dtype == np.int64
    )
    found = {o["kind"]: o for o in p.audit}
    assert (
        found["missing"]["examples"] == ["ash/none.png"]
        and found["repeated"]["examples"] == ["ash/ash_1.png"]
        and found["unknown label"]["examples"] == ["birch"]
    )


def test_lists_with_labels(tmp_path):
    tree(tmp_path / "in")
    numbers = dict(ash=2, birch=0, cedar=1)
    text = "".join(f"{c}/{c}_{i}.png {k}\n" for c, k in numbers.items() for i in range(2))
    p = prepare(tmp_path / "in", tmp_path / "out", side=32, lists=listed(tmp_path, train=text))
    assert (
        p.classes == ["birch", "cedar", "ash"]
        and p.labels[p.splits["train"]].tolist() == [2, 2, 0, 0, 1, 1]
        and (p.labels == -1).sum() == 3
        and "unlabelled" in kinds(p)
    )
    q = prepare(
        tmp_path / "in",
        tmp_path / "words",
        side=32,
        lists=listed(tmp_path, train="ash_0.png leaf\nash_1.png wood\ncedar_1.png wood\n"),
    )
    assert q.classes == ["leaf", "wood"] and q.labels[q.splits["train"]].tolist() == [0, 1, 1] and q.hash != p.hash


def test_one_image_in_several_families(tmp_path):
    lists = listed(
        tmp_path,
        train_20="ash_0.png\n",
        test_80="ash_1.png\nash_2.png\n",
        train_50="ash_0.png\nash_1.png\n",
        test_50="ash_2.png\n",
    )
    p = prepare(tree(tmp_path / "in"), tmp_path / "out", side=32, lists=lists)
    assert len(p) == 9 and p.splits["train_50"].tolist() == [0, 1] and kinds(p).count("overlap") == 3


def test_a_listed_file_that_is_damaged(tmp_path):
    tree(tmp_path / "in")
    (tmp_path / "in/ash/ash_1.png").write_bytes((tmp_path / "in/ash/ash_1.png").read_bytes()[:900])
    p = prepare(
        tmp_path / "in", tmp_path / "out", side=32, lists=listed(tmp_path, train="ash_0.png\nash_1.png\nash_2.png\n")
    )
    assert [p.source(i) for i in p.splits["train"]] == ["ash/ash_0.png", "ash/ash_2.png"] and [
        o["examples"] for o in p.audit if o["kind"] == "unread"
    ] == [["ash/ash_1.png"]]


def test_copies_across_splits(tmp_path):
    tree(tmp_path / "in")
    (tmp_path / "in/birch/copy.png").write_bytes((tmp_path / "in/ash/ash_0.png").read_bytes())
    p = prepare(
        tmp_path / "in",
        tmp_path / "out",
        side=32,
        lists=listed(tmp_path, train="ash_0.png\nbirch_0.png\n", test="copy.png\n"),
    )
    found = {o["kind"]: o["examples"] for o in p.audit}
    assert (
        found["duplicate"] == ["ash/ash_0.png = birch/copy.png"]
        and found["leak"] == ["ash/ash_0.png = birch/copy.png"]
        and "train and test" in str(p)
    )


def test_splits_of_tiles(tmp_path):
    for n in "ab":
        tiff(tmp_path / "in" / f"{n}.tif", RNG(ord(n)).integers(0, 256, (3, 64, 64), dtype="uint8"))
    p = prepare(
        tmp_path / "in",
        tmp_path / "out",
        side=32,
        tile=32,
        workers=1,
        lists=listed(tmp_path, train="b.tif", test="a.tif"),
    )
    assert (
        p.splits["train"].tolist() == [4, 5, 6, 7]
        and p.splits["test"].tolist() == [0, 1, 2, 3]
        and "leak" not in kinds(p)
    )


# --- the same result, whatever happens


def test_workers_and_shards_change_nothing(tmp_path):
    pictures(tmp_path / "in", 100)
    (tmp_path / "in/050.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    (tmp_path / "in/060.png").write_bytes((tmp_path / "in/060.png").read_bytes()[:3000])
    one, two = (prepare(tmp_path / "in", tmp_path / f"w{w}", side=32, workers=w) for w in (1, 2))
    assert contents(one.folder) == contents(two.folder) and len(one) == 98
    small = prepare(tmp_path / "in", tmp_path / "small", side=32, workers=2, shard_mb=0.1)
    assert (
        len(small.manifest["shards"]) == 3
        and small.hash == one.hash
        and (small[:] == one[:]).all()
        and small.mean == one.mean
    )
    (tmp_path / "elsewhere").mkdir()
    os.rename(tmp_path / "in", tmp_path / "elsewhere/in")
    assert prepare(tmp_path / "elsewhere/in", tmp_path / "moved", side=32).hash == one.hash


def test_hash_sees_a_pixel(tmp_path):
    pictures(tmp_path / "in", 3)
    a = prepare(tmp_path / "in", tmp_path / "a", side=32).hash
    x = np.asarray(Image.open(tmp_path / "in/001.png")).copy()
    x[:20] ^= 255
    Image.fromarray(x).save(tmp_path / "in/001.png")
    assert prepare(tmp_path / "in", tmp_path / "b", side=32).hash != a


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    pictures(tmp_path / "in", 3)
    p = prepare(tmp_path / "in", tmp_path / "out", side=32)
    with monkeypatch.context() as m:
        m.setattr("cmid.data.prepare._passes", lambda *a: pytest.fail("done again"))
        assert prepare(tmp_path / "in", tmp_path / "out", side=32).hash == p.hash
    time.sleep(0.05)
    picture(tmp_path / "in/001.png", 55)
    assert prepare(tmp_path / "in", tmp_path / "out", side=32).hash != p.hash and not list(tmp_path.glob(".out*"))


CALL = "import sys\nfrom cmid.data.prepare import prepare\nprepare(sys.argv[1], sys.argv[2], side=64, workers=int(sys.argv[3]), shard_mb=.5)"


@pytest.mark.parametrize("workers, lines", [(1, 1), (2, 2), (1, 5)])
def test_killed_and_resumed(tmp_path, monkeypatch, workers, lines):
    pictures(tmp_path / "in", 400, size=(200, 200))
    (tmp_path / "in/017.png").write_bytes((tmp_path / "in/017.png").read_bytes()[:9000])
    made = []
    real = images.make_items
    monkeypatch.setattr(images, "make_items", lambda job: (made.append(job["shard"]), real(job))[1])
    whole = prepare(tmp_path / "in", tmp_path / "whole", side=64, workers=1, shard_mb=0.5)
    jobs = len(made)
    assert len(set(made)) > 5 and jobs >= 13
    made.clear()
    script = tmp_path / "call.py"
    script.write_text(CALL)  # without a __main__ guard: workers must not run it again
    run = subprocess.Popen(
        [sys.executable, script, tmp_path / "in", tmp_path / "out", str(workers)], stderr=subprocess.DEVNULL
    )
    journal = tmp_path / "out.partial/items.jsonl"
    while run.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
        time.sleep(0.005)
    assert run.poll() is None, "it was done before it could be killed"
    run.kill()
    run.wait()
    done = journal.read_bytes().count(b"\n")
    assert lines <= done < jobs and not (tmp_path / "out").exists()
    with open(journal, "ab") as f:
        f.write(b'[{"sha": "cut sho')  # a line that was being written
    p = prepare(tmp_path / "in", tmp_path / "out", side=64, workers=1, shard_mb=0.5)
    assert (
        len(made) == jobs - done
        and contents(p.folder) == contents(whole.folder)
        and not (tmp_path / "out.partial").exists()
    )


def test_killed_before_the_last_rename(tmp_path, monkeypatch):
    pictures(tmp_path / "in", 5)
    whole = prepare(tmp_path / "in", tmp_path / "whole", side=32)
    for name in ("publish", "close_shard"):
        with monkeypatch.context() as m:
            m.setattr(f"cmid.data.prepare.{name}", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare(tmp_path / "in", tmp_path / name, side=32)
        assert not (tmp_path / name).exists() and contents(
            prepare(tmp_path / "in", tmp_path / name, side=32).folder
        ) == contents(whole.folder)


def test_a_partial_of_other_parameters_is_thrown_away(tmp_path, monkeypatch, capsys):
    pictures(tmp_path / "in", 5)
    with monkeypatch.context() as m:
        m.setattr("cmid.data.prepare.publish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "in", tmp_path / "out", side=64)
    assert prepare(tmp_path / "in", tmp_path / "out", side=32)[0].shape == (3, 32, 32)
    assert "out.partial: begun with other images or parameters, thrown away\n" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no lock there")
def test_two_at_once(tmp_path):
    import fcntl

    pictures(tmp_path / "in", 2)
    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial/lock", "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(CmidError, match="another prepare"):
            prepare(tmp_path / "in", tmp_path / "out", side=32)


# --- millions


def test_one_image_more_or_less_changes_one_shard(tmp_path):
    "600 images in shards of 30 or so: what comes or goes in the middle leaves all others as they were, byte by byte."
    pictures(tmp_path / "in", 600, size=(32, 32))
    sums = lambda p: {file_sha256(p.folder / o["file"]) for o in p.manifest["shards"]}

    def right(p):
        for i in (0, 149, 150, 299, 300, 301, len(p) - 1):
            assert (p[i] == np.asarray(Image.open(tmp_path / "in" / p.source(i))).transpose(2, 0, 1)).all()

    make = lambda name, **kw: prepare(
        tmp_path / "in", tmp_path / name, side=32, workers=1, **{"shard_mb": 30 * 3072 / 2**20, **kw}
    )
    one = make("one")
    sizes = [o["count"] for o in one.manifest["shards"]]
    assert 15 <= len(sizes) <= 40 and min(sizes[:-1]) >= 15 and max(sizes) <= 45
    picture(tmp_path / "in/300a.png", 999, size=(32, 32))
    two = make("two")
    right(two)
    (tmp_path / "in/150.png").unlink()
    three = make("three")
    right(three)
    assert (
        len(sums(two) - sums(one)) <= 2
        and len(sums(three) - sums(two)) <= 2
        and len(sums(three) & sums(one)) >= len(sizes) - 4
    )
    assert (two[[600, 301, 150]] == np.stack([two[i] for i in (600, 301, 150)])).all() and make(
        "whole", shard_mb=1000
    ).hash == three.hash
    (tmp_path / "in/150.png").write_bytes(picture(tmp_path / "again.png", 150, size=(32, 32)).read_bytes())
    (tmp_path / "in/300a.png").unlink()
    assert sums(make("four")) == sums(one)


def test_a_new_tile_or_a_hole_moves_no_other_shard(tmp_path):
    for n in "abcd":
        tiff(tmp_path / "in" / f"{n}.tif", RNG(ord(n)).integers(0, 256, (3, 320, 320), dtype="uint8"))
    make = lambda name: prepare(
        tmp_path / "in", tmp_path / name, side=32, tile=32, workers=1, shard_mb=20 * 3072 / 2**20
    )
    one = make("one")
    tiff(
        tmp_path / "in/b.tif",
        np.pad(RNG(9).integers(0, 256, (3, 320, 64), dtype="uint8"), ((0, 0), (0, 0), (0, 256))),
        nodata=0,
    )
    two = make("two")
    assert (
        len(one) == 400
        and len(two) == 320
        and two.source(120) == "c.tif[0:32, 0:32]"
        and (two[120:] == one[200:]).all()
    )
    kept = {file_sha256(one.folder / o["file"]) for o in one.manifest["shards"]} & {
        file_sha256(two.folder / o["file"]) for o in two.manifest["shards"]
    }
    assert len(kept) >= 10  # those of a, c and d but for the ones where b begins and ends


def test_an_image_more_needs_less_than_250_bytes(tmp_path, monkeypatch):
    "So a million need less than 250 MB more than a thousand. Decoding is left out here, which keeps nothing; names, a list of bare names, class folders and the journals are not."

    def make(job):
        with open(job["shard"], "ab") as f:
            f.truncate(NPY_HEADER + (job["row"] + len(job["items"])) * 3072)
        return [
            dict(sha=f"{int(o[0][-12:-4]):064x}", array="00" * 16, sum=[1, 2, 3], square=[1, 2, 3], holes=0)
            for o in job["items"]
        ]

    monkeypatch.setattr(images, "make_items", make)
    monkeypatch.setattr(
        survey,
        "_probe",
        lambda job: [dict(width=32, height=32, bands=3, dtype="uint8", grey=False, notes=[], sha="") for _ in job[1]],
    )

    def peak(n):
        monkeypatch.setattr(
            images, "find_images", lambda folder: ([f"{i // 100:05}/image_{i:08}.png" for i in range(n)], {})
        )
        (tmp_path / "in").mkdir(exist_ok=True)
        lists = listed(tmp_path, train="".join(f"image_{i:08}.png\n" for i in range(n)))
        tracemalloc.start()
        try:
            p = prepare(tmp_path / "in", tmp_path / f"{n}", side=32, workers=1, lists=lists)
            assert len(p) == len(p.splits["train"]) == n
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    few, many = peak(4_000), peak(12_000)
    assert 0 < many - few < 250 * 8_000


def test_where_an_image_came_from_is_found_without_a_copy_of_the_table(tmp_path):
    pictures(tmp_path / "in", 9)
    p = prepare(tmp_path / "in", tmp_path / "out", side=32)
    table = tmp_path / "out/items.csv"
    lines = table.read_bytes().splitlines(True)
    table.write_bytes(b"".join(lines[:9]) + lines[9].replace(b"008.png", b"x" * 3_000_000 + b".png"))
    p = Prepared(tmp_path / "out")
    tracemalloc.start()  # longer than a block that is read at once
    try:
        assert p.source(3) == "003.png" and p.source(7) == "007.png" and tracemalloc.get_traced_memory()[1] < 2.5e6
    finally:
        tracemalloc.stop()


# --- reading


def test_indexing(tmp_path):
    pictures(tmp_path / "in", 40, size=(32, 32))
    p = prepare(tmp_path / "in", tmp_path / "out", side=32, shard_mb=0.02)
    every = np.stack([np.asarray(Image.open(tmp_path / "in" / p.source(i))).transpose(2, 0, 1) for i in range(40)])
    assert len(p.manifest["shards"]) > 5 and len(p) == 40
    idx = RNG().permutation(40)
    idx = np.append(idx, [3, 3, -1])
    for i in (idx, idx[:1], [], [5, 2], slice(3, 30, 4), slice(None), np.arange(40) % 3 == 0, np.int32(7), -40):
        got, want = p[i], every[np.asarray(i, int) if isinstance(i, list) else i]
        assert got.shape == want.shape and got.dtype == np.uint8 and (got == want).all()
    got[:] = 0
    assert (p[0] == every[0]).all() and (pickle.loads(pickle.dumps(p)).images[idx] == every[idx]).all()
    for i in (40, -41, [0, 40], np.ones(39, bool)):
        with pytest.raises(IndexError):
            p[i]


def test_not_whole(tmp_path):
    with pytest.raises(CmidError, match="cmid_prepare"):
        Prepared(tmp_path)
    pictures(tmp_path / "in", 3)
    p = prepare(tmp_path / "in", tmp_path / "out", side=32)
    shard = tmp_path / "out/images-00000.npy"
    assert (np.load(shard, mmap_mode="r") == p[:]).all()
    m = json.loads((tmp_path / "out/manifest.json").read_text())
    (tmp_path / "out/manifest.json").write_text(json.dumps({**m, "format": 99}))
    with pytest.raises(CmidError, match="format 99"):
        Prepared(tmp_path / "out")
    (tmp_path / "out/manifest.json").write_text(json.dumps(m))
    os.truncate(shard, 5000)
    with pytest.raises(CmidError, match="cut short"):
        Prepared(tmp_path / "out")


def test_figures(tmp_path):
    p = prepare(tree(tmp_path / "in"), tmp_path / "out", side=32)
    titles = [ax.get_title() for ax in contact_sheet(p, 5).axes]
    assert [o for o in titles if o] == ["ash", "ash", "birch", "cedar", "cedar"]
    assert [o.get_text() for o in class_figure(p).axes[0].get_yticklabels()] == p.classes
    tiff(tmp_path / "one/a.tif", np.ones((2, 9, 9), "uint8"))
    q = prepare(tmp_path / "one", tmp_path / "q", side=32)
    assert len(contact_sheet(q).axes) == 1
    with pytest.raises(CmidError, match="no classes"):
        class_figure(q)


def test_command(tmp_path):
    script = tmp_path / "cmid_prepare"
    script.write_text(
        "import sys\nfrom cmid.data.prepare import cmid_prepare\nsys.exit(cmid_prepare())"
    )  # as pip writes it
    run = lambda *a: subprocess.run([sys.executable, script, *map(str, a)], capture_output=True, text=True)
    tree(tmp_path / "in")
    lists = listed(tmp_path, train="ash_0.png\n", test="cedar_1.png\n")
    done = run(
        tmp_path / "in",
        tmp_path / "out",
        "--side",
        "32",
        "--lists",
        ",".join(f"{k}={v}" for k, v in lists.items()),
        "--bands",
        "2,0",
    )
    assert (
        done.returncode == 0
        and "9 images of 2 x 32 x 32" in done.stdout
        and "train: 1" in done.stdout
        and Prepared(tmp_path / "out").bands == 2
    )
    for args in (
        (tmp_path / "none", tmp_path / "x"),
        (tmp_path / "in", tmp_path / "x", "--lists", "train"),
        (tmp_path / "in", tmp_path / "x", "--bands", "red"),
    ):
        bad = run(*args)
        assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and not bad.stdout
    assert "--shard_mb" in run("--help").stdout


# --- real images


@pytest.mark.skipif("CMID_REALDATA" not in os.environ, reason="CMID_REALDATA names no folder of real archives")
def test_aid(tmp_path):
    for o in ("aid", "aid_splits"):
        with tarfile.open(Path(os.environ["CMID_REALDATA"]) / f"{o}.tar.gz") as f:
            f.extractall(tmp_path, filter="data")
    lists = {o.stem: o for o in sorted((tmp_path / "aid_splits").glob("*.txt"))}
    p = prepare(tmp_path / "aid", tmp_path / "out", side=128, lists=lists)
    assert (
        len(p) == 10_000
        and len(p.classes) == 30
        and {k: len(v) for k, v in p.splits.items()} == dict(train_20=2000, test_80=8000, train_50=5000, test_50=5000)
    )
    assert np.bincount(p.labels).min() == 220 and np.bincount(p.labels).max() == 420
    assert [o["examples"] for o in p.audit if o["kind"] == "duplicate"] == [
        ["Industrial/industrial_203.jpg = Industrial/industrial_205.jpg"]
    ]
    i = int(p.splits["test_50"][-1])
    want = np.asarray(Image.open(tmp_path / "aid" / p.source(i)).convert("RGB")).transpose(2, 0, 1)
    assert (p[i] == want).all() and not (p.manifest["counts"]["skipped"])
