"The same result, whatever happens: several workers, interruptions, other parameters, files of others."

import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rasterio.transform import from_origin

from cmid.base.errors import CmidError
from cmid.data import audit, listing, prepare as preparing, statistics
from cmid.data.dataset import Prepared
from cmid.data.prepare import prepare
from cmid.settings.prepare import PREPARE_WARNINGS


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def interrupt(*_):
    raise KeyboardInterrupt


def test_workers_and_shards_change_nothing(images):
    images.pictures(100)
    (images.path / "050.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    images.truncate("060.png", 3000)
    one, two = (images.prepare(f"workers{workers}", workers=workers) for workers in (1, 2))
    assert contents(one.folder) == contents(two.folder)
    assert len(one) == 98
    small = images.prepare("small", workers=2, shard_mb=0.1)
    assert len(small.manifest["shards"]) == 3
    assert small.hash == one.hash
    assert (small[:] == one[:]).all()
    assert small.mean == one.mean


def test_a_folder_that_was_moved(images, tmp_path):
    images.pictures(3)
    first = images.prepare().hash
    (tmp_path / "elsewhere").mkdir()
    images.path = images.path.rename(tmp_path / "elsewhere/in")
    assert images.prepare("moved").hash == first


def test_what_a_map_needs_is_told(images):
    "Pixel types, the values that the images have, and the median size of a pixel."
    pixels = np.random.default_rng(0).integers(100, 4000, (2, 40, 40), dtype="uint16")
    for k, step in enumerate((0.5, 0.5, 2)):
        images.tiff(f"{k}.tif", pixels + np.uint16(k), crs="EPSG:32633", transform=from_origin(5e5, 5e6, step, step))
    manifest = images.prepare(bands=[1, 0]).manifest
    assert manifest["pixel_types"] == {"uint16": 3}
    assert manifest["value_range"] == [[int(o.min()), int(o.max()) + 2] for o in pixels[::-1]]
    assert abs(manifest["resolution"] - 0.5) < 1e-3
    images.tiff("3.tif", pixels.astype("float32"))
    manifest = images.prepare("two types").manifest
    assert manifest["pixel_types"] == {"uint16": 3, "float32": 1}
    assert manifest["value_range"] is None


def test_hash_sees_a_pixel(images):
    images.pictures(3)
    before = images.prepare("before").hash
    pixels = np.asarray(Image.open(images.path / "001.png")).copy()
    pixels[:20] ^= 255
    Image.fromarray(pixels).save(images.path / "001.png")
    assert images.prepare("after").hash != before


def test_what_is_done_is_not_done_again(images, monkeypatch):
    images.pictures(3)
    first = images.prepare().hash
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_both_passes", lambda *_: pytest.fail("done again"))
        assert images.prepare().hash == first
    time.sleep(0.05)  # so that the file's time differs
    images.picture("001.png", 55)
    assert images.prepare().hash != first
    assert not list(images.root.glob(".out*"))


def test_on_error_raise(images):
    images.pictures(4)
    images.prepare("fine", on_error="raise")
    images.truncate("002.png", 2000)
    for _ in range(2):
        with pytest.raises(CmidError, match="002.png"):
            images.prepare(on_error="raise")
    assert not (images.root / "out.partial").exists()
    assert len(images.prepare()) == 3


def test_files_of_others_are_left_alone(images):
    images.pictures(2)
    for name in "out", "new.partial":
        (images.root / name).mkdir()
        (images.root / name / "mine.txt").write_text("mine")
    with pytest.raises(CmidError, match="is not a prepared folder"):
        images.prepare()
    images.prepare("new")
    assert (images.root / "out/mine.txt").exists()
    assert (images.root / "new/mine.txt").exists()


def test_disk_too_small(images, monkeypatch):
    images.pictures(2)
    usage = type("Usage", (), dict(total=0, used=0, free=1000))
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CmidError, match="the disk is full .* MB needed"):
        images.prepare()


SCRIPT = """import sys
from cmid.data.prepare import prepare
prepare(sys.argv[1], sys.argv[2], side=64, workers=int(sys.argv[3]), shard_mb=.5)
"""  # without a __main__ guard: workers must not run it again


def killed_after(lines, script, images, out, workers):
    "Run the script and kill it when its journal has some lines; how many it has then."
    command = [sys.executable, script, images, out, str(workers)]
    journal = Path(f"{out}.partial/items.jsonl")
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while run.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
        time.sleep(0.005)
    assert run.poll() is None, "it was done before it could be killed"
    run.kill()
    run.wait()
    return journal.read_bytes().count(b"\n")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "400 images, and what `prepare` makes of them; the shard of every job."
    root = tmp_path_factory.mktemp("large")
    (root / "in").mkdir()
    for i in range(400):
        noise = np.random.default_rng(i).integers(0, 256, (200, 200, 3), dtype="uint8")
        Image.fromarray(noise).save(root / "in" / f"{i:03}.png")
    damaged = root / "in/017.png"
    damaged.write_bytes(damaged.read_bytes()[:9000])
    with pytest.MonkeyPatch.context() as patch:
        shards = watch_jobs(patch)
        whole = prepare(root / "in", root / "whole", side=64, workers=1, shard_mb=0.5)
    assert len(set(shards)) > 5
    assert len(shards) >= 13
    return root / "in", contents(whole.folder), len(shards)


