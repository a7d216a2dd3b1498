"One step of the method at real sizes: every family of encoders, other bands, odd shapes, one image."

import pytest
import torch

from cmid.base.runtime import step_generator
from cmid.method.model import CMID
from cmid.method.views import TwoViews

SMALL = dict(queue=64, projector_hidden=64, projector_dim=32, head_hidden=64, head_dim=32, prototypes=48)


def step(name, bands, batch, size):
    "The model and its losses after one step."
    torch.manual_seed(0)
    model = CMID(name, bands, max(size), **SMALL)
    pixels = torch.randint(0, 256, (batch, bands, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    views = TwoViews([0.4] * bands, [0.2] * bands, model.stride)
    losses = model(views(pixels, step_generator(0, 0)), 0.04)
    losses.total.backward()
    model.enqueue()
    return model, losses


@pytest.mark.parametrize(
    "name, bands, batch, size, matches",
    [
        pytest.param("resnet18", 3, 2, (224, 224), 20, id="ResNet, 20 of 49 cells"),
        pytest.param("resnet50", 13, 1, (224, 224), 20, id="13 bands, one image", marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", 3, 1, (224, 224), 20, id="Swin"),
        pytest.param("swin_tiny_patch4_window7_224", 4, 2, (128, 128), 7, id="Swin, 7 of 16 cells"),
        pytest.param("vit_small_patch16_224", 1, 1, (224, 224), 80, id="ViT, 80 of 196 cells"),
        pytest.param("resnet18", 2, 3, (96, 160), 10, id="not square, 10 of 25 cells"),
    ],
)
def test_a_step_at_real_sizes(name, bands, batch, size, matches):
    model, losses = step(name, bands, batch, size)
    assert model.matches == matches
    assert all(loss.isfinite() for loss in losses)
    assert losses.total.item() == pytest.approx(sum(loss.item() for loss in losses[1:]), rel=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    assert gradients["student.encoder.mask_token"].abs().sum() > 0
    assert int(model.queue.ptr) == 2 * batch


def test_swin_views_in_one_batch_equal_views_one_after_the_other():
    model, _ = step("swin_tiny_patch4_window7_224", 3, 2, (64, 64))
    model.eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    views = TwoViews([0.4] * 3, [0.2] * 3)(pixels, step_generator(0, 1))
    in_one_batch = model(views, 0.04)
    for branch in (model.student, model.teacher):
        branch.encoder.has_batch_norm = True  # one view after the other
    for together, separate in zip(in_one_batch, model(views, 0.04)):
        torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fidelity, norm", [("corrected", 1), ("published", (32 / 4096) ** 0.5)])
def test_norms_of_the_first_keys(fidelity, norm):
    "The release's keys had the norm sqrt(dim / size); here it is 1."
    model = CMID("resnet18", img_size=64, fidelity=fidelity, **SMALL | dict(queue=4096))
    assert model.queue.keys.norm(dim=0).mean().item() == pytest.approx(norm, rel=0.02)


def test_keys_wait_for_the_end_of_a_step_view_b_first():
    "Of two micro-batches: the keys of all second views, then those of all first views."
    torch.manual_seed(0)
    model = CMID("resnet18", img_size=64, **SMALL)
    views = TwoViews([0.4] * 3, [0.2] * 3)
    before = model.queue.keys.clone()
    for i in range(2):
        model(views(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), step_generator(0, i)), 0.04)
    assert torch.equal(model.queue.keys, before)
    (first_a, first_b), (second_a, second_b) = model.keys
    model.enqueue()
    assert torch.equal(model.queue.keys[:, :8].T, torch.cat([first_b, second_b, first_a, second_a]))
    assert model.keys == []
