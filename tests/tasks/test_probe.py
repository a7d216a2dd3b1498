"What the probes say is what the features hold: no test label is used, no image is dropped, and chance stays chance."

import json
import os
from statistics import NormalDist

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cmid.base.figures import accuracy_figure
from cmid.base.params import CmidError, Probe
from cmid.base.scores import difference, wilson
from cmid.data.prepare import prepare
from cmid.method import backbones
from cmid.tasks import probe as module
from cmid.tasks.probe import recall_figure, features, fit_linear, knn_predict, probe, subsample
from cmid.train import knn

SETTINGS = Probe(
    train="train",
    test="test",
    neighbours=5,
    temperature=0.07,
    fractions=[1.0, 0.1],
    regularisation=[0.1, 10.0],
    batch=4,
)


class Colour(nn.Module):
    "The image as its own map: features are normalised mean colours."

    def forward(self, images):
        return [images]


COLOURS = dict(blue=(40, 60, 180), green=(50, 170, 60), red=(190, 50, 40))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    "3 classes of 15 images: 10 to train, 5 to test; colours that hardly overlap."
    at = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    lists = dict(train=[], test=[], some=[])
    for c, rgb in COLOURS.items():
        (at / "in" / c).mkdir(parents=True)
        for i in range(15):
            x = np.clip(np.array(rgb) + rng.normal(0, 12, 3) + rng.normal(0, 20, (32, 32, 3)), 0, 255).astype("uint8")
            Image.fromarray(x).save(at / "in" / c / f"{i:02}.png")
            lists["train" if i < 10 else "test"].append(f"{c}/{i:02}.png")
    lists["some"] = lists["train"][8:12] + lists["test"][:2]
    for k, o in lists.items():
        (at / f"{k}.txt").write_text("\n".join(f"{p} {p.split('/')[0]}" for p in o))
    return prepare(at / "in", at / "out", side=32, lists={k: at / f"{k}.txt" for k in lists}, workers=1)


class Fake:
    "A prepared dataset in memory, with what `probe` asks of one."

    folder, mean, std = "fake", [0.5], [0.25]

    def __init__(self, x, labels, train, test, names):
        self.x, self.labels, self.classes, self.splits = x, labels, names, dict(train=train, test=test)

    def __getitem__(self, i):
        return self.x[i]

    def source(self, i):
        return f"{i}.png"


# --- features


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("bands", [1, 4])
def test_features_are_pooled_normalised_maps(name, bands):
    torch.manual_seed(0)
    encoder = backbones.create(name, bands, 64)
    x = np.random.default_rng(0).integers(0, 256, (5, bands, 64, 64), "uint8")
    mean, std = np.linspace(0.3, 0.5, bands), np.linspace(0.1, 0.2, bands)
    got = features(encoder, x, [3, 0, 4, 1, 3], mean, std, batch=2)
    z = (torch.from_numpy(x[[3, 0, 4, 1, 3]] / 255) - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(
        1, -1, 1, 1
    )
    with torch.no_grad():
        want = encoder.eval()(z.float())[-1].flatten(2).mean(2)
    assert got.dtype == torch.float32 and not got.requires_grad and torch.allclose(got, want, atol=1e-4)


def test_features_in_any_batches():
    torch.manual_seed(0)
    encoder = backbones.create("resnet18", img_size=32)
    x = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), "uint8")
    a, *others = (features(encoder, x, range(7), [0.5] * 3, [0.2] * 3, batch=b) for b in (1, 3, 7, 64))
    assert all(torch.allclose(a, o, atol=1e-4) for o in others)
    assert features(encoder, x, [5], [0.5] * 3, [0.2] * 3).shape == (1, 512)


def test_encoder_is_left_as_it_was():
    encoder = backbones.create("resnet18", img_size=32).train()
    encoder.model.layer1.eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    modes = [o.training for o in encoder.modules()]
    x = np.zeros((2, 3, 32, 32), "uint8")
    features(encoder, x, [0, 1], [0.5] * 3, [0.2] * 3)
    with pytest.raises(CmidError):
        features(encoder, x[:, :1], [0, 1], [0.5], [0.2])  # also when it fails
    assert [o.training for o in encoder.modules()] == modes and all(
        torch.equal(v, before[k]) for k, v in encoder.state_dict().items()
    )


