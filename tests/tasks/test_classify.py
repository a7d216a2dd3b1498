"Fine-tuned classification: the published recipe, every image counted, and two runs that agree bit for bit."

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, auto_augment
from torch import nn

from cmid.base.errors import CmidError
from cmid.base.figures import confusion_figure
from cmid.base.params import Params
from cmid.base.runtime import step_generator
from cmid.base.scores import class_table, unpack_answers, wilson
from cmid.method import backbones
from cmid.method.images import crop, random_boxes
from cmid.tasks import classify as module
from cmid.tasks.classify import (
    AugmentedScenes,
    Classifier,
    apply_operations,
    classification_curves_figure,
    classification_learner,
    classify,
    drop_path_rate,
    fine_tune_classifier,
    group_operations,
    make_mixup,
    mix_batch,
    predict_logits,
    rand_augment,
)
from cmid.tasks.finetune import temporary_seed
from cmid.train.checkpoint import load_backbone
from tests.tools.runs import changed, quiet
from tests.tools.scenes import paint_scenes, prepare_scenes

CPU = torch.device("cpu")
PAPER = Params(profile="paper").classify


PLAIN = changed(
    PAPER,
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


class Memory:
    "A prepared dataset in memory."

    folder = "fake"

    def __init__(self, images, labels, train, test, names=None):
        self.images, self.labels = images, np.asarray(labels)
        self.splits = dict(train=np.asarray(train), test=np.asarray(test))
        self.classes = names or [f"c{i}" for i in range(max(labels) + 1)]
        self.bands, self.side = images.shape[1:3]
        self.mean, self.std = [0.5] * self.bands, [0.25] * self.bands

    def __getitem__(self, rows):
        return self.images[rows]

    def __len__(self):
        return len(self.images)

    def source(self, i):
        return f"{i}.png"


def noise(n, bands=3, side=32, test=0):
    "Two classes of random images, the last `test` of them in the test split."
    images = np.random.default_rng(0).integers(0, 256, (n, bands, side, side), "uint8")
    return Memory(images, np.arange(n) % 2, range(n - test), range(n - test, n))


@pytest.fixture(scope="module")
def resnet(random_backbone):
    return random_backbone("resnet18", 3, 32)


# --- the recipe


def test_the_paper_profile_is_the_published_recipe():
    s = PAPER
    assert (s.epochs, s.batch, s.lr, s.weight_decay, s.warmup_epochs) == (200, 16, 0.003125, 0.02, 5)
    assert s.betas == [0.98, 0.92, 0.99]
    assert (s.randaugment, s.mixup, s.cutmix, s.erasing, s.smoothing) == ("rand-m9-mstd0.5", 0.8, 1.0, 0.25, 0.1)
    assert (s.validation, s.fractions, s.test, s.drop_path) == (0.0, [1.0], "test", None)
    assert drop_path_rate(s, "swin_base_patch4_window7_224") == 0.5
    assert drop_path_rate(s, "resnet50") == 0.0


def test_timm_gets_the_published_recipe():
    mixup = make_mixup(PAPER, 21)
    assert isinstance(mixup, Mixup)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing) == (0.8, 1.0, 0.1)
    assert (mixup.mix_prob, mixup.switch_prob, mixup.num_classes) == (1.0, 0.5, 21)
    augment = rand_augment(PAPER.randaugment, [0.5] * 3)
    assert augment.num_layers == 2
    assert len(augment.ops) == 15
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in augment.ops} == {(9, 0.5, 0.5)}


