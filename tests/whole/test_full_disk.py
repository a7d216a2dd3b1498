"""A full disk: one line with the path and the space that is needed, no partial file, the earlier file unchanged;
the same command resumes when there is room."""

import os
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from cmid.base.errors import CmidError, cli
from cmid.base.files import write_json, write_whole
from cmid.data.dataset import Prepared
from cmid.data.prepare import prepare
from cmid.method.backbones import create
from cmid.tasks.card import read_task_card, save_task
from cmid.train import checkpoint
from tests.tools.cards import random_card
from tests.tools.networks import made_card

FACTS = random_card()


def mount(folder, options):
    "A small disk of its own in memory; skips the test where none can be mounted."
    folder.mkdir()
    if sys.platform != "linux" or not shutil.which("mount"):
        pytest.skip(f"no small disk can be mounted here (needs Linux and root): {sys.platform}")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here (needs Linux and root): {done.stderr.strip()}")


def unmount(folder):
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0 or not shutil.which("unshare"),
    reason="root mounts by itself; others need unshare",
)
def test_in_a_namespace_of_ones_own():
    "Who is not root may mount where nobody else sees it; all of this file again, there."

    def inside(*args):
        return subprocess.run(["unshare", "-rm", *args], capture_output=True, text=True)

    if inside("true").returncode:
        pytest.skip("this system gives no namespaces to users who are not root")
    done = inside(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "no small disk" not in done.stdout, done.stdout[-3000:]


@pytest.fixture
def disk(tmp_path):
    mount(tmp_path / "disk", "size=8m")
    yield tmp_path / "disk"
    unmount(tmp_path / "disk")


def files(folder):
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def fill(disk, leave):
    "Leave so many bytes free."
    (disk / "ballast").unlink(missing_ok=True)
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - leave))


def stops_and_resumes(disk, work, path, leave=10_000, needs=r"[\d.]+ MB needed, "):
    "Everything that a writer must do."
    fill(disk, leave)
    before = files(disk)
    with pytest.raises(CmidError, match=rf"disk is full \({needs}[\d.]+ MB free\); make room and run again") as e:
        work()
    assert str(e.value).startswith(f"{path}: ")
    assert "\n" not in str(e.value)
    assert files(disk) == before, "no partial file is left, and what was there is unchanged"
    (disk / "ballast").unlink()
    work()
    assert not list(disk.rglob(".*"))


def state(value):
    return dict(w=torch.full((250_000,), value), more=[torch.zeros(250_000)])


def test_checkpoint(disk):
    checkpoint.save(disk / "run/epoch-1.ckpt", state(1.0), {})
    path = disk / "run/epoch-2.ckpt"
    stops_and_resumes(disk, lambda: checkpoint.save(path, state(2.0), {}), path, needs="1.9 MB needed, ")
    assert checkpoint.latest(disk / "run")[1]["w"][0] == 2
    assert len(checkpoint.checkpoints(disk / "run")) == 2


def test_checkpoint_at_any_size_of_what_is_free(disk):
    "torch reports a full disk in several ways, which depend on how much was written."
    checkpoint.save(disk / "epoch-1.ckpt", state(1.0), {})
    for free in (0, 4096, 500_000, 1_000_000, 1_990_000):
        fill(disk, free)
        with pytest.raises(CmidError, match="the disk is full"):
            checkpoint.save(disk / "epoch-2.ckpt", state(2.0), {})
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", "epoch-1.ckpt"]
        assert checkpoint.latest(disk)[1]["w"][0] == 1


@pytest.mark.parametrize("leave", [0, 10_000, 1_000_000, 1_550_000])
def test_export(disk, leave):
    encoder = create("test_resnet", 3, 64)

    def export(value):
        checkpoint.export_backbone(encoder, disk / "models/b", FACTS | dict(health=dict(value=value)), teacher=encoder)

    export(1.0)
    stops_and_resumes(disk, lambda: export(2.0), disk / "models/b", leave)
    assert checkpoint.read_card(disk / "models/b").health["value"] == 2


@pytest.mark.parametrize("leave", [0, 10_000, 1_000_000, 1_550_000])
def test_fine_tuned_network(disk, leave):
    card = made_card("segment", encoder=create("test_resnet", 3, 64))

    def keep(value):
        network = torch.nn.Linear(1000, 400, bias=False)
        torch.nn.init.constant_(network.weight, value)
        save_task(disk / "models/a", network, card)

    keep(1.0)
    stops_and_resumes(disk, lambda: keep(2.0), disk / "models/a", leave)
    assert (load_file(disk / "models/a/model.safetensors")["weight"] == 2).all()
    assert read_task_card(disk / "models/a") == card


def test_small_files(disk):
    path = disk / "a/x.txt"
    write_whole(path, b"1" * 300_000)
    stops_and_resumes(disk, lambda: write_whole(path, b"2" * 300_000), path, needs="0.3 MB needed, ")
    write_json(disk / "x.json", [1])
    stops_and_resumes(disk, lambda: write_json(disk / "x.json", list(range(100_000))), disk / "x.json")


