"Killed at any moment, by `kill -9` to whole processes: what was there stays readable, the next run goes on, and the end is the same bit for bit."

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cmid.base.files import write_whole
from cmid.base.params import Params
from cmid.base.runtime import seed_everything
from cmid.train import checkpoint

ROOT = Path(__file__).parents[2]
FACTS = dict(
    mean=[0.5] * 3,
    std=[0.2] * 3,
    bands=["red", "green", "blue"],
    method="random",
    parameters={},
    data_hash=None,
    data_licence=None,
    provenance={},
    health={},
)
BACKBONE, IMAGES, EPOCHS, KILLS = "test_resnet", 24, 12, 20  # timm's smallest; three steps an epoch


class Images:
    "Generated images in the form of a prepared folder."

    bands, side, mean, std, hash = 3, 64, [0.5] * 3, [0.2] * 3, "generated"

    def __init__(self):
        self.rows = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 64, 64), dtype=np.uint8)

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        return self.rows[i]


# Every process here is a fork of one that has loaded the libraries: twenty of them start in the time of one


@pytest.fixture(scope="module")
def forks():
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cmid.train.pretrain", "cmid.data.prepare", "matplotlib.figure"])
    yield context
    os.environ.pop("OMP_NUM_THREADS")
    os.environ.update({"OMP_NUM_THREADS": before} if before else {})


def train(folder, begun):
    "One run of pretraining, which goes on where the last one stopped."
    from cmid.train.pretrain import pretrain_learner, run_pretraining

    torch.set_num_threads(1)
    seed_everything(0)
    images = Images()
    settings = Params(ROOT, "smoke").pretrain.model_copy(update=dict(epochs=EPOCHS, checkpoint_epochs=1))
    with open(Path(folder) / "said.txt", "a") as f:
        learn = pretrain_learner(
            images,
            np.arange(IMAGES),
            settings,
            BACKBONE,
            "cmid",
            0,
            torch.device("cpu"),
            folder,
            images.hash,
            "code",
            say=lambda o: print(o, file=f, flush=True),
            health=Params(ROOT, "smoke").health,
        )
        begun.set()
        run_pretraining(learn)


def same(a, b, at="", but=("images_per_s", "seconds", "commits")):
    "Places where two states differ, bit for bit; speed is no part of a state."
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [at]
    if isinstance(a, dict):
        return [
            o
            for k in a.keys() | b.keys()
            if k not in but
            for o in (same(a[k], b[k], f"{at}.{k}") if k in a and k in b else [f"{at}.{k}"])
        ]
    if isinstance(a, (list, tuple)):
        return [o for i, (x, y) in enumerate(zip(a, b)) for o in same(x, y, f"{at}[{i}]")] + [at] * (len(a) != len(b))
    return [] if a == b or a != a and b != b else [at]


def newest(folder):
    return checkpoint.latest(next(o for o in Path(folder).iterdir() if o.is_dir()))


def worked(p):
    "Seconds that a process has worked: on a busy machine it gets as far in as many of them."
    try:
        return sum(psutil.Process(p.pid).cpu_times()[:2])
    except psutil.Error:
        return float("inf")


def start(forks, folder):
    begun = forks.Event()
    p = forks.Process(target=train, args=(str(folder), begun))
    p.start()
    begun.wait()
    return p


def finish(forks, folder):
    p = start(forks, folder)
    p.join()
    assert p.exitcode == 0


@pytest.fixture(scope="module")
def straight(forks, tmp_path_factory):
    "The folder of a run that nothing disturbed, the state at its end, and the seconds of an epoch."
    folder = tmp_path_factory.mktemp("straight")
    p = start(forks, folder)
    first = last = worked(p)
    while p.is_alive():
        last, _ = max(last, worked(p) if worked(p) < float("inf") else 0), time.sleep(0.01)
    assert p.exitcode == 0
    return folder, newest(folder)[1], (last - first) / EPOCHS


def test_two_runs_agree_bit_for_bit(forks, straight, tmp_path):
    finish(forks, tmp_path)
    assert same(newest(tmp_path)[1], straight[1]) == []


