"Probes: the whole test split is evaluated, and no test label is used."

import json

import numpy as np
import pytest
import torch
from torch import nn

from cmid.base.errors import CmidError
from cmid.base.figures import accuracy_figure
from cmid.base.scores import unpack_answers, wilson
from cmid.method import backbones
from cmid.settings.probe import Probe
from cmid.tasks import probe as module
from cmid.tasks.probe import fit_linear, probe, recall_figure
from cmid.tasks.scene_classes import pooled_features, subsample
from cmid.train import knn
from cmid.train.knn import knn_predict
from tests.tools.scenes import paint_scenes, prepare_scenes

SETTINGS = Probe(
    train="train",
    test="test",
    neighbours=5,
    metric="cosine",
    vote="weighted",
    scaler="none",
    temperature=0.07,
    fractions=[1.0, 0.1],
    regularisation=[0.1, 10.0],
    batch=4,
)


class MeanColour(nn.Module):
    "The image as its own map: features are normalised mean colours."

    def forward(self, images):
        return [images]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    "3 classes of 15 images: 10 to train, 5 to test; colours that hardly overlap."
    folder = tmp_path_factory.mktemp("scenes")
    return prepare_scenes(folder, paint_scenes(folder, 15, train=10, noise=(12, 20)))


class Memory:
    "What `probe` reads of a prepared dataset, in memory."

    folder, mean, std = "fake", [0.5], [0.25]

    def __init__(self, images, labels, train, test, names):
        self.images, self.labels, self.classes = images, labels, names
        self.splits = dict(train=train, test=test)

    def __getitem__(self, rows):
        return self.images[rows]

    def source(self, i):
        return f"{i}.png"


# --- kNN


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (7, 0.07), (40, 0.5), (500, 0.07), (9, 1e-3)])
def test_knn_is_its_formula(k, temperature):
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 4, 60), rng.integers(0, 4, 30)
    centres = rng.normal(size=(4, 6))
    x, query = centres[labels] + rng.normal(size=(60, 6)), centres[truth] + rng.normal(size=(30, 6))
    cosines = (query @ x.T) / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(x, axis=1)
    nearest = np.argsort(-cosines, 1)[:, :k]
    weights = np.exp((np.take_along_axis(cosines, nearest, 1) - cosines.max(1, keepdims=True)) / temperature)
    votes = np.stack([(weights * (labels[nearest] == c)).sum(1) for c in range(4)], 1)
    predicted = knn_predict(torch.tensor(x), labels, torch.tensor(query), 4, k, temperature)
    assert predicted.tolist() == votes.argmax(1).tolist()


def test_knn_is_computed_in_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, query = torch.randn(50, 8, generator=generator), torch.randn(33, 8, generator=generator)
    labels = torch.arange(50, dtype=torch.int32) % 3
    whole = knn_predict(x, labels, query, 3)
    sizes, vote = [], knn._vote

    def watched(cosines, *rest):
        sizes.append(cosines.numel())
        return vote(cosines, *rest)

    monkeypatch.setattr(knn, "SIMILARITIES", 120)
    monkeypatch.setattr(knn, "_vote", watched)
    assert torch.equal(knn_predict(x, labels, query, 3), whole)
    assert max(sizes) <= 120
    assert sum(sizes) == 50 * 33


# --- the linear classifier


def clusters(n, seed, channels=20, classes=3):
    y = np.arange(n) % classes
    return np.random.default_rng(seed).normal(size=(n, channels)) + 3 * np.eye(channels)[y], y


def weak_channels(n, seed):
    y = np.arange(n) % 2
    return np.random.default_rng(seed).normal(size=(n, 50)) + 0.4 * y[:, None], y


def test_a_stratified_fifth_is_held_out(monkeypatch):
    "C is rated on 20 of 100 images, in proportion; the last fit has all 100."
    seen, fit, rate = [], module._fit, module._rating

    def watched_fit(x, y, C):
        seen.append(len(y))
        return fit(x, y, C)

    def watched_rating(x, y, held, C):
        seen.append(np.bincount(y[held]).tolist())
        return rate(x, y, held, C)

    monkeypatch.setattr(module, "_fit", watched_fit)
    monkeypatch.setattr(module, "_rating", watched_rating)
    y = np.repeat([0, 1], [75, 25])
    x = np.random.default_rng(0).normal(size=(100, 4)) + y[:, None]
    assert fit_linear(x, y, [0.1, 1.0]).held_out == 20
    assert seen == [[15, 5], 80] * 2 + [100]


