"Processes killed by `kill -9`: what was there stays readable, the next run resumes and ends with the same bits."

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

from cmid.base.params import Params
from cmid.base.runtime import seed_everything
from cmid.study.smoke import smoke_study
from cmid.train import checkpoint
from tests.tools.cards import random_card
from tests.tools.study import Study, environment

ROOT = Path(__file__).parents[2]
FACTS = random_card()
BACKBONE = "test_resnet"  # timm's smallest
IMAGES = 24  # three steps an epoch
EPOCHS = 4


class Images:
    "Generated images in the form of a prepared folder."

    bands, side, mean, std, hash = 3, 64, [0.5] * 3, [0.2] * 3, "generated"

    def __init__(self):
        self.rows = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 64, 64), dtype=np.uint8)

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        return self.rows[i]


# Every process here is a fork of one that has loaded the libraries, so that it starts at once


@pytest.fixture(scope="module")
def forks():
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cmid.train.pretrain", "cmid.data.prepare", "matplotlib.figure"])
    yield context
    os.environ.pop("OMP_NUM_THREADS")
    os.environ.update({"OMP_NUM_THREADS": before} if before else {})


def kill_after(step):
    "A callback that kills its process after a step."
    from fastai.callback.core import Callback

    class KillAfter(Callback):
        order = 25  # after the journal, before the checkpoint

        def after_batch(self):
            if self.learn.cmid.done == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return KillAfter()


def train(folder, begun, epochs=EPOCHS, killed_after=0):
    "One run of pretraining, which resumes where the last one stopped."
    from cmid.train.pretrain import pretrain_learner, run_pretraining

    torch.set_num_threads(1)
    seed_everything(0)
    images = Images()
    settings = Params(ROOT, "smoke").pretrain.model_copy(update=dict(epochs=epochs, checkpoint_epochs=1))
    with open(Path(folder) / "said.txt", "a") as f:

        def say(line):
            print(line, file=f, flush=True)

        learn = pretrain_learner(
            images,
            np.arange(IMAGES),
            settings,
            BACKBONE,
            0,
            torch.device("cpu"),
            folder,
            images.hash,
            "code",
            say=say,
            health=Params(ROOT, "smoke").health,
        )
        learn.add_cb(kill_after(killed_after))
        begun.set()
        run_pretraining(learn)


def differing(a, b, at="", but=("images_per_s", "seconds", "commits")):
    "Places where two states differ, bit for bit; speed is no part of a state."
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [at]
    if isinstance(a, dict):
        found = [f"{at}.{key}" for key in a.keys() ^ b.keys()]
        for key in (a.keys() & b.keys()) - {*but}:
            found += differing(a[key], b[key], f"{at}.{key}")
        return found
    if isinstance(a, (list, tuple)):
        found = [at] * (len(a) != len(b))
        for i, (x, y) in enumerate(zip(a, b)):
            found += differing(x, y, f"{at}[{i}]")
        return found
    both_nan = a != a and b != b
    return [] if a == b or both_nan else [at]


def newest(folder):
    "Path, state and meta of the newest checkpoint of the only run."
    return checkpoint.latest(next(path for path in Path(folder).iterdir() if path.is_dir()))


def start(forks, folder, *args):
    "A training that has begun."
    begun = forks.Event()
    process = forks.Process(target=train, args=(str(folder), begun, *args))
    process.start()
    assert begun.wait(300), "the training did not begin"
    return process


def finish(forks, folder, *args):
    "The exit code of a whole training."
    process = start(forks, folder, *args)
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(forks, tmp_path_factory):
    "The folder of a run that was not killed, and the state at its end."
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finish(forks, folder) == 0
    return folder, newest(folder)[1]


