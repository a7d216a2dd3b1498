"Fine-tuning: the published recipe, every image counted, and two runs that agree bit for bit."

import json
import os

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support
from timm.data import Mixup
from torch import nn

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.base.runtime import step_generator
from cmid.base.scores import wilson
from cmid.data.prepare import prepare
from cmid.method import backbones
from cmid.method.images import crop, random_boxes
from cmid.settings.classify import Classify
from cmid.tasks import classify as module
from cmid.tasks.classify import AugmentedScenes, Classifier, classify, confusion_figure, classification_curves_figure, drop_path_rate, fine_tune_classifier, classification_learner, predict_logits, mix_batch, make_mixup, rand_augment
from cmid.tasks.finetune import class_table
from cmid.tasks.finetune import ShuffledBatches, temporary_seed
from cmid.train.checkpoint import export_backbone

CPU = torch.device("cpu")
PAPER = Params(profile="paper").classify
PLAIN = PAPER.model_copy(
    update=dict(
        epochs=1,
        warmup_epochs=0,
        batch=4,
        randaugment=None,
        mixup=0.0,
        cutmix=0.0,
        erasing=0.0,
        smoothing=0.0,
        precision="float32",
    )
)
quiet = lambda line: None
changed = lambda settings, **o: settings.model_copy(update=o)


class Fake:
    "A prepared dataset in memory."

    folder = "fake"

    def __init__(self, x, labels, train, test, names=None):
        self.x, self.labels, self.splits, self.classes = (
            x,
            np.asarray(labels),
            dict(train=np.asarray(train), test=np.asarray(test)),
            names or [f"c{i}" for i in range(max(labels) + 1)],
        )
        self.bands, self.side, self.mean, self.std = x.shape[1], x.shape[2], [0.5] * x.shape[1], [0.25] * x.shape[1]

    def __getitem__(self, i):
        return self.x[i]

    def __len__(self):
        return len(self.x)

    def source(self, i):
        return f"{i}.png"


def noise(n, bands=3, side=32, classes=2, test=0):
    "Images that say nothing, the last `test` of them to be tested on."
    return Fake(
        np.random.default_rng(0).integers(0, 256, (n, bands, side, side), "uint8"),
        np.arange(n) % classes,
        range(n - test),
        range(n - test, n),
    )


def export(folder, name="resnet18", bands=3, side=32):
    "An untrained backbone in the form of one that was pretrained."
    torch.manual_seed(0)
    card = dict(
        mean=[0.45] * bands,
        std=[0.2] * bands,
        bands=[f"b{i}" for i in range(bands)],
        method="random",
        parameters={},
        data_hash=None,
        data_licence=None,
        provenance={},
        health={},
    )
    return export_backbone(backbones.create(name, bands, side), folder, card)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders of untrained backbones by architecture and bands, made once."
    at, made = tmp_path_factory.mktemp("models"), {}

    def get(name="resnet18", bands=3, side=32):
        key = f"{name}-{bands}-{side}"
        if key not in made:
            made[key] = export(at / key, name, bands, side)
        return made[key]

    return get


# --- the recipe


def test_paper_profile_is_the_published_recipe():
    s = PAPER
    assert (s.epochs, s.batch, s.lr, s.weight_decay, s.warmup_epochs, s.betas) == (
        200,
        16,
        0.003125,
        0.02,
        5,
        [0.98, 0.92, 0.99],
    )
    assert (s.randaugment, s.mixup, s.cutmix, s.erasing, s.smoothing) == ("rand-m9-mstd0.5", 0.8, 1.0, 0.25, 0.1)
    assert (s.validation, s.fractions, s.test) == (0.0, [1.0], "test") and (
        s.drop_path,
        drop_path_rate(s, "swin_base_patch4_window7_224"),
        drop_path_rate(s, "resnet50"),
    ) == (None, 0.5, 0.0)
    m = make_mixup(s, 21)
    assert isinstance(m, Mixup) and (
        m.mixup_alpha,
        m.cutmix_alpha,
        m.label_smoothing,
        m.mix_prob,
        m.switch_prob,
        m.num_classes,
    ) == (0.8, 1.0, 0.1, 1.0, 0.5, 21)
    r = rand_augment(s.randaugment, [0.5] * 3)
    assert (
        r.num_layers == 2
        and {(o.magnitude, o.magnitude_std, o.prob) for o in r.ops} == {(9, 0.5, 0.5)}
        and len(r.ops) == 15
    )