def test_the_better_penalty_is_chosen():
    "50 channels with a little information each need a strong penalty: it is chosen in any order of the grid."
    x, y = weak_channels(120, 2)
    query, truth = weak_channels(2000, 3)
    strong, weak = ((fit_linear(x, y, [C]).predict(query) == truth).mean() for C in (0.01, 100.0))
    assert strong > weak + 0.02
    assert fit_linear(x, y, [0.01, 100.0]).C == 0.01
    assert fit_linear(x, y, [100.0, 0.01]).C == 0.01


def test_the_scale_of_channels_does_not_matter():
    x, y = clusters(120, 0)
    query, _ = clusters(300, 1)
    scale = np.geomspace(1e-3, 1e3, 20)
    expected = fit_linear(x, y, [1.0]).predict(query)
    predicted = fit_linear(x * scale + 7, y, [1.0]).predict(query * scale + 7)
    assert (predicted == expected).mean() > 0.99


def test_constant_channels_do_no_harm():
    x, y = clusters(60, 0)
    x[:, 5:9] = 0.0
    assert (fit_linear(torch.tensor(x), y, [0.1, 1.0]).predict(x) == y).mean() > 0.9


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 5, 9)])
def test_nothing_is_held_out_where_a_class_has_one_image(counts):
    y = np.repeat([0, 1, 2], counts)
    fit = fit_linear(clusters(len(y), 0)[0], y, [0.01, 2.0, 30.0])
    assert (fit.C, fit.held_out, fit.converged) == (2.0, 0, True)


def test_two_images_a_class_are_enough_to_choose():
    x, y = clusters(6, 0)
    assert fit_linear(x, y, [0.1, 1.0]).held_out == 3


def test_classes_may_be_missing():
    "Labels 1 and 4 of five: predictions are 1 and 4."
    x, y = clusters(80, 0, classes=2)
    assert set(fit_linear(x, np.array([1, 4])[y], [0.1, 1.0]).predict(x)) == {1, 4}


def test_a_fit_that_does_not_converge_is_reported(monkeypatch, recwarn):
    monkeypatch.setattr(module, "MAX_ITERATIONS", 2)
    x, y = clusters(120, 0)
    assert not fit_linear(x, y, [100.0]).converged
    assert not len(recwarn)


def test_one_class_is_an_error():
    with pytest.raises(CmidError, match="one class"):
        fit_linear(np.zeros((4, 2)), [3] * 4, [1.0])


# --- the whole probe


def run(data, settings=SETTINGS, seed=0):
    return probe(MeanColour(), data.mean, data.std, data, settings, seed)


def test_results_agree_with_each_other(scenes):
    result, answers = run(scenes)
    truth = scenes.labels[scenes.splits["test"]]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["classes"], result["test_images"], result["chance"]) == (3, 15, pytest.approx(1 / 3))
    assert list(result["knn"]) == list(result["linear"]) == ["0.1", "1.0"]
    assert [o["train_images"] for o in result["knn"].values()] == [3, 30]
    assert [o["k"] for o in result["knn"].values()] == [3, 5]
    assert [o["held_out"] for o in result["linear"].values()] == [0, 6]
    assert all(o["C"] in (0.1, 10.0) for o in result["linear"].values())
    for score in (*result["knn"].values(), *result["linear"].values()):
        assert score["accuracy"] == score["correct"] / 15
        assert (score["low"], score["high"]) == wilson(score["correct"], 15)
    assert result["linear"]["1.0"]["correct"] > 12
    for kind in ("knn", "linear"):
        for share, score in result[kind].items():
            assert unpack_answers(answers[kind][share], 15).sum() == score["correct"]
    assert result["recall_at"] == "1.0"
    correct = unpack_answers(answers["linear"]["1.0"], 15)
    for c, name in enumerate(scenes.classes):
        assert result["recall"][name] == pytest.approx(correct[truth == c].mean())