def test_the_learner_does_what_the_settings_say(resnet):
    "Steps, learning rates, weight decay and stochastic depth."
    data = noise(10)
    s = changed(PLAIN, epochs=4, warmup_epochs=1, lr=0.01, lr_min=1e-4, weight_decay=0.3, drop_path=0.2)
    learn = fine_tune_classifier(resnet, data, data.splits["train"], s, on=CPU, say=quiet)
    groups = learn.opt.opt.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    decayed = [parameter for group in groups if group["weight_decay"] for parameter in group["params"]]
    assert all(parameter.ndim > 1 for parameter in decayed)
    assert {tuple(group["betas"]) for group in groups} == {(0.98, 0.92, 0.99)}
    assert learn.classification.step == 12
    epochs = learn.classification.epochs
    assert [epoch["step"] for epoch in epochs] == [3, 6, 9, 12]
    rates = [1e-4 + (0.01 - 1e-4) * (1 + np.cos(np.pi * (step - 3) / 9)) / 2 for step in (5, 8, 11)]
    assert [epoch["lr"] for epoch in epochs] == pytest.approx([0.01, *rates])
    depths = [part.drop_prob for part in learn.model.modules() if type(part).__name__ == "DropPath"]
    assert max(depths) == pytest.approx(0.2)


# --- network


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_logits_are_a_linear_map_of_the_mean(name):
    torch.manual_seed(0)
    model = Classifier(backbones.create(name, 3, 64), 5).eval()
    images = torch.randn(3, 3, 64, 64)
    nn.init.normal_(model.head.bias)
    with torch.no_grad():
        maps, logits = model.encoder(images)[-1], model(images)
    means = maps.flatten(2).sum(2) / maps[0, 0].numel()
    assert torch.allclose(logits, means @ model.head.weight.T + model.head.bias, atol=1e-4)


# --- augmentation


def test_crops_depend_on_seed_and_step_alone():
    data, rows = noise(6, side=64), np.array([5, 0, 3])
    source = AugmentedScenes(data, data.labels, (0.2, 0.5), seed=4)
    x, y = source.example(7, rows)
    generator = step_generator(4, 7)
    boxes = random_boxes(3, (64, 64), (0.2, 0.5), generator=generator)
    horizontal, vertical = torch.rand(2, 3, generator=generator) < 0.5
    for k, i in enumerate(rows):
        image = torch.from_numpy(data.images[i : i + 1]).float()
        expected = crop(image, boxes[k : k + 1], horizontal[k : k + 1])[0].round().clamp(0, 255)
        assert torch.equal((255 * x[k]).round(), expected.flip(1) if vertical[k] else expected)
    assert y.tolist() == data.labels[rows].tolist()
    assert not torch.equal(source.example(8, rows)[0], x)


def pixels(image):
    "A PIL image as float (3, H, W)."
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def a_picture(size):
    "Smooth colours with some noise, of (width, height) px."
    small = np.random.default_rng(sum(size)).integers(0, 256, (9, 7, 3), "uint8")
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


COLOURS = dict(
    auto_contrast=[0.0],
    equalize=[0.0],
    invert=[0.0],
    posterize=[1, 3, 8],
    solarize=[0, 100, 256],
    solarize_add=[77],
    brightness=[0.3, 1.7],
    contrast=[0.3, 1.7],
    color=[0.3, 1.7],
    sharpness=[0.1, 1.9],
)
MOVES = dict(
    rotate=[17.0, -26.0, 0.0],
    shear_x=[0.27, -0.2],
    shear_y=[0.27, -0.13],
    translate_x_rel=[0.31],
    translate_y_rel=[-0.4],
    translate_x_abs=[13.4],
    translate_y_abs=[-7.0],
)


def operated(image, name, amount, cubic=False):
    "An image after one operation, in a batch with another image that passes another operation."
    x = torch.stack([255 - image, image])
    notes = [(("invert", 0.0, False),), ((name, amount, cubic),)]
    other, found = apply_operations(x, *group_operations(notes, image.shape[1:], (11, 22, 33)))
    assert torch.equal(other, image)
    return found