def test_reads_on_disk_in_order(scenes):
    "Shards are read forwards, whatever was asked, and each image once."
    asked = []

    class Watched:
        def __getitem__(self, i):
            asked.extend(i)
            return scenes[i]

    index = np.random.default_rng(1).permutation(45)
    got = features(Colour(), Watched(), index, scenes.mean, scenes.std, batch=7)
    assert asked == list(range(45))
    want = (scenes[index].mean((2, 3)) / 255 - scenes.mean) / scenes.std
    assert np.allclose(got, want, atol=1e-4)


def test_bad_features_are_refused():
    x = np.zeros((3, 2, 32, 32), "uint8")
    with pytest.raises(CmidError, match="2 bands, but mean and std have 3"):
        features(Colour(), x, [0], [0.5] * 3, [0.2] * 3)
    with pytest.raises(CmidError, match="no images"):
        features(Colour(), x, [], [0.5] * 2, [0.2] * 2)

    class Broken(nn.Module):
        def forward(self, o):
            return [o / (o[:, :1] - o[:, :1])]

    with pytest.raises(CmidError, match="3 of 3 images are not finite"):
        features(Broken(), x, range(3), [0.5] * 2, [0.2] * 2)


# --- kNN


@pytest.mark.parametrize("k,T", [(1, 0.07), (7, 0.07), (40, 0.5), (500, 0.07), (9, 1e-3)])
def test_knn_is_the_formula(k, T):
    rng = np.random.default_rng(0)
    y, truth = rng.integers(0, 4, 60), rng.integers(0, 4, 30)
    at = rng.normal(size=(4, 6))
    x, q = at[y] + rng.normal(size=(60, 6)), at[truth] + rng.normal(size=(30, 6))
    cosines = (q @ x.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(x, axis=1)
    near = np.argsort(-cosines, 1)[:, :k]
    w = np.exp((np.take_along_axis(cosines, near, 1) - cosines.max(1, keepdims=True)) / T)
    votes = np.stack([(w * (y[near] == c)).sum(1) for c in range(4)], 1)
    assert knn_predict(torch.tensor(x), y, torch.tensor(q), 4, k, T).tolist() == votes.argmax(1).tolist()


def test_knn_in_chunks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, q, y = torch.randn(50, 8, generator=g), torch.randn(33, 8, generator=g), torch.arange(50, dtype=torch.int32) % 3
    whole = knn_predict(x, y, q, 3)
    monkeypatch.setattr(knn, "SIMILARITIES", 120)
    sizes, vote = [], knn._vote
    monkeypatch.setattr(knn, "_vote", lambda cosines, *a: sizes.append(cosines.numel()) or vote(cosines, *a))
    assert torch.equal(knn_predict(x, y, q, 3), whole) and max(sizes) <= 120 and sum(sizes) == 50 * 33


# --- labels


@pytest.mark.parametrize("seed", range(3))
def test_subsets_are_nested_and_stratified(seed):
    labels = np.random.default_rng(seed).integers(0, 7, 900)
    index = np.random.default_rng(9).choice(900, 500, replace=False)
    last = set()
    for f in (0.001, 0.01, 0.1, 0.33, 0.5, 1.0):
        part = subsample(labels, index, f, seed)
        counts, whole = (np.bincount(labels[o], minlength=7) for o in (part, index))
        assert last <= set(part) <= set(index) and len(set(part)) == len(part) and (np.diff(part) > 0).all()
        assert (counts == np.maximum(1, np.floor(f * whole + 0.5))).all()
        last = set(part)
    assert last == set(index)


def test_subsets_follow_the_seed_alone():
    labels = np.arange(300) % 3
    parts = [tuple(subsample(labels, np.random.default_rng(k).permutation(300), 0.1, 5)) for k in range(3)]
    assert len(set(parts)) == 1 and tuple(subsample(labels, np.arange(300), 0.1, 6)) != parts[0]


# --- the linear classifier


def blobs(n, seed, d=20, classes=3):
    y = np.arange(n) % classes
    return np.random.default_rng(seed).normal(size=(n, d)) + 3 * np.eye(d)[y], y


def test_held_out_is_a_stratified_fifth(monkeypatch):
    "C is rated on 20 of 100 images, in proportion; the last fit has all 100."
    seen, fit, rating = [], module._fit, module._rating
    monkeypatch.setattr(module, "_fit", lambda x, y, C: seen.append(len(y)) or fit(x, y, C))
    monkeypatch.setattr(
        module, "_rating", lambda x, y, held, C: seen.append(np.bincount(y[held]).tolist()) or rating(x, y, held, C)
    )
    y = np.repeat([0, 1], [75, 25])
    x = np.random.default_rng(0).normal(size=(100, 4)) + y[:, None]
    assert fit_linear(x, y, [0.1, 1.0]).held_out == 20 and seen == [[15, 5], 80] * 2 + [100]


def test_the_better_penalty_is_chosen():
    "50 channels that each say a little want a strong penalty: the rule finds it, whatever the order of the grid."

    def murmur(n, seed):
        y = np.arange(n) % 2
        return np.random.default_rng(seed).normal(size=(n, 50)) + 0.4 * y[:, None], y

    (x, y), (q, truth) = murmur(120, 2), murmur(2000, 3)
    scores = [(fit_linear(x, y, [C]).predict(q) == truth).mean() for C in (0.01, 100.0)]
    assert (
        scores[0] > scores[1] + 0.02 and fit_linear(x, y, [0.01, 100.0]).C == fit_linear(x, y, [100.0, 0.01]).C == 0.01
    )


def test_scale_does_not_matter():
    x, y = blobs(120, 0)
    q, _ = blobs(300, 1)
    a, b = fit_linear(x, y, [1.0]), fit_linear(x * np.geomspace(1e-3, 1e3, 20) + 7, y, [1.0])
    assert (a.predict(q) == b.predict(q * np.geomspace(1e-3, 1e3, 20) + 7)).mean() > 0.99


def test_constant_channels_do_no_harm():
    x, y = blobs(60, 0)
    x[:, 5:9] = 0.0
    assert (fit_linear(torch.tensor(x), y, [0.1, 1.0]).predict(x) == y).mean() > 0.9


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 5, 9)])
def test_too_few_to_choose(counts):
    y = np.repeat([0, 1, 2], counts)
    fit = fit_linear(blobs(len(y), 0)[0], y, [0.01, 2.0, 30.0])
    assert (fit.C, fit.held_out, fit.converged) == (2.0, 0, True)