def test_answers_name_the_scored_list(scenes):
    "The digest is the same whatever scores the list, and another where a name, a label or the order differs."

    def listed(**changes):
        images, labels = np.zeros((6, 1, 32, 32), "uint8"), np.array([0, 1, 0, 1, 0, 1])
        values = dict(images=images, labels=labels, train=np.arange(2), test=np.arange(2, 6), names=["a", "b"])
        return run(Memory(**values | changes))[1]["images"]

    same = listed()
    assert same == listed(images=np.full((6, 1, 32, 32), 255, "uint8")) == listed(labels=np.array([1, 0, 0, 1, 0, 1]))
    assert len({same, listed(labels=np.array([0, 1, 1, 1, 0, 1])), listed(test=np.array([3, 2, 4, 5]))}) == 3
    assert len({same, listed(names=["a", "c"]), listed(test=np.arange(2, 5))}) == 3
    assert run(scenes)[1]["images"] != same


def test_features_may_be_scaled_before_the_vote():
    "Only the small channel knows the class: distances see it after scaling alone."
    rng = np.random.default_rng(0)
    y = np.arange(80) % 2
    images = np.stack([rng.integers(0, 256, 80), 2 * y], 1)[:, :, None, None]
    images = np.tile(images, (1, 1, 32, 32)).astype("uint8")
    data = Memory(images, y, np.arange(40), np.arange(40, 80), ["a", "b"])
    data.mean, data.std = [0.5, 0.5], [0.25, 0.25]
    near = dict(metric="euclidean", vote="majority", fractions=[1.0])
    plain, scaled = (run(data, SETTINGS.model_copy(update=near | dict(scaler=o)))[0] for o in ("none", "standard"))
    assert plain["knn"]["1.0"]["accuracy"] < 0.8 < scaled["knn"]["1.0"]["accuracy"]
    assert plain["linear"] == scaled["linear"]


def test_every_batch_size_evaluates_the_whole_test_split(scenes):
    assert run(scenes, SETTINGS.model_copy(update=dict(batch=1))) == run(
        scenes, SETTINGS.model_copy(update=dict(batch=11))
    )


def test_the_same_seed_gives_the_same_numbers(scenes):
    torch.manual_seed(0)
    encoder = backbones.create("resnet18", img_size=32)
    runs = [json.dumps(probe(encoder, scenes.mean, scenes.std, scenes, SETTINGS, seed=3)[0]) for _ in range(2)]
    assert runs[0] == runs[1]


def test_random_labels_give_the_accuracy_of_chance():
    "The intervals of both probes contain 1/4."
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (600, 1, 32, 32), "uint8")
    result, _ = run(Memory(images, rng.integers(0, 4, 600), np.arange(200), np.arange(200, 600), list("abcd")))
    for score in (result["knn"]["1.0"], result["linear"]["1.0"]):
        assert score["low"] < 0.25 < score["high"]


class GreyLevels(Memory):
    "Three classes of 100 images, told apart by their grey level, with some overlap."

    mean, std = [0.5] * 2, [0.25] * 2

    def __init__(self, train):
        rng = np.random.default_rng(0)
        labels = np.arange(300) % 3
        grey = (60 + 40 * labels + rng.normal(0, 25, 300)).clip(0, 255).astype("uint8")
        images = np.full((300, 2, 32, 32), 128, "uint8")
        images[:, 0] = grey[:, None, None]
        super().__init__(images, labels, train, np.arange(200, 300), list("abc"))


def test_a_fraction_of_the_labels_is_all_that_is_used():
    "Both probes at 10 % are those of that tenth alone."
    data = GreyLevels(np.arange(200))
    labels, truth = data.labels, data.labels[200:]
    kept = subsample(labels, np.arange(200), 0.1)
    assert len(kept) == 21
    features = pooled_features(MeanColour(), data.images, kept, data.mean, data.std)
    query = pooled_features(MeanColour(), data.images, np.arange(200, 300), data.mean, data.std)
    result, _ = run(data)
    by_neighbours = int((knn_predict(features, labels[kept], query, 3, 5).numpy() == truth).sum())
    assert result["knn"]["0.1"]["correct"] == by_neighbours != result["knn"]["1.0"]["correct"]
    fit = fit_linear(features, labels[kept], SETTINGS.regularisation)
    assert result["linear"]["0.1"]["correct"] == int((fit.predict(query) == truth).sum())
    assert result["linear"]["0.1"]["C"] == fit.C
    assert result["chance"] == 0.34


