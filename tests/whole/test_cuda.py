"""What only a GPU can show: a step never waits for the host, and compiled steps and asynchronous copies are
correct."""

import warnings

import numpy as np
import pytest
import torch

from cmid.base.params import Params
from cmid.base.runtime import step_generator
from cmid.data.batches import Batches
from cmid.train.pretrain import pretrain_learner, run_pretraining
from tests.tools.runs import quiet

with warnings.catch_warnings():  # fastai 2.8 scripts a function when it is imported, which torch calls deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from fastai.callback.core import Callback

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SETTINGS = Params(profile="smoke").pretrain.model_copy(
    update=dict(epochs=1, batch=8, lr=2e-4, warmup_epochs=0, queue=64, precision="bfloat16")
)


class Corpus:
    "Forty images of noise."

    bands, mean, std = 3, [0.5] * 3, [0.2] * 3

    def __init__(self, side=64):
        self.side = side
        self.pixels = np.random.default_rng(0).integers(0, 256, (40, 3, side, side), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


def short_learner(backbone="resnet18", side=64, on="cuda", **settings):
    "A run of five steps."
    torch.manual_seed(0)
    changed = SETTINGS.model_copy(update=settings)
    return pretrain_learner(Corpus(side), np.arange(40), changed, backbone, on=torch.device(on), say=quiet)


class Strict(Callback):
    "torch raises where the host waits for the device; the first step may, while it allocates."

    order = -100

    def before_batch(self):
        if self.learn.cmid.done:
            torch.cuda.set_sync_debug_mode("error")


class Lenient(Callback):
    "The end of `Strict`; records the steps that were made."

    order = 100

    def __init__(self):
        self.seen = []

    def after_batch(self):
        torch.cuda.set_sync_debug_mode(0)
        self.seen.append(self.learn.cmid.done)


@pytest.mark.parametrize("backbone", ["resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(accumulate=2), dict(gradient_checkpointing=True)],
    ids=["plain", "micro-batches", "checkpointing"],
)
def test_step_never_waits(backbone, settings):
    learn = short_learner(backbone, **settings)
    lenient = Lenient()
    learn.add_cbs([Strict(), lenient])
    try:
        learn.fit(1)
    finally:
        torch.cuda.set_sync_debug_mode(0)
    assert lenient.seen == [1, 2, 3, 4, 5]


def test_batches_arrive_whole():
    "Asynchronous copies hold what was read, however busy the device is."
    images = Corpus()
    busy = torch.randn(2048, 2048, device="cuda")
    for x, rows in Batches(images, np.arange(40), 8, on=torch.device("cuda")):
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        assert x.is_cuda
        assert rows.is_cuda
        assert torch.equal(x.cpu(), torch.from_numpy(images[rows.cpu().numpy()]))


def total_losses(backbone, way):
    learn = run_pretraining(short_learner(backbone, compile=way, precision="float32"))
    assert learn.compiled == way
    return [point["total"] for point in learn.journal.curve]


@pytest.mark.parametrize("way", [True, "graph"])
@pytest.mark.parametrize("backbone", ["resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_compiled_is_the_same(backbone, way):
    "Losses of compiled steps, and of recorded ones, are those of plain ones, but for rounding."
    assert total_losses(backbone, False) == pytest.approx(total_losses(backbone, way), rel=1e-3)


def test_gpu_agrees_with_cpu():
    "The first step of the same model on the same views, in float32."
    learn = short_learner(precision="float32")
    x = torch.from_numpy(learn.dls.train.images[np.arange(8)])
    views = learn.cmid.views(x, step_generator(0, 0))
    views_on_gpu = type(views)(*(tensor.cuda() for tensor in views))
    on_gpu = learn.model(views_on_gpu, 0.05)
    on_cpu = short_learner(on="cpu", precision="float32").model(views, 0.05)
    assert [loss.item() for loss in on_gpu] == pytest.approx([loss.item() for loss in on_cpu], rel=2e-3)
