"Accuracy of matches: 1 for an encoder that knows where each cell is, chance for one with random features."

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
from cmid.method.views import RGB_MEAN, RGB_STD, TwoViews, View, cell_centres, stack_views
from cmid.viz.correspondence import (
    Matches,
    bootstrap_interval,
    cell_features,
    class_matches,
    class_pairs,
    correspondence_figure,
    correspondence_metrics,
    draw_views,
    ground_truth,
    match_features,
    match_views,
    view_pairs,
)

ROOT = Path(__file__).parents[2]
RUN_STAGE = """
import sys
from cmid.study.runner import run_notebook
notebook, out, init = sys.argv[1:]
run_notebook(notebook, out, dict(smoke=False, init=init))
"""


class KnowsItsPlace(nn.Module):
    "Features are the angles of a cell's mean (y, x), which the image holds."

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        angles = F.avg_pool2d(x, self.stride) * 3
        return [torch.cat([angles.cos(), angles.sin()], 1)]


class SameColours(TwoViews):
    "Both views without a change of colour."

    def colour(self, x, colours):
        return x


class SameView(SameColours):
    "The second view is the first."

    def render(self, images, draws):
        view, _ = super().render(images, draws).pair()
        return stack_views(view, view)


def coordinates(count, side):
    "Images whose two bands are y and x."
    ramp = np.linspace(0, 255, side).round().astype("uint8")
    image = np.stack(np.meshgrid(ramp, ramp, indexing="ij"))
    return np.repeat(image[None], count, 0)


def unscored(index):
    "Matches of given cells."
    return Matches(index, torch.zeros(index.shape), torch.ones(index.shape).bool())


