"""Fine-tuning that is interrupted ends with the weights and the numbers of one that nothing interrupted, bit for bit:
stopped by a signal after any step, killed at any moment, or with a damaged checkpoint."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from cmid.base.errors import CmidError
from cmid.tasks import finetune
from cmid.tasks.finetune import DeviceAutocast, FineTuneCallback
from cmid.tasks.segment import Segmenter
from cmid.train import resume
from cmid.train.checkpoint import checkpoints, latest
from tests.tools.runs import quiet
from tests.tools.trainings import TASKS, checkpoint_every_epoch, differing, train, train_and_die

BACKBONE = "test_resnet"  # timm's smallest
STEPS = 9  # of three epochs


@pytest.fixture(scope="module")
def init(random_backbone):
    "A backbone from which a training takes a second."
    return random_backbone(BACKBONE, 3, 32)


@pytest.fixture(scope="module")
def whole(init):
    "Weights and epochs of a task's training that nothing interrupted, and that kept no checkpoints."
    made = {}

    def get(task):
        if task not in made:
            made[task] = train(task, init, say=quiet)
        return made[task]

    return get


@pytest.fixture
def every_epoch(monkeypatch):
    "A checkpoint after every epoch, however short."
    monkeypatch.setattr(resume, "SECONDS", 0)
    monkeypatch.setattr(resume, "TIMES_AS_LONG", 0)


@pytest.fixture
def stop_after(monkeypatch):
    "A function after which the training is sent a signal at some step."
    original = FineTuneCallback.after_batch

    def at(step, number=signal.SIGTERM):
        def after_batch(self):
            original(self)
            if self.step == step:
                signal.raise_signal(number)

        monkeypatch.setattr(FineTuneCallback, "after_batch", after_batch)

    return at


def runs_of(folder):
    "Folders with checkpoints."
    return sorted({path.parent for path in folder.rglob("*.ckpt")})


# --- stopped by a signal


@pytest.mark.parametrize("task", TASKS)
def test_stopped_by_a_signal(task, init, whole, stop_after, tmp_path):
    "In the first epoch, in the middle of the second, at its end, in the third (in which batch norm is frozen)."
    lines = []
    per_epoch = whole(task)[1][0]["step"]
    steps = per_epoch * len(whole(task)[1])
    stops = sorted({1, per_epoch + 1, 2 * per_epoch, steps - 1})
    for step in stops:
        stop_after(step, signal.SIGINT if step == 1 else signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match=f"stopped at step {step} of {steps}; .* run the same command"):
            train(task, init, tmp_path, lines.append)
    stop_after(0)
    weights, epochs = train(task, init, tmp_path, lines.append)
    assert differing(weights, whole(task)[0]) == []
    assert epochs == whole(task)[1]
    resumed = [line for line in lines if line.startswith("resuming")]
    assert resumed == [f"resuming after step {step}, epoch {step // per_epoch}" for step in stops]
    assert sum(line.startswith("epoch ") for line in lines) == len(epochs)  # each is printed once
    folder, *others = runs_of(tmp_path)
    assert not others
    assert len(checkpoints(folder)) == 2


def test_a_finished_training_is_not_repeated(init, whole, monkeypatch, tmp_path):
    train("segment", init, tmp_path, quiet)
    monkeypatch.setattr(finetune.Learner, "fit", lambda *_, **__: pytest.fail("it trains again"))
    lines = []
    weights, epochs = train("segment", init, tmp_path, lines.append)
    assert differing(weights, whole("segment")[0]) == []
    assert epochs == whole("segment")[1]
    assert "all 3 epochs are trained: the last checkpoint is loaded" in lines


def test_a_second_signal_stops_at_once(init, monkeypatch, tmp_path):
    def twice(self):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(FineTuneCallback, "after_pred", twice)
    with pytest.raises(KeyboardInterrupt):
        train("change", init, tmp_path, quiet)
    assert runs_of(tmp_path) == []


# --- what identifies a training


def test_checkpoints_of_another_training_are_named_and_left_alone(init, whole, stop_after, tmp_path):
    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        train("segment", init, tmp_path, quiet)
    stop_after(0)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.ckpt")}
    lines = []
    for changes in (dict(lr=0.02), dict(code="other")):
        train("segment", init, tmp_path, lines.append, **changes)
    notes = [line for line in lines if "are not used" in line]
    assert "settings.lr: 0.01 then, 0.02 now" in notes[0]
    assert any("code: code then, other now" in line for line in notes)
    assert not [line for line in lines if line.startswith("resuming")]
    assert all(path.read_bytes() == content for path, content in kept.items())
    weights, _ = train("segment", init, tmp_path, lines.append, test="other")  # evaluation is no part of a training
    assert "resuming after step 5, epoch 1" in lines
    assert differing(weights, whole("segment")[0]) == []


def test_another_backbone_is_another_training(init, random_backbone, every_epoch, tmp_path):
    train("change", init, tmp_path, quiet)
    lines = []
    train("change", random_backbone(BACKBONE, 3, 64), tmp_path, lines.append)
    assert "backbone.img_size: 32 then, 64 now" in "".join(lines)
    assert len(runs_of(tmp_path)) == 2


# --- checkpoints


def test_a_damaged_checkpoint_costs_one_interval(init, whole, every_epoch, stop_after, tmp_path, capfd):
    stop_after(8)
    with pytest.raises(KeyboardInterrupt):
        train("segment", init, tmp_path, quiet)
    stop_after(0)
    last = checkpoints(runs_of(tmp_path)[0])[-1]
    last.write_bytes(last.read_bytes()[:-1000])
    lines = []
    weights, epochs = train("segment", init, tmp_path, lines.append)
    assert "step-000000008.ckpt: is truncated or altered" in capfd.readouterr().err
    assert "resuming after step 6, epoch 2" in lines
    assert differing(weights, whole("segment")[0]) == []
    assert epochs == whole("segment")[1]


def test_no_checkpoint_is_due_before_some_time(init, monkeypatch, tmp_path):
    "The last epoch ends with one, however short the training was."
    train("segment", init, tmp_path, quiet)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["step-000000009.ckpt"]
    monkeypatch.setattr(resume, "SECONDS", 0)
    monkeypatch.setattr(resume, "TIMES_AS_LONG", 1e6)  # the first one is written, and the next is far away
    train("segment", init, tmp_path / "b", quiet)
    assert sorted(path.name for path in (tmp_path / "b").rglob("*.ckpt")) == [
        "step-000000003.ckpt",
        "step-000000009.ckpt",
    ]


def test_the_scaler_is_part_of_a_checkpoint(init, monkeypatch, stop_after, tmp_path):
    "float16 on this CPU, with a scale that doubles every two steps: it resumes between two of them."
    monkeypatch.setattr(finetune, "precision_of", lambda *_: torch.float16)
    original = DeviceAutocast.before_fit

    def before_fit(self):
        original(self)
        self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)

    monkeypatch.setattr(DeviceAutocast, "before_fit", before_fit)
    weights, epochs = train("change", init, tmp_path / "whole", quiet)
    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        train("change", init, tmp_path / "stopped", quiet)
    stop_after(0)
    resumed, resumed_epochs = train("change", init, tmp_path / "stopped", quiet)
    assert differing(resumed, weights) == []
    assert resumed_epochs == epochs
    states = [latest(runs_of(tmp_path / name)[0])[1]["scaler"] for name in ("whole", "stopped")]
    assert states[0] == states[1]
    assert (states[0]["scale"], states[0]["_growth_tracker"]) == (4.0 * 2 ** (STEPS // 2), STEPS % 2)


def test_an_error_in_a_step_leaves_mixed_precision(init, monkeypatch):
    def fail(*_):
        assert torch.is_autocast_enabled("cpu")
        raise RuntimeError("broken")

    monkeypatch.setattr(Segmenter, "forward", fail)
    with pytest.raises(RuntimeError, match="broken"):
        train("segment", init, say=quiet, precision="bfloat16")
    assert not torch.is_autocast_enabled("cpu")


def test_a_full_disk_is_one_line(init, every_epoch, monkeypatch, tmp_path):
    def full(*_, **__):
        raise CmidError("checkpoints/x: the disk is full")

    monkeypatch.setattr(resume, "save", full)
    with pytest.raises(CmidError, match="^checkpoints/x: the disk is full$"):
        train("segment", init, tmp_path, quiet)


# --- killed


@pytest.fixture(scope="module")
def forks():
    "Processes that are forked from one that has loaded the libraries, so that they start at once."
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tools.trainings", "torch._dynamo"])
    yield context
    os.environ.pop("OMP_NUM_THREADS")
    os.environ.update({"OMP_NUM_THREADS": before} if before else {})


def in_a_process(forks, task, init, folder, seconds=0.0):
    "The exit code of a training in a process of its own."
    process = forks.Process(target=train_and_die, args=(task, init, folder, seconds, folder / "result.pt"))
    process.start()
    process.join()
    return process.exitcode


def seconds_of(task, init, folder):
    "How long a process computes for a whole training."
    checkpoint_every_epoch()
    begun = time.process_time()
    train(task, init, folder, quiet)
    return time.process_time() - begun


def killed_at_random(forks, task, init, parent, kills, draw):
    "How many times trainings were killed, and the results of those that came to their end."
    longest = seconds_of(task, init, parent / "timed")
    killed, results = 0, []
    while killed < kills:
        folder = parent / f"run-{len(results)}"
        folder.mkdir()
        exitcode = -signal.SIGPROF
        while exitcode and killed < kills:
            exitcode = in_a_process(forks, task, init, folder, draw.uniform(0.05, longest))
            assert exitcode in (0, -signal.SIGPROF)
            killed += exitcode != 0
        if exitcode:
            assert in_a_process(forks, task, init, folder) == 0
        results.append(torch.load(folder / "result.pt"))
    return killed, results


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("task", TASKS)
def test_killed_at_random_moments(task, kills, forks, init, whole, every_epoch, tmp_path):
    killed, results = killed_at_random(forks, task, init, tmp_path, kills, random.Random(kills))
    assert killed >= kills
    for result in results:
        assert differing(result["weights"], whole(task)[0]) == []
        assert result["epochs"] == whole(task)[1]