def test_a_damaged_checkpoint_costs_one_interval(forks, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    path = newest(tmp_path / "run")[0]
    path.write_bytes(path.read_bytes()[:-5000])
    older, state, _ = newest(tmp_path / "run")
    assert older != path and straight[1]["step"] - state["step"] == IMAGES // 8  # the steps of one epoch
    finish(forks, tmp_path / "run")
    assert newest(tmp_path / "run")[0] == path and same(newest(tmp_path / "run")[1], straight[1]) == []


def test_killed_while_training(forks, straight, tmp_path):
    "At 20 random moments, each within two epochs after training began or went on; should it reach its end before, another run is killed."
    draw, killed, resumed, folder = random.Random(0), 0, 0, tmp_path / "0"
    folder.mkdir()
    while True:
        p = start(forks, folder)
        until = worked(p) + draw.uniform(0, 2 * straight[2])
        if killed < KILLS:
            while worked(p) < until:
                time.sleep(0.002)
            if p.is_alive():
                os.kill(p.pid, signal.SIGKILL)
        p.join()
        killed += p.exitcode == -signal.SIGKILL
        assert p.exitcode in (0, -signal.SIGKILL)
        if p.exitcode:
            continue
        resumed += (folder / "said.txt").read_text().count("going on")
        state = newest(folder)[1]
        assert same(state, straight[1]) == [] and len(checkpoint.checkpoints(newest(folder)[0].parent)) == 2
        if killed == KILLS:
            break
        folder = tmp_path / str(killed)
        folder.mkdir()
    assert resumed >= KILLS // 4, "most kills fell before the first checkpoint"
    assert {"model", "optimiser", "curve", "epochs", "step"} <= set(state) and all(
        any(o in k for k in state["model"]) for o in ("student", "teacher", "queue", "centre")
    )


# Killed at every step of writing: Python reports each file that is opened, renamed or removed, and each call that writes, before it happens


def killed_at(n, folder, work, *args):
    "Do `work`, killed before its `n`th operation on a file below `folder`."
    left = [n]

    def count():
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def hook(event, given):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and any(
            str(o).startswith(folder) for o in given
        ):
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


def every_step(forks, folder, work, *args):
    "Kill at the first operation, at the second, ... until one comes through; yields after each."
    for n in range(100):
        p = forks.Process(target=killed_at, args=(n, str(folder), work, *args))
        p.start()
        p.join()
        assert p.exitcode in (0, -signal.SIGKILL)
        yield n
        if p.exitcode == 0:
            return


def put(folder, i):
    checkpoint.save(Path(folder) / f"epoch-{i:05d}.ckpt", dict(w=torch.full((1000,), float(i))), dict(parameters={}))


def test_killed_while_writing_a_checkpoint(forks, tmp_path):
    for i in (1, 2):
        put(tmp_path / "kept", i)
    shutil.copytree(tmp_path / "kept", tmp_path / "run")
    for n in every_step(forks, tmp_path / "run", put, str(tmp_path / "run"), 3):
        assert float(checkpoint.latest(tmp_path / "run")[1]["w"][0]) in (2.0, 3.0) and not [
            o
            for o in checkpoint.checkpoints(tmp_path / "run")
            if (checkpoint.load(o)[0]["w"] != float(o.stem[-1])).any()
        ]
        put(tmp_path / "run", 4)
        assert {"epoch-00004.ckpt"} < {o.name for o in (tmp_path / "run").iterdir()} and len(
            list((tmp_path / "run").iterdir())
        ) == 2
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "kept", tmp_path / "run")
    assert n >= 5


def export(folder, value):
    from cmid.method.backbones import create

    e = create(BACKBONE, 3, 64)
    torch.nn.init.constant_(e.mask_token, value)
    checkpoint.export_backbone(e, folder, FACTS | dict(health=dict(value=value)), teacher=e)


def test_killed_while_exporting(forks, tmp_path):
    export(tmp_path / "kept", 1.0)
    work = tmp_path / "models"
    shutil.copytree(tmp_path / "kept", work / "b")
    for n in every_step(forks, work, export, str(work / "b"), 2.0):
        encoder, card = checkpoint.load_backbone(work / "b")
        assert card.health["value"] in (1.0, 2.0) and (encoder.mask_token == card.health["value"]).all()
        export(work / "b", 3.0)
        assert [o.name for o in work.iterdir()] == ["b"] and {o.name for o in (work / "b").iterdir()} == set(
            checkpoint.FILES
        )
        assert checkpoint.read_card(work / "b").health["value"] == 3.0
        shutil.rmtree(work / "b")
        shutil.copytree(tmp_path / "kept", work / "b")
    assert n >= 10


# Several processes


def picture(i):
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (200, 200, 3), dtype=np.uint8))


def prepared(folder, out):
    from cmid.data.prepare import prepare

    prepare(folder, out, side=96, workers=2, shard_mb=2, stretch=(2.0, 98.0))


def contents(folder):
    return {o.relative_to(folder).as_posix(): o.read_bytes() for o in sorted(folder.rglob("*")) if o.is_file()}


def test_killed_while_preparing(forks, tmp_path):
    "At 5 random moments between its first and its last file; the workers are children of the process that is killed, and end with it."
    for i in range(300):
        write_whole(tmp_path / f"in/{i % 3}/{i}.png", b"")
        picture(i).save(tmp_path / f"in/{i % 3}/{i}.png")

    def start(out):
        p = forks.Process(target=prepared, args=(str(tmp_path / "in"), str(out)))
        p.start()
        return p

    t = time.perf_counter()
    p = start(tmp_path / "a/x")
    ready = None
    while p.is_alive():
        ready = ready or ((tmp_path / "a/x.partial/items.jsonl").exists() and time.perf_counter())
        time.sleep(0.01)
    assert p.exitcode == 0
    whole, draw, killed = time.perf_counter() - ready, random.Random(0), 0
    while True:
        p = start(tmp_path / "b/x")
        children = []
        if killed < 5:
            while p.is_alive() and not (tmp_path / "b/x.partial/items.jsonl").exists():
                time.sleep(0.01)
            p.join(draw.uniform(0, whole / 3))
            children = psutil.Process(p.pid).children(recursive=True) if p.is_alive() else []
            if p.is_alive():
                os.kill(p.pid, signal.SIGKILL)
                killed += 1
        p.join()
        assert not psutil.wait_procs(children, timeout=20)[1], "a worker outlives the process that it works for"
        if p.exitcode == 0:
            break
    assert killed == 5 and contents(tmp_path / "a") == contents(tmp_path / "b")


