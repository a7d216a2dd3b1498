"""Several processes train as one: against a single process that is given the same batch, and against each other. In float64, so that what differs is no rounding."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback  # after cmid, which imports fastai without its warning

from cmid.base.errors import CmidError, cli
from cmid.base.params import Params, check
from cmid.base.runtime import step_generator
from cmid.method.model import CMID
from cmid.settings.pretrain import Pretrain
from cmid.train import pretrain
from cmid.train.checkpoint import latest
from cmid.train.pretrain import pretrain_learner, run_pretraining
from cmid.train.steps import CMIDCallback
from cmid.train.processes import joined, launch, own_device, rank

SETTINGS = Params(profile="smoke").pretrain.model_copy(
    update=dict(epochs=1, batch=8, lr=0.002, warmup_epochs=0, queue=64, sync_batch_norm=True, checkpoint_epochs=1)
)
STEPS, LOSSES = 5, ("total", "reconstruction", "contrast", "distillation")
BACKBONES = {
    "vit_tiny_patch16_224": "cmid",
    "swin_tiny_patch4_window7_224": "cmid",
    "resnet18": "cmid",
    "resnet10t": "byol",
}


class Corpus:
    "Forty images that are nowhere alike, 64 px."

    bands, side, mean, std = 3, 64, [0.5] * 3, [0.2] * 3

    def __init__(self):
        self.pixels = (
            np.random.default_rng(0).integers(0, 256, (8 * STEPS, 3, 8, 8), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
        )

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


class Wide(CMIDCallback):
    "Views in float64."

    name = "cmid"

    def make_views(self, images, part=0):
        return [o._replace(images=o.images.double()) for o in super().make_views(images, part)]


def short(settings, backbone, folder, callback=Wide):
    "A learner in float64."
    torch.manual_seed(0)
    images = Corpus()
    l = pretrain_learner(
        images,
        np.arange(len(images)),
        settings,
        backbone,
        BACKBONES[backbone],
        on=torch.device("cpu"),
        folder=folder,
        say=lambda _: None,
    )
    l.model.double()
    c = callback(settings, l.cmid.method.views, 0)
    c.on = l.cmid.on
    l.remove_cb(l.cmid)
    l.add_cb(c)
    return l


class Twin(Wide):
    "One process that is given both halves of a batch, each with the views that one of two would make of it."

    def make_views(self, images, part=0):
        halves = [self.views(o, step_generator(self.seed, self.done, i)) for i, o in enumerate(images.chunk(2))]
        return [
            type(a)(*map(torch.cat, zip(a, b)))._replace(images=torch.cat([a.images, b.images]).double())
            for a, b in zip(*halves)
        ]


class PerHalf(CMID):
    "The frequency loss is that of a process's own images."

    def reconstruct(self, maps, views):
        halves = (
            zip(*[o.chunk(2) for o in maps]),
            zip(*[[type(v)(*t) for t in zip(*[o.chunk(2) for o in v])] for v in views]),
        )
        return sum(super(PerHalf, self).reconstruct(list(m), list(v)) for m, v in zip(*halves)) / 2


class Ask(Callback):
    "A scheduler's SIGTERM, to the second process only."

    order = 25

    def __init__(self, at):
        self.at = at

    def after_batch(self):
        if rank() == 1 and self.learn.cmid.done == self.at:
            signal.raise_signal(signal.SIGTERM)


@cli
def worker(backbone, folder, epochs, stop_at):
    "What each of two processes does."
    torch.set_num_threads(1)
    with joined(torch.device("cpu")):
        l = short(SETTINGS.model_copy(update=dict(epochs=epochs)), backbone, folder)
        l.add_cb(Ask(stop_at))
        run_pretraining(l)


def in_two(backbone, folder, epochs=1, stop_at=0):
    "The last checkpoint of two processes."
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_processes import worker; worker({backbone!r}, {str(folder)!r}, {epochs}, {stop_at})"
    try:
        launch(2, ["-c", script], "worker")
    except CmidError as e:
        assert stop_at and f"stopped at step {stop_at + 1} of" in str(e), e
    return latest(next(Path(folder).iterdir()))[1]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_two_processes_are_one(backbone, tmp_path, monkeypatch):
    "Losses of five steps, queue, centre, weights and running statistics."
    monkeypatch.setattr(pretrain, "CMID", PerHalf)
    l = run_pretraining(short(SETTINGS, backbone, None, Twin))
    one = l.model.state_dict()
    state = in_two(backbone, tmp_path)
    two = state["model"]
    ours, theirs = ([[o[k] for k in LOSSES] for o in curve] for curve in (l.journal.curve, state["curve"]))
    assert len(ours) == STEPS and torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-5)
    assert [o["gradient_norm"] for o in l.journal.curve] == pytest.approx(
        [o["gradient_norm"] for o in state["curve"]], rel=1e-5
    )
    if BACKBONES[backbone] == "cmid":
        assert one["queue.ptr"] == two["queue.ptr"] == (16 * STEPS) % 64 and torch.allclose(
            one["queue.keys"], two["queue.keys"], atol=1e-5
        )
    assert one["prototype_loss.centre"].abs().max() > 0 and torch.allclose(
        one["prototype_loss.centre"], two["prototype_loss.centre"], atol=1e-7
    )
    print(f"{backbone}: losses differ by {np.abs(np.subtract(ours, theirs)).max():.1e}")
    assert [k for k in one if not torch.allclose(one[k].double(), two[k].double(), atol=1e-5)] == []


def test_processes_stop_together_and_go_on(tmp_path):
    "One is asked to stop: both do, a step later; what goes on is the run that never stopped, and one process may take over."
    whole = in_two("vit_tiny_patch16_224", tmp_path / "whole", 2)
    stopped = in_two("vit_tiny_patch16_224", tmp_path / "stopped", 2, stop_at=3)
    assert (stopped["step"], stopped["epoch"]) == (4, 0)
    again = in_two("vit_tiny_patch16_224", tmp_path / "stopped", 2)
    assert again["step"] == 2 * STEPS
    assert (
        [k for k, v in whole["model"].items() if not torch.equal(v, again["model"][k])] == []
        and whole["curve"] == again["curve"]
        and len(again["ways"]) == 1
    )
    in_two(
        "vit_tiny_patch16_224", tmp_path / "shrunk", 2, stop_at=STEPS - 1
    )  # asked at the last step of an epoch but one: both stop at its end
    lines = []
    l = short(SETTINGS.model_copy(update=dict(epochs=2)), "vit_tiny_patch16_224", tmp_path / "shrunk")
    l.journal.say = lines.append
    run_pretraining(l)
    assert [(o["step"], o["processes"]) for o in l.checkpoints.ways] == [(0, 2), (STEPS, 1)] and any(
        "processes: 2 then, 1 now" in o for o in lines
    )
    ours, theirs = ([o["total"] for o in c] for c in (l.journal.curve, whole["curve"]))
    assert ours[:STEPS] == theirs[:STEPS] and len(ours) == len(theirs) == 2 * STEPS


class Sliced(Wide):
    "Every part gets its rows of the views of the whole batch."

    def before_batch(self):
        self.batch = self.learn.xb[0]
        super().before_batch()

    def make_views(self, images, part=0):
        rows = slice(part * len(images), (part + 1) * len(images))
        return [
            type(v)(*(o[rows] for o in v))._replace(images=v.images[rows].double())
            for v in self.views(self.batch, step_generator(0, self.done))
        ]


def test_parts_add_up():
    "A batch in four parts is the batch: losses, gradients, queue, where no loss is a part's own (frequency, centre)."

    def train(accumulate):
        s = SETTINGS.model_copy(
            update=dict(
                accumulate=accumulate,
                frequency_weight=0.0,
                weights=SETTINGS.weights.model_copy(update=dict(distillation=0.0)),
            )
        )
        return run_pretraining(short(s, "vit_tiny_patch16_224", None, Sliced))

    one, four = train(1), train(4)
    for k in LOSSES:
        assert [o[k] for o in one.journal.curve] == pytest.approx([o[k] for o in four.journal.curve], abs=1e-5)
    assert [o["gradient_norm"] for o in one.journal.curve] == pytest.approx(
        [o["gradient_norm"] for o in four.journal.curve], rel=1e-3
    )
    assert one.model.queue.ptr == four.model.queue.ptr == (16 * STEPS) % 64 and four.model.keys == []
    assert torch.allclose(one.model.queue.keys, four.model.queue.keys, atol=1e-4)


def test_centre_forgets_as_slowly_in_parts():
    "Four parts of one batch move the centre as far as the batch does, when all parts say the same."
    x, centres = torch.randn(2, SETTINGS.prototypes, 3), []
    for n in (1, 4):
        loss = pretrain.build_cmid(
            SETTINGS.model_copy(update=dict(accumulate=n)), "resnet10t", "cmid", side=64
        ).prototype_loss
        for _ in range(n):
            loss(x, x, 0.05)
        centres.append(loss.centre)
    assert torch.allclose(*centres, atol=1e-6) and centres[0].abs().max() > 0


def test_what_cannot_be_shared_out(monkeypatch):
    with pytest.raises(CmidError, match="batch: 8 must be divisible by processes x accumulate: 3 x"):
        check(Pretrain, SETTINGS.model_dump() | dict(processes=3), "pretrain")
    monkeypatch.setattr(pretrain, "world", lambda: 3)
    with pytest.raises(CmidError, match="pretrain.batch: 8 cannot be shared out over 3 processes"):
        short(SETTINGS, "resnet18", None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(CmidError, match="names one GPU for 2 processes"):
        own_device("cuda:0")
    assert own_device("cpu").type == "cpu"