@pytest.mark.parametrize("side, stride", [(128, 32), (128, 16), (224, 32), (224, 16), (64, 32)])
def test_an_encoder_that_knows_its_place_is_correct(side, stride):
    views = SameColours([0, 0], [1, 1], stride=stride)
    cells = (side // stride) ** 2
    matched = match_views(KnowsItsPlace(stride), coordinates(32, side), range(32), views, 0)
    metrics = correspondence_metrics(matched.matches, matched.truth)
    assert (metrics["images"], metrics["places"]) == (32, cells)
    assert 16 * cells < metrics["cells"] < 32 * cells
    assert metrics["accuracy"] > 0.995
    assert metrics["exact"] > 0.97
    assert metrics["moved"] > 0.99
    assert metrics["low"] > 0.98
    assert metrics["chance"] < 0.75
    assert metrics["error_px"] < 0.8 * stride  # a centre is within a cell of at most `stride` px


def test_flips_are_handled():
    "With crops of the entire image, views differ by their flips alone: a mirrored column or the same."
    views = SameColours([0, 0], [1, 1], scale=(1, 1), aspect=(1, 1))
    matched = match_views(KnowsItsPlace(32), coordinates(40, 128), range(40), views, 0)
    flipped = (matched.a.centres[:, 0, 1] > 64) != (matched.b.centres[:, 0, 1] > 64)
    assert 5 < flipped.sum() < 35
    same = torch.arange(16)
    mirrored = same.view(4, 4).flip(1).flatten()
    assert torch.equal(matched.matches.index, torch.where(flipped[:, None], mirrored, same))
    assert matched.matches.mutual.all()
    metrics = correspondence_metrics(matched.matches, matched.truth)
    assert metrics["accuracy"] == metrics["exact"] == metrics["moved"] == 1
    assert metrics["error_px"] == 0
    assert metrics["chance"] == 1 / 4
    assert metrics["position"] == pytest.approx(1 - float(flipped.double().mean()) / 2)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("bands", [1, 13])
def test_identical_views_are_matched_with_themselves(name, bands):
    torch.manual_seed(0)
    encoder = backbones.create(name, bands, 64).eval()
    views = SameView([0.5] * bands, [0.25] * bands, stride=encoder.strides[-1])
    images = np.random.default_rng(0).integers(0, 256, (1, bands, 64, 64), "uint8")
    matched = match_views(encoder, images, [7], views, 0)
    assert torch.equal(matched.matches.index[0], torch.arange(matched.size[0] ** 2))
    assert torch.allclose(matched.matches.cosine, torch.ones(1), atol=1e-5)
    metrics = correspondence_metrics(matched.matches, matched.truth)
    assert metrics["accuracy"] == metrics["position"] == 1
    assert metrics["moved"] is None
    assert json.loads(json.dumps(metrics)) == metrics


def random_geometry(batch=60, n=5, size=(128, 96)):
    "Ground truth of random views; the centres of their cells; the boxes of view B."
    g = torch.Generator().manual_seed(0)
    boxes = [random_boxes(batch, size, generator=g) for _ in "ab"]
    flips = [torch.rand(batch, generator=g) < 0.5 for _ in "ab"]
    a, b = (cell_centres(box, flip, (n, n + 1)) for box, flip in zip(boxes, flips))
    return ground_truth(a, b, (n, n + 1)), a, b, boxes[1]


def test_ground_truth_by_brute_force():
    truth, a, b, boxes = random_geometry(batch=12)
    for i in range(12):
        top, left, h, w = boxes[i].tolist()
        cell_h, cell_w = h / 5, w / 6
        for j, (y, x) in enumerate(a[i].tolist()):
            inside_b = top - 1e-3 <= y <= top + h + 1e-3 and left - 1e-3 <= x <= left + w + 1e-3
            assert truth.visible[i, j] == inside_b
            dy, dx = y - b[i, :, 0].numpy(), x - b[i, :, 1].numpy()
            assert np.allclose(truth.pixels[i, j], np.hypot(dy, dx), atol=1e-3)
            assert np.array_equal(truth.near[i, j].numpy(), np.hypot(dy / cell_h, dx / cell_w) <= 1 + 1e-4)
            inside_cell = (np.abs(dy) <= cell_h / 2 + 1e-3) & (np.abs(dx) <= cell_w / 2 + 1e-3)
            assert np.array_equal(truth.holds[i, j].numpy(), inside_cell)
    assert (truth.holds <= truth.near).all()
    assert 0.2 < truth.visible.float().mean() < 0.95


def test_chance_is_the_mean_of_random_matches():
    truth, *_ = random_geometry()
    g = torch.Generator().manual_seed(1)
    cells = truth.near.shape[2]
    draws = [
        correspondence_metrics(unscored(torch.randint(cells, truth.visible.shape, generator=g)), truth)
        for _ in range(40)
    ]
    chances = dict(accuracy="chance", moved="moved_chance", exact="exact_chance", error_px="error_px_chance")
    for name, chance in chances.items():
        values = np.array([metrics[name] for metrics in draws])
        assert abs(values.mean() - draws[0][chance]) < 4 * values.std() / 40**0.5, name
    random_features = torch.randn(2, 60, 64, 5, 6, generator=g)
    metrics = correspondence_metrics(match_features(*random_features), truth)
    assert abs(metrics["accuracy"] - metrics["chance"]) < 0.04


def test_position_is_the_accuracy_of_the_same_row_and_column():
    truth, *_ = random_geometry()
    batch, cells = truth.visible.shape
    metrics = correspondence_metrics(unscored(torch.arange(cells).expand(batch, cells)), truth)
    assert metrics["accuracy"] == metrics["position"] > metrics["chance"]
    assert metrics["moved"] == 0


def test_invisible_cells_do_not_count():
    truth, *_ = random_geometry()
    g = torch.Generator().manual_seed(2)
    index, other = (torch.randint(truth.near.shape[2], truth.visible.shape, generator=g) for _ in "ab")
    other = torch.where(truth.visible, index, other)
    assert not torch.equal(index, other)
    assert correspondence_metrics(unscored(index), truth) == correspondence_metrics(unscored(other), truth)


def test_the_bootstrap_resamples_images():
    cells = np.full(300, 50)
    correct = np.round(np.random.default_rng(0).beta(2, 2, 300) * 50)
    low, high = bootstrap_interval(correct, cells, 3)
    mean = correct.sum() / cells.sum()
    half = 1.96 * (correct / 50).std() / 300**0.5
    half_of_independent_cells = 1.96 * (mean * (1 - mean) / cells.sum()) ** 0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert low < mean < high
    assert half > 2.5 * half_of_independent_cells
    assert bootstrap_interval(correct, cells, 3) == (low, high)
    assert bootstrap_interval(correct, cells, 4) != (low, high)
    assert bootstrap_interval([0, 2, 0], [0, 4, 0]) == (0.5, 0.5)  # resamples without a visible cell are left out


def test_views_do_not_depend_on_the_batch():
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), "uint8")
    views, numbers = TwoViews(RGB_MEAN, RGB_STD), [4, 9, 2]
    together = draw_views(images, numbers, views, 5)
    assert isinstance(together[0], View)
    for i, number in enumerate(numbers):
        for one, batch in zip(draw_views(images[i : i + 1], [number], views, 5), together):
            assert torch.equal(one.images[0], batch.images[i])
            assert torch.equal(one.centres[0], batch.centres[i])


def test_class_pairs():
    labels = np.repeat(np.arange(10), 5)
    labels[7] = -1
    pairs = class_pairs(labels, 4, 0)
    assert [labels[i] for i, _ in pairs] == [0, 3, 6, 9]
    assert [labels[j] for _, j in pairs] == [0, 3, 6, 9]
    assert all(i < j for i, j in pairs)
    assert class_pairs(labels, 4, 0) == pairs
    assert class_pairs(labels, 4, 1) != pairs


