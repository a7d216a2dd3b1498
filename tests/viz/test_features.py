"Feature space: purity against a slow count, maps that repeat, and input that is refused."

import json

import matplotlib
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from cmid.base.errors import CmidError
from cmid.base.figures import class_marker, embeddings_figure
from cmid.base.scores import mean_interval
from cmid.settings.features import Features
from cmid.viz import features as module
from cmid.viz.features import (
    chance_purity,
    choose_images,
    class_labels,
    feature_space,
    knn_purity,
    nearest_images,
    negative_distance,
    neighbours_figure,
    tsne,
)

SETTINGS = Features(split=None, images=2000, branch="student", perplexity=5.0, neighbours=4, queries=3)


def settings(**changes):
    return SETTINGS.model_copy(update=changes)


def clusters(each=10, classes=4, spread=0.05):
    "Features and labels: a cluster along one axis for each class."
    y = np.repeat(np.arange(classes), each)
    noise = torch.randn(each * classes, classes, generator=torch.Generator().manual_seed(0))
    return torch.eye(classes)[y] + spread * noise, y


class Images:
    "What `choose_images` asks of `Prepared`."

    folder = "prepared/made"

    def __init__(self, count, labels=None, **splits):
        self.count, self.labels, self.splits = count, labels, splits

    def __len__(self):
        return self.count


# purity


def slow_purity(distance, y, k):
    "Purity of each image from a table of distances, by sorting."
    purity = []
    for i, row in enumerate(distance):
        others = [j for j in np.argsort(row, kind="stable") if j != i]
        purity.append(np.mean(y[others[:k]] == y[i]))
    return purity


@pytest.mark.parametrize("k", (1, 3, 10))
def test_purity_against_a_slow_count(k):
    x, y = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), np.arange(40) % 3
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    assert np.allclose(knn_purity(x, y, k), slow_purity(-unit @ unit.T, y, k))
    plane = x[:, :2]
    distance = torch.cdist(plane.double(), plane.double()).numpy()
    assert np.allclose(knn_purity(plane, y, k, negative_distance), slow_purity(distance, y, k))


def test_shuffled_labels_are_at_chance():
    x, y = clusters()
    assert knn_purity(x, y, 9).mean() == 1
    assert chance_purity(y) == 9 / 39
    rng = np.random.default_rng(0)
    mean = np.mean([knn_purity(x, rng.permutation(y), 5).mean() for _ in range(200)])
    assert mean == pytest.approx(9 / 39, abs=0.01)


def test_all_others_as_neighbours_are_exactly_chance():
    "With k = N - 1 the neighbours of an image are all others."
    y = np.repeat([0, 1, 2], [3, 9, 1])
    x = torch.randn(13, 4, generator=torch.Generator().manual_seed(2))
    assert chance_purity(y) == pytest.approx((3 * 2 + 9 * 8 + 0) / (13 * 12), abs=1e-12)
    assert float(knn_purity(x, y, 12).double().mean()) == pytest.approx(chance_purity(y), abs=1e-6)


@pytest.mark.parametrize("k", [1, 4, 7])
@pytest.mark.parametrize("order", [np.arange(16), np.arange(16)[::-1].copy(), np.random.default_rng(0).permutation(16)])
def test_ties_do_not_follow_the_order_of_files(k, order):
    y = np.repeat([0, 1, 2], [8, 4, 4])
    collapsed = torch.randn(1, 5).expand(16, 5)
    due = (np.bincount(y)[y[order]] - 1) / 15
    assert np.allclose(knn_purity(collapsed, y[order], k), due, atol=1e-6)


@pytest.mark.parametrize("labels", ([0, 0, 0, 1, 1], [0, 0, 1, 0, 1]))
def test_copies_of_an_image_share_a_place(labels):
    "Nearest to the first: one at 10 degrees, then two copies at 20, one of its class: for k = 2, (1 + 1/2) / 2."
    angles = torch.tensor([0.0, 10, 20, 20, 90]).deg2rad()
    x = torch.stack([angles.cos(), angles.sin()], 1)
    assert float(knn_purity(x, labels, 2)[0]) == 0.75


def test_chunks_do_not_change_purity(monkeypatch):
    x, y = clusters(spread=0.8)
    in_one_chunk = knn_purity(x, y, 6)
    monkeypatch.setattr(module, "SIMILARITIES", 100)
    assert torch.equal(knn_purity(x, y, 6), in_one_chunk)


def test_mean_interval():
    values = [0.2, 0.4, 0.9, 0.5]
    mean, low, high = mean_interval(values)
    standard_error = np.std(values, ddof=1) / 2
    assert mean == 0.5
    assert high - 0.5 == pytest.approx(1.959964 * standard_error, abs=1e-6)
    assert low + high == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError):
        mean_interval([0.5])


# choice of images


@pytest.mark.parametrize("count, due", [(50, [30, 15, 5]), (10, [6, 3, 1]), (100, [60, 30, 10]), (1000, [60, 30, 10])])
def test_classes_keep_their_shares(count, due):
    images = Images(100, np.repeat([0, 1, 2], [60, 30, 10]))
    index = choose_images(images, None, count)
    assert list(np.bincount(images.labels[index])) == due
    assert len(set(index)) == len(index)


def test_the_choice_follows_the_seed():
    images = Images(100, np.repeat([0, 1, 2], [60, 30, 10]))
    assert np.array_equal(choose_images(images, None, 50, 3), choose_images(images, None, 50, 3))
    assert not np.array_equal(choose_images(images, None, 50, 3), choose_images(images, None, 50, 4))


