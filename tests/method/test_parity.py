"""Losses, queue, schedules and optimiser against measured inputs, outputs and gradients of the published method.

`CMID_PARITY` names the folder of the `.npz` files; without it these tests are skipped, and the notebooks prove the same
functions by hand arithmetic. One case is one test, so that pytest's count is the number of cases.
Tolerances, relative to the largest absolute value: float64 1e-9; float32 2e-6 for values, 1e-4 for gradients.
"""

import os
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

from cmid.method.contrast import KeyQueue, info_nce
from cmid.method.distillation import PrototypeLoss, match_cells, temperature_at
from cmid.method.reconstruction import focal_frequency, reconstruction_loss
from cmid.method.teacher import momentum_at, update

folder = os.environ.get("CMID_PARITY")
pytestmark = pytest.mark.skipif(not folder, reason="CMID_PARITY does not name a folder of reference numbers")
precisions = pytest.mark.parametrize("precision", ["f32", "f64"])
dtypes = {"f32": torch.float32, "f64": torch.float64}


@cache
def reference(name):
    with np.load(Path(folder) / f"{name}.npz", allow_pickle=False) as f:
        return {k: f[k] for k in f.files}


def tensor(data, key, precision="f32"):
    array = torch.from_numpy(data[key])
    return array.to(dtypes[precision]) if array.is_floating_point() else array


def close(ours, theirs, precision, gradient=False):
    ours, theirs = (torch.as_tensor(values, dtype=torch.float64) for values in (ours, theirs))
    assert ours.shape == theirs.shape
    tolerance = {"f64": 1e-9, "f32": 1e-4 if gradient else 2e-6}[precision]
    allowed = tolerance * theirs.abs().max()
    difference = (ours - theirs).abs().max()
    assert difference <= allowed, f"differs by {difference:.3g}, allowed {allowed:.3g}"


def value_and_slope(loss, leaf):
    "The loss of `leaf`, and its gradient."
    value = loss(leaf.requires_grad_(True))
    return value.detach(), torch.autograd.grad(value, leaf)[0]


# reconstruction.npz


@precisions
@pytest.mark.parametrize(
    "case,variant", [("c0", "default"), ("c1", "default"), ("c3", "default"), ("c1", "fft_weight0")]
)
def test_reconstruction(case, variant, precision):
    data, key = reference("reconstruction"), f"{case}/{variant}/{precision}"
    x = tensor(data, f"{case}/x", precision)
    r = tensor(data, f"{case}/x_rec", precision)
    masks = tensor(data, f"{case}/mask").bool()
    weight = 0.0 if variant == "fft_weight0" else 1.0
    loss, slope = value_and_slope(lambda r: reconstruction_loss(r, x, masks, weight), r)
    spatial, spatial_slope = value_and_slope(lambda r: reconstruction_loss(r, x, masks, 0.0), r)
    close(loss, data[f"{key}/loss"], precision)
    close(spatial, data[f"{key}/reg"], precision)
    if weight:
        close(loss - spatial, data[f"{key}/ffl"], precision)
    if f"{key}/grad" in data:
        close(slope, data[f"{key}/grad"], precision, gradient=True)
    if f"{key}/ffl_grad" in data:
        close(slope - spatial_slope, data[f"{key}/ffl_grad"], precision, gradient=True)


@precisions
@pytest.mark.parametrize("case", ["c0", "c1", "c3"])
def test_frequency_alone(case, precision):
    data, key = reference("reconstruction"), f"{case}/ffl_alone/{precision}"
    x = tensor(data, f"{case}/x", precision)
    r = tensor(data, f"{case}/x_rec", precision)
    loss, slope = value_and_slope(lambda r: focal_frequency(r, x), r)
    close(loss, data[f"{key}/loss"], precision)
    if f"{key}/grad" in data:
        close(slope, data[f"{key}/grad"], precision, gradient=True)


def test_reconstruction_of_the_target_itself():
    data = reference("reconstruction")
    x, masks = tensor(data, "c0/x"), tensor(data, "c0/mask").bool()
    loss, slope = value_and_slope(lambda r: reconstruction_loss(r, x, masks), x.clone())
    assert loss == data["degenerate_equal/loss"] == 0
    assert slope.abs().max() == data["degenerate_equal/grad_absmax"] == 0


# contrast.npz


@precisions
@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_info_nce(case, precision):
    data = reference("contrast")
    query, key, queue = (tensor(data, f"{case}/{name}", precision) for name in ("query", "key", "queue"))
    loss, slope = value_and_slope(lambda q: info_nce(q, key, queue, float(data[f"{case}/temperature"])), query)
    close(loss, data[f"{case}/{precision}/loss"], precision)
    close(slope, data[f"{case}/{precision}/grad_query"], precision, gradient=True)