def test_bad_input_is_named():
    encoder = backbones.create("resnet18", img_size=64).eval()
    views = TwoViews(RGB_MEAN, RGB_STD)
    with pytest.raises(CmidError, match="1 x 1 places.*prepare.side"):
        match_views(encoder, np.zeros((2, 3, 32, 32), "uint8"), [0, 1], views, 0)
    with pytest.raises(CmidError, match="bands"):
        match_views(encoder, np.zeros((2, 4, 64, 64), "uint8"), [0, 1], views, 0)
    with torch.no_grad():
        encoder.model.conv1.weight.fill_(float("nan"))
    with pytest.raises(CmidError, match="not finite"):
        cell_features(encoder, torch.zeros(1, 3, 64, 64))


def as_colours(x):
    return x[:, [0, 1, 1]]


@pytest.fixture(scope="module")
def best_match_is_wrong():
    "Two images whose matches are all correct but one, which has the largest cosine."
    matched = match_views(KnowsItsPlace(32), coordinates(2, 128), range(2), SameColours([0, 0], [1, 1]), 0)
    index, cosine = matched.matches.index.clone(), matched.matches.cosine.clone()
    first_visible = matched.truth.visible[0].nonzero()[0, 0]
    index[0, first_visible] = (~matched.truth.near[0, first_visible]).nonzero()[0, 0]
    cosine[0, first_visible] = 2.0
    return matched._replace(matches=matched.matches._replace(index=index, cosine=cosine))


def test_pairs_of_views(best_match_is_wrong):
    visible = int(best_match_is_wrong.truth.visible[0].sum())
    (pair,) = view_pairs(best_match_is_wrong, [0], 4, as_colours, ["river"])
    assert pair.title == f"river: {visible - 1} of {visible} cells correct"
    assert pair.correct.tolist() == [False, True, True, True]


def test_the_figure_shows_wrong_matches_by_more_than_colour(best_match_is_wrong):
    metrics = correspondence_metrics(best_match_is_wrong.matches, best_match_is_wrong.truth)
    pairs = view_pairs(best_match_is_wrong, [0], 4, as_colours, ["river"])
    others = class_matches(KnowsItsPlace(32), torch.rand(4, 2, 128, 128), 3, as_colours, ["a", "b"])
    fig = correspondence_figure(pairs, others, metrics, "teacher")
    assert len(fig.axes) == 3
    assert fig.get_figwidth() < 4.5

    wrong, correct, *rest = fig.axes[0].lines
    assert len(rest) == 2
    assert wrong.get_color() != correct.get_color()
    assert wrong.get_marker() != correct.get_marker()
    assert wrong.get_linestyle() != correct.get_linestyle()
    x, y = correct.get_xdata(), correct.get_ydata()
    assert np.allclose([y[0], x[0], y[-1], x[-1] - 136], pairs[0].ends[1])  # 136: 128 px and a gap of 6 %

    title = fig._suptitle.get_text()
    for words in (f"{metrics['accuracy']:.0%}", f"{metrics['chance']:.0%}", "teacher"):
        assert words in title
    without_classes = correspondence_figure(pairs, [], metrics, "student")
    assert "no class has two images" in without_classes.legends[0].get_title().get_text()


@pytest.mark.slow
def test_stage_without_classes_and_of_the_teacher(tmp_path):
    from cmid.study.smoke import smoke_study

    study = smoke_study(prepared=["pool"], models=["cmid-resnet18"])
    parameters = study / "params.yaml"
    before, section = parameters.read_text().split("correspondence:", 1)
    section = section.replace("branch: student", "branch: teacher", 1).replace("dataset: scenes", "dataset: pool", 1)
    parameters.write_text(f"{before}correspondence:{section}")

    notebook = str(ROOT / "nbs/pipeline/correspondence.ipynb")
    command = [sys.executable, "-c", RUN_STAGE, notebook, str(tmp_path / "out.ipynb"), "cmid-resnet18"]
    environment = os.environ | dict(OMP_NUM_THREADS="1", CMID_ROOT=str(study), PYTHONPATH=str(ROOT))
    subprocess.run(command, cwd=study, check=True, env=environment)
    results = study / "results/correspondence/cmid-resnet18"
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["branch"] == "teacher"
    assert (metrics["images"], metrics["class_pairs"], metrics["places"]) == (4, 0, 4)
    assert metrics["low"] <= metrics["accuracy"] <= metrics["high"]
    assert (results / "figure.png").stat().st_size > 10_000
