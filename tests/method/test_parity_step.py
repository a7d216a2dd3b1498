"Cell centres, masks and an entire training step against reference numbers; `CMID_PARITY` names their folder."

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cmid.method.distillation import temperature_at
from cmid.method.masking import block_masks, fill_mean
from cmid.method.model import CMID
from cmid.method.views import View, cell_centres, published_centres, stack_views

FOLDER = os.environ.get("CMID_PARITY")
pytestmark = pytest.mark.skipif(not FOLDER, reason="CMID_PARITY is not set: no reference numbers")


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
    if row > 6:
        ours = cell_centres(boxes, flipped, n)
    else:  # these rows hold starts as fractions; with a source of 1 x 1 px `published_centres` leaves them as they are
        ours = published_centres(boxes, flipped, n, (1, 1))
    np.testing.assert_allclose(ours[0].view(n, n, 2), r[f"grid{row}_N{n}"], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("ratio", (0.1, 0.25, 0.5, 0.6, 0.75, 0.9))
def test_mask_counts(ratio):
    count = int(reference("masking")[f"count224_32_ratio{ratio}"])
    assert block_masks(3, 224, ratio).sum((1, 2)).tolist() == [count] * 3


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
    raise KeyError(ours)


def filled_model(dtype):
    "The step's model: weights by name, teacher = student, unit keys by name."
    fill = named_fill()
    model = CMID("resnet50", img_size=128, queue=1024, matches=8).train()
    state = model.state_dict()
    for key, value in state.items():
        if key.startswith(("student.", "decoder.")) and value.is_floating_point():
            value.copy_(torch.from_numpy(fill(published(key), value.shape)))
    for key, value in state.items():
        if key.startswith("teacher."):
            value.copy_(state["student." + key.removeprefix("teacher.")])
    state["queue.keys"].copy_(F.normalize(torch.from_numpy(fill("queue", (256, 1024))), dim=0))
    model.load_state_dict(state)
    return model.to(dtype)


def stored_view(r, image, mask, centres, dtype):
    "One view of the reference's batch."
    pixels, places = (torch.from_numpy(r[key].astype("float64")).to(dtype) for key in (image, centres))
    return View(pixels, torch.from_numpy(r[mask]).bool()[:, ::8, ::8], places.flatten(1, 2))


@pytest.fixture(scope="module", params=("f32", "f64"))
def first_step(request):
    "Precision, model after one step, and its losses."
    r = reference("step_resnet50")
    dtype = dict(f32=torch.float32, f64=torch.float64)[request.param]
    view_a = stored_view(r, "img", "mask", "locations1", dtype)
    view_b = stored_view(r, "view", "view_mask", "locations2", dtype)
    model = filled_model(dtype)
    losses = model(stack_views(view_a, view_b), temperature_at(1))
    losses.total.backward()
    model.enqueue()
    return request.param, model, losses


def test_losses_of_a_step(first_step):
    precision, model, losses = first_step
    ours = [losses.reconstruction, losses.contrast, losses.distillation, losses.total]
    tolerance = dict(f32=2e-6, f64=1e-6)[precision]  # the reference's f32 and f64 agree to 1e-6
    theirs = reference("step_resnet50")[f"{precision}/losses"][0]
    np.testing.assert_allclose([loss.item() for loss in ours], theirs, rtol=tolerance)
    assert int(model.queue.ptr) == 8


def error(values, exact):
    "Relative errors: of each gradient norm, or to the largest value of one gradient."
    size = exact if exact.ndim == 1 else abs(exact).max()
    return abs(values - exact) / size


def close_gradients(ours, exact, rounded, precision, tolerance):
    """In float64 within a tolerance. Float32 sums depend on the processor.

    So in float32 the maximum and the median of the error may be at most twice those of the reference's own float32.
    """
    if precision == "f64":
        assert error(ours, exact).max() < tolerance
        return
    assert error(ours, exact).max() < 2 * error(rounded, exact).max()
    assert np.median(error(ours, exact)) < 2 * np.median(error(rounded, exact))


def test_gradient_norms_of_a_step(first_step):
    precision, model, _ = first_step
    r = reference("step_resnet50")
    norms = {}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            norms[published(key)] = parameter.grad.double().norm().item()
    keys = r[f"{precision}/grad_norm_keys"].tolist()
    assert set(norms) == set(keys)
    counted = r[f"{precision}/grad_norms"] > 1e-6
    ours = np.array([norms[key] for key in keys])[counted]
    exact, rounded = r["f64/grad_norms"][counted], r["f32/grad_norms"][counted]
    close_gradients(ours, exact, rounded, precision, tolerance=1e-5)


def test_gradient_of_the_mask_token(first_step):
    precision, model, _ = first_step
    r = reference("step_resnet50")
    gradient = model.student.encoder.mask_token.grad.numpy()
    close_gradients(gradient, r["f64/grad/mask_token"], r["f32/grad/mask_token"], precision, tolerance=1e-4)