@pytest.mark.parametrize("size", [(61, 47), (32, 96)])
@pytest.mark.parametrize("name, amounts", COLOURS.items())
def test_colours_are_pillows_bit_for_bit(name, amounts, size):
    picture = a_picture(size)
    for amount in amounts:
        given = () if name in ("auto_contrast", "equalize", "invert") else (amount,)
        assert torch.equal(
            operated(pixels(picture), name, amount), pixels(getattr(auto_augment, name)(picture, *given))
        )


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("size", [(61, 47), (32, 96)])
@pytest.mark.parametrize("name, amounts", MOVES.items())
def test_moved_pixels_are_pillows(name, amounts, size, cubic):
    "But for grey values that float32 rounds to the neighbour."
    picture = a_picture(size)
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    for amount in amounts:
        expected = pixels(getattr(auto_augment, name)(picture, amount, resample=resample, fillcolor=(11, 22, 33)))
        differences = (operated(pixels(picture), name, amount, cubic) - expected).abs()
        assert differences.max() <= 1
        assert differences.mean() < 0.15


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_a_blur_is_nearly_pillows(sigma):
    "Pillow approximates a Gaussian by boxes, and repeats the border."
    picture = a_picture((61, 47))
    differences = operated(pixels(picture), "gaussian_blur", sigma) - pixels(auto_augment.gaussian_blur(picture, sigma))
    assert differences.abs().max() <= 8
    assert differences.abs().mean() < 1


@pytest.mark.parametrize("colour", [0, 7, 255])
def test_operations_on_an_image_of_one_colour(colour):
    plain = torch.full((3, 32, 40), float(colour))
    for name in ("auto_contrast", "equalize", "contrast", "color", "sharpness", "gaussian_blur"):
        assert torch.equal(operated(plain, name, 1.3), plain), name
    picture = Image.new("RGB", (40, 32), (colour, colour, colour))
    for name in ("auto_contrast", "equalize", "sharpness"):
        assert torch.equal(pixels(getattr(auto_augment, name)(picture, *([1.3] * (name == "sharpness")))), plain), name


@pytest.mark.parametrize("config", ["rand-m9-mstd0.5", "rand-m5-n3-mstd1-inc1", "rand-m6-mstd0.5-tweights", "rand-t3a"])
def test_rand_augment_draws_what_timm_draws(config):
    "The images of a batch become what timm makes of each of them, with the same state of the random generators."
    mean = [0.2, 0.4, 0.6]
    fill = tuple(round(255 * value) for value in mean)
    timms, ours = auto_augment.rand_augment_transform(config, dict(img_mean=fill)), rand_augment(config, mean)
    pictures = [a_picture((48, 40)) for _ in range(24)]
    with temporary_seed(5):
        expected = torch.stack([pixels(timms(picture)) for picture in pictures])
        after = np.random.rand()
    with temporary_seed(5):
        notes = [ours(()) for _ in pictures]
        assert np.random.rand() == after
    x = torch.stack([pixels(picture) for picture in pictures])
    groups, rows, numbers = group_operations(notes, x.shape[2:], fill)
    found = apply_operations(x, groups, rows, numbers)
    close = ((found - expected).abs() <= 4).float().mean((1, 2, 3))
    assert close.min() > 0.97
    assert not torch.equal(found[0], pixels(pictures[0])) or not notes[0]
    assert sum(count for _, count in groups) == sum(map(len, notes)) == len(rows)


def test_half_of_the_operations_are_applied():
    "Two are chosen for an image, each of fifteen as often, and applied with probability 1/2; half are turned around."
    augment = rand_augment("rand-m9-mstd0.5", [0.5] * 3)
    with temporary_seed(1):
        notes = [augment(()) for _ in range(6000)]
    lengths = np.bincount([len(drawn) for drawn in notes], minlength=3) / len(notes)
    assert lengths == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    drawn = sum(notes, ())
    counts = Counter(name for name, _, _ in drawn)
    assert len(counts) == 15
    assert all(count == pytest.approx(400, abs=80) for count in counts.values())
    turns = np.array([(amount, cubic) for name, amount, cubic in drawn if name == "rotate"])
    assert (turns > 0).mean(0) == pytest.approx([0.5, 0.5], abs=0.08)
    assert np.abs(turns[:, 0]).mean() == pytest.approx(27, abs=0.3)
    assert np.abs(turns[:, 0]).max() <= 30


def test_a_batch_without_operations_stays():
    x = torch.rand(2, 13, 32, 40)
    assert torch.equal(apply_operations(x.clone(), *group_operations([(), ()], (32, 40), ())), x)


