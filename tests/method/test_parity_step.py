"Cell centres, masks and a whole training step against reference numbers (CMID_PARITY names their folder)."

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cmid.method.masking import block_masks, fill_mean
from cmid.method.model import CMID
from cmid.method.views import View, cell_centres, published_centres

FOLDER = os.environ.get("CMID_PARITY")
pytestmark = pytest.mark.skipif(not FOLDER, reason="CMID_PARITY is not set: no reference numbers here")


def reference(name):
    return np.load(Path(FOLDER) / f"{name}.npz", allow_pickle=False)


def named_fill():
    spec = importlib.util.spec_from_file_location("named_fill", Path(FOLDER) / "named_fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.named_fill


@pytest.mark.parametrize("row", range(9))
@pytest.mark.parametrize("n", (7, 4))
def test_cell_centres(row, n):
    r = reference("cell_centres")
    h, w, y0, x0, flip = torch.from_numpy(r["locations"][row]).double()
    boxes = torch.stack([y0, x0, h, w])[None]
    flipped = flip[None] > 0.5
    # rows 0 to 6 hold starts as fractions: what the release adds to sizes in pixels; a source of 1 x 1 px makes the two the same
    ours = cell_centres(boxes, flipped, n) if row > 6 else published_centres(boxes, flipped, n, (1, 1))
    np.testing.assert_allclose(ours[0].view(n, n, 2), r[f"grid{row}_N{n}"], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("ratio", (0.1, 0.25, 0.5, 0.6, 0.75, 0.9))
def test_mask_counts(ratio):
    assert (
        block_masks(3, 224, ratio).sum((1, 2)).tolist() == [int(reference("masking")[f"count224_32_ratio{ratio}"])] * 3
    )


def test_fill_mean():
    r = reference("masking")
    ours = fill_mean(torch.from_numpy(r["fill/img"])[None], torch.from_numpy(r["fill_mean/mask"]).bool()[None])
    np.testing.assert_allclose(ours[0], r["fill_mean/out"], rtol=2e-6, atol=2e-6)


PARTS = {
    "online_encoder.": "student.encoder.",
    "mim2org.decoder_pred.0.": "decoder.0.",
    "online_projector.layer.0.0.": "student.projector.mlp.0.",
    "online_projector.layer.0.3.": "student.projector.mlp.2.",
    "class_projector.last_layer.weight_v": "student.head.weight_v",
    "class_projector.mlp.": "student.head.mlp.",
}


def published(ours):
    "The published key of one of our parameters or buffers."
    for theirs, mine in PARTS.items():
        if ours.startswith(mine):
            return theirs + ours[len(mine) :]


def filled(dtype):
    "The step's model: weights by name, teacher = student, unit keys by name."
    fill = named_fill()
    model = CMID("resnet50", img_size=128, queue=1024, matches=8).train()
    state = model.state_dict()
    for key, value in state.items():
        if key.startswith(("student.", "decoder.")) and value.is_floating_point():
            value.copy_(torch.from_numpy(fill(published(key), value.shape)))
    for key in list(state):
        if key.startswith("teacher."):
            state[key].copy_(state["student." + key.removeprefix("teacher.")])
    state["queue.keys"].copy_(F.normalize(torch.from_numpy(fill("queue", (256, 1024))), dim=0))
    model.load_state_dict(state)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_whole_step(dtype):
    "Losses, gradient norms, centre and queue of the first training step of ResNet-50."
    r = reference("step_resnet50")
    name = {torch.float32: "f32", torch.float64: "f64"}[dtype]
    tensor = lambda k: torch.from_numpy(r[k].astype("float64")).to(dtype)
    views = [
        View(tensor(i), torch.from_numpy(r[m]).bool()[:, ::8, ::8], tensor(c).flatten(1, 2))
        for i, m, c in (("img", "mask", "locations1"), ("view", "view_mask", "locations2"))
    ]
    model = filled(dtype)
    from cmid.method.distillation import temperature_at

    losses = model(views, temperature_at(1))
    losses.total.backward()
    model.enqueue()
    ours = [losses.reconstruction, losses.contrast, losses.distillation, losses.total]
    np.testing.assert_allclose(
        [o.item() for o in ours], r[f"{name}/losses"][0], rtol=2e-6 if name == "f32" else 1e-6
    )  # the reference's f32 and f64 agree to 1e-6
    grads = {published(k): p.grad.double().norm().item() for k, p in model.named_parameters() if p.grad is not None}
    keys, norms = r[f"{name}/grad_norm_keys"].tolist(), r[f"{name}/grad_norms"]
    assert set(grads) == set(keys)
    token = model.student.encoder.mask_token.grad
    counted = norms > 1e-6
    if name == "f64":
        np.testing.assert_allclose(np.array([grads[k] for k in keys])[counted], norms[counted], rtol=1e-5)
        np.testing.assert_allclose(token, r["f64/grad/mask_token"], atol=1e-4 * abs(r["f64/grad/mask_token"]).max())
    else:  # float32 sums depend on the processor: at most twice as far from float64 as the reference's own float32 is, at worst and in the middle
        for ours, exact, rounded in (
            (np.array([grads[k] for k in keys])[counted], r["f64/grad_norms"][counted], norms[counted]),
            (token.numpy(), r["f64/grad/mask_token"], r["f32/grad/mask_token"]),
        ):
            size = exact if exact.ndim == 1 else abs(exact).max()
            off, allowed = (abs(o - exact) / size for o in (ours, rounded))
            assert off.max() < 2 * allowed.max() and np.median(off) < 2 * np.median(allowed)
    assert int(model.queue.ptr) == 8
