"Links among the images, folders that may not be written to, and what DVC sees of a folder."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cmid.base.errors import CmidError
from cmid.data.listing import GENERATED_NAMES, check_tracked, find_images, is_hidden
from tests.data.test_listing import HIDDEN

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="links and rights differ elsewhere")


@pytest.fixture
def disks(images):
    "Two folders beside the images, whose files have the same names, sizes and times."
    for number, disk in enumerate(("disk1", "disk2")):
        folder = images.root / disk
        folder.mkdir()
        for i in range(3):
            noise = np.random.default_rng(10 * number + i).integers(0, 256, (3, 64, 64), "uint8")
            os.utime(images.tiff(folder / f"{i}.tif", noise), (1e9, 1e9))
    images.picture("own/a.png")
    return images


def relink(link, target):
    link.unlink(missing_ok=True)
    link.symlink_to(target)


@pytest.mark.parametrize("at", ["in/linked", "in/own/linked", "in/0.tif", "current"])
def test_another_target_is_another_corpus(disks, at):
    "A linked folder, one deeper, a linked file, and a link that the link in the folder goes through."
    link, tail = disks.root / at, "0.tif" if at.endswith(".tif") else ""
    if at == "current":
        (disks.path / "linked").symlink_to(link)
    relink(link, disks.root / "disk1" / tail)
    first = disks.prepare()
    made = (first.folder / "manifest.json").stat().st_mtime_ns
    assert len(first) == (2 if tail else 4)
    assert (disks.prepare().folder / "manifest.json").stat().st_mtime_ns == made, "nothing changed"
    relink(link, disks.root / "disk2" / tail)
    assert disks.prepare().hash != first.hash


def test_the_folder_itself_may_be_a_link(disks):
    shutil.rmtree(disks.path)
    relink(disks.path, disks.root / "disk1")
    first = disks.prepare()
    relink(disks.path, disks.root / "disk2")
    assert disks.prepare().hash != first.hash


def test_folders_that_change_places(disks):
    "Their files have the same names and sizes, and nothing is newer than what was made of them."
    for number, name in enumerate(("disk1", "disk2")):
        for path in (disks.root / name).iterdir():
            os.utime(path, (1e9 + number, 1e9 + number))
    shutil.move(disks.root / "disk1", disks.path / "disk")
    first = disks.prepare()
    shutil.move(disks.path / "disk", disks.root / "disk1")
    shutil.move(disks.root / "disk2", disks.path / "disk")
    assert disks.prepare().hash != first.hash


def test_folders_are_entered_once_by_their_own_names(disks):
    "A link to a folder of the same corpus, whatever it is called, takes no name from its files."
    (disks.path / "a").symlink_to(disks.path / "own")
    (disks.path / "own/loop").symlink_to(disks.path)
    (disks.path / "zone").symlink_to(disks.root / "disk1")
    (disks.path / "again").symlink_to(disks.root / "disk1")
    names, left_out = find_images(disks.path)
    assert names == ["again/0.tif", "again/1.tif", "again/2.tif", "own/a.png"]
    assert sorted(left_out.links) == ["a", "again", "own/loop", "zone"]


def test_links_to_nothing_are_named(disks):
    (disks.path / "disk3").symlink_to(disks.root / "disk3")
    found = [finding for finding in disks.prepare().audit if finding["kind"] == "broken-link"]
    assert [(o["level"], o["examples"]) for o in found] == [("warning", ["disk3"])]


@pytest.mark.parametrize(
    "folder, link, says",
    [
        ("in", "disk", r"key: disk in in links to a folder, in which DVC sees no change; name .*/disk1 as a folder"),
        ("in", "own/disk", "own/disk in in links to a folder"),
        ("in", "gone", "gone in in links to .*/nothing, which is not there; mount it, or remove the link"),
        (".images", None, "key: .images is hidden, and DVC sees no change in it; rename it"),
        ("x/.images/y", None, "is hidden"),
    ],
)
def test_a_stage_refuses_what_dvc_does_not_see(disks, folder, link, says):
    (disks.root / folder).mkdir(parents=True, exist_ok=True)
    if link:
        (disks.path / link).symlink_to(disks.root / ("nothing" if link == "gone" else "disk1"))
    with pytest.raises(CmidError, match=says):
        check_tracked(disks.root, folder, "key")


