"The whole method at real sizes: every family of encoders, other bands, odd shapes, one image, and the training loop around it."

import numpy as np
import pytest
import torch

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.base.runtime import step_generator
from cmid.data.batches import Batches
from cmid.method.model import CMID
from cmid.method.views import TwoViews
from cmid.train.pretrain import learner, run

SMALL = dict(queue=64, projector_hidden=64, projector_dim=32, head_hidden=64, head_dim=32, prototypes=48)


def step(name, bands, batch, size, **settings):
    "One step of the method; the model and its losses."
    torch.manual_seed(0)
    model = CMID(name, bands, max(size), **SMALL | settings)
    pixels = torch.randint(0, 256, (batch, bands, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    losses = model(TwoViews([0.4] * bands, [0.2] * bands, model.stride)(pixels, step_generator(0, 0)), 0.04)
    losses.total.backward()
    model.enqueue()
    return model, losses


@pytest.mark.parametrize(
    "name, bands, batch, size, matches",
    [
        ("resnet18", 3, 2, (224, 224), 20),
        ("resnet50", 13, 1, (224, 224), 20),
        ("swin_tiny_patch4_window7_224", 3, 1, (224, 224), 20),
        ("swin_tiny_patch4_window7_224", 4, 2, (128, 128), 7),
        ("vit_small_patch16_224", 1, 1, (224, 224), 80),
        ("resnet18", 2, 3, (96, 160), 10),
    ],
)
def test_a_step_at_real_sizes(name, bands, batch, size, matches):
    model, losses = step(name, bands, batch, size)
    assert model.matches == matches  # 20 of 49 cells, 7 of 16, 80 of 196, 10 of 25
    assert all(o.isfinite() for o in losses) and losses.total.item() == pytest.approx(
        sum(o.item() for o in losses[1:]), rel=1e-5
    )
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, g in grads.items() if g is None or not g.isfinite().all()]
    assert grads["student.encoder.mask_token"].abs().sum() > 0
    assert int(model.queue.ptr) == 2 * batch


def test_swin_views_in_one_batch_are_views_one_after_the_other():
    model, _ = step("swin_tiny_patch4_window7_224", 3, 2, (64, 64))
    model.eval()
    views = TwoViews([0.4] * 3, [0.2] * 3)(
        torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), step_generator(0, 1)
    )
    together = model(views, 0.04)
    model.both = lambda f, *pairs: [f(*o) for o in zip(*pairs)]
    for a, b in zip(together, model(views, 0.04)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fidelity", ("corrected", "published"))
def test_queue_starts_as_said(fidelity):
    "The release's keys had norm sqrt(dim / size); ours have norm 1."
    norms = CMID("resnet18", img_size=64, fidelity=fidelity, **SMALL | dict(queue=4096)).queue.keys.norm(dim=0)
    assert norms.mean().item() == pytest.approx(1 if fidelity == "corrected" else (32 / 4096) ** 0.5, rel=0.02)


class Pool:
    "What a learner needs of a prepared data set."

    bands, side, mean, std = 5, 64, [0.4] * 5, [0.2] * 5

    def __init__(self):
        self.pixels = np.random.default_rng(0).integers(0, 256, (11, 5, 64, 64), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


def settings(**more):
    return Params(profile="smoke").pretrain.model_copy(update=dict(epochs=2, batch=4) | more)


@pytest.mark.parametrize(
    "name, method, more",
    [
        ("resnet18", "byol", {}),
        ("vit_small_patch16_224", "cmid", dict(precision="bfloat16")),
        ("resnet18", "cmid", dict(batch=1, epoch_images=2)),
    ],
)
def test_training_runs(name, method, more):
    "Five bands, a short last batch (11 images in fours), one image a step."
    torch.manual_seed(0)
    learn = run(
        learner(Pool(), np.arange(11), settings(**more), name, method, on=torch.device("cpu"), say=lambda _: None)
    )
    steps = 2 * (2 if "epoch_images" in more else 11 // learn.cmid.settings.batch)
    assert learn.cmid.done == steps and all(np.isfinite(list(o.values())).all() for o in learn.journal.curve)


def test_a_loss_that_is_off_trains():
    learn = run(
        learner(
            Pool(),
            np.arange(11),
            settings(weights=settings().weights.model_copy(update=dict(contrast=0.0, distillation=0.0))),
            "resnet18",
            on=torch.device("cpu"),
            say=lambda _: None,
        )
    )
    assert (
        learn.journal.epochs[-1]["contrast"]
        == learn.journal.epochs[-1]["distillation"]
        == 0
        < learn.journal.epochs[-1]["reconstruction"]
    )


def test_more_images_asked_for_than_there_are():
    with pytest.raises(CmidError, match="pretrain.batch: 12 is more than the 11 images"):
        Batches(Pool(), np.arange(11), 12)
