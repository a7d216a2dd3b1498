"""What only a GPU can show: that a step never waits for the host, and that many processes, compiled encoders and copies ahead are right there too."""

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback  # after cmid, which imports fastai without its warning

from cmid.base.params import Params
from cmid.base.runtime import step_generator
from cmid.data.batches import Batches
from cmid.train.pretrain import pretrain_learner, run_pretraining

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


def short(backbone="resnet18", variant="cmid", side=64, **settings):
    torch.manual_seed(0)
    return pretrain_learner(
        Corpus(side),
        np.arange(40),
        SETTINGS.model_copy(update=settings),
        backbone,
        variant,
        on=torch.device("cuda"),
        say=lambda _: None,
    )


@pytest.mark.parametrize("backbone", ["resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
@pytest.mark.parametrize(
    "settings", [dict(), dict(accumulate=2), dict(gradient_checkpointing=True)], ids=["plain", "parts", "checkpointing"]
)
def test_step_never_waits(backbone, settings):
    "Torch itself raises where the host waits for the device; the first step may, while it allocates."
    l = short(backbone, **settings)
    seen = []

    def strict(name):
        torch.cuda.set_sync_debug_mode(
            "error"
        ) if name == "before_batch" and l.cmid.done else torch.cuda.set_sync_debug_mode(
            0
        ) if name == "after_batch" else None

    class Strict(Callback):
        order = -100

        def before_batch(self):
            strict("before_batch")

    class Lenient(Callback):
        order = 100

        def after_batch(self):
            strict("after_batch")
            seen.append(self.learn.cmid.done)

    l.add_cbs([Strict(), Lenient()])
    try:
        l.fit(1)
    finally:
        torch.cuda.set_sync_debug_mode(0)
    assert seen == [1, 2, 3, 4, 5]


def test_batches_arrive_whole():
    "Copies that were sent ahead hold what was read, however busy the device is."
    images = Corpus()
    busy = torch.randn(2048, 2048, device="cuda")
    for x, rows in Batches(images, np.arange(40), 8, on=torch.device("cuda")):
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        assert x.is_cuda and rows.is_cuda and torch.equal(x.cpu(), torch.from_numpy(images[rows.cpu().numpy()]))


@pytest.mark.parametrize("backbone", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_compiled_is_the_same(backbone):
    "Losses of compiled encoders are those of plain ones, but for rounding."
    plain, compiled = (run_pretraining(short(backbone, compile=o, precision="float32")).journal.curve for o in (False, True))
    assert [o["total"] for o in plain] == pytest.approx([o["total"] for o in compiled], rel=1e-3)


def test_gpu_agrees_with_cpu():
    "The first step of the same model on the same views, in float32."
    l = short(precision="float32")
    x = torch.from_numpy(l.dls.train.images[np.arange(8)])
    views = [o._replace() for o in l.cmid.views(x, step_generator(0, 0))]
    gpu = l.model([type(o)(*(t.cuda() for t in o)) for o in views], 0.05)
    torch.manual_seed(0)
    cpu = pretrain_learner(Corpus(), np.arange(40), SETTINGS, "resnet18", on=torch.device("cpu"), say=lambda _: None).model(
        views, 0.05
    )
    assert [o.item() for o in gpu] == pytest.approx([o.item() for o in cpu], rel=2e-3)