def test_the_order_of_a_split_does_not_matter_and_its_seed_does():
    result, _ = run(GreyLevels(np.arange(200)))
    assert run(GreyLevels(np.random.default_rng(1).permutation(200)))[0] == result
    others = [run(GreyLevels(np.arange(200)), seed=seed)[0] for seed in (1, 2, 3)]
    assert any(other["knn"]["0.1"] != result["knn"]["0.1"] for other in others)
    assert all(other["knn"]["1.0"] == result["knn"]["1.0"] for other in others)


def test_test_labels_change_no_prediction(scenes):
    "Each prediction is right under exactly one of the three ways to turn the test labels."
    train, test = scenes.splits["train"], scenes.splits["test"]
    results, answers = [], []
    for turn in range(3):
        labels = scenes.labels.copy()
        labels[test] = (labels[test] + turn) % 3
        data = Memory(scenes, labels, train, test, scenes.classes)
        data.mean, data.std = scenes.mean, scenes.std
        result, packed = run(data)
        results.append(result)
        answers.append([unpack_answers(packed[kind]["1.0"], 15) for kind in ("knn", "linear")])
    assert (np.sum(answers, 0) == 1).all()
    assert len({result["linear"]["1.0"]["C"] for result in results}) == 1
    assert results[1]["linear"]["1.0"]["accuracy"] < 0.2 < results[0]["linear"]["1.0"]["accuracy"]


def test_a_class_without_test_images_has_no_recall():
    images = np.broadcast_to(np.arange(40, dtype="uint8").reshape(40, 1, 1, 1), (40, 1, 32, 32))
    result, _ = run(Memory(images, np.arange(40) // 14, np.arange(0, 40, 2), np.arange(1, 28, 2), list("abc")))
    assert result["recall"]["c"] is None
    assert json.dumps(result, allow_nan=False)
    assert recall_figure(dict(one=result)).axes[0].get_yticklabels()[0].get_text() == "c"


# --- figures


def made_up(correct, fractions):
    low, high = wilson(correct, 100)
    return {str(fraction): dict(accuracy=correct / 100, low=low, high=high) for fraction in fractions}


@pytest.mark.parametrize("inits, fractions", [(1, [1.0]), (3, [0.01, 0.1, 1.0]), (9, [0.1, 1.0])])
def test_accuracy_figure(inits, fractions):
    "One line with intervals for each init and panel, at the numbers; as wide as a phone."
    results = {}
    for i in range(inits):
        results[f"init{i}"] = dict(chance=0.1, knn=made_up(50 + i, fractions), linear=made_up(60 + i, fractions))
    fig = accuracy_figure(results)
    assert fig.get_size_inches()[0] < 5
    assert len(fig.axes) == 2
    for ax, first in zip(fig.axes, (50, 60)):
        last = first + inits - 1
        assert [o.get_label() for o in ax.containers] == list(results)
        assert ax.get_xscale() == "log"
        line, _, (bars,) = ax.containers[-1].lines
        assert np.allclose(line.get_ydata(), last)
        assert np.allclose([o[:, 1] for o in bars.get_segments()], [100 * np.array(wilson(last, 100))] * len(fractions))
    lines = [o.lines[0] for o in fig.axes[0].containers]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == inits
    fig.canvas.draw()


def test_recall_figure_goes_from_hard_to_easy():
    results = dict(a=dict(recall=dict(a=0.9, b=0.1, c=0.5)), b=dict(recall=dict(a=1.0, b=0.2, c=0.4)))
    ax = recall_figure(results).axes[0]
    assert [o.get_text() for o in ax.get_yticklabels()] == ["b", "c", "a"]
    assert np.allclose(ax.collections[2].get_offsets()[:, 0], [20, 40, 100])
    assert len({tuple(o.get_facecolor()[0]) for o in ax.collections[1:]}) == 2
