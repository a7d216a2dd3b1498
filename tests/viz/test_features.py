"Feature space: purity against a slow count, maps that repeat, and what is refused."

import json
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from cmid.base.errors import CmidError
from cmid.base.figures import embeddings_figure, class_marker
from cmid.base.scores import mean_interval
from cmid.settings.features import Features
from cmid.viz.features import (
    chance_purity,
    choose,
    embed,
    feature_space,
    knn_purity,
    labels_of,
    neighbours_figure,
    proximity,
    strips,
)


def settings(**more):
    return Features(**dict(split=None, images=2000, branch="student", perplexity=5.0, neighbours=4, queries=3) | more)


def clusters(each=10, classes=4, spread=0.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = np.repeat(np.arange(classes), each)
    return torch.eye(classes)[y] + spread * torch.randn(each * classes, classes, generator=g), y


class Images(SimpleNamespace):
    folder = "prepared/made"

    def __len__(self):
        return self.n


# purity


def test_against_a_slow_count():
    x, y = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), np.arange(40) % 3
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    for k in (1, 3, 10):
        due = [
            np.mean(
                [y[j] == y[i] for j in sorted((j for j in range(40) if j != i), key=lambda j: -unit[i] @ unit[j])[:k]]
            )
            for i in range(40)
        ]
        assert np.allclose(knn_purity(x, y, k), due)
    flat = x[:, :2]
    due = [
        np.mean(
            [
                y[j] == y[i]
                for j in sorted((j for j in range(40) if j != i), key=lambda j: float((flat[i] - flat[j]).norm()))[:5]
            ]
        )
        for i in range(40)
    ]
    assert np.allclose(knn_purity(flat, y, 5, proximity), due)


def test_separated_clusters_are_pure_and_shuffled_labels_are_chance():
    x, y = clusters()
    assert knn_purity(x, y, 9).mean() == 1
    chance = chance_purity(y)
    assert chance == 9 / 39
    rng = np.random.default_rng(0)
    mean = np.mean([knn_purity(x, rng.permutation(y), 5).mean() for _ in range(200)])
    assert abs(mean - chance) < 0.01


def test_all_neighbours_are_chance_exactly():
    "With k = N - 1 every image has the same neighbours: all others."
    y = np.repeat([0, 1, 2], [3, 9, 1])
    x = torch.randn(13, 4, generator=torch.Generator().manual_seed(2))
    assert abs(float(knn_purity(x, y, 12).double().mean()) - chance_purity(y)) < 1e-6
    assert abs(chance_purity(y) - (3 * 2 + 9 * 8 + 0) / (13 * 12)) < 1e-12


@pytest.mark.parametrize("k", [1, 4, 7])
def test_ties_do_not_follow_the_order_on_disk(k):
    y = np.repeat([0, 1, 2], [8, 4, 4])
    same = torch.randn(1, 5).expand(16, 5)
    for order in (np.arange(16), np.arange(16)[::-1].copy(), np.random.default_rng(0).permutation(16)):
        p = knn_purity(same, y[order], k)
        n = np.bincount(y)
        assert torch.allclose(p, torch.tensor((n[y[order]] - 1) / 15, dtype=torch.float32), atol=1e-6)


def test_copies_of_an_image_share_a_place():
    "Nearest of the first: one at 10 degrees, then two copies at 20 of which one has its class: for k = 2, (1 + 1/2) / 2."
    a = torch.tensor([0.0, 10, 20, 20, 90]).deg2rad()
    x = torch.stack([a.cos(), a.sin()], 1)
    assert float(knn_purity(x, [0, 0, 0, 1, 1], 2)[0]) == 0.75 == float(knn_purity(x, [0, 0, 1, 0, 1], 2)[0])


def test_memory_is_bounded_and_chunks_do_not_matter(monkeypatch):
    import cmid.viz.features as module

    x, y = clusters(spread=0.8)
    whole = knn_purity(x, y, 6)
    monkeypatch.setattr(module, "SIMILARITIES", 100)
    assert torch.equal(knn_purity(x, y, 6), whole)


def test_interval():
    mean, low, high = mean_interval([0.2, 0.4, 0.9, 0.5])
    sd = np.std([0.2, 0.4, 0.9, 0.5], ddof=1)
    assert mean == 0.5 and abs(high - 0.5 - 1.959964 * sd / 2) < 1e-6 and abs(low + high - 1) < 1e-12
    with pytest.raises(ValueError):
        mean_interval([0.5])


# which images


def test_classes_keep_their_shares():
    images = Images(n=100, labels=np.repeat([0, 1, 2], [60, 30, 10]), splits={})
    for n, due in ((50, [30, 15, 5]), (10, [6, 3, 1]), (100, [60, 30, 10]), (1000, [60, 30, 10])):
        assert list(np.bincount(images.labels[choose(images, None, n)])) == due
    assert np.array_equal(choose(images, None, 50, 3), choose(images, None, 50, 3)) and not np.array_equal(
        choose(images, None, 50, 3), choose(images, None, 50, 4)
    )
    assert len(set(choose(images, None, 50))) == 50