def watch_jobs(patch):
    "The shards of all jobs that this process does from now on"
    shards, make_items = [], preparing.make_items

    def watched(job):
        shards.append(job.shard)
        return make_items(job)

    patch.setattr(preparing, "make_items", watched)
    return shards


@pytest.mark.parametrize("workers, lines", [(1, 1), (2, 2), (1, 5)])
def test_killed_and_resumed(large, tmp_path, monkeypatch, workers, lines):
    folder, whole, jobs = large
    script, out = tmp_path / "call.py", tmp_path / "out"
    script.write_text(SCRIPT)
    done = killed_after(lines, script, folder, out, workers)
    assert lines <= done < jobs
    assert not out.exists()
    with open(tmp_path / "out.partial/items.jsonl", "ab") as journal:
        journal.write(b'[{"sha": "trunca')  # a line that was being written
    made = watch_jobs(monkeypatch)
    prepared = prepare(folder, out, side=64, workers=1, shard_mb=0.5)
    assert len(made) == jobs - done
    assert contents(prepared.folder) == whole
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["publish", "close_shard"])
def test_killed_before_the_last_rename(images, monkeypatch, name):
    images.pictures(5)
    whole = images.prepare("whole")
    with monkeypatch.context() as patch:
        patch.setattr(preparing, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            images.prepare()
    assert not (images.root / "out").exists()
    assert contents(images.prepare().folder) == contents(whole.folder)


def test_what_was_begun_with_other_parameters_is_removed(images, monkeypatch, capsys):
    images.pictures(5)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            images.prepare(side=64)
    assert images.prepare()[0].shape == (3, 32, 32)
    expected = "out.partial: was begun with other images or parameters; starting again\n"
    assert expected in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no lock there")
def test_two_at_once(images):
    import fcntl

    images.pictures(2)
    (images.root / "out.partial").mkdir()
    with open(images.root / "out.partial/lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CmidError, match="another prepare"):
            images.prepare()


@pytest.fixture
def command(tmp_path):
    "Run `cmid_prepare` from a script as pip writes it."
    script = tmp_path / "cmid_prepare"
    script.write_text("import sys\nfrom cmid.data.prepare_command import cmid_prepare\nsys.exit(cmid_prepare())\n")

    def run(*arguments):
        return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)

    return run


def test_command(images, command):
    images.classes()
    lists = images.lists(train="ash_0.png\n", test="cedar_1.png\n")
    named = ",".join(f"{split}={path}" for split, path in lists.items())
    out = images.root / "out"
    done = command(images.path, out, "--side", "32", "--lists", named, "--bands", "2,0")
    assert done.returncode == 0, done.stderr
    assert "images   9 of 2 x 32 x 32" in done.stdout
    assert "splits   train 1, test 1" in done.stdout
    assert (images.root / "out/sheet.png").is_file()
    assert Prepared(out).bands == 2


def test_command_help_and_errors(images, command):
    assert "--shard_mb" in command("--help").stdout
    wrong = command(images.root / "none", images.root / "x")
    assert wrong.returncode == 1
    assert wrong.stderr.count("\n") == 1
    assert not wrong.stdout


@pytest.mark.slow
@pytest.mark.skipif("CMID_REALDATA" not in os.environ, reason="CMID_REALDATA names no folder of real archives")
def test_aid(tmp_path):
    for name in ("aid", "aid_splits"):
        with tarfile.open(Path(os.environ["CMID_REALDATA"]) / f"{name}.tar.gz") as archive:
            archive.extractall(tmp_path, filter="data")
    lists = {path.stem: path for path in sorted((tmp_path / "aid_splits").glob("*.txt"))}
    prepared = prepare(tmp_path / "aid", tmp_path / "out", side=128, lists=lists)
    assert len(prepared) == 10_000
    assert len(prepared.classes) == 30
    assert prepared.manifest["splits"] == dict(train_20=2000, test_80=8000, train_50=5000, test_50=5000)
    assert np.bincount(prepared.labels).min() == 220
    assert np.bincount(prepared.labels).max() == 420
    within = "(test_50, test_80)"
    assert [finding["examples"] for finding in prepared.audit if finding["kind"] == "duplicate"] == [
        [f"Industrial/industrial_203.jpg {within} = Industrial/industrial_205.jpg {within}"]
    ]
    i = int(prepared.splits["test_50"][-1])
    expected = np.asarray(Image.open(tmp_path / "aid" / prepared.source(i)).convert("RGB")).transpose(2, 0, 1)
    assert (prepared[i] == expected).all()
    assert prepared.manifest["counts"]["skipped"] == 0


def test_every_warning_can_be_accepted():
    "The kinds of warnings in the sources are those of the settings."
    text = "".join(Path(module.__file__).read_text() for module in (audit, listing, statistics))
    kinds = {*re.findall(r'"([a-z-]+)",\s+"warning"', text)} | {*re.findall(r"    ([a-z]+)=\"(?:lines|files) of", text)}
    assert kinds | {"unicode", "case", "skipped", "overlap"} == {*PREPARE_WARNINGS}
