"The accuracy of matches is what the geometry says: certain for an encoder that knows where it is, chance for one that does not."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmid.base.errors import CmidError
from cmid.method import backbones
from cmid.method.images import random_boxes
from cmid.method.views import RGB_MEAN, RGB_STD, TwoViews, cell_centres
from cmid.viz.correspondence import (
    Matches,
    bootstrap,
    cell_features,
    class_matches,
    class_pairs,
    correspondence_figure,
    correspondence_metrics,
    draw_views,
    find,
    match_features,
    true_places,
    view_pairs,
)

ROOT = Path(__file__).parents[2]


class Knows(nn.Module):
    "Features are the angles of a cell's mean (y, x), which the image holds."

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        a = F.avg_pool2d(x, self.stride) * 3
        return [torch.cat([a.cos(), a.sin()], 1)]


class Weak(TwoViews):
    "Both views without colour change; `same`: the second is the first."

    same = False

    def __call__(self, x, g):
        x = x.float() / 255
        a = self._view(x, g, lambda o: o)
        return a, a if self.same else self._view(x, g, lambda o: o)


def atlas(n, side):
    "Images of two bands that say where each pixel is."
    ramp = np.linspace(0, 255, side).round().astype("uint8")
    return np.broadcast_to(
        np.stack([np.broadcast_to(ramp[:, None], (side, side)), np.broadcast_to(ramp, (side, side))]),
        (n, 2, side, side),
    ).copy()


@pytest.mark.parametrize("side, stride", [(128, 32), (128, 16), (224, 32), (224, 16), (64, 32)])
def test_an_encoder_that_knows_is_right(side, stride):
    views = Weak([0, 0], [1, 1], stride=stride)
    n = side // stride
    found = find(Knows(stride), atlas(32, side), range(32), views, 0)
    s = correspondence_metrics(found.matches, found.truth)
    assert s["images"] == 32 and s["places"] == n * n and 16 * n * n < s["cells"] < 32 * n * n
    assert s["accuracy"] > 0.995 and s["exact"] > 0.97 and s["moved"] > 0.99 and s["low"] > 0.98
    assert s["chance"] < 0.75 and s["error_px"] < 0.8 * stride  # a centre is within a cell of at most `stride` px


def test_flips_are_handled():
    "With crops of the whole image, views differ by their flips alone: a mirrored column or the same."
    found = find(Knows(32), atlas(40, 128), range(40), Weak([0, 0], [1, 1], scale=(1, 1), aspect=(1, 1)), 0)
    flipped = (found.a.centres[:, 0, 1] > 64) != (found.b.centres[:, 0, 1] > 64)
    assert 5 < flipped.sum() < 35
    same, mirrored = torch.arange(16), torch.arange(16).view(4, 4).flip(1).flatten()
    assert (
        torch.equal(found.matches.index, torch.where(flipped[:, None], mirrored, same)) and found.matches.mutual.all()
    )
    s = correspondence_metrics(found.matches, found.truth)
    share = float(flipped.double().mean())
    assert (
        s["accuracy"] == s["exact"] == s["moved"] == 1
        and s["error_px"] == 0
        and s["chance"] == 1 / 4
        and np.isclose(s["position"], 1 - share / 2)
    )


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("bands", [1, 13])
def test_identical_views_are_matched_with_themselves(name, bands):
    torch.manual_seed(0)
    encoder = backbones.create(name, bands, 64).eval()
    views = Weak([0.5] * bands, [0.25] * bands, stride=encoder.strides[-1])
    views.same = True
    images = np.random.default_rng(0).integers(0, 256, (1, bands, 64, 64), "uint8")
    found = find(encoder, images, [7], views, 0)
    assert torch.equal(found.matches.index[0], torch.arange(found.size[0] ** 2)) and torch.allclose(
        found.matches.cosine, torch.ones(1), atol=1e-5
    )
    s = correspondence_metrics(found.matches, found.truth)
    assert s["accuracy"] == s["position"] == 1 and s["moved"] is None and json.dumps(s)


def geometry(B=60, n=5, size=(128, 96), seed=0):
    "Truth of random views, by brute force beside."
    g = torch.Generator().manual_seed(seed)
    boxes = [random_boxes(B, size, generator=g) for _ in "ab"]
    flips = [torch.rand(B, generator=g) < 0.5 for _ in "ab"]
    a, b = (cell_centres(o, f, (n, n + 1)) for o, f in zip(boxes, flips))
    return true_places(a, b, (n, n + 1)), a, b, boxes[1]