# The real thing: DVC, its stage and the notebook's process


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    from test_pipeline import Study

    s = Study(tmp_path_factory.mktemp("study"))
    s.edit("params.yaml", "pretrain: {epochs: 2,", "pretrain: {epochs: 20,")
    for old, new in (
        ("backbones: [resnet18]", f"backbones: [{BACKBONE}]"),
        ("inits: [cmid-resnet18,", f"inits: [cmid-{BACKBONE},"),
    ):
        s.edit("params.yaml", old, new)
    s.repro("prepare@pool")
    yield s
    for o in psutil.process_iter():
        if working_in(o, s.at):
            o.kill()  # of a test that failed half-way


def working_in(process, folder):
    try:
        return Path(process.cwd()).is_relative_to(folder)
    except psutil.Error:
        return False


STAGE = "pretrain", "-p", "method", "cmid", "-p", "backbone", BACKBONE


class Command:
    "A command in a study, in a group of processes of its own, as a terminal would start it."

    def __init__(self, study, *args):
        env = os.environ | dict(
            PYTHONPATH=str(study.at),
            PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            CMID_ROOT=str(study.at),
            OMP_NUM_THREADS="1",
        )
        self.run = subprocess.Popen(
            args,
            cwd=study.at,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def tree(self):
        return [psutil.Process(self.run.pid), *psutil.Process(self.run.pid).children(recursive=True)]

    def find(self, name):
        return next(o for o in self.tree() if name in " ".join(o.cmdline()))

    def end(self):
        said = self.run.communicate(timeout=300)[0]
        return self.run.returncode, said


def trains(study, command, since=()):
    "Wait until a checkpoint is there that was not."
    for _ in range(3000):
        if set(study.at.glob("checkpoints/*/*/*.ckpt")) - set(since):
            return
        assert command.run.poll() is None, command.end()[1]
        time.sleep(0.1)
    raise AssertionError("no checkpoint after five minutes")


def gone(*processes):
    assert not psutil.wait_procs(processes, timeout=30)[1]


def test_the_pipeline_stopped_killed_and_started_twice(study):
    seen = lambda: set(study.at.glob("checkpoints/*/*/*.ckpt"))
    # Ctrl-C in the terminal reaches every process of the group; the notebook's is in none
    first = Command(study, "dvc", "repro", "pretrain")
    trains(study, first)
    kernel = first.find("ipykernel")
    os.killpg(first.run.pid, signal.SIGINT)
    status, said = first.end()
    gone(kernel)
    before = seen()
    assert (
        status
        and "press Ctrl-C again to kill" in said
        and "cmid_stage: stopped at step" in said
        and "Traceback" not in said
    ), said
    # a second DVC while the first one works
    first = Command(study, "dvc", "repro", "pretrain")
    trains(study, first, before)
    stage, kernel = first.find("cmid_stage"), first.find("ipykernel")
    kernel.suspend()
    status, said = Command(study, "dvc", "repro", "pretrain").end()
    assert (
        status
        and "is busy, it is being blocked by" in said
        and f"(PID {first.run.pid}): " in said
        and "dvc repro pretrain" in said
        and "Traceback" not in said
    ), said
    # DVC is killed and its stage lives: a second stage is refused
    os.kill(first.run.pid, signal.SIGKILL)
    first.run.wait()
    status, said = Command(study, "cmid_stage", *STAGE).end()
    assert (
        status == 1
        and said.count("\n") == 1
        and f"pretrain cmid-{BACKBONE}: is running already as process {kernel.pid}" in said
    ), said
    # the stage is killed: the notebook's process ends by itself, and the next one waits for that
    os.kill(stage.pid, signal.SIGKILL)
    before = seen()
    again = Command(study, "dvc", "repro", "pretrain")
    kernel.resume()
    trains(study, again, before)
    gone(kernel)
    # everything is killed at once
    for o in again.tree():
        os.kill(o.pid, signal.SIGKILL)
    again.run.wait()
    study.repro("pretrain")
    assert "going on" in study.said
    # the same study without all that
    killed = {o.name: o.read_bytes() for o in (study.at / f"models/cmid-{BACKBONE}").glob("*.safetensors")}
    for o in ("models", "checkpoints"):
        shutil.rmtree(study.at / o / f"cmid-{BACKBONE}")
    status, said = Command(study, "cmid_stage", *STAGE).end()
    assert status == 0 and "going on" not in said
    assert (
        killed == {o.name: o.read_bytes() for o in (study.at / f"models/cmid-{BACKBONE}").glob("*.safetensors")}
        and len(killed) == 3
    )