def test_what_runs_is_what_the_settings_say(models):
    "Steps, rates, decay and stochastic depth of the learner."
    data = noise(10)
    s = changed(PLAIN, epochs=4, warmup_epochs=1, lr=0.01, lr_min=1e-4, weight_decay=0.3, drop_path=0.2)
    rates = []
    learn = fine_tune_classifier(models(), data, data.splits["train"], s, on=CPU, say=quiet)
    groups = learn.opt.opt.param_groups
    assert (
        {o["weight_decay"] for o in groups} == {0.0, 0.3}
        and all(p.ndim > 1 for o in groups if o["weight_decay"] for p in o["params"])
        and {tuple(o["betas"]) for o in groups} == {(0.98, 0.92, 0.99)}
    )
    assert learn.classification.done == 12 and [o["step"] for o in learn.classification.epochs] == [3, 6, 9, 12]
    cosine = lambda step: 1e-4 + (0.01 - 1e-4) * (1 + np.cos(np.pi * (step - 3) / 9)) / 2
    assert [o["lr"] for o in learn.classification.epochs] == pytest.approx([0.01, cosine(5), cosine(8), cosine(11)])
    depth = [o.drop_prob for o in learn.model.modules() if type(o).__name__ == "DropPath"]
    assert max(depth) == pytest.approx(0.2)


# --- network


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_logits_are_a_linear_map_of_the_mean(name):
    torch.manual_seed(0)
    m = Classifier(backbones.create(name, 3, 64), 5).eval()
    x = torch.randn(3, 3, 64, 64)
    nn.init.normal_(m.head.bias)
    with torch.no_grad():
        maps = m.encoder(x)[-1]
        got = m(x)
    want = torch.stack([m.head.weight @ o.flatten(1).sum(1) / o[0].numel() + m.head.bias for o in maps])
    assert torch.allclose(got, want, atol=1e-4)


# --- augmentation


def test_crops_are_those_of_the_seed_and_step():
    data = noise(6, side=64)
    source = AugmentedScenes(data, data.labels, (0.2, 0.5), seed=4)
    rows = np.array([5, 0, 3])
    x, y = source[7, rows]
    g = step_generator(4, 7)
    boxes, flips = random_boxes(3, (64, 64), (0.2, 0.5), generator=g), torch.rand(2, 3, generator=g) < 0.5
    for o, i, b, (f, v) in zip(x, rows, boxes, flips.T):
        want = crop(torch.from_numpy(data.x[i : i + 1]).float(), b[None], f[None])[0].round().clamp(0, 255)
        assert torch.equal(o.float(), want.flip(1) if v else want)
    assert y.tolist() == data.labels[rows].tolist() and not torch.equal(source[8, rows][0], x)


@pytest.mark.parametrize(
    "n,batch,sizes",
    [(10, 4, [4, 3, 3]), (9, 4, [3, 3, 3]), (5, 1, [1] * 5), (3, 16, [3]), (33, 16, [11] * 3), (1680, 16, [16] * 105)],
)
def test_every_image_once_an_epoch(n, batch, sizes):
    s = ShuffledBatches(np.arange(100, 100 + n), batch, seed=1)
    orders = []
    for s.epoch in range(2):
        found = list(s)
        orders.append(np.concatenate([o for _, o in found]))
        assert [len(o) for _, o in found] == sizes and [k for k, _ in found] == list(
            range(s.epoch * len(s), (s.epoch + 1) * len(s))
        )
    assert all(sorted(o) == list(range(100, 100 + n)) for o in orders) and orders[0].tolist() != orders[1].tolist()