def test_two_a_class_are_enough_to_choose():
    x, y = blobs(6, 0)
    assert fit_linear(x, y, [0.1, 1.0]).held_out == 3


def test_classes_need_not_be_all_there():
    "Labels 1 and 4 of five: predictions are 1 and 4."
    x, y = blobs(80, 0, classes=2)
    assert set(fit_linear(x, np.array([1, 4])[y], [0.1, 1.0]).predict(x)) == {1, 4}


def test_what_did_not_converge_says_so(monkeypatch, recwarn):
    monkeypatch.setattr(module, "ITERATIONS", 2)
    x, y = blobs(120, 0)
    assert not fit_linear(x, y, [100.0]).converged and not len(recwarn)


def test_one_class_is_refused():
    with pytest.raises(CmidError, match="one class"):
        fit_linear(np.zeros((4, 2)), [3] * 4, [1.0])


# --- intervals


@pytest.mark.parametrize("c,n", [(0, 1), (1, 1), (3, 7), (45, 90), (89, 90), (7999, 8000)])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_wilson_ends_are_where_the_test_turns(c, n, level):
    "At both ends the distance from the observed share is z standard errors of the end itself."
    z = NormalDist().inv_cdf((1 + level) / 2)
    low, high = wilson(c, n, level)
    assert 0 <= low <= c / n <= high <= 1 and low < high
    for p in (low, high):
        if 0 < p < 1:
            assert abs(c / n - p) == pytest.approx(z * (p * (1 - p) / n) ** 0.5, rel=1e-6)


def test_wilson_holds_the_truth():
    "20,000 draws of 60 images; the usual interval misses far more near 1."
    for p in (0.5, 0.9, 0.97):
        draws = np.random.default_rng(0).binomial(60, p, 20000)
        ends = np.array([wilson(int(c), 60) for c in range(61)])[draws]
        assert 0.93 < ((ends[:, 0] <= p) & (p <= ends[:, 1])).mean() < 0.98


@pytest.mark.parametrize("bad", [(5, 4), (-1, 4), (0, 0)])
def test_no_accuracy(bad):
    with pytest.raises(ValueError, match="no accuracy"):
        wilson(*bad)


@pytest.mark.parametrize(
    "counts,want",
    [
        ((56, 70, 48, 80), (0.0524, 0.3339)),
        ((9, 10, 3, 10), (0.1705, 0.8090)),
        ((5, 56, 0, 29), (-0.0381, 0.1926)),
        ((10, 10, 0, 20), (0.6791, 1.0)),
    ],
)
def test_difference_is_as_published(counts, want):
    a, b, c, d = counts
    assert difference(*counts) == pytest.approx(want, abs=5e-5) and difference(c, d, a, b) == pytest.approx(
        (-want[1], -want[0]), abs=5e-5
    )