def test_a_damaged_checkpoint_costs_one_interval(forks, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    path = newest(tmp_path / "run")[0]
    path.write_bytes(path.read_bytes()[:-5000])
    older, state, _ = newest(tmp_path / "run")
    assert older != path
    assert undisturbed[1]["step"] - state["step"] == IMAGES // 8  # the steps of one epoch
    assert finish(forks, tmp_path / "run") == 0
    assert newest(tmp_path / "run")[0] == path
    assert differing(newest(tmp_path / "run")[1], undisturbed[1]) == []


@pytest.mark.slow
def test_killed_while_training(forks, undisturbed, tmp_path):
    "Before the first checkpoint, in the middle of an epoch, and after the last step before its checkpoint."
    for step in (2, 5, 9):
        assert finish(forks, tmp_path, EPOCHS, step) == -signal.SIGKILL
    assert finish(forks, tmp_path) == 0
    path, state, _ = newest(tmp_path)
    assert differing(state, undisturbed[1]) == []
    assert len(checkpoint.checkpoints(path.parent)) == 2
    said = (tmp_path / "said.txt").read_text().splitlines()
    resumed = [line for line in said if line.startswith("resuming")]
    assert resumed == ["resuming after step 3, epoch 1", "resuming after step 6, epoch 2"]
    assert {"model", "optimiser", "curve", "epochs", "step"} <= set(state)
    for name in ("student", "teacher", "queue", "centre"):
        assert any(name in key for key in state["model"])


def cpu_seconds(process):
    "On a busy machine a process gets as far in as many of them."
    try:
        return sum(psutil.Process(process.pid).cpu_times()[:2])
    except psutil.Error:
        return float("inf")


def timed(forks, folder, epochs):
    "CPU seconds of a training after it has begun."
    process = start(forks, folder, epochs)
    first = last = cpu_seconds(process)
    while process.is_alive():
        now = cpu_seconds(process)
        last = last if now == float("inf") else max(last, now)
        time.sleep(0.01)
    assert process.exitcode == 0
    return last - first


def kill_within(forks, folder, epochs, seconds):
    "The exit code of a training that is killed after so many CPU seconds, if it still runs."
    process = start(forks, folder, epochs)
    until = cpu_seconds(process) + seconds
    while cpu_seconds(process) < until:
        time.sleep(0.002)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_random_moments(forks, tmp_path):
    "Twenty times, each within two epochs after training began or was resumed."
    epochs, draw, killed = 12, random.Random(0), 0
    (tmp_path / "whole").mkdir()
    epoch_seconds = timed(forks, tmp_path / "whole", epochs) / epochs
    whole = newest(tmp_path / "whole")[1]
    while killed < 20:
        folder = tmp_path / f"run-{killed}"
        folder.mkdir()
        exitcode = -signal.SIGKILL
        while exitcode and killed < 20:
            exitcode = kill_within(forks, folder, epochs, draw.uniform(0, 2 * epoch_seconds))
            assert exitcode in (0, -signal.SIGKILL)
            killed += exitcode != 0
        if exitcode:
            assert finish(forks, folder, epochs) == 0
        assert differing(newest(folder)[1], whole) == []


# Killed at every operation of writing: Python reports each file that is opened, renamed or removed, and each call
# that writes, before it happens


FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def killed_at(n, folder, work, *args):
    "Does `work`, killed before its `n`th operation on a file below `folder`."
    left = n

    def count():
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def hook(event, given):
        if event in FILE_EVENTS and any(str(path).startswith(folder) for path in given):
            count()

    def calls(frame, event, function):
        if event == "c_call" and function.__name__ in ("write", "fsync"):
            count()

    torch.set_num_threads(1)
    seed_everything(0)
    sys.addaudithook(hook)
    sys.setprofile(calls)
    work(*args)
    sys.setprofile(None)


def every_operation(forks, folder, work, *args):
    "Kills at the first operation, at the second, ... until one run comes through; yields after each."
    for n in range(100):
        process = forks.Process(target=killed_at, args=(n, str(folder), work, *args))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        yield n
        if process.exitcode == 0:
            return


def write_checkpoint(folder, i):
    state = dict(w=torch.full((1000,), float(i)))
    checkpoint.save(Path(folder) / f"epoch-{i:05d}.ckpt", state, dict(parameters={}))


def values(folder):
    "The value that every checkpoint of a folder holds, by its number."
    return {
        int(path.stem[-1]): checkpoint.load(path)[0]["w"].unique().tolist() for path in checkpoint.checkpoints(folder)
    }


def test_killed_while_writing_a_checkpoint(forks, tmp_path):
    kept, run = tmp_path / "kept", tmp_path / "run"
    for i in (1, 2):
        write_checkpoint(kept, i)
    shutil.copytree(kept, run)
    for n in every_operation(forks, run, write_checkpoint, str(run), 3):
        assert float(checkpoint.latest(run)[1]["w"][0]) in (2.0, 3.0)
        assert all(value == [float(i)] for i, value in values(run).items())
        write_checkpoint(run, 4)
        assert "epoch-00004.ckpt" in {path.name for path in run.iterdir()}
        assert len(list(run.iterdir())) == 2
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        killed = n
    assert killed >= 5


def export(folder, value):
    from cmid.method.backbones import create

    encoder = create(BACKBONE, 3, 64)
    torch.nn.init.constant_(encoder.mask_token, value)
    checkpoint.export_backbone(encoder, folder, FACTS | dict(health=dict(value=value)), teacher=encoder)


@pytest.mark.slow
def test_killed_while_exporting(forks, tmp_path):
    kept, models = tmp_path / "kept", tmp_path / "models"
    export(kept, 1.0)
    shutil.copytree(kept, models / "b")
    for n in every_operation(forks, models, export, str(models / "b"), 2.0):
        encoder, card = checkpoint.load_backbone(models / "b")
        assert card.health["value"] in (1.0, 2.0)
        assert (encoder.mask_token == card.health["value"]).all()
        export(models / "b", 3.0)
        assert [path.name for path in models.iterdir()] == ["b"]
        assert {path.name for path in (models / "b").iterdir()} == set(checkpoint.FILES)
        assert checkpoint.read_card(models / "b").health["value"] == 3.0
        shutil.rmtree(models / "b")
        shutil.copytree(kept, models / "b")
        killed = n
    assert killed >= 10


# Several processes


def prepare_images(folder, out):
    from cmid.data.prepare import prepare

    prepare(folder, out, side=96, workers=2, shard_mb=2, stretch=(2.0, 98.0))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def write_images(folder, n):
    for i in range(n):
        path = folder / f"{i % 3}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def start_preparing(forks, folder, out):
    process = forks.Process(target=prepare_images, args=(str(folder), str(out)))
    process.start()
    return process


def wait_for_items(process, out):
    "Until the first image is recorded, or all is done."
    while process.is_alive() and not out.with_name(f"{out.name}.partial").joinpath("items.jsonl").exists():
        time.sleep(0.01)


def kill_with_children(process):
    "Kills a process. Its workers must end by themselves."
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not psutil.wait_procs(children, timeout=20)[1], "a worker outlives the process that it works for"


@pytest.mark.slow
@pytest.mark.parametrize("images,kills", [(120, 2), pytest.param(300, 5, marks=pytest.mark.long)])
def test_killed_while_preparing(forks, tmp_path, images, kills):
    "Between its first and its last file; the end is that of a run that was not killed."
    write_images(tmp_path / "in", images)
    process = start_preparing(forks, tmp_path / "in", tmp_path / "a/x")
    wait_for_items(process, tmp_path / "a/x")
    begun = time.perf_counter()
    process.join()
    assert process.exitcode == 0
    seconds, draw, killed = time.perf_counter() - begun, random.Random(0), 0
    while killed < kills:
        process = start_preparing(forks, tmp_path / "in", tmp_path / "b/x")
        wait_for_items(process, tmp_path / "b/x")
        process.join(draw.uniform(0, seconds / 3))
        if not process.is_alive():
            break
        kill_with_children(process)
        killed += 1
    assert killed
    process = start_preparing(forks, tmp_path / "in", tmp_path / "b/x")
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# A stage and the process of its notebook, alone and under DVC


@pytest.fixture(scope="module")
def alone():
    "A study without DVC, whose pretraining takes minutes."
    folder = smoke_study(prepared=["pool", "scenes"])
    shutil.copytree(ROOT / "nbs/pipeline", folder / "nbs/pipeline")
    path = folder / "params.yaml"
    values = yaml.safe_load(path.read_text())
    values["profiles"]["smoke"]["pretrain"] |= dict(epochs=1000, checkpoint_epochs=1)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    yield SimpleNamespace(folder=folder)
    end_all_in(folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A study under DVC."
    study = Study(tmp_path_factory.mktemp("study"))
    study.edit("params.yaml", "pretrain: {epochs: 2,", "pretrain: {epochs: 20,")
    study.edit("params.yaml", r"backbones: \[resnet18\]", f"backbones: [{BACKBONE}]")
    study.edit("params.yaml", r"inits: \[cmid-resnet18,", f"inits: [cmid-{BACKBONE},")
    study.dvc("repro", "prepare@pool")
    yield study
    end_all_in(study.folder)


def end_all_in(folder):
    "Ends what a test that failed half-way left."
    for process in psutil.process_iter():
        if works_in(process, folder):
            process.kill()


def works_in(process, folder):
    try:
        return Path(process.cwd()).is_relative_to(folder)
    except psutil.Error:
        return False


STAGE = "cmid_stage", "pretrain", "-p", "recipe", "cmid", "-p", "backbone", BACKBONE


class Command:
    "A command in a study, in a process group of its own, as a terminal would start it."

    def __init__(self, study, *args):
        self.run = subprocess.Popen(
            args,
            cwd=study.folder,
            env=environment(study.folder, ROOT),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def tree(self):
        process = psutil.Process(self.run.pid)
        return [process, *process.children(recursive=True)]

    def find(self, name):
        return next(process for process in self.tree() if name in " ".join(process.cmdline()))

    def kill(self):
        os.kill(self.run.pid, signal.SIGKILL)
        self.run.wait()

    def end(self):
        said = self.run.communicate(timeout=300)[0]
        return self.run.returncode, said


def written(study):
    return set(study.folder.glob("checkpoints/*/*/*.ckpt"))


def wait_for_checkpoint(study, command, since=()):
    "Waits until a checkpoint is there that was not."
    for _ in range(3000):
        if written(study) - set(since):
            return
        assert command.run.poll() is None, command.end()[1]
        time.sleep(0.1)
    raise AssertionError("no checkpoint after five minutes")


def has_ended(process):
    assert not psutil.wait_procs([process], timeout=30)[1]


def weights(study):
    return {path.name: path.read_bytes() for path in (study.folder / f"models/cmid-{BACKBONE}").glob("*.safetensors")}


@pytest.mark.slow
def test_a_stage_is_refused_while_it_runs_and_stopped_by_ctrl_c(alone):
    "Ctrl-C in the terminal reaches the stage, and not the process of its notebook."
    command = Command(alone, *STAGE)
    wait_for_checkpoint(alone, command)
    kernel = command.find("ipykernel")
    refused_by_the_stage(alone, kernel)
    os.killpg(command.run.pid, signal.SIGINT)
    status, said = command.end()
    has_ended(kernel)
    assert status == 130
    ended = [line for line in said.splitlines() if line.startswith("cmid_stage: ")]
    assert len(ended) == 1
    step = int(re.match(r"cmid_stage: stopped at step (\d+) of \d+; a checkpoint is kept", ended[0])[1])
    assert "Traceback" not in said
    assert max(path.name for path in written(alone)) == f"step-{step:09d}.ckpt"


@pytest.mark.slow
def test_a_notebook_ends_with_its_killed_stage(alone):
    before = written(alone)
    command = Command(alone, *STAGE)
    wait_for_checkpoint(alone, command, before)
    kernel = command.find("ipykernel")
    command.kill()
    has_ended(kernel)


def interrupted(study):
    "Ctrl-C in the terminal reaches every process of the group; the notebook's is in none."
    command = Command(study, "dvc", "repro", "pretrain")
    wait_for_checkpoint(study, command)
    kernel = command.find("ipykernel")
    os.killpg(command.run.pid, signal.SIGINT)
    status, said = command.end()
    has_ended(kernel)
    assert status
    assert "press Ctrl-C again to kill" in said
    assert "cmid_stage: stopped at step" in said
    assert "Traceback" not in said


def refused_by_dvc(study, first):
    "A second DVC while the first one works."
    status, said = Command(study, "dvc", "repro", "pretrain").end()
    assert status
    assert "is busy, it is being blocked by" in said
    assert f"(PID {first.run.pid}): " in said
    assert "dvc repro pretrain" in said
    assert "Traceback" not in said


def refused_by_the_stage(study, kernel):
    "A second stage while the first one works."
    status, said = Command(study, *STAGE).end()
    assert status == 1
    assert said.count("\n") == 1
    assert f"pretrain cmid-{BACKBONE}: is running already as process {kernel.pid}" in said


@pytest.mark.slow
@pytest.mark.long
def test_the_pipeline_stopped_killed_and_started_twice(study):
    interrupted(study)
    before = written(study)
    first = Command(study, "dvc", "repro", "pretrain")
    wait_for_checkpoint(study, first, before)
    stage, kernel = first.find("cmid_stage"), first.find("ipykernel")
    kernel.suspend()
    refused_by_dvc(study, first)
    first.kill()  # DVC, whose stage lives
    refused_by_the_stage(study, kernel)
    os.kill(stage.pid, signal.SIGKILL)  # the notebook's process ends by itself, and the next one waits for that
    before = written(study)
    again = Command(study, "dvc", "repro", "pretrain")
    kernel.resume()
    wait_for_checkpoint(study, again, before)
    has_ended(kernel)
    for process in again.tree():
        os.kill(process.pid, signal.SIGKILL)
    again.run.wait()
    study.dvc("repro", "pretrain")
    assert "resuming" in study.said
    killed = weights(study)
    for folder in ("models", "checkpoints"):
        shutil.rmtree(study.folder / folder / f"cmid-{BACKBONE}")
    status, said = Command(study, *STAGE).end()  # the same study, not killed
    assert status == 0
    assert "resuming" not in said
    assert weights(study) == killed
    assert len(killed) == 3