def test_workers_augment_as_the_training_process():
    data, batches = noise(9), []
    for workers in (0, 2):
        model = Classifier(backbones.create("resnet18", 3, 32), 2)
        s = changed(PAPER, batch=4)
        learn = classification_learner(
            model, data, range(9), s, data.mean, data.std, 3, CPU, say=quiet, workers=workers
        )
        batches.append([])
        for epoch in range(2):
            learn.dls.train.sampler.epoch = epoch
            batches[-1] += list(learn.dls.train)
    assert len(batches[0]) == len(batches[1]) == 6
    source = learn.dls.train.dataset
    for one, other in zip(*batches):
        for a, b in zip(source.augmented(*one), source.augmented(*other)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("off", [{}, dict(mixup=0.0), dict(cutmix=0.0), dict(mixup=0.0, cutmix=0.0)])
def test_targets_agree_with_mixed_images(n, off):
    "Each class has a channel of its own, so the mean of a channel is the share of its class."
    mixup = make_mixup(changed(PAPER, **off), 3)
    labels = torch.arange(n) % 3
    images = torch.eye(3)[labels].view(n, 3, 1, 1).expand(n, 3, 16, 16)
    kept = images.clone()
    for seed in range(12):
        with temporary_seed(seed):
            mixed, targets = mix_batch(mixup, images, labels)
        assert mixed.shape == images.shape
        assert torch.allclose(targets.sum(1), torch.ones(n), atol=1e-6)
        assert targets.min() >= 0.1 / 3 - 1e-6
        assert torch.allclose(targets, 0.9 * mixed.mean((2, 3)) + 0.1 / 3, atol=1e-5)
    assert torch.equal(images, kept)


@pytest.mark.parametrize("bad", ["rand-m9-q4", "randm9", "augmix-m5", "rand-tfoo", "rand--m9", "rand-mnine"])
def test_an_unknown_notation_is_an_error(bad):
    with pytest.raises(CmidError, match="classify.randaugment: timm does not understand") as error:
        rand_augment(bad, [0.5] * 3)
    assert repr(bad) in str(error.value)
    assert "\n" not in str(error.value)


# --- prediction


@pytest.mark.parametrize("batch", [1, 3, 5, 64])
def test_the_last_incomplete_batch_is_predicted_too(batch):
    "Logits of all images, in order, for any batch size; the network is left as it was."
    torch.manual_seed(0)
    model = Classifier(backbones.create("resnet18", 3, 32), 4).train()
    data, order = noise(7), [6, 0, 3, 1, 2, 5, 4]
    logits = predict_logits(model, data, order, [0.5] * 3, [0.25] * 3, batch)
    assert model.training
    assert model.encoder.model.bn1.training
    assert not logits.requires_grad
    with torch.no_grad():
        expected = model.eval()((torch.from_numpy(data.images[order]).float() / 255 - 0.5) / 0.25)
    assert logits.shape == (7, 4)
    assert torch.allclose(logits, expected, atol=1e-4)


# --- whole runs


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    "3 classes of 13 images: 8 to train, 5 to test."
    folder = tmp_path_factory.mktemp("scenes")
    lines = paint_scenes(folder, 13, train=8, noise=(15, 30))
    lines["both"] = lines["train"][:2] + lines["test"][:2]
    return prepare_scenes(folder, lines)


QUICK = changed(PAPER, epochs=6, warmup_epochs=1, batch=8, lr=0.003, precision="float32", fractions=[1.0, 0.2])


@pytest.fixture(scope="module")
def run(scenes, resnet):
    "Result, answers, epochs and lines of one run with all of the published augmentation."
    lines = []
    return *classify(resnet, scenes, QUICK, seed=3, on=CPU, say=lines.append), lines


def test_accuracy_exceeds_chance_and_results_agree(scenes, run):
    result, answers, epochs, _ = run
    whole = result["finetune"]["1.0"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["classes"], result["test_images"], result["chance"]) == (3, 15, pytest.approx(1 / 3))
    assert (result["epoch"], result["chosen_on"]) == (6, "last")
    assert list(result["finetune"]) == ["0.2", "1.0"]
    assert [score["train_images"] for score in result["finetune"].values()] == [6, 24]
    assert whole["low"] > result["chance"]
    for score in result["finetune"].values():
        assert score["accuracy"] == score["correct"] / 15
        assert (score["low"], score["high"]) == wilson(score["correct"], 15)
        assert (score["epoch"], score["held_out"]) == (6, 0)
    for share, score in result["finetune"].items():
        assert unpack_answers(answers["finetune"][share], 15).sum() == score["correct"]
    confusion = np.array(result["confusion"])
    assert confusion.sum(1).tolist() == [5, 5, 5]
    assert confusion.trace() == whole["correct"]
    assert result["per_class"] == class_table(confusion, scenes.classes)
    recalls = [scores["recall"] for scores in result["per_class"].values()]
    assert result["mean_recall"] == pytest.approx(np.mean(recalls))
    assert [epoch["epoch"] for epoch in epochs] == list(range(1, 7))
    assert "validation" not in epochs[0]


def test_each_epoch_is_reported_in_one_line(run):
    lines = run[3]
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 12
    assert all("images/s" in line and "left" in line for line in epochs)
    assert all("\n" not in line for line in lines)


def test_two_runs_agree_bit_for_bit(scenes, resnet):
    "Weights, losses and numbers, whatever the state of the global random generators. Another seed differs."
    s, runs = changed(QUICK, epochs=2, drop_path=0.2), []
    for seed in (3, 3, 4):
        np.random.rand(len(runs))
        torch.rand(len(runs) + 1)
        learn = fine_tune_classifier(resnet, scenes, scenes.splits["train"], s, seed, CPU, quiet)
        runs.append((learn.model.state_dict(), learn.classification.epochs))
    (first, first_epochs), (second, second_epochs), (third, third_epochs) = runs
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first_epochs == second_epochs != third_epochs
    assert not torch.equal(first["head.weight"], third["head.weight"])


# --- the choice of the epoch

VALIDATED = changed(QUICK, validation=0.25, fractions=[1.0], epochs=3, lr=0.01, batch=18)


@pytest.fixture(scope="module")
def validated(scenes, resnet):
    "A trained learner whose epoch was chosen, and the numbers of the images that it was trained on."
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        read = AugmentedScenes.__getitem__

        def watched(self, at):
            seen.extend(at[1])
            return read(self, at)

        patch.setattr(AugmentedScenes, "__getitem__", watched)
        learn = fine_tune_classifier(resnet, scenes, scenes.splits["train"], VALIDATED, 1, CPU, quiet)
    return learn, seen


def test_a_stratified_share_is_held_out_and_not_trained_on(scenes, validated):
    learn, seen = validated
    held_out = learn.classification.held_out
    assert np.bincount(scenes.labels[held_out]).tolist() == [2, 2, 2]
    assert not set(held_out) & set(seen)
    assert set(held_out) | set(seen) == set(scenes.splits["train"])
    assert sorted(seen) == sorted([*set(seen)] * 3)


def test_the_weights_are_those_of_the_best_epoch(scenes, validated):
    learn, _ = validated
    callback = learn.classification
    accuracy = [epoch["validation"] for epoch in callback.epochs]
    assert accuracy[callback.best_epoch - 1] == max(accuracy)
    logits = predict_logits(learn.model, scenes, callback.held_out, callback.mean, callback.std)
    assert (logits.argmax(1).numpy() == scenes.labels[callback.held_out]).mean() == max(accuracy)


def test_test_labels_do_not_choose_the_epoch(scenes, validated, resnet):
    train, test = scenes.splits["train"], scenes.splits["test"]
    labels = scenes.labels.copy()
    labels[test] = (labels[test] + 1) % 3
    wrong = Memory(scenes[np.arange(39)], labels, train, test, scenes.classes)
    result, *_ = classify(resnet, scenes, VALIDATED, 1, CPU, quiet)
    other, *_ = classify(resnet, wrong, VALIDATED, 1, CPU, quiet)
    assert result["chosen_on"] == "validation (6 images)"
    assert result["epoch"] == other["epoch"] == validated[0].classification.best_epoch
    assert np.roll(result["confusion"], 1, 0).tolist() == other["confusion"]


def test_the_best_epoch_is_kept_when_later_ones_are_worse(scenes, resnet, monkeypatch):
    "Accuracies are .5, 1, 1 and 0, and the third epoch has a lower likelihood: the second is kept."
    accuracies, weights = [0.5, 1.0, 1.0, 0.0], []

    def made_up_logits(model, images, index, *rest):
        accuracy = accuracies[len(weights)]
        weights.append(model.head.weight.detach().clone())
        truth = torch.as_tensor(images.labels[index]).long()
        correct = torch.arange(len(index)) < int(accuracy * len(index))
        guess = torch.where(correct, truth, (truth + 1) % 3)
        certainty = 1 + 1 / len(weights) if accuracy == 1 else 1
        return nn.functional.one_hot(guess, 3).float() * certainty

    monkeypatch.setattr(module, "predict_logits", made_up_logits)
    s = changed(QUICK, validation=0.25, epochs=4)
    learn = fine_tune_classifier(resnet, scenes, scenes.splits["train"], s, 1, CPU, quiet)
    assert learn.classification.best_epoch == 2
    assert torch.equal(learn.model.head.weight, weights[1])
    assert not torch.equal(weights[1], weights[3])


def test_nothing_is_held_out_where_a_class_has_one_image(scenes, resnet):
    lines = []
    s = changed(QUICK, fractions=[0.1], validation=0.5, epochs=2, batch=16)
    result, *_ = classify(resnet, scenes, s, on=CPU, say=lines.append)
    assert result["chosen_on"] == "last"
    assert result["finetune"]["0.1"]["train_images"] == 3
    assert any("nothing is held out" in line for line in lines)
    assert any("all 3 images are one batch" in line for line in lines)


# --- bands, backbones, batches


@pytest.mark.parametrize(
    "name, n, bands, side, batch, precision",
    [
        ("resnet18", 5, 13, 32, 4, "float32"),
        ("resnet18", 5, 1, 64, 1, "float32"),
        ("swin_tiny_patch4_window7_224", 2, 3, 64, 2, "float32"),
        ("vit_tiny_patch16_224", 5, 4, 64, 3, "bfloat16"),
    ],
)
def test_any_bands_backbone_and_batch(random_backbone, name, n, bands, side, batch, precision):
    "One epoch with the published recipe, with odd batches and batches of one: every parameter is trained."
    data, lines = noise(n, bands, side), []
    folder = random_backbone(name, bands, side)
    s = changed(PAPER, epochs=1, warmup_epochs=0, batch=batch, precision=precision, drop_path=0.0)
    learn = fine_tune_classifier(folder, data, data.splits["train"], s, on=CPU, say=lines.append)
    before = load_backbone(folder)[0].state_dict()
    parameters = dict(learn.model.encoder.named_parameters())
    unchanged = {key for key, value in parameters.items() if torch.equal(value, before[key])}
    assert unchanged == {"mask_token"}
    assert np.isfinite(learn.classification.epochs[0]["loss"])
    assert any("left out" in line for line in lines) == (bands != 3)


# --- errors


def test_a_loss_that_is_not_finite_is_an_error(resnet):
    data, s = noise(8), changed(PLAIN, epochs=30, lr=1e30)
    why = r"loss is not finite at step \d+ \(learning rate [\de.+]+\); lower classify.lr"
    with pytest.raises(CmidError, match=why) as error:
        fine_tune_classifier(resnet, data, data.splits["train"], s, on=CPU, say=quiet)
    assert "\n" not in str(error.value)


def test_a_batch_that_does_not_fit_is_an_error(resnet, monkeypatch):
    forward = Classifier.forward

    def two_images_fit(self, x, targets=None):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, targets)

    monkeypatch.setattr(Classifier, "forward", two_images_fit)
    data = noise(8)
    why = "^params.yaml: classify.batch: 4 images of 32 px do not fit into the memory of cpu; 2 do; lower it"
    with pytest.raises(CmidError, match=why):
        fine_tune_classifier(resnet, data, data.splits["train"], PLAIN, on=CPU, say=quiet)