def test_images_without_a_class():
    images = Images(12, np.array([0, 1, -1] * 4), bare=np.arange(2, 12, 3))
    some_labelled = choose_images(images, None, 12)
    assert set(images.labels[some_labelled]) == {0, 1}
    assert class_labels(images, some_labelled) is not None
    none_labelled = choose_images(images, "bare", 12)
    assert len(none_labelled) == 4
    assert class_labels(images, none_labelled) is None
    without_labels = Images(9)
    assert class_labels(without_labels, choose_images(without_labels, None, 5)) is None


IMAGES = Images(12, test=np.arange(3))
X, Y = clusters(3)


@pytest.mark.parametrize(
    "message, call",
    [
        ("did you mean", lambda: choose_images(IMAGES, "tests", 9)),
        ("has 3 images", lambda: choose_images(IMAGES, "test", 9)),
        ("features.perplexity: 12", lambda: feature_space(X, Y, list("abcd"), settings(perplexity=12.0))),
        ("features.neighbours: 12", lambda: feature_space(X, Y, list("abcd"), settings(neighbours=12))),
        ("features.queries: 13", lambda: nearest_images(X, Y, 13)),
        ("collapsed", lambda: tsne(torch.ones(30, 5), 5.0)),
    ],
)
def test_bad_input_is_named_in_one_line(message, call):
    with pytest.raises(CmidError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# maps


def test_a_map_does_not_depend_on_the_number_of_threads():
    x, y = clusters(30, 5, 0.3)
    results = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            results.append(feature_space(x, y, list("abcde"), settings(), 1))
    assert results[0] == results[1]
    embedding = results[0][1]
    assert json.loads(json.dumps(embedding)) == embedding


def test_metrics_and_embedding():
    x, y = clusters()
    metrics, embedding = feature_space(x, y, ["a", "b", "c", "d", "absent"], settings())
    counts = [metrics[key] for key in ("images", "classes", "neighbours")]
    assert counts == [40, 4, 4]
    assert metrics["purity"] == metrics["purity_2d"] == 1.0
    assert metrics["per_class"] == dict.fromkeys("abcd", 1.0)
    assert metrics["low"] <= metrics["purity"] <= metrics["high"] <= 1
    assert metrics["chance"] == embedding["chance"] == chance_purity(y)
    assert [len(embedding[key]) for key in ("x", "y", "label", "purity")] == [40] * 4
    assert embedding["label"] == list(y)
    assert [round(value, 2) for value in embedding["x"]] == embedding["x"]


def test_metrics_without_classes():
    metrics, embedding = feature_space(clusters()[0], None, None, settings())
    assert [metrics[key] for key in ("purity", "low", "high", "chance", "purity_2d")] == [None] * 5
    assert metrics["classes"] == 0
    assert embedding["label"] is None
    assert len(embedding["x"]) == 40


def test_one_class_is_at_chance():
    metrics, _ = feature_space(clusters()[0], np.zeros(40, int), ["all"], settings())
    assert metrics["purity"] == metrics["chance"] == 1


def test_every_class_has_its_own_marker():
    markers = [class_marker(c, "k") for c in range(49)]
    assert len({tuple(marker.values()) for marker in markers}) == 49
    assert len({marker["color"] for marker in markers[:7]}) == 7


def test_the_legend_of_45_classes_fits():
    x, y = clusters(4, 45, 0.2)
    embedding = feature_space(x, y, [f"class {c}" for c in range(45)], settings())[1]
    fig = embeddings_figure({"a-x": embedding, "b-x": embedding, "c-x": embedding})
    fig.canvas.draw()
    legend = fig.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == embedding["classes"]
    box = legend.get_window_extent()
    assert 0 <= box.x0
    assert box.x1 <= fig.bbox.x1
    assert box.y0 >= 0
    assert fig.get_figwidth() <= 4.4


def test_black_points_take_the_text_colour():
    x, y = clusters(4, 7)
    embedding = feature_space(x, y, list("abcdefg"), settings())[1]
    with matplotlib.rc_context({"text.color": "#d5dae0"}):
        fig = embeddings_figure({"a": embedding})
    points = fig.axes[0].collections
    colours = {matplotlib.colors.to_hex(colour) for some in points for colour in some.get_facecolors()}
    assert len(colours) == 7
    assert "#d5dae0" in colours
    assert "#000000" not in colours


# nearest images


def test_nearest_images_are_sorted():
    x, y = clusters()
    rows = nearest_images(x, y, 4)
    assert rows.shape == (4, 7)
    assert list(y[rows[:, 0]]) == [0, 1, 2, 3]
    assert (y[rows] == y[rows[:, :1]]).all()
    assert all(len(set(row.tolist())) == 7 for row in rows)
    unit = torch.nn.functional.normalize(x, dim=1)
    cosines = (unit[rows[:, :1]] * unit[rows[:, 1:]]).sum(-1)
    assert (cosines.diff(dim=1) <= 1e-6).all()


def test_neighbours_of_another_class_differ_by_more_than_colour():
    fig = neighbours_figure(torch.rand(1, 3, 32, 32, 3), [[0, 0, 1]], ["a", "b"])
    query, same, other = fig.axes
    assert query.get_title(loc="left") == "a"
    assert (same.get_xlabel(), other.get_xlabel()) == ("✓", "✗")
    assert same.spines["left"].get_linestyle() != other.spines["left"].get_linestyle()
