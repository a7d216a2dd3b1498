"`cmid_apply`: every task's files, what is refused in one line, and runs that are stopped."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin
from safetensors.torch import load_file, save_file

from cmid.apply.command import apply_network, cmid_apply
from cmid.apply.scene import ApplyOptions
from cmid.data.formats import quiet_decoders
from cmid.method.backbones import create
from cmid.tasks.dense import blended, decided
from cmid.tasks.load import load_task
from cmid.train.checkpoint import export_backbone
from tests.tools import rasters
from tests.tools.cards import random_card
from tests.tools.networks import made_network

UTM = dict(crs="EPSG:32632", transform=from_origin(5e5, 5.3e6, 0.5, 0.5))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A small network of each task."
    folder = tmp_path_factory.mktemp("models")
    return {task: made_network(folder / task, task) for task in ("segment", "change", "detect", "classify")}


def picture(path, height=150, width=170, bands=3, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(1, 256, (bands, height, width), np.uint8)
    with quiet_decoders():
        rasters.tiff(path, pixels, **UTM | options)
    return pixels


def refused(capsys, *args):
    "The one line that the command ends with."
    with pytest.raises(SystemExit) as stop:
        cmid_apply([str(o) for o in args])
    assert stop.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("cmid_apply: "), lines
    return lines[0]


def test_a_map_is_what_scoring_predicts(models, tmp_path):
    "Class by class as `blended` of the whole scene, for both tasks with maps."
    first, second = picture(tmp_path / "one" / "a.tif"), picture(tmp_path / "two" / "a.tif", seed=1)
    for task, pixels in (("segment", first), ("change", np.stack([first, second]))):
        network = load_task(models[task])
        card = network.card
        due = blended(lambda x, f=network: f(x.float() / 255), pixels, card.tile, card.overlap / card.tile)
        later = tmp_path / "two" if task == "change" else None
        summary = apply_network(models[task], tmp_path / "one", tmp_path / task, later, say=lambda line: None)
        with rasterio.open(tmp_path / task / "a.tif") as file:
            found = file.read(1)
        sure = np.abs(np.diff(due.sort(0).values[-2:].numpy(), axis=0)[0]) > 1e-5
        assert np.array_equal(found[sure], decided(due)[sure]) and sure.mean() > 0.99
        assert summary["scenes"]["a"]["files"] == ["a.tif", "a.tif.aux.xml"]
        assert json.loads((tmp_path / task / "summary.json").read_text()) == summary


def test_every_task_writes_its_files(models, tmp_path, capsys):
    picture(tmp_path / "scenes" / "north" / "a.tif")
    due = dict(
        detect={"north/a.geojson", "north/a.wgs84.geojson", "north/a.txt"}, classify={"classes.csv", "classes.parquet"}
    )
    for task, files in due.items():
        out = tmp_path / task
        cmid_apply([str(o) for o in (models[task], tmp_path / "scenes", out)])
        assert all((out / name).is_file() for name in files), [*out.rglob("*")]
        assert not [*out.rglob(".*.part")]
        capsys.readouterr()
        cmid_apply([str(o) for o in (models[task], tmp_path / "scenes", out)])
        assert "up to date" in capsys.readouterr().out


def test_a_second_run_computes_nothing_and_a_third_what_changed(models, tmp_path):
    scenes, out, lines = tmp_path / "scenes", tmp_path / "out", []
    for name in "ab":
        picture(scenes / f"{name}.tif")

    def run(**options):
        lines.clear()
        apply_network(models["segment"], scenes, out, say=lines.append, **options)
        return [line for line in lines if "up to date" in line]

    run()
    assert run() == ["a: up to date", "b: up to date"]
    (out / "a.tif").unlink()
    assert run() == ["b: up to date"]
    (out / "a.tif").write_bytes((out / "a.tif").read_bytes()[:-5])
    assert run(overwrite=True) == ["b: up to date"]
    picture(scenes / "b.tif", seed=5)
    assert run(overwrite=True) == ["a: up to date"]


def test_what_is_refused(models, tmp_path, capsys):
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    picture(scenes / "a.tif")
    segment, change = models["segment"], models["change"]
    backbone = tmp_path / "backbone"
    export_backbone(create("resnet18", 3, 64), backbone, random_card())
    assert "no fine-tuned network" in refused(capsys, tmp_path, scenes, out)
    assert "is a backbone" in refused(capsys, backbone, scenes, out)
    newer = tmp_path / "newer"
    newer.mkdir()
    card = json.loads((segment / "card.json").read_text())
    (newer / "card.json").write_text(json.dumps(card | dict(format=99)))
    assert "written by a newer cmid" in refused(capsys, newer, scenes, out)
    (newer / "card.json").write_text(json.dumps(card))
    assert "no model.safetensors" in refused(capsys, newer, scenes, out)
    assert "--second: missing" in refused(capsys, change, scenes, out)
    assert "--second: is for change" in refused(capsys, segment, scenes, out, "--second", scenes)
    assert "no such file or folder" in refused(capsys, segment, tmp_path / "nothing", out)
    assert "is inside of the images" in refused(capsys, segment, scenes, scenes / "out")
    inside = scenes / "out", "--second", scenes
    assert "is inside of the images" in refused(capsys, change, scenes, *inside)
    assert "a folder of its own" in refused(capsys, segment, scenes / "a.tif", scenes)
    assert "must be 0 or more" in refused(capsys, segment, scenes, out, "--batch", "-1")
    assert "must be from 0 to 1" in refused(capsys, models["detect"], scenes, out, "--score", "7")
    picture(tmp_path / "two" / "b.tif", bands=2)
    assert "has 2 bands, but the network was trained on 3" in refused(capsys, segment, tmp_path / "two", out)
    assert not out.exists()


def test_all_scenes_are_checked_before_the_first_is_computed(models, tmp_path, capsys):
    picture(tmp_path / "scenes" / "a.tif")
    picture(tmp_path / "scenes" / "z.tif", bands=1)
    assert "z.tif: has 1 band" in refused(capsys, models["segment"], tmp_path / "scenes", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pairs(models, tmp_path, capsys):
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    picture(one / "a.tif")
    picture(two / "a.tif", height=130, seed=1)
    picture(one / "lonely.tif")
    cmid_apply([str(o) for o in (models["change"], one, out, "--second", two)])
    said = capsys.readouterr().out
    assert "left out, not in" in said and "lonely" in said
    assert "used is what both show, 87% of the first one" in said
    assert not (out / "lonely.tif").exists()
    picture(two / "a.tif", crs="EPSG:32633")
    assert "is in another coordinate system" in refused(capsys, models["change"], one, tmp_path / "b", "--second", two)
    (tmp_path / "three").mkdir()
    picture(tmp_path / "three" / "b.tif")
    assert "no two scenes have one name" in refused(capsys, models["change"], one, out, "--second", tmp_path / "three")


def test_results_of_somebody_else_are_not_replaced(models, tmp_path, capsys):
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    picture(scenes / "a.tif")
    out.mkdir()
    (out / "a.tif").write_text("mine")
    assert "give --overwrite" in refused(capsys, models["segment"], scenes, out)
    assert (out / "a.tif").read_text() == "mine"


def test_results_of_another_task_stay(models, tmp_path, capsys):
    "A network of another task neither replaces nor removes what is there."
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    picture(scenes / "a.tif")
    apply_network(models["segment"], scenes, out)
    for task in ("detect", "classify"):
        assert "give --overwrite" in refused(
            capsys, models[task], scenes, out, *["--tile", "64"] * (task == "classify")
        )
    assert (out / "a.tif").exists() and not (out / "a.geojson").exists()


def test_the_summary_of_another_network_stays(models, tmp_path, capsys):
    "Also where no scene of one run has the name of a scene of the other."
    out = tmp_path / "out"
    for scene in ("a", "b"):
        picture(tmp_path / f"{scene}.tif")
    apply_network(models["segment"], tmp_path / "a.tif", out, say=lambda line: None)
    before = (out / "summary.json").read_bytes()
    assert "holds the results of" in refused(capsys, models["detect"], tmp_path / "b.tif", out)
    assert (out / "summary.json").read_bytes() == before
    apply_network(models["segment"], tmp_path / "b.tif", out, say=lambda line: None)
    summary = apply_network(models["detect"], tmp_path / "b.tif", out, overwrite=True, say=lambda line: None)
    assert summary["task"] == "detect" and 0 < summary["scenes"]["b"]["score"] < 1


def test_a_world_file_that_comes_later_is_another_scene(models, tmp_path, capsys):
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    scenes.mkdir()
    Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(scenes / "a.png")
    apply_network(models["segment"], scenes, out)
    assert (out / "a.png").exists()
    (scenes / "a.pgw").write_text("2\n0\n0\n-2\n400000\n5000000\n")
    assert "give --overwrite" in refused(capsys, models["segment"], scenes, out)
    apply_network(models["segment"], scenes, out, overwrite=True)
    assert not (out / "a.png").exists()
    with rasterio.open(out / "a.tif") as file:
        assert file.transform[:3] == (2, 0, 399999)


def test_scenes_that_would_share_a_file_are_refused(models, tmp_path, capsys):
    for name in ("a", "a.wgs84", "a-probabilities"):
        picture(tmp_path / "scenes" / f"{name}.tif", 40, 40)
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    assert "both would be written to a.wgs84.geojson" in refused(capsys, models["detect"], scenes, out)
    line = refused(capsys, models["segment"], scenes, out, "--probabilities")
    assert "both would be written to a-probabilities.tif" in line
    apply_network(models["segment"], scenes, out)


def test_folders_that_are_no_place_for_results(models, tmp_path, capsys):
    picture(tmp_path / "scenes" / "a.tif", 40, 40)
    network, scenes, out = models["segment"], tmp_path / "scenes", tmp_path / "out"
    (tmp_path / "file").write_text("mine")
    assert "file: is a file" in refused(capsys, network, scenes, tmp_path / "file" / "out")
    assert "is the folder of the network" in refused(capsys, network, scenes, network)
    out.mkdir()
    (out / "summary.json").write_text("[1]")
    assert "was not written by cmid_apply" in refused(capsys, network, scenes, out)
    assert (out / "summary.json").read_text() == "[1]"


def test_maps_hold_255_classes(tmp_path, capsys):
    picture(tmp_path / "a.tif", 64, 64)
    many = made_network(tmp_path / "many", "segment", classes=256)
    assert "a map holds 255" in refused(capsys, many, tmp_path / "a.tif", tmp_path / "out")
    many = made_network(tmp_path / "many tiles", "classify", classes=256, tile=32, side=32)
    summary = apply_network(many, tmp_path / "a.tif", tmp_path / "out")
    assert summary["scenes"]["classes"]["files"] == ["classes.csv", "classes.parquet"]


@pytest.mark.parametrize("task", ["segment", "detect", "classify"])
def test_a_run_that_is_killed_behind_its_last_file_is_resumed(task, models, tmp_path, monkeypatch):
    "Between the files with their final names, with nothing unfinished any more, and the record."
    picture(tmp_path / "a.tif", 40, 40)
    args = models[task], tmp_path / "a.tif", tmp_path / "out"

    def killed(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("cmid.apply.command._sizes", killed)
        apply_network(*args)
    apply_network(*args)
    assert (tmp_path / "out" / "summary.json").exists()


def test_one_process_at_a_time(models, tmp_path, capsys):
    picture(tmp_path / "a.tif", 40, 40)
    seen = []

    def another(line):
        seen.append(line)
        assert "another cmid_apply writes here" in refused(capsys, *args, "--overwrite")

    args = models["segment"], tmp_path / "a.tif", tmp_path / "out"
    apply_network(*args, say=another)
    assert len(seen) == 1
    apply_network(*args)


@pytest.mark.parametrize("task", ["segment", "classify"])
def test_a_network_that_gives_no_numbers_is_refused(task, tmp_path, capsys):
    picture(tmp_path / "a.tif", 40, 40)
    network = made_network(tmp_path / task, task)
    weights = load_file(network / "model.safetensors")
    damaged = {key: torch.full_like(o, float("nan")) if o.is_floating_point() else o for key, o in weights.items()}
    save_file(damaged, network / "model.safetensors")
    line = refused(capsys, network, tmp_path / "a.tif", tmp_path / "out")
    assert "values that are not finite" in line
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("sizes", [{"../a.tif": 1}, {"../mine": 4, "a.tif": 7}, 5, ["a"], None])
def test_a_strange_record_removes_nothing_outside(sizes, models, tmp_path, capsys):
    picture(tmp_path / "a.tif", 40, 40)
    out = tmp_path / "results" / "out"
    picture(out.parent / "a.tif", 40, 40)
    (out.parent / "mine").write_text("mine")
    out.mkdir()
    (out / ".a.done.json").write_text(json.dumps(dict(sizes=sizes, key="x")))
    apply_network(models["segment"], tmp_path / "a.tif", out, overwrite=True)
    assert (out.parent / "a.tif").exists() and (out.parent / "mine").read_text() == "mine"
    assert set(json.loads((out / ".a.done.json").read_text())["sizes"]) == {"a.tif", "a.tif.aux.xml"}


@pytest.mark.parametrize("task, part", [("segment", "strip-0*"), ("detect", "row-0*"), ("classify", "000000.*")])
def test_damaged_parts_of_unfinished_work_are_named(task, part, models, tmp_path, capsys, monkeypatch):
    picture(tmp_path / "a.tif", 40, 40)
    args = models[task], tmp_path / "a.tif", tmp_path / "out"
    module, step = dict(
        segment=("dense", "_write_files"), detect=("objects", "box_files"), classify=("tiles", "_check_any")
    )[task]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"cmid.apply.{module}.{step}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        apply_network(*args)
    path = next((tmp_path / "out").glob(f".*.part/{part}"))
    path.write_bytes(b"PK\x03\x04 junk")
    line = refused(capsys, *args)
    assert f"{path}: is damaged" in line and f"remove {path.parent}" in line


def test_the_key_knows_network_scene_and_options(models, tmp_path):
    "Unfinished work of another network, another scene or other options is not resumed."
    scenes, out, lines = tmp_path / "scenes", tmp_path / "out", []
    picture(scenes / "a.tif")
    other = made_network(tmp_path / "other", "segment", seed=1)
    keys = set()
    for model, options in ((models["segment"], {}), (other, {}), (other, dict(vector=True)), (other, dict(batch=3))):
        apply_network(model, scenes, out, options=ApplyOptions(**options), overwrite=True, say=lines.append)
        keys.add(json.loads((out / ".a.done.json").read_text())["key"])
    picture(scenes / "a.tif", seed=3)
    apply_network(other, scenes, out, overwrite=True, say=lines.append)
    keys.add(json.loads((out / ".a.done.json").read_text())["key"])
    assert len(keys) == 4


def test_the_first_head_is_up_to_date_by_its_name(tmp_path, capsys):
    model = made_network(tmp_path / "model", "change", heads=("bit", "difference"))
    picture(tmp_path / "1.tif", 40, 40)
    picture(tmp_path / "2.tif", 40, 40, seed=1)
    args = [str(o) for o in (model, tmp_path / "1.tif", tmp_path / "out", "--second", tmp_path / "2.tif")]
    cmid_apply(args)
    capsys.readouterr()
    cmid_apply([*args, "--head", "bit"])
    assert ": up to date" in capsys.readouterr().out
    assert "--overwrite" in refused(capsys, *args, "--head", "difference")


def test_notes_about_a_scene_of_another_scale(tmp_path, capsys):
    source = dict(bands=None, types=dict(uint16=dict(low=[100.0] * 3, high=[3000.0] * 3)), nodata=None)
    model = made_network(tmp_path / "model", "segment", source=source, valid_range=[[50.0, 9000.0]] * 3)
    with quiet_decoders():
        rasters.tiff(tmp_path / "a", np.full((3, 40, 40), 60_000, np.uint16), **UTM)
    cmid_apply([str(o) for o in (model, tmp_path / "a.tif", tmp_path / "out")])
    said = capsys.readouterr().out
    assert "100% of its values lie outside of those that the network was trained on (50 to 9000)" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_stopped_is_resumed(kind, models, tmp_path):
    picture(tmp_path / "scenes" / "a.tif", 1200, 900)
    args = [str(o) for o in (models["segment"], tmp_path / "scenes")]
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background ignores it
    command = [sys.executable, "-c", f"{heard}; from cmid.apply.command import cmid_apply; cmid_apply()", *args]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    running = subprocess.Popen([*command, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True, env=environment)
    part = tmp_path / "out" / ".a.part"
    while running.poll() is None and not (part / "strip-000004.npz").exists():
        time.sleep(0.02)
    running.send_signal(kind)
    _, said = running.communicate(timeout=60)
    assert running.returncode != 0
    assert not (tmp_path / "out" / "a.tif").exists() and (part / "strip-000004.npz").exists()
    if kind == signal.SIGINT:
        assert running.returncode == 130 and said.strip().splitlines()[-1].endswith("run the same command to resume")
    lines = []
    apply_network(models["segment"], tmp_path / "scenes", tmp_path / "out", say=lines.append)
    assert lines[0].startswith("a: resumed, ")
    apply_network(models["segment"], tmp_path / "scenes", tmp_path / "once", say=lines.append)
    assert (tmp_path / "out" / "a.tif").read_bytes() == (tmp_path / "once" / "a.tif").read_bytes()


def test_help_is_a_page_to_work_from(capsys):
    with pytest.raises(SystemExit):
        cmid_apply(["--help"])
    page = capsys.readouterr().out
    for word in ("examples:", "--second", "--probabilities", "NAME.gpkg", "classes.parquet", "resumed"):
        assert word in page
    assert max(map(len, page.splitlines())) <= 120