def test_workers_see_the_same(models):
    "Images that other processes augment are those of one that does it itself."
    data = noise(9)
    batches = []
    for workers in (0, 2):
        learn = classification_learner(
            Classifier(backbones.create("resnet18", 3, 32), 2),
            data,
            range(9),
            changed(PAPER, batch=4),
            data.mean,
            data.std,
            3,
            CPU,
            say=quiet,
            workers=workers,
        )
        batches.append([o for learn.dls.train.sampler.epoch in range(2) for o in learn.dls.train])
    assert len(batches[0]) == 6 and all(torch.equal(a, b) for one, two in zip(*batches) for a, b in zip(one, two))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("over", [{}, dict(mixup=0.0), dict(cutmix=0.0), dict(mixup=0.0, cutmix=0.0)])
def test_targets_sum_to_one_and_tell_what_is_seen(n, over):
    "Of images that are their class, in one channel a class: the mean of a channel is the class's share."
    s = changed(PAPER, **over)
    y = torch.arange(n) % 3
    x = torch.eye(3)[y].view(n, 3, 1, 1).expand(n, 3, 16, 16)
    for seed in range(12):
        with temporary_seed(seed):
            images, targets = mix_batch(make_mixup(s, 3), x, y)
        assert (
            images.shape == x.shape
            and torch.allclose(targets.sum(1), torch.ones(n), atol=1e-6)
            and targets.min() >= 0.1 / 3 - 1e-6
        )
        assert torch.allclose(targets, 0.9 * images.mean((2, 3)) + 0.1 / 3, atol=1e-5)
    assert torch.equal(x, torch.eye(3)[y].view(n, 3, 1, 1).expand(n, 3, 16, 16))


@pytest.mark.parametrize(
    "bad", ["rand-m9-mstd", "rand-m9-q4", "randm9", "augmix-m5", "rand-tfoo", "rand--m9", "rand-mnine"]
)
def test_unknown_notation_is_named(bad):
    with pytest.raises(CmidError, match="classify.randaugment: timm does not understand") as e:
        rand_augment(bad, [0.5] * 3)
    assert repr(bad) in str(e.value) and "\n" not in str(e.value)


# --- scores


def test_table_of_classes_is_sklearns():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 6, 300), rng.integers(0, 6, 300)
    guess[rng.random(300) < 0.6] = truth[guess > -1][0]
    n = np.zeros((6, 6), int)
    np.add.at(n, (truth, guess), 1)
    want = np.transpose(precision_recall_fscore_support(truth, guess, labels=range(6)))
    got = class_table(n, "abcdef")
    assert np.allclose([[o[k] for k in ("precision", "recall", "f1", "images")] for o in got.values()], want) and list(
        got
    ) == list("abcdef")


def test_nothing_to_divide_by_is_nothing():
    got = class_table([[2, 0, 0], [1, 0, 0], [0, 0, 0]], ["seen", "missed", "absent"])
    assert got == dict(
        seen=dict(images=2, precision=2 / 3, recall=1.0, f1=4 / 5),
        missed=dict(images=1, precision=None, recall=0.0, f1=0.0),
        absent=dict(images=0, precision=None, recall=None, f1=None),
    )


@pytest.mark.parametrize("batch", [1, 3, 5, 64])
def test_the_short_last_batch_counts(batch):
    "Logits of all images, in order, whatever the batch; the network is left as it was."
    torch.manual_seed(0)
    m = Classifier(backbones.create("resnet18", 3, 32), 4).train()
    data = noise(7)
    order = [6, 0, 3, 1, 2, 5, 4]
    got = predict_logits(m, data, order, [0.5] * 3, [0.25] * 3, batch)
    assert m.training and m.encoder.model.bn1.training and not got.requires_grad
    with torch.no_grad():
        want = m.eval()((torch.from_numpy(data.x[order]).float() / 255 - 0.5) / 0.25)
    assert got.shape == (7, 4) and torch.allclose(got, want, atol=1e-4)


# --- the whole