@pytest.mark.parametrize(
    "values, why",
    [
        (dict(train="tran"), r"no split 'tran' \(did you mean 'train'\?\)"),
        (dict(test="both"), "2 images are in both 'train' and 'both', the first is blue/00.png"),
        (dict(randaugment="rand-m9-zeal3"), "timm does not understand 'rand-m9-zeal3'"),
        (dict(precision="float16"), "classify.precision: float16 needs a GPU"),
        (dict(batch=1), "classify.batch: batch norm would see one image of 32 px"),
    ],
)
def test_bad_settings_are_errors(scenes, resnet, values, why):
    with pytest.raises(CmidError, match=why):
        classify(resnet, scenes, changed(QUICK, **values), on=CPU, say=quiet)


def test_bad_data_and_backbones_are_errors(scenes, resnet, random_backbone):
    one_class = Memory(noise(8).images, [1] * 8, range(6), [6, 7])
    with pytest.raises(CmidError, match="the 6 training images are all of one class"):
        classify(resnet, one_class, changed(QUICK, fractions=[1.0]), on=CPU, say=quiet)
    unlabelled = noise(4, test=2)
    unlabelled.labels = None
    with pytest.raises(CmidError, match="has no classes"):
        classify(resnet, unlabelled, QUICK, on=CPU, say=quiet)
    with pytest.raises(CmidError, match="images have 3 bands, but .*resnet18-13-32 takes 13; use the same bands"):
        classify(random_backbone("resnet18", 13, 32), scenes, QUICK, on=CPU, say=quiet)
    with pytest.raises(FileNotFoundError, match="there is no backbone here"):
        classify("nowhere", scenes, QUICK, on=CPU, say=quiet)


