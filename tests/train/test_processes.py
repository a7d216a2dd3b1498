"""Several processes train as one: against a single process that is given the same batch, and against each other.
In float64, so that differences are not rounding."""

import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cmid.base.errors import CmidError, cli
from cmid.base.params import Params, check
from cmid.base.runtime import step_generator
from cmid.method.model import CMID
from cmid.method.views import Views
from cmid.settings.pretrain import Pretrain
from cmid.train import pretrain
from cmid.train.checkpoint import checkpoints, latest, load
from cmid.train.journal import LOSSES
from cmid.train.pretrain import pretrain_learner, run_pretraining
from cmid.train.processes import launch, process_device, process_group, rank
from cmid.train.steps import CMIDCallback
from tests.tools.runs import quiet

with warnings.catch_warnings():  # fastai 2.8 scripts a function when it is imported, which torch calls deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from fastai.callback.core import Callback

SETTINGS = Params(profile="smoke").pretrain.model_copy(
    update=dict(epochs=1, batch=8, lr=0.002, warmup_epochs=0, queue=64, sync_batch_norm=True, checkpoint_epochs=1)
)
STEPS = 5  # an epoch
VIT = "vit_tiny_patch16_224"
SMALL = "resnet10t"
VARIANTS = {SMALL: "cmid", "resnet18": "byol", VIT: "cmid", "swin_tiny_patch4_window7_224": "cmid"}


class Noise:
    "Forty images of coarse noise, 64 px."

    bands, side, mean, std = 3, 64, [0.5] * 3, [0.2] * 3

    def __init__(self):
        coarse = np.random.default_rng(0).integers(0, 256, (8 * STEPS, 3, 8, 8), dtype=np.uint8)
        self.pixels = coarse.repeat(8, 2).repeat(8, 3)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


def in_double(views):
    return views._replace(images=views.images.double())


class DoubleViews(CMIDCallback):
    "Views in float64."

    name = "cmid"

    def make_views(self, images, part=0):
        return in_double(super().make_views(images, part))


def double_learner(settings, backbone, folder, callback=DoubleViews, say=quiet):
    "A learner in float64."
    torch.manual_seed(0)
    images, cpu = Noise(), torch.device("cpu")
    settings = settings.model_copy(update=dict(variant=VARIANTS[backbone]))
    learn = pretrain_learner(images, np.arange(len(images)), settings, backbone, on=cpu, folder=folder, say=say)
    learn.model.double()
    double = callback(settings, learn.cmid.views, 0)
    double.on = learn.cmid.on
    learn.remove_cb(learn.cmid)
    learn.add_cb(double)
    return learn


class BothHalves(DoubleViews):
    "One process that is given both halves of a batch, each with the views that one of two processes would make of it."

    def make_views(self, images, part=0):
        halves = [self.views(half, step_generator(self.seed, self.done, i)) for i, half in enumerate(images.chunk(2))]
        return in_double(Views(*(torch.cat(parts, 1) for parts in zip(*halves))))


def halves_of_views(views):
    return [Views(*parts) for parts in zip(*[tensor.chunk(2, 1) for tensor in views])]


class LossPerHalf(CMID):
    "The frequency loss is that of a process's own images."

    def reconstruct(self, maps, views):
        halves = zip(maps.chunk(2, 1), halves_of_views(views))
        losses = [super(LossPerHalf, self).reconstruct(m, v) for m, v in halves]
        return sum(losses) / 2


class StopSecond(Callback):
    "A scheduler's SIGTERM after a step, to the second process only."

    order = 25

    def __init__(self, step):
        self.step = step

    def after_batch(self):
        if rank() == 1 and self.learn.cmid.done == self.step:
            signal.raise_signal(signal.SIGTERM)


@cli
def worker(backbone, folder, epochs, stop_at):
    "What each of two processes does."
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        learn = double_learner(SETTINGS.model_copy(update=dict(epochs=epochs)), backbone, folder)
        learn.add_cb(StopSecond(stop_at))
        run_pretraining(learn)


def train_in_two(backbone, folder, epochs=1, stop_at=0, stops_after=0):
    "The last checkpoint of two processes; one is asked to stop at a step, both stop after another."
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_processes import worker; "
        f"worker({backbone!r}, {str(folder)!r}, {epochs}, {stop_at})"
    )
    try:
        launch(2, ["-c", script], "worker")
    except CmidError as e:
        assert stop_at, e
        assert f"stopped at step {stops_after} of" in str(e)
    return latest(next(Path(folder).iterdir()))[1]


def losses_of(curve):
    return torch.tensor([[point[name] for name in LOSSES] for point in curve])