COLOURS = dict(blue=(40, 60, 180), green=(50, 170, 60), red=(190, 50, 40))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    "3 classes of 13 images: 8 to train, 5 to test."
    at = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    lists = dict(train=[], test=[], both=[])
    for c, rgb in COLOURS.items():
        (at / "in" / c).mkdir(parents=True)
        for i in range(13):
            x = np.clip(np.array(rgb) + rng.normal(0, 15, 3) + rng.normal(0, 30, (32, 32, 3)), 0, 255).astype("uint8")
            Image.fromarray(x).save(at / "in" / c / f"{i:02}.png")
            lists["train" if i < 8 else "test"].append(f"{c}/{i:02}.png")
    lists["both"] = lists["train"][:2] + lists["test"][:2]
    for k, o in lists.items():
        (at / f"{k}.txt").write_text("\n".join(f"{p} {p.split('/')[0]}" for p in o))
    return prepare(at / "in", at / "out", side=32, lists={k: at / f"{k}.txt" for k in lists}, workers=1)


QUICK = changed(PAPER, epochs=6, warmup_epochs=1, batch=8, lr=0.003, precision="float32", fractions=[1.0, 0.2])


@pytest.fixture(scope="module")
def result(scenes, models):
    said = []
    return *classify(models(), scenes, QUICK, seed=3, on=CPU, say=said.append), said


def test_classify_beats_chance(scenes, result):
    "With all of the published augmentation; and the numbers agree with each other."
    r, epochs, said = result
    whole = r["finetune"]["1.0"]
    assert json.loads(json.dumps(r, allow_nan=False)) == r and (
        r["classes"],
        r["test_images"],
        r["chance"],
        r["epoch"],
        r["chosen_on"],
    ) == (3, 15, pytest.approx(1 / 3), 6, "last")
    assert (
        list(r["finetune"]) == ["0.2", "1.0"]
        and [o["train_images"] for o in r["finetune"].values()] == [6, 24]
        and whole["low"] > r["chance"]
    )
    for o in r["finetune"].values():
        assert (
            o["accuracy"] == o["correct"] / 15
            and (o["low"], o["high"]) == wilson(o["correct"], 15)
            and (o["epoch"], o["held_out"]) == (6, 0)
        )
    n = np.array(r["confusion"])
    assert (
        n.sum(1).tolist() == [5, 5, 5]
        and n.trace() == whole["correct"]
        and r["per_class"] == class_table(n, scenes.classes)
    )
    assert r["mean_recall"] == pytest.approx(np.mean([o["recall"] for o in r["per_class"].values()]))
    assert [o["epoch"] for o in epochs] == list(range(1, 7)) and "validation" not in epochs[0]
    assert (
        len([o for o in said if o.startswith("epoch ")]) == 12
        and any("images/s" in o and "left" in o for o in said)
        and all("\n" not in o for o in said)
    )


def test_two_runs_agree_bit_for_bit(scenes, models):
    "Weights, losses and numbers; whatever was drawn from the global generators before. Another seed differs."
    s, runs = changed(QUICK, epochs=2, drop_path=0.2), []
    for seed in (3, 3, 4):
        np.random.rand(len(runs))
        torch.rand(len(runs) + 1)
        learn = fine_tune_classifier(models(), scenes, scenes.splits["train"], s, seed, CPU, quiet)
        runs.append((learn.model.state_dict(), learn.classification.epochs))
    (a, one), (b, two), (c, three) = runs
    assert (
        all(torch.equal(a[k], b[k]) for k in a)
        and one == two
        and one != three
        and not torch.equal(a["head.weight"], c["head.weight"])
    )