def test_a_stage_takes_what_dvc_sees(disks):
    "Linked files, hidden links, a folder that is a link itself, and one in a hidden folder outside the study."
    (disks.path / "0.tif").symlink_to(disks.root / "disk1/0.tif")
    (disks.path / ".snapshot").symlink_to(disks.root / "disk1")
    (disks.root / "linked").symlink_to(disks.path)
    (disks.root / ".cache/images").mkdir(parents=True)
    for folder in "in", "linked", str(disks.root / "in"):
        check_tracked(disks.root, folder, "key")
    check_tracked(disks.root / "in", str(disks.root / ".cache/images"), "key")


def test_dvcignore_names_what_the_reader_leaves_out():
    lines = (ROOT / ".dvcignore").read_text().splitlines()
    ignored = {line.removeprefix("\\") for line in lines if line and not line.startswith("#")}
    assert ignored == {".*", *GENERATED_NAMES}
    assert all(map(is_hidden, HIDDEN))


STAGE = """stages:
  s:
    cmd: echo > out
    deps: [data, file]
    outs: [out]
"""


@pytest.mark.slow
def test_dvc_ignores_what_the_reader_leaves_out(tmp_path):
    "Hidden files change nothing; others, linked ones and the target of a linked folder that is named itself do."

    def dvc(*args):
        environment = os.environ | dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        done = subprocess.run(["dvc", *args], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode

    def put(name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    for name in "real/ash/0.png", "file", "other/0.png":
        put(name)
    (tmp_path / "data").symlink_to("real")
    (tmp_path / "dvc.yaml").write_text(STAGE)
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    assert [dvc("init", "-q", "--no-scm"), dvc("repro", "-q")] == [0, 0]
    for name in [*HIDDEN, *(f"{name}/0.png" for name in GENERATED_NAMES)]:
        put(f"real/{name}")
    assert dvc("status", "-q") == 0
    (tmp_path / "real/ash/1.png").symlink_to(tmp_path / "other/0.png")
    assert dvc("status", "-q") == 1
    assert [dvc("repro", "-q"), dvc("status", "-q")] == [0, 0]
    (tmp_path / "other/0.png").write_text("changed")
    assert dvc("status", "-q") == 1


PREPARE = """
import os, sys
from cmid.data.prepare import prepare
assert not os.access(sys.argv[1], os.W_OK)
print(prepare(sys.argv[1], sys.argv[2], side=32, workers=1).hash)
"""


def written(folder):
    "Names and times of all that a folder holds."
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_read_only_folder(images):
    "As a user without the rights of root; nothing is written, and the images are the same."
    images.classes()
    images.tiff("ash/a.tif", np.random.default_rng(0).integers(0, 9999, (3, 40, 40), "uint16"))
    due, before = images.prepare("due").hash, written(images.path)
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    command = [sys.executable, "-c", PREPARE, str(images.path), str(images.root / "out")]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may write everywhere, and setpriv is missing")
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    done = subprocess.run(command, env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.stdout.strip() == due, done.stderr
    assert written(images.path) == before


def test_read_only_labels(study):
    study.fill("segment")
    before = written(study.data)
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    study.read("segment")
    assert written(study.data) == before


@pytest.mark.parametrize("kind", ["linked", "hidden"])
def test_labels_refuse_what_dvc_does_not_see(study, kind):
    study.fill("segment")
    if kind == "linked":
        (study.data / "more").symlink_to(study.data / "images")
        with pytest.raises(CmidError, match="tasks.x.folder: more in d links to a folder"):
            study.read("segment")
    else:
        study.data.rename(study.root / ".d")
        with pytest.raises(CmidError, match="tasks.x.folder: .d is hidden"):
            study.read("segment", folder=".d")