def gradient_norms(curve):
    return [point["gradient_norm"] for point in curve]


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    [
        SMALL,  # batch norm everywhere, a queue
        pytest.param("resnet18", marks=pytest.mark.long),  # batch norm everywhere, no queue
        pytest.param(VIT, marks=pytest.mark.long),  # no batch norm in the backbone
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.long),
    ],
)
def test_two_processes_are_one(backbone, tmp_path, monkeypatch):
    "Losses of five steps, queue, centre, weights and running statistics."
    monkeypatch.setattr(pretrain, "CMID", LossPerHalf)
    learn = run_pretraining(double_learner(SETTINGS, backbone, None, BothHalves))
    one = learn.model.state_dict()
    state = train_in_two(backbone, tmp_path)
    two = state["model"]
    assert len(learn.journal.curve) == STEPS
    assert torch.allclose(losses_of(learn.journal.curve), losses_of(state["curve"]), rtol=0, atol=1e-5)
    assert gradient_norms(learn.journal.curve) == pytest.approx(gradient_norms(state["curve"]), rel=1e-5)
    if VARIANTS[backbone] == "cmid":
        assert one["queue.ptr"] == two["queue.ptr"] == (16 * STEPS) % 64
        assert torch.allclose(one["queue.keys"], two["queue.keys"], atol=1e-5)
    assert one["prototype_loss.centre"].abs().max() > 0
    assert torch.allclose(one["prototype_loss.centre"], two["prototype_loss.centre"], atol=1e-7)
    assert [key for key in one if not torch.allclose(one[key].double(), two[key].double(), atol=1e-5)] == []


@pytest.mark.slow
def test_processes_stop_together_and_resume(tmp_path):
    """One is asked to stop: both do, a step later. Two processes resume in the middle of an epoch and stop at its end,
    with the bits of a run that never stopped; one process takes over."""
    whole = train_in_two(SMALL, tmp_path / "whole", 2)
    stopped = train_in_two(SMALL, tmp_path / "stopped", 2, stop_at=3, stops_after=4)
    assert (stopped["step"], stopped["epoch"]) == (4, 0)
    again = train_in_two(SMALL, tmp_path / "stopped", 2, stop_at=STEPS, stops_after=STEPS)
    assert (again["step"], again["epoch"], len(again["ways"])) == (STEPS, 1, 1)
    first_epoch, _ = load(checkpoints(next((tmp_path / "whole").iterdir()))[0])
    assert first_epoch["step"] == STEPS
    assert [key for key, value in first_epoch["model"].items() if not torch.equal(value, again["model"][key])] == []
    assert first_epoch["curve"] == again["curve"]

    lines = []
    settings = SETTINGS.model_copy(update=dict(epochs=2))
    learn = run_pretraining(double_learner(settings, SMALL, tmp_path / "stopped", say=lines.append))
    assert [(way["step"], way["processes"]) for way in learn.checkpoints.ways] == [(0, 2), (STEPS, 1)]
    assert any("processes: 2 then, 1 now" in line for line in lines)
    ours, theirs = ([point["total"] for point in curve] for curve in (learn.journal.curve, whole["curve"]))
    assert ours[:STEPS] == theirs[:STEPS]
    assert len(ours) == len(theirs) == 2 * STEPS


class RowsOfBatch(DoubleViews):
    "Every micro-batch gets its rows of the views of the whole batch."

    def before_batch(self):
        self.batch = self.learn.xb[0]
        super().before_batch()

    def make_views(self, images, part=0):
        rows = slice(part * len(images), (part + 1) * len(images))
        views = self.views(self.batch, step_generator(0, self.done))
        return in_double(Views(*(tensor[:, rows] for tensor in views)))


def train_in_micro_batches(n):
    "With the losses that do not depend on micro-batches: no frequency loss, no centre."
    weights = SETTINGS.weights.model_copy(update=dict(distillation=0.0))
    settings = SETTINGS.model_copy(update=dict(accumulate=n, frequency_weight=0.0, weights=weights))
    return run_pretraining(double_learner(settings, VIT, None, RowsOfBatch))


@pytest.mark.slow
def test_micro_batches_add_up():
    "A batch in four micro-batches is the batch: losses, gradients, queue."
    one, four = train_in_micro_batches(1), train_in_micro_batches(4)
    assert torch.allclose(losses_of(one.journal.curve), losses_of(four.journal.curve), rtol=0, atol=1e-5)
    assert gradient_norms(one.journal.curve) == pytest.approx(gradient_norms(four.journal.curve), rel=1e-3)
    assert one.model.queue.ptr == four.model.queue.ptr == (16 * STEPS) % 64
    assert four.model.keys == []
    assert torch.allclose(one.model.queue.keys, four.model.queue.keys, atol=1e-4)


def test_centre_forgets_at_the_same_speed_in_micro_batches():
    "Four equal micro-batches move the centre as far as one batch does."
    x, centres = torch.randn(1, 6, SETTINGS.prototypes), []  # one direction
    for n in (1, 4):
        settings = SETTINGS.model_copy(update=dict(accumulate=n))
        loss = pretrain.build_cmid(settings, "resnet10t", side=64).prototype_loss
        for _ in range(n):
            loss(x, x, 0.05)
        centres.append(loss.centre)
    assert torch.allclose(*centres, atol=1e-6)
    assert centres[0].abs().max() > 0


def test_a_batch_that_is_not_divisible(monkeypatch):
    with pytest.raises(CmidError, match="batch: 8 must be divisible by processes x accumulate: 3 x"):
        check(Pretrain, SETTINGS.model_dump() | dict(processes=3), "pretrain")
    monkeypatch.setattr(pretrain, "world", lambda: 3)
    with pytest.raises(CmidError, match="pretrain.batch: 8 must be divisible by 3: 3 processes, accumulate: 1"):
        double_learner(SETTINGS, "resnet18", None)


def test_one_gpu_for_two_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(CmidError, match="names one GPU for 2 processes"):
        process_device("cuda:0")
    assert process_device("cpu").type == "cpu"