# --- figures


@pytest.mark.parametrize("k", [2, 3, 12, 13, 21, 45])
def test_confusion_figure(k):
    "Shares of rows; counts where they fit; every row named; no labels overlap; as wide as a phone."
    counts = np.random.default_rng(0).integers(0, 30, (k, k))
    counts[0] = 0
    ax = confusion_figure(counts, [f"class {i}" for i in range(k)]).axes[0]
    ax.figure.canvas.draw()
    share = ax.images[0].get_array()
    assert np.allclose(share.sum(1), [0] + [1] * (k - 1))
    assert share[1, 0] == pytest.approx(counts[1, 0] / counts[1].sum())
    assert ax.figure.get_size_inches()[0] < 5
    assert [o.get_text().split()[1] for o in ax.get_yticklabels()] == [str(i) for i in range(k)]
    assert f"{counts.trace()} of {counts.sum()}" in ax.get_title("left")
    texts = sorted((o.get_position()[::-1], o.get_text()) for o in ax.texts)
    assert texts == (sorted(((i, j), str(counts[i, j])) for i, j in np.argwhere(counts)) if 2 * k <= 45 else [])
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels if label.get_text()]
        assert len(boxes) > 1
        assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))


def test_curves_figure(run):
    _, _, epochs, _ = run
    validated = [epoch | dict(validation=0.1 * epoch["epoch"]) for epoch in epochs]
    expected = {1: ["loss", "learning rate"], 2: ["loss", "learning rate", "validation accuracy"]}
    for number, shown in enumerate((epochs, validated), 1):
        axes = classification_curves_figure(shown).axes
        assert [ax.get_title("left") for ax in axes if ax.get_title("left")] == expected[number]
    line = classification_curves_figure(validated).axes[2].lines[0]
    assert line.get_xdata().tolist() == [epoch["step"] for epoch in epochs]
    assert line.get_ydata() == pytest.approx([0.1 * i for i in range(1, 7)])