def test_figure_of_a_stage(disk):
    from cmid.study.stage import Stage

    stage = object.__new__(Stage)
    stage.results = disk / "results/probe/a"
    rng = np.random.default_rng(0)

    def noise():
        fig = Figure()
        fig.subplots().imshow(rng.random((300, 300)))
        return fig

    stage.figure(noise())
    stops_and_resumes(disk, lambda: stage.figure(noise()), disk / "results/probe/a/figure.png")


# A stage of several steps keeps what it has done; the folder that it wrote before stays as it was


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(100):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


@pytest.mark.parametrize("leave,workers", [(0, 1), (3000, 1), (40_000, 2), (400_000, 1), (1_300_000, 1)])
def test_prepare(disk, pictures, leave, workers):

    def make(side):
        return prepare(pictures, disk / "prepared/x", side=side, workers=workers, shard_mb=0.5)

    make(32)
    before = files(disk / "prepared")
    fill(disk, leave)
    text = r"prepared/x\.partial.*: the disk is full \(.*[\d.]+ MB free\); make room and run again"
    with pytest.raises(CmidError, match=text) as e:
        make(64)
    assert "\n" not in str(e.value)
    assert {name: data for name, data in files(disk / "prepared").items() if ".partial" not in name} == before
    assert Prepared(disk / "prepared/x").side == 32
    (disk / "ballast").unlink()
    assert make(64).side == 64
    assert [path.name for path in (disk / "prepared").iterdir()] == ["x"]


def test_prepare_when_the_disk_fills_up_on_the_way(disk, pictures, monkeypatch):
    "The room that was there when it began is gone: another program writes too."
    monkeypatch.setattr("cmid.data.prepare.require_room", lambda *_: None)
    fill(disk, 500_000)
    with pytest.raises(CmidError, match=r"prepared/x\.partial: the disk is full \([\d.]+ MB free\)"):
        prepare(pictures, disk / "prepared/x", side=64, workers=2, shard_mb=0.25)
    (disk / "ballast").unlink()
    again = prepare(pictures, disk / "prepared/x", side=64, workers=2, shard_mb=0.25)
    assert files(again.folder) == files(prepare(pictures, disk / "other/x", side=64, workers=1, shard_mb=0.25).folder)


# Commands and stages


def test_command_line(disk, capsys):
    @cli
    def cmid_example():
        (disk / "x").write_bytes(bytes(2**20))

    fill(disk, 1000)
    with pytest.raises(SystemExit) as e:
        cmid_example()
    said = capsys.readouterr().err
    assert e.value.code == 1
    assert "the disk is full" in said
    assert said.count("\n") == 1


def notebook(path, code):
    cells = [nbformat.v4.new_code_cell(source) for source in ("smoke = True", code)]
    kernel = dict(name="python3", language="python", display_name="python3")
    nb = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, path)
    return path


@pytest.mark.parametrize(
    "code,out,says",
    [
        (
            "from cmid.base.files import write_whole; write_whole({x!r}, bytes(2**20))",
            "elsewhere",
            "disk/x: the disk is full (1.0 MB needed, ",
        ),  # by our own means
        ('open({x!r}, "wb").write(bytes(2**20))', "elsewhere", "the disk is full ("),  # by another library's
        ("pass", "disk/reports", "disk/reports/out.ipynb: the disk is full ("),
    ],
)  # the executed copy itself
def test_notebook(disk, tmp_path, code, out, says):
    from cmid.study.runner import run_notebook

    path = notebook(tmp_path / "train.ipynb", code.format(x=str(disk / "x")))
    fill(disk, 0)
    with pytest.raises(CmidError) as e:
        run_notebook(path, tmp_path / out / "out.ipynb", {})
    assert says in str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "disk/reports/out.ipynb").exists()


# Room for bytes is not all


def test_no_number_left_for_another_file(tmp_path):
    mount(tmp_path / "disk", "size=8m,nr_inodes=20")
    try:
        for i in range(100):
            try:
                (tmp_path / f"disk/{i}").touch()
            except OSError:
                break
        with pytest.raises(CmidError, match=r"disk/a\.json: the disk is full \(no inode left for another file\)"):
            write_json(tmp_path / "disk/a.json", 1)
    finally:
        unmount(tmp_path / "disk")


def test_read_only_disk(tmp_path):
    mount(tmp_path / "disk", "size=8m,ro")
    try:
        for work in (
            lambda: write_json(tmp_path / "disk/a.json", 1),
            lambda: checkpoint.save(tmp_path / "disk/run/epoch-1.ckpt", state(1.0), {}),
            lambda: checkpoint.export_backbone(create("test_resnet", 3, 64), tmp_path / "disk/b", FACTS),
        ):
            with pytest.raises(CmidError, match="this disk is read-only; name a folder elsewhere") as e:
                work()
            assert "\n" not in str(e.value)
    finally:
        unmount(tmp_path / "disk")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path, capsys):
    @cli
    def cmid_example():
        write_json(tmp_path / "kept/a.json", 1)

    (tmp_path / "kept").mkdir()
    (tmp_path / "kept").chmod(0o555)
    with pytest.raises(SystemExit):
        cmid_example()
    assert capsys.readouterr().err.count("\n") == 1