def test_images_without_a_class():
    images = Images(n=12, labels=np.array([0, 1, -1] * 4), splits=dict(bare=np.arange(2, 12, 3)))
    assert (
        set(images.labels[choose(images, None, 12)]) == {0, 1}
        and labels_of(images, choose(images, None, 12)) is not None
    )
    assert len(i := choose(images, "bare", 12)) == 4 and labels_of(images, i) is None
    assert labels_of(images := Images(n=9, labels=None, splits={}), choose(images, None, 5)) is None


def test_refused_in_one_line():
    images = Images(n=12, labels=None, splits=dict(test=np.arange(3)))
    x, y = clusters(3)
    cases = {
        "did you mean": lambda: choose(images, "tests", 9),
        "has 3 images": lambda: choose(images, "test", 9),
        "features.perplexity: 12": lambda: feature_space(x, y, list("abcd"), settings(perplexity=12.0)),
        "features.neighbours: 12": lambda: feature_space(x, y, list("abcd"), settings(neighbours=12)),
        "features.queries: 13": lambda: strips(x, y, 13),
        "collapsed": lambda: embed(torch.ones(30, 5), 5.0),
    }
    for says, f in cases.items():
        with pytest.raises(CmidError, match=says) as e:
            f()
        assert "\n" not in str(e.value)


# maps


def test_a_map_repeats_whatever_the_threads():
    x, y = clusters(30, 5, 0.3)
    with threadpool_limits(1):
        a = feature_space(x, y, list("abcde"), settings(), 1)
    with threadpool_limits(2):
        b = feature_space(x, y, list("abcde"), settings(), 1)
    assert a == b and json.loads(json.dumps(a[1])) == a[1]


def test_what_is_written():
    x, y = clusters()
    metrics, o = feature_space(x, y, ["a", "b", "c", "d", "absent"], settings())
    assert (metrics["images"], metrics["classes"], metrics["neighbours"], metrics["purity"], metrics["purity_2d"]) == (
        40,
        4,
        4,
        1.0,
        1.0,
    ) and metrics["per_class"] == dict.fromkeys("abcd", 1.0)
    assert metrics["low"] <= metrics["purity"] <= metrics["high"] <= 1 and metrics["chance"] == o[
        "chance"
    ] == chance_purity(y)
    assert (
        {len(o[k]) for k in ("x", "y", "label", "purity")} == {40}
        and o["label"] == list(y)
        and all(round(v, 2) == v for v in o["x"] + o["y"])
    )
    bare, o = feature_space(x, None, None, settings())
    assert (
        [bare[k] for k in ("purity", "low", "high", "chance", "purity_2d")] == [None] * 5
        and bare["classes"] == 0
        and o["label"] is None
        and len(o["x"]) == 40
    )


def test_one_class_is_chance():
    assert (lambda m: m["purity"] == m["chance"] == 1)(
        feature_space(clusters()[0], np.zeros(40, int), ["all"], settings())[0]
    )


def test_every_class_can_be_told_apart():
    assert (
        len({tuple(class_marker(c, "k").values()) for c in range(49)}) == 49
        and len({class_marker(c, "k")["color"] for c in range(7)}) == 7
    )
    x, y = clusters(4, 45, 0.2)
    o = feature_space(x, y, [f"class {c}" for c in range(45)], settings())[1]
    fig = embeddings_figure({"a-x": o, "b-x": o, "c-x": o})
    fig.canvas.draw()
    box = fig.legends[0].get_window_extent()
    assert (
        [t.get_text() for t in fig.legends[0].get_texts()] == o["classes"]
        and 0 <= box.x0
        and box.x1 <= fig.bbox.x1
        and box.y0 >= 0
    )
    assert fig.get_figwidth() <= 4.4


def test_black_is_the_ink_of_the_page():
    x, y = clusters(4, 7)
    o = feature_space(x, y, list("abcdefg"), settings())[1]
    with matplotlib.rc_context({"text.color": "#d5dae0"}):
        fig = embeddings_figure({"a": o})
    colours = {matplotlib.colors.to_hex(c) for s in fig.axes[0].collections for c in s.get_facecolors()}
    assert "#d5dae0" in colours and "#000000" not in colours and len(colours) == 7


# strips


def test_strips():
    x, y = clusters()
    s = strips(x, y, 4)
    assert s.shape == (4, 7) and list(y[s[:, 0]]) == [0, 1, 2, 3]
    assert (y[s] == y[s[:, :1]]).all() and all(len(set(o.tolist())) == 7 for o in s)
    z = torch.nn.functional.normalize(x, dim=1)
    close = (z[s[:, :1]] * z[s[:, 1:]]).sum(-1)
    assert (close.diff(dim=1) <= 1e-6).all()


def test_right_and_wrong_are_told_by_more_than_colour():
    fig = neighbours_figure(torch.rand(1, 3, 32, 32, 3), [[0, 0, 1]], ["a", "b"])
    query, right, wrong = fig.axes
    assert query.get_title(loc="left") == "a" and (right.get_xlabel(), wrong.get_xlabel()) == ("✓", "✗")
    assert right.spines["left"].get_linestyle() != wrong.spines["left"].get_linestyle()