def test_the_epoch_is_chosen_on_held_out_training_labels(scenes, models, monkeypatch):
    "A quarter is held out, and not learnt from; the weights that count are those of the best epoch; test labels have no say."
    train, test = scenes.splits["train"], scenes.splits["test"]
    s = changed(QUICK, validation=0.25, fractions=[1.0], epochs=3, lr=0.01, batch=18)
    seen = []
    read = AugmentedScenes.__getitem__
    monkeypatch.setattr(AugmentedScenes, "__getitem__", lambda self, at: seen.extend(at[1]) or read(self, at))
    learn = fine_tune_classifier(models(), scenes, train, s, 1, CPU, quiet)
    a = learn.classification
    held = set(a.held)
    assert (
        np.bincount(scenes.labels[a.held]).tolist() == [2, 2, 2]
        and not held & set(seen)
        and held | set(seen) == set(train)
        and sorted(seen) == sorted([*set(seen)] * 3)
    )
    accuracy = [o["validation"] for o in a.epochs]
    assert accuracy[a.best[1] - 1] == max(accuracy)
    got = predict_logits(learn.model, scenes, a.held, a.mean, a.std).argmax(1).numpy()
    assert (got == scenes.labels[a.held]).mean() == max(accuracy)
    fake = Fake(scenes[np.arange(39)], scenes.labels.copy(), train, test, scenes.classes)
    fake.labels[test] = (fake.labels[test] + 1) % 3
    (r, _), (wrong, _) = (classify(models(), o, s, 1, CPU, quiet) for o in (scenes, fake))
    assert (
        r["chosen_on"] == "validation (6 images)"
        and r["epoch"] == wrong["epoch"] == a.best[1]
        and np.roll(r["confusion"], 1, 0).tolist() == wrong["confusion"]
    )


def test_the_best_epoch_is_kept_when_later_ones_are_worse(scenes, models, monkeypatch):
    "Of accuracies .5, 1, 1 and 0 with likelihoods that fall, the second."
    marks, y = iter([0.5, 1.0, 1.0, 0.0]), torch.tensor([0, 1])
    calls, weights = [], []

    def made(model, images, index, *a):
        share, k = next(marks), len(calls) + 1
        calls.append(k)
        weights.append(model.head.weight.detach().clone())
        truth = torch.as_tensor(images.labels[index]).long()
        right = int(share * len(index))
        guess = torch.where(torch.arange(len(index)) < right, truth, (truth + 1) % 3)
        return nn.functional.one_hot(guess, 3).float() * (1 + 1 / k if share == 1 else 1)

    monkeypatch.setattr(module, "logits", made)
    learn = fine_tune_classifier(
        models(), scenes, scenes.splits["train"], changed(QUICK, validation=0.25, epochs=4), 1, CPU, quiet
    )
    assert (
        learn.classification.best[1] == 2
        and torch.equal(learn.model.head.weight, weights[1])
        and not torch.equal(weights[1], weights[3])
    )


def test_one_image_a_class_holds_nothing_out(scenes, models):
    said = []
    r, _ = classify(
        models(), scenes, changed(QUICK, fractions=[0.1], validation=0.5, epochs=2, batch=16), on=CPU, say=said.append
    )
    assert (
        r["chosen_on"] == "last"
        and r["finetune"]["0.1"]["train_images"] == 3
        and any("nothing is held out" in o for o in said)
        and any("all 3 images are one batch" in o for o in said)
    )


@pytest.mark.parametrize(
    "name,bands,side,batch,precision",
    [
        ("resnet18", 13, 32, 4, "float32"),
        ("resnet18", 1, 64, 1, "float32"),
        ("swin_tiny_patch4_window7_224", 3, 64, 2, "float32"),
        ("vit_tiny_patch16_224", 4, 64, 3, "bfloat16"),
    ],
)
def test_any_bands_backbone_and_batch(models, name, bands, side, batch, precision):
    "One epoch with the published recipe, odd batches and batches of one among them: every part that should learn moves."
    data, said = noise(2 if "swin" in name else 5, bands, side), []
    folder = models(name, bands, side)
    learn = fine_tune_classifier(
        folder,
        data,
        data.splits["train"],
        changed(PAPER, epochs=1, warmup_epochs=0, batch=batch, precision=precision, drop_path=0.0),
        on=CPU,
        say=said.append,
    )
    before = module.load_backbone(folder)[0].state_dict()
    moved = [k for k, v in learn.model.encoder.named_parameters() if not torch.equal(v, before[k])]
    assert {k for k, _ in learn.model.encoder.named_parameters()} - {*moved} == {"mask_token"}
    assert np.isfinite(learn.classification.epochs[0]["loss"]) and any("left out" in o for o in said) == (bands != 3)