# --- the whole


def test_probe(scenes):
    r, guess = probe(Colour(), scenes.mean, scenes.std, scenes, SETTINGS)
    truth = scenes.labels[scenes.splits["test"]]
    assert json.loads(json.dumps(r, allow_nan=False)) == r and (r["classes"], r["test_images"], r["chance"]) == (
        3,
        15,
        pytest.approx(1 / 3),
    )
    assert (
        list(r["knn"]) == list(r["linear"]) == ["0.1", "1.0"]
        and [o["train_images"] for o in r["knn"].values()] == [3, 30]
        and [o["k"] for o in r["knn"].values()] == [3, 5]
    )
    assert [o["held_out"] for o in r["linear"].values()] == [0, 6] and all(
        o["C"] in (0.1, 10.0) for o in r["linear"].values()
    )
    for o in (*r["knn"].values(), *r["linear"].values()):
        assert o["accuracy"] == o["correct"] / 15 and (o["low"], o["high"]) == wilson(o["correct"], 15)
    assert len(guess) == 15 and (guess == truth).sum() == r["linear"]["1.0"]["correct"] > 12
    assert r["recall_at"] == "1.0" and r["recall"] == {
        o: pytest.approx((guess[truth == c] == c).mean()) for c, o in enumerate(scenes.classes)
    }


def test_every_batch_size_counts_the_whole_test_set(scenes):
    a, b = (
        probe(Colour(), scenes.mean, scenes.std, scenes, SETTINGS.model_copy(update=dict(batch=o))) for o in (1, 11)
    )
    assert a[0] == b[0] and (a[1] == b[1]).all()


def test_the_same_seed_gives_the_same_numbers(scenes):
    torch.manual_seed(0)
    encoder = backbones.create("resnet18", img_size=32)
    runs = [json.dumps(probe(encoder, scenes.mean, scenes.std, scenes, SETTINGS, seed=3)[0]) for _ in range(2)]
    assert runs[0] == runs[1]


def test_chance_stays_chance():
    "Labels that have nothing to do with the images: the interval of both probes holds 1/4."
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (600, 1, 32, 32), "uint8")
    labels = rng.integers(0, 4, 600)
    r, _ = probe(Colour(), [0.5], [0.25], Fake(x, labels, np.arange(200), np.arange(200, 600), list("abcd")), SETTINGS)
    for o in (r["knn"]["1.0"], r["linear"]["1.0"]):
        assert o["low"] < 0.25 < o["high"]


def test_few_labels_are_all_that_is_used():
    "Both probes at 10 % are those of that tenth alone; and the order in which the split lists its images is of no account."
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    test = np.arange(200, 300)
    x = (60 + 40 * labels + rng.normal(0, 25, 300)).clip(0, 255).astype("uint8").reshape(300, 1, 1, 1) * np.ones(
        (1, 2, 32, 32), "uint8"
    )
    x[:, 1] = 128
    go = lambda y, train, seed=0: probe(
        Colour(), [0.5] * 2, [0.25] * 2, Fake(x, y, train, test, list("abc")), SETTINGS, seed
    )[0]
    kept = subsample(labels, np.arange(200), 0.1)
    assert len(kept) == 21
    part, q = (features(Colour(), x, o, [0.5] * 2, [0.25] * 2) for o in (kept, test))
    a = go(labels, np.arange(200))
    assert (
        a["knn"]["0.1"]["correct"]
        == int((knn_predict(part, labels[kept], q, 3, 5).numpy() == labels[test]).sum())
        != a["knn"]["1.0"]["correct"]
    )
    fit = fit_linear(part, labels[kept], SETTINGS.regularisation)
    assert (
        a["linear"]["0.1"]["correct"] == int((fit.predict(q) == labels[test]).sum())
        and a["linear"]["0.1"]["C"] == fit.C
    )
    assert go(labels, rng.permutation(200)) == a and a["chance"] == 0.34
    others = [
        go(labels, np.arange(200), seed) for seed in (1, 2, 3)
    ]  # another seed draws another tenth, and the whole stays the whole
    assert any(o["knn"]["0.1"] != a["knn"]["0.1"] for o in others) and all(
        o["knn"]["1.0"] == a["knn"]["1.0"] for o in others
    )