def test_truth_by_brute_force():
    truth, a, b, boxes = geometry(B=12)
    for i in range(12):
        top, left, h, w = boxes[i].tolist()
        sy, sx = h / 5, w / 6
        for j, (y, x) in enumerate(a[i].tolist()):
            assert truth.visible[i, j] == (top - 1e-3 <= y <= top + h + 1e-3 and left - 1e-3 <= x <= left + w + 1e-3)
            d = np.hypot((y - b[i, :, 0].numpy()) / sy, (x - b[i, :, 1].numpy()) / sx)
            assert np.array_equal(truth.near[i, j].numpy(), d <= 1 + 1e-4) and np.allclose(
                truth.pixels[i, j], np.hypot(*(a[i, j] - b[i]).numpy().T), atol=1e-3
            )
            inside = (np.abs(y - b[i, :, 0].numpy()) <= sy / 2 + 1e-3) & (
                np.abs(x - b[i, :, 1].numpy()) <= sx / 2 + 1e-3
            )
            assert np.array_equal(truth.holds[i, j].numpy(), inside)
    assert (
        truth.holds <= truth.near
    ).all() and 0.2 < truth.visible.float().mean() < 0.95  # who finds the very cell is within one cell


def test_chance_is_what_random_matches_give():
    truth, *_ = geometry()
    g = torch.Generator().manual_seed(1)
    shape = truth.visible.shape
    M = truth.near.shape[2]
    draws = [
        correspondence_metrics(
            Matches(torch.randint(M, shape, generator=g), torch.zeros(shape), torch.ones(shape).bool()), truth
        )
        for _ in range(40)
    ]
    for k, c in (
        ("accuracy", "chance"),
        ("moved", "moved_chance"),
        ("exact", "exact_chance"),
        ("error_px", "error_px_chance"),
    ):
        x = np.array([o[k] for o in draws])
        assert abs(x.mean() - draws[0][c]) < 4 * x.std() / 40**0.5, k
    random = match_features(*torch.randn(2, 60, 64, 5, 6, generator=g))
    s = correspondence_metrics(random, truth)
    assert abs(s["accuracy"] - s["chance"]) < 0.04


def test_position_is_matching_in_place():
    truth, *_ = geometry()
    shape = truth.visible.shape
    stay = Matches(torch.arange(shape[1]).expand(shape), torch.zeros(shape), torch.ones(shape).bool())
    s = correspondence_metrics(stay, truth)
    assert s["accuracy"] == s["position"] > s["chance"] and s["moved"] == 0


def test_invisible_cells_do_not_count():
    truth, *_ = geometry()
    shape, g = truth.visible.shape, torch.Generator().manual_seed(2)
    index = torch.randint(truth.near.shape[2], shape, generator=g)
    other = torch.where(truth.visible, index, torch.randint(truth.near.shape[2], shape, generator=g))
    assert not torch.equal(index, other)
    a, b = (
        correspondence_metrics(Matches(o, torch.zeros(shape), torch.ones(shape).bool()), truth) for o in (index, other)
    )
    assert a == b


def test_bootstrap_is_over_images():
    rng = np.random.default_rng(0)
    share = rng.beta(2, 2, 300)
    right = np.round(share * 50)
    low, high = bootstrap(right, np.full(300, 50), 3)
    half = 1.96 * (right / 50).std() / 300**0.5
    mean = right.sum() / 15000
    assert (
        abs((high - low) / 2 / half - 1) < 0.1
        and low < mean < high
        and half > 2.5 * 1.96 * (mean * (1 - mean) / 15000) ** 0.5
    )  # wider than independent cells'
    assert bootstrap(right, np.full(300, 50), 3) == (low, high) != bootstrap(right, np.full(300, 50), 4)
    assert bootstrap([0, 2, 0], [0, 4, 0]) == (0.5, 0.5)  # draws without a visible cell say nothing


def test_views_are_pretrainings_and_do_not_depend_on_the_batch():
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), "uint8")
    views = TwoViews(RGB_MEAN, RGB_STD)
    a, b = draw_views(images, [4, 9, 2], views, 5)
    for i, k in enumerate((4, 9, 2)):
        for one, all_ in zip(draw_views(images[i : i + 1], [k], views, 5), (a, b)):
            assert torch.equal(one.images[0], all_.images[i]) and torch.equal(one.centres[0], all_.centres[i])
    assert type(a).__name__ == "View" and a.images.shape == (3, 3, 64, 64)