def test_a_loss_that_is_not_finite_is_named(models):
    data = noise(8)
    with pytest.raises(
        CmidError, match=r"loss is not finite at step \d+ \(learning rate [\de.+]+\); lower classify.lr"
    ) as e:
        fine_tune_classifier(models(), data, data.splits["train"], changed(PLAIN, epochs=30, lr=1e30), on=CPU, say=quiet)
    assert "\n" not in str(e.value)


def test_out_of_memory_is_named(models, monkeypatch):
    whole = Classifier.forward

    def narrow(self, x, targets=None):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, x, targets)

    monkeypatch.setattr(Classifier, "forward", narrow)
    data = noise(8)
    with pytest.raises(
        CmidError,
        match="^params.yaml: classify.batch: 4 images of 32 px do not fit into the memory of cpu; 2 do; lower it",
    ):
        fine_tune_classifier(models(), data, data.splits["train"], PLAIN, on=CPU, say=quiet)


def test_what_is_wrong_is_named(scenes, models):
    go = lambda data, folder=models(), **o: classify(folder, data, changed(QUICK, **o), on=CPU, say=quiet)
    with pytest.raises(CmidError, match=r"no split 'tran' \(did you mean 'train'\?\)"):
        go(scenes, train="tran")
    with pytest.raises(CmidError, match="2 images are in both 'train' and 'both', the first is blue/00.png"):
        go(scenes, test="both")
    with pytest.raises(CmidError, match="the 6 training images are all of one class"):
        go(Fake(noise(8).x, [1] * 8, range(6), [6, 7]), fractions=[1.0])
    with pytest.raises(CmidError, match="has no classes"):
        bare = noise(4, test=2)
        bare.labels = None
        go(bare)
    with pytest.raises(CmidError, match="images have 3 bands, .*resnet18-13-32 was made for 13; take the same bands"):
        go(scenes, models(bands=13))
    with pytest.raises(CmidError, match="timm does not understand 'rand-m9-zeal3'"):
        go(scenes, randaugment="rand-m9-zeal3")
    with pytest.raises(CmidError, match="classify.precision: float16 needs a GPU"):
        go(scenes, precision="float16")
    with pytest.raises(CmidError, match="classify.batch: batch norm would see one image of 32 px"):
        go(scenes, batch=1)
    with pytest.raises(FileNotFoundError, match="there is no backbone here"):
        go(scenes, "nowhere")


# --- figures


@pytest.mark.parametrize("k", [2, 3, 12, 13, 21, 45])
def test_confusion_figure(k):
    "Shares of rows; counts where they fit; every row named; as wide as a phone."
    n = np.random.default_rng(0).integers(0, 30, (k, k))
    n[0] = 0
    ax = confusion_figure(n, [f"class {i}" for i in range(k)]).axes[0]
    ax.figure.canvas.draw()
    share = ax.images[0].get_array()
    assert np.allclose(share.sum(1), [0] + [1] * (k - 1)) and share[1, 0] == pytest.approx(n[1, 0] / n[1].sum())
    assert (
        ax.figure.get_size_inches()[0] < 5
        and [o.get_text().split()[1] for o in ax.get_yticklabels()] == [str(i) for i in range(k)]
        and f"{n.trace()} of {n.sum()}" in ax.get_title("left")
    )
    assert sorted((o.get_position()[::-1], o.get_text()) for o in ax.texts) == (
        sorted(((i, j), str(n[i, j])) for i, j in np.argwhere(n)) if 2 * k <= 45 else []
    )
    boxes = [o.get_window_extent() for o in ax.get_xticklabels() if o.get_text()]
    assert len(boxes) > 1 and not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))
    boxes = [o.get_window_extent() for o in ax.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))


def test_curves_figure(result):
    made = [o | dict(validation=0.1 * o["epoch"]) for o in result[1]]
    titles = lambda epochs: [o.get_title("left") for o in classification_curves_figure(epochs).axes if o.get_title("left")]
    assert titles(result[1]) == ["loss", "learning rate"] and titles(made) == [
        "loss",
        "learning rate",
        "validation accuracy",
    ]
    line = classification_curves_figure(made).axes[2].lines[0]
    assert line.get_xdata().tolist() == [o["step"] for o in made] and line.get_ydata() == pytest.approx(
        [0.1 * i for i in range(1, 7)]
    )