def test_queue():
    data = reference("contrast")
    queue = KeyQueue(*data["queue/init"].shape)
    queue.keys.copy_(tensor(data, "queue/init"))
    for step, view in product(range(5), ("view", "org")):
        key = f"queue/step{step}_{view}"
        queue.enqueue(tensor(data, f"{key}/keys"))
        assert torch.equal(queue.keys, tensor(data, f"{key}/queue"))
        assert queue.ptr == data[f"{key}/ptr"][0]


# distillation.npz


@precisions
@pytest.mark.parametrize("calls", range(1, 6))
def test_prototype_loss(calls, precision):
    "The centre is carried from call to call: the last of `calls` calls is compared."
    data, loss = reference("distillation"), PrototypeLoss(64).to(dtypes[precision])
    for call in range(calls):
        key = f"call{call}"
        student = tensor(data, f"{key}/online", precision).mT[None]
        teacher = tensor(data, f"{key}/branch", precision).mT[None]
        temperature = temperature_at(int(data[f"{key}/epoch"]))
        loss_of = partial(loss, teacher=teacher, teacher_temperature=temperature)
        value, slope = value_and_slope(loss_of, student)
    close(value, data[f"{key}/{precision}/loss"], precision)
    close(slope[0].mT, data[f"{key}/{precision}/grad_online"], precision, gradient=True)
    close(loss.centre, data[f"{key}/{precision}/center_after"].flatten(), precision)


def test_temperature():
    schedule = reference("distillation")["temp_schedule"]
    close([temperature_at(epoch) for epoch in range(len(schedule))], schedule, "f64")


# matching.npz


@pytest.mark.parametrize("matches", [20, 7])
def test_matches(matches):
    data = reference("matching")
    student, teacher = match_cells(tensor(data, "rand_locations1"), tensor(data, "rand_locations2"), matches)
    assert torch.equal(student, tensor(data, f"rand_n{matches}/idx_filtered"))
    assert torch.equal(teacher, tensor(data, f"rand_n{matches}/idx_nn"))


def centres_at(centres, index):
    return centres.gather(1, index[..., None].expand(-1, -1, 2))


def distances(data, student, teacher):
    "Distance of each matched pair in px, sorted within an image."
    student_centres = centres_at(tensor(data, "locations1", "f64"), student)
    teacher_centres = centres_at(tensor(data, "locations2", "f64"), teacher)
    return (student_centres - teacher_centres).norm(dim=-1).sort(1).values


@pytest.mark.parametrize("matches", [20, 7, 1, 49])
def test_matches_with_ties(matches):
    "Which of two cells at the same distance is taken is arbitrary; the distances are not."
    data = reference("matching")
    ours = distances(data, *match_cells(tensor(data, "locations1"), tensor(data, "locations2"), matches))
    theirs = distances(data, *(tensor(data, f"n{matches}/idx_{name}") for name in ("filtered", "nn")))
    close(ours, theirs, "f32")


# teacher.npz


def test_momentum():
    data = reference("teacher")
    close([momentum_at(int(s), int(data["tau_max_steps"])) for s in data["tau_steps"]], data["tau"], "f64")


@pytest.mark.parametrize("step", range(1, 8))
def test_moving_average(step):
    "One published average at a time: the release takes the student of the step before."
    data = reference("teacher")
    teacher, student = nn.Module(), nn.Module()
    teacher.w = nn.Parameter(tensor(data, f"ema/it{step - 1}/teacher_w"))
    student.w = nn.Parameter(tensor(data, f"ema/it{step - 1}/student_w_after_opt"))
    close(momentum_at(step - 1, 8), data["ema/tau_used_per_iter"][step], "f64")
    update(teacher, student, momentum_at(step - 1, 8))
    close(teacher.w.detach(), data[f"ema/it{step}/teacher_w"], "f32")


# adan.npz


class OneLayer(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, x):
        return torch.tanh(F.linear(x, self.weight, self.bias))


@precisions
@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize("no_prox", [0, 1])
def test_adan(no_prox, decay, precision):
    "Five steps of the optimiser that training uses."
    data = reference("adan")
    weight, bias, x, y = (tensor(data, key, precision) for key in ("W0", "b0", "X", "Y"))
    layer = OneLayer(weight, bias)
    adan = create_optimizer_v2(
        layer, opt="adan", lr=0.01, weight_decay=decay, betas=(0.98, 0.92, 0.99), no_prox=bool(no_prox)
    )
    for step, lr in enumerate(data["lr_per_step"]):
        key = f"noprox{no_prox}_wd{decay}/{precision}/step{step}"
        for group in adan.param_groups:
            group["lr"] = float(lr)
        loss = F.mse_loss(layer(x), y)
        adan.zero_grad()
        loss.backward()
        adan.step()
        close(loss.detach(), data[f"{key}/loss_before"], precision)
        close(layer.weight.detach(), data[f"{key}/W"], precision)
        close(layer.bias.detach(), data[f"{key}/b"], precision)