def test_test_labels_change_no_prediction(scenes):
    "Wrong test labels lower the score, and nothing else."
    train, test = scenes.splits["train"], scenes.splits["test"]
    wrong = scenes.labels.copy()
    wrong[test] = (wrong[test] + 1) % 3
    (a, guess), (b, other) = (
        probe(Colour(), scenes.mean, scenes.std, Fake(scenes, y, train, test, scenes.classes), SETTINGS)
        for y in (scenes.labels, wrong)
    )
    assert (
        (guess == other).all()
        and a["linear"]["1.0"]["C"] == b["linear"]["1.0"]["C"]
        and b["linear"]["1.0"]["accuracy"] < 0.2 < a["linear"]["1.0"]["accuracy"]
    )


def test_a_class_without_test_images():
    x = np.arange(40, dtype="uint8").reshape(40, 1, 1, 1) * np.ones((1, 1, 32, 32), "uint8")
    labels = np.arange(40) // 14
    r, _ = probe(
        Colour(), [0.5], [0.25], Fake(x, labels, np.arange(0, 40, 2), np.arange(1, 28, 2), list("abc")), SETTINGS
    )
    assert r["recall"]["c"] is None and json.dumps(r, allow_nan=False)
    assert recall_figure(dict(one=r)).axes[0].get_yticklabels()[0].get_text() == "c"


def test_what_is_wrong_is_named(scenes):
    go = lambda data, **o: probe(Colour(), scenes.mean, scenes.std, data, SETTINGS.model_copy(update=o))
    with pytest.raises(CmidError, match=r"no split 'tran' \(did you mean 'train'\?\); it has train, test, some"):
        go(scenes, train="tran")
    with pytest.raises(CmidError, match="30 images are in both 'train' and 'train'"):
        go(scenes, test="train")
    with pytest.raises(
        CmidError, match="4 images are in both 'train' and 'some', the first is blue/08.png; list each once"
    ):
        go(scenes, test="some")
    x = np.zeros((6, 3, 32, 32), "uint8")
    y = np.array([0, 1, 0, 1, -1, -1])
    fake = lambda labels, test: Fake(x, labels, np.arange(4), np.array(test, int), list("ab"))
    with pytest.raises(CmidError, match="2 images are in split 'test' without a class, the first is 4.png"):
        go(fake(y, [4, 5]))
    with pytest.raises(CmidError, match="split 'test' is empty"):
        go(fake(y, []))
    with pytest.raises(CmidError, match="has no classes; name"):
        go(fake(None, [4, 5]))
    assert all("\n" not in str(o) for o in [pytest.raises(CmidError, go, fake(None, [4])).value])


# --- figures


@pytest.mark.parametrize("inits,fractions", [(1, [1.0]), (3, [0.01, 0.1, 1.0]), (9, [0.1, 1.0])])
def test_accuracy_figure(inits, fractions):
    "One line with intervals an init and panel, at the numbers; as wide as a phone."

    def made(c):
        return {str(f): dict(accuracy=c / 100, low=wilson(c, 100)[0], high=wilson(c, 100)[1]) for f in fractions}

    fig = accuracy_figure({f"init{i}": dict(chance=0.1, knn=made(50 + i), linear=made(60 + i)) for i in range(inits)})
    assert fig.get_size_inches()[0] < 5 and len(fig.axes) == 2
    for ax, base in zip(fig.axes, (50, 60)):
        assert [o.get_label() for o in ax.containers] == [f"init{i}" for i in range(inits)] and ax.get_xscale() == "log"
        line, _, (bars,) = ax.containers[-1].lines
        assert np.allclose(line.get_ydata(), base + inits - 1) and np.allclose(
            [o[:, 1] for o in bars.get_segments()], [100 * np.array(wilson(base + inits - 1, 100))] * len(fractions)
        )
    assert len({(o.lines[0].get_color(), o.lines[0].get_linestyle()) for o in fig.axes[0].containers}) == inits
    fig.canvas.draw()


def test_class_figure_from_hard_to_easy():
    a, b = (dict(recall=dict(zip("abc", o))) for o in ((0.9, 0.1, 0.5), (1.0, 0.2, 0.4)))
    ax = recall_figure(dict(a=a, b=b)).axes[0]
    assert [o.get_text() for o in ax.get_yticklabels()] == ["b", "c", "a"] and np.allclose(
        ax.collections[2].get_offsets()[:, 0], [20, 40, 100]
    )
    assert len({tuple(o.get_facecolor()[0]) for o in ax.collections[1:]}) == 2