def test_class_pairs():
    labels = np.repeat(np.arange(10), 5)
    labels[7] = -1
    pairs = class_pairs(labels, 4, 0)
    assert (
        [labels[i] for i, _ in pairs] == [0, 3, 6, 9]
        and all(labels[i] == labels[j] and i < j for i, j in pairs)
        and pairs == class_pairs(labels, 4, 0) != class_pairs(labels, 4, 1)
    )


def test_bad_input_is_named():
    encoder = backbones.create("resnet18", img_size=64).eval()
    views = TwoViews(RGB_MEAN, RGB_STD)
    images = np.zeros((2, 3, 32, 32), "uint8")
    with pytest.raises(CmidError, match="1 x 1 places.*prepare.side"):
        find(encoder, images, [0, 1], views, 0)
    with pytest.raises(CmidError, match="bands"):
        find(encoder, np.zeros((2, 4, 64, 64), "uint8"), [0, 1], views, 0)
    with torch.no_grad():
        encoder.model.conv1.weight.fill_(float("nan"))
    with pytest.raises(CmidError, match="not finite"):
        cell_features(encoder, torch.zeros(1, 3, 64, 64))


def test_the_figure_shows_right_and_wrong_and_not_by_colour_alone():
    views = Weak([0, 0], [1, 1])
    found = find(Knows(32), atlas(2, 128), range(2), views, 0)
    index = found.matches.index.clone()
    cosine = found.matches.cosine.clone()
    first = found.truth.visible[0].nonzero()[0, 0]
    index[0, first] = (~found.truth.near[0, first]).nonzero()[0, 0]
    cosine[0, first] = 2.0  # the best one is wrong
    found = found._replace(matches=found.matches._replace(index=index, cosine=cosine))
    s = correspondence_metrics(found.matches, found.truth)
    n = int(found.truth.visible[0].sum())
    pairs = view_pairs(found, [0], 4, lambda o: o[:, [0, 1, 1]], ["river"])
    assert pairs[0].title == f"river: {n - 1} of {n} cells right" and pairs[0].ok.tolist() == [False, True, True, True]
    others = class_matches(Knows(32), torch.rand(4, 2, 128, 128), 3, lambda o: o, ["a", "b"])
    fig = correspondence_figure(pairs, others, s, "teacher")
    lines = fig.axes[0].lines
    assert len(lines) == 4 and len(fig.axes) == 3 and fig.get_figwidth() < 4.5
    for k in ("get_color", "get_marker", "get_linestyle"):
        assert getattr(lines[0], k)() != getattr(lines[1], k)()
    x, y = lines[1].get_xdata(), lines[1].get_ydata()
    assert np.allclose([y[0], x[0], y[-1], x[-1] - 136], pairs[0].ends[1])  # 136: a gap of 6 %
    said = fig._suptitle.get_text()
    assert f"{s['accuracy']:.0%}" in said and f"{s['chance']:.0%}" in said and "teacher" in said
    assert "no class has two images" in correspondence_figure(pairs, [], s, "student").legends[0].get_title().get_text()


def test_stage_without_classes_and_with_a_teacher(tmp_path):
    "The stage on a pool without classes, of the teacher; then again, with the same numbers."
    from cmid.study.smoke import smoke_study

    at = smoke_study(prepared=["pool"], models=["cmid-resnet18"])
    text = (at / "params.yaml").read_text()
    head, tail = text.split("correspondence:", 1)
    (at / "params.yaml").write_text(
        head
        + "correspondence:"
        + tail.replace("branch: student", "branch: teacher", 1).replace("dataset: scenes", "dataset: pool", 1)
    )
    run = lambda: subprocess.run(
        [
            sys.executable,
            "-c",
            f"from cmid.study.stage import run_notebook; run_notebook({str(ROOT / 'nbs/pipeline/correspondence.ipynb')!r}, {str(tmp_path / 'out.ipynb')!r}, dict(smoke=False, init='cmid-resnet18'))",
        ],
        cwd=at,
        check=True,
        env=os.environ | dict(OMP_NUM_THREADS="1", CMID_ROOT=str(at), PYTHONPATH=str(ROOT)),
    )
    run()
    first = (at / "results/correspondence/cmid-resnet18/metrics.json").read_text()
    m = json.loads(first)
    assert (
        m["branch"] == "teacher"
        and m["images"] == 4
        and m["class_pairs"] == 0
        and m["places"] == 4
        and m["low"] <= m["accuracy"] <= m["high"]
    )
    assert (at / "results/correspondence/cmid-resnet18/figure.png").stat().st_size > 10_000
