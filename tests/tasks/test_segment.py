"Segmentation: every pixel counted once, batches of any size, crops that repeat, and whole scenes from tiles."

import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, precision_recall_fscore_support

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.base.runtime import step_generator
from cmid.base.scores import mean_iou
from cmid.data.labelled import IGNORE, palette, windows
from cmid.method import backbones
from cmid.method.backbones import STRIDES, Pyramid
from cmid.tasks.finetune import largest_image, resolved
from cmid.tasks.segment import (
    ERROR_COLOUR,
    PUBLISHED_SEGMENTATION,
    BinPooling,
    SegmentationCrops,
    Segmenter,
    crop_window,
    error_overlay,
    fine_tune_segmentation,
    inference_tiles,
    paint_mask,
    photometric_distortion,
    pixel_confusion,
    scaled_crops,
    segment,
    segmentation_examples,
    segmentation_figure,
    segmentation_scene_figure,
    segmentation_scores,
    upernet,
    window_of_mixed_classes,
)
from tests.tools.runs import changed, quiet

CPU = torch.device("cpu")
PAPER = Params(profile="paper").segment
NETWORKS = "resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"


PLAIN = changed(Params(profile="smoke").segment, crop=64, epochs=1, batch=2, channels=16, precision="float32")


def read_only(array):
    view = array.view()
    view.flags.writeable = False
    return view


class Memory:
    "Labelled images in memory."

    task, folder = "segment", "fake"

    def __init__(self, items, train, test, classes=3):
        self.items = items
        self.splits = dict(train=np.asarray(train), test=np.asarray(test, int))
        self.classes = [f"c{i}" for i in range(classes)]
        self.bands = len(items[0][0])
        self.sizes = np.array([mask.shape for _, mask in items])
        self.names = [f"img/{i}.png" for i in range(len(items))]

    def __len__(self):
        return len(self.items)

    def image(self, i):
        return read_only(self.items[i][0])

    def mask(self, i):
        return read_only(self.items[i][1])


def squares(n=4, size=(64, 64), bands=3, classes=3, seed=0):
    "Images in which a class is a level of brightness, with some noise and an ignored corner."
    rng = np.random.default_rng(seed)
    height, width = size
    items = []
    for _ in range(n):
        coarse = rng.integers(0, classes, (-(-height // 16), -(-width // 16)))
        mask = np.repeat(np.repeat(coarse, 16, 0), 16, 1)[:height, :width].astype("uint8")
        image = (40 + 80 * mask[None] + rng.integers(0, 30, (bands, *size))).astype("uint8")
        mask[:4, :4] = IGNORE
        items.append((image, mask))
    return Memory(items, range(n - 1), [n - 1], classes)


# --- the recipe


def test_the_paper_profile_is_the_published_recipe():
    s = PAPER
    assert (s.epochs, s.batch, s.crop, s.scale, s.test) == (50, 8, 512, [0.5, 2.0], "test")
    assert (s.channels, s.auxiliary, s.warmup_steps) == (512, 0.4, 100)
    resnet = resolved(s, "resnet50", PUBLISHED_SEGMENTATION)
    assert (resnet.optimiser, resnet.lr, resnet.momentum) == ("sgd", 0.01, 0.9)
    assert (resnet.weight_decay, resnet.drop_path) == (1e-4, 0.0)
    swin = resolved(s, "swin_base_patch4_window7_224", PUBLISHED_SEGMENTATION)
    assert (swin.optimiser, swin.lr, swin.weight_decay, swin.drop_path) == ("adamw", 6e-5, 0.01, 0.3)


def test_drop_path_reaches_the_backbone(random_backbone):
    s = changed(PLAIN, drop_path=0.3, batch=1)
    model, *_ = fine_tune_segmentation(random_backbone(), squares(2), [0], s, on=CPU, say=quiet)
    rates = [part.drop_prob for part in model.modules() if type(part).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)


# --- pyramid


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_four_maps_of_any_encoder(name, size):
    pyramid = Pyramid(backbones.create(name, 2, 64)).eval()
    maps = pyramid(torch.randn(1, 2, *size))
    expected = [(1, c, size[0] // s, size[1] // s) for c, s in zip(pyramid.channels, STRIDES)]
    assert [tuple(o.shape) for o in maps] == expected
    assert pyramid.strides == [4, 8, 16, 32]


def test_own_maps_are_passed_on_and_a_single_one_is_rescaled():
    images = torch.randn(1, 3, 64, 64)
    resnet = Pyramid(backbones.create("resnet18", 3, 64)).eval()
    assert torch.equal(resnet(images)[3], resnet.encoder(images)[-1])
    vit = Pyramid(backbones.create("vit_tiny_patch16_224", 3, 64)).eval()
    maps, own = vit(images), vit.encoder(images)[0]
    assert torch.equal(maps[2], own)
    assert torch.equal(maps[3], F.max_pool2d(own, 2))
    layer = vit.levels[1][0]
    assert torch.allclose(maps[1], F.conv_transpose2d(own, layer.weight, layer.bias, 2), atol=1e-5)
    assert vit.channels == [48, 96, 192, 192]


# --- network


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (7, 16), (12, 5)])
def test_bins_are_adaptive_pooling(height, width):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    for bins in (1, 2, 3, 6):
        assert torch.allclose(BinPooling(bins)(x), F.adaptive_avg_pool2d(x, bins))


def test_the_librarys_decoder_has_the_parts_that_are_replaced():
    decoder = upernet([8, 16, 24, 32], 16)
    kinds = [[type(part).__name__ for part in (block[0], *block[1])] for block in decoder.psp.blocks]
    assert kinds == [["BinPooling", "Conv2d", "GroupNorm", "ReLU"]] * 4
    assert [block[0].size for block in decoder.psp.blocks] == [1, 2, 3, 6]
    assert not any(isinstance(part, torch.nn.AdaptiveAvgPool2d) for part in decoder.modules())


def test_the_decoder_leaves_its_inputs_as_they_are():
    decoder = upernet([8, 16, 24, 32], 16)
    maps = [torch.randn(1, c, 32 // s, 64 // s) for c, s in zip((8, 16, 24, 32), (1, 2, 4, 8))]
    kept = [o.clone() for o in maps]
    assert decoder([None, None, *maps]).shape == (1, 16, 32, 64)
    assert all(map(torch.equal, maps, kept))


@pytest.mark.parametrize(
    "name, bands",
    [
        ("resnet18", 1),
        ("resnet18", 13),
        (NETWORKS[1], 13),
        (NETWORKS[2], 1),
        (NETWORKS[1], 1),
        (NETWORKS[2], 13),
    ],
)
def test_a_batch_may_have_one_image(name, bands):
    "A training step on a single crop of 64 px reaches every parameter but the mask token."
    torch.manual_seed(0)
    model = Segmenter(backbones.create(name, bands, 64), 3, 16)
    losses = model(torch.randn(1, bands, 64, 64), torch.randint(0, 3, (1, 64, 64), dtype=torch.uint8))
    sum(losses.values()).backward()
    assert list(losses) == ["segmentation", "auxiliary"]
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None] == ["pyramid.encoder.mask_token"]
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)
    assert model.eval()(torch.randn(2, bands, 96, 32)).shape == (2, 3, 96, 32)


def test_the_auxiliary_loss_is_weighted_or_absent():
    images, masks = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    torch.manual_seed(0)
    model = Segmenter(backbones.create("resnet18", 3, 64), 3, 16, 0.4).eval()
    with torch.no_grad():
        auxiliary = model(images, masks)["auxiliary"]
        logits = F.interpolate(model.auxiliary(model.pyramid(images)[2]), (64, 64), mode="bilinear")
        assert torch.allclose(auxiliary, 0.4 * F.cross_entropy(logits, masks.long()))
        model.auxiliary_weight = 0.8
        assert torch.allclose(model(images, masks)["auxiliary"], 2 * auxiliary)
    assert Segmenter(backbones.create("resnet18", 3, 64), 3, 16, 0.0).auxiliary is None


# --- crops


def test_windows_of_one_class_are_avoided():
    mask = np.zeros((8, 8), "uint8")
    mask[:, 6:] = 1
    mask[0] = IGNORE
    places = torch.tensor([[0.0, 0.0], [0.5, 0.3], [0.9, 0.99]])
    assert window_of_mixed_classes(mask, 4, 4, places) == (4, 4)
    assert window_of_mixed_classes(mask, 4, 4, places[:2]) == (2, 1)
    assert window_of_mixed_classes(np.full_like(mask, IGNORE), 4, 4, places) == (4, 4)
    mask[:] = np.arange(8) % 4
    assert window_of_mixed_classes(mask, 4, 4, places) == (0, 0)


def cropped(image, mask, filled, side, flipped=(False, False), canvas=None):
    "The crop and the mask of one window, which lies in the top left corner of a canvas; the padding is 51."
    size = mask.shape
    height, width = canvas or size
    images = torch.full((2, len(image), height, width), 255, dtype=torch.uint8)
    images[1, :, : size[0], : size[1]] = torch.from_numpy(np.array(image))
    masks = torch.full((2, height, width), 7, dtype=torch.uint8)
    masks[1, : size[0], : size[1]] = torch.from_numpy(np.array(mask))
    sizes = torch.tensor([[height, width, side, side], [*size, *filled]]).float()
    fill, flags = torch.full((len(image),), 0.2), torch.tensor([[False, False], flipped])
    x, y = scaled_crops(images, masks, sizes, flags, side, fill)
    assert (y[0] == 7).all()
    return x[1], y[1]


def test_a_crop_at_scale_one_is_a_part_of_the_image():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (5, 40, 50), "uint8"), rng.integers(0, 3, (40, 50), "uint8")
    top, left, height, width, *size = crop_window(mask, 32, 1.0, torch.tensor([[0.5, 0.5]]))
    assert (top, left, height, width, size) == (4, 9, 32, 32, [32, 32])
    x, y = cropped(image[:, 4:36, 9:41], mask[4:36, 9:41], size, 32)
    assert torch.allclose(x * 255, torch.from_numpy(image[:, 4:36, 9:41]).float(), atol=0.01)
    assert np.array_equal(y, mask[4:36, 9:41])


@pytest.mark.parametrize(
    "window, size, side", [((61, 47), (96, 96), 96), ((150, 31), (64, 13), 64), ((1, 5), (2, 7), 9)]
)
@pytest.mark.parametrize("flipped", [(False, False), (True, False), (False, True), (True, True)])
def test_a_crop_is_torchs_interpolation_of_its_window(window, size, side, flipped):
    "Alone and beside larger windows, larger and smaller than the window, mirrored or not."
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (3, *window), "uint8"), rng.integers(0, 200, window, "uint8")
    scaled = F.interpolate(torch.from_numpy(image)[None].float(), size, mode="bilinear")[0]
    classes = F.interpolate(torch.from_numpy(mask)[None, None], size, mode="nearest-exact")[0, 0]
    margins = (0, side - size[1], 0, side - size[0])
    axes = [axis for axis, flag in zip((-1, -2), flipped) if flag]
    expected = F.pad(scaled, margins, value=51).flip(axes), F.pad(classes, margins, value=IGNORE).flip(axes)
    for canvas in (window, (200, 170)):
        x, y = cropped(image, mask, size, side, flipped, canvas)
        assert torch.allclose(255 * x, expected[0], atol=0.05)
        assert torch.equal(y, expected[1])


@pytest.mark.parametrize("size", [(509, 544), (33, 200), (1, 1), (64, 64)])
@pytest.mark.parametrize("scale", [0.5, 0.73, 1.37, 2.0])
def test_crops_of_any_image_have_their_size(size, scale):
    "The labelled part is as large as the scaled image; beside it everything is fill and ignored."
    image, mask = np.full((2, *size), 77, "uint8"), np.zeros(size, "uint8")
    _, _, height, width, *filled = crop_window(mask, 96, scale, torch.tensor([[0.3, 0.8]]))
    x, y = cropped(image[:, :height, :width], mask[:height, :width], filled, 96)
    assert x.shape == (2, 96, 96)
    assert y.shape == (96, 96)
    inside = y != IGNORE
    height, width = inside.any(1).sum().item(), inside.any(0).sum().item()
    assert inside[:height, :width].all()
    assert torch.allclose(255 * x[:, inside], torch.tensor(77.0))
    assert torch.allclose(255 * x[:, ~inside], torch.tensor(51.0))
    for found, n in zip((height, width), size):
        fits = round(96 / scale) <= n
        assert found == 96 if fits else abs(found - max(1, n * scale)) <= 1


def test_image_and_mask_stay_together():
    "In images whose brightness is their class, the mean brightness of a crop's classes rises with the class."
    crops = SegmentationCrops(squares(3, (200, 150)), 64, [0.5, 2.0], [0.4] * 3, seed=3)
    variants = set()
    for step in range(6):
        for image, mask in zip(*crops.example(step, np.array([0, 2]))):
            large = [c for c in range(3) if (mask == c).sum() > 200]
            levels = [255 * image[0][mask == c].mean().item() for c in large]
            assert all(darker + 15 < brighter for darker, brighter in zip(levels, levels[1:]))
            variants.add(mask.numpy().tobytes())
    assert len(variants) == 12


def test_crops_depend_on_seed_and_step_alone():
    data, rows = squares(3, (80, 80)), np.array([2, 0])

    def crops(seed, step):
        images, masks = SegmentationCrops(data, 64, [0.5, 2.0], [0.4] * 3, seed).example(step, rows)
        return images.tolist(), masks.tolist()

    assert crops(1, 5) == crops(1, 5)
    assert crops(1, 5) != crops(1, 6)
    assert crops(1, 5) != crops(2, 5)


def distorted(*values):
    "80 distortions of an image with these bands."
    images = torch.tensor(values).view(-1, 1, 1).expand(80, -1, 2, 2)
    return photometric_distortion(images, torch.rand(80, 2, 5, generator=step_generator(0, 0)))


def test_each_image_is_distorted_by_its_own_draws():
    "As it is alone, in a batch of any size; and as computed by hand, contrast before and after the hue."
    images, draws = torch.rand(7, 3, 5, 6), torch.rand(7, 2, 5, generator=step_generator(1, 0))
    together = photometric_distortion(images, draws)
    for k in range(7):
        assert torch.allclose(
            together[k : k + 1], photometric_distortion(images[k : k + 1], draws[k : k + 1]), atol=1e-6
        )
    u = torch.tensor([[0.75, 1.0, 0.0, 0.5, 0.0]]).expand(2, -1)
    on = torch.tensor([[0.0, 0.0, 0.0, 0.9, 0.0], [0.0, 0.0, 0.0, 0.9, 0.9]])  # all but the hue; the order differs
    first, last = photometric_distortion(torch.full((2, 3, 1, 1), 0.2), torch.stack([u, on], 1))
    assert torch.allclose(first, torch.tensor((0.2 + 16 / 255) * 1.5))
    assert torch.allclose(last, first)
    red = torch.tensor([0.8, 0.1, 0.1]).view(1, 3, 1, 1).expand(2, -1, 1, 1)
    first, last = photometric_distortion(red, torch.stack([u, on], 1)).flatten(1)
    bright = torch.tensor([0.8, 0.1, 0.1]) + 16 / 255
    for found, clipped in ((first, (1.5 * bright).clamp(max=1)), (last, bright)):
        luma = clipped @ torch.tensor([0.299, 0.587, 0.114])
        expected = 0.5 * clipped + 0.5 * luma
        assert torch.allclose(found, expected if found is first else (1.5 * expected).clamp(max=1), atol=1e-5)


def test_each_distortion_is_applied_to_half_of_the_images():
    draws = torch.rand(4000, 2, 5, generator=step_generator(2, 0))
    draws[:, 0] = 0.9  # so that each changes the image
    images = torch.tensor([0.3, 0.35, 0.4]).view(-1, 1, 1).expand(4000, -1, 1, 1)
    same = torch.isclose(photometric_distortion(images, draws), images, atol=1e-4).all(1)
    assert same.float().mean().item() == pytest.approx(1 / 16, abs=0.012)
    draws[:, 1, :3] = 0.9  # only the hue
    same = torch.isclose(photometric_distortion(images, draws), images, atol=1e-4).all(1)
    assert same.float().mean().item() == pytest.approx(1 / 2, abs=0.03)


def test_distortion_treats_all_pixels_alike():
    out = distorted(0.3, 0.4, 0.5)
    assert (out == out[..., :1, :1]).all()
    assert out.min() >= 0
    assert out.max() <= 1


def test_distortion_of_four_bands_scales_their_differences_by_one_factor():
    factors = distorted(0.3, 0.35, 0.4, 0.45)[..., 0, 0].diff(dim=1) / 0.05
    assert torch.allclose(factors, factors[:, :1].expand(-1, 3), atol=1e-4)
    assert 0.5 <= factors.min() < 0.6
    assert 1.4 < factors.max() <= 1.5001


def test_distortion_of_three_bands_also_changes_the_hue():
    "A rotated hue moves the middle band away from the middle of the other two, in some of the images."
    differences = distorted(0.3, 0.35, 0.4)[..., 0, 0].diff(dim=1)
    equal = torch.isclose(differences[:, 0], differences[:, 1], atol=1e-5)
    assert 0.2 < equal.float().mean() < 0.8


# --- scores


def test_scores_by_hand():
    "Two images of one split, counted together: the mean of their scores would differ."
    one = pixel_confusion(np.array([[0, 0], [0, 255]], "uint8"), np.array([[0, 0], [1, 1]], "uint8"), 3)
    two = pixel_confusion(np.array([[1]], "uint8"), np.array([[1]], "uint8"), 3)
    assert one.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert two.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    scores = segmentation_scores(one + two, ["a", "b", "c"])
    assert scores["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["mf1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert scores["oa"] == 0.75
    found = dict(iou=pytest.approx(2 / 3), f1=pytest.approx(0.8), precision=1.0, recall=pytest.approx(2 / 3), pixels=3)
    assert scores["per_class"]["a"] == found
    assert scores["per_class"]["c"] == dict(iou=None, f1=None, precision=None, recall=None, pixels=0)
    assert np.mean([mean_iou(one), mean_iou(two)]) != pytest.approx(scores["miou"])


def test_a_class_that_is_predicted_but_never_occurs_counts_as_zero():
    scores = segmentation_scores(np.array([[3, 0, 1], [0, 2, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert scores["per_class"]["c"]["iou"] == 0
    assert scores["miou"] == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert scores["mf1"] == pytest.approx((6 / 7 + 1 + 0) / 3)


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, 5, (2, 3000))
    guess[::2] = truth[::2]
    labelled = rng.random(3000) < 0.8
    masks = np.where(labelled, truth, IGNORE).astype("uint8").reshape(50, 60)
    confusion = pixel_confusion(masks, guess.astype("uint8").reshape(50, 60), 5)
    truth, guess = truth[labelled], guess[labelled]
    assert confusion.tolist() == confusion_matrix(truth, guess).tolist()
    scores = segmentation_scores(confusion, list("abcde"))
    assert scores["miou"] == pytest.approx(jaccard_score(truth, guess, average="macro"))
    assert scores["mf1"] == pytest.approx(f1_score(truth, guess, average="macro"))
    assert scores["oa"] == pytest.approx((truth == guess).mean())
    precision, recall, f1, pixels = precision_recall_fscore_support(truth, guess)
    iou = jaccard_score(truth, guess, average=None)
    expected = dict(iou=iou, precision=precision, recall=recall, f1=f1, pixels=pixels)
    for key, values in expected.items():
        assert [o[key] for o in scores["per_class"].values()] == pytest.approx(list(values))


def test_the_mean_iou_of_many_confusion_matrices():
    confusions = np.random.default_rng(0).integers(0, 9, (7, 2, 3, 3))
    confusions[0, 0, 2] = confusions[0, 0, :, 2] = 0
    found = mean_iou(confusions)
    assert found.shape == (7, 2)
    each = [segmentation_scores(confusion, list("abc"))["miou"] for confusion in confusions.reshape(-1, 3, 3)]
    assert found.ravel() == pytest.approx(each)


# --- the whole task


@pytest.fixture(scope="module")
def overfit(random_backbone):
    "Data, settings, metrics, epochs and predictions of a short run on images that are easy to segment."
    data = squares(4, (75, 101))
    data.items[3][1][10:20] = IGNORE
    s = changed(PLAIN, epochs=12, optimiser="adamw", lr=2e-3, overlap=0.5, warmup_steps=4)
    return data, *segment(random_backbone(), data, s, on=CPU, say=quiet, keep=[3])


def test_easy_images_are_segmented(overfit):
    _, metrics, epochs, _ = overfit
    confusion = np.array(metrics["confusion"])
    assert metrics["oa"] > 1.5 * max(confusion.sum(1)) / confusion.sum()
    assert epochs[-1]["loss"] < epochs[0]["loss"]


def test_every_labelled_pixel_is_scored(overfit):
    data, metrics, _, kept = overfit
    confusion, truth = np.array(metrics["confusion"]), data.mask(3)
    assert confusion.sum() == (truth != IGNORE).sum()
    assert metrics["per_image"] == [confusion.ravel().tolist()]
    assert [scores["pixels"] for scores in metrics["per_class"].values()] == [(truth == c).sum() for c in range(3)]
    assert list(kept) == [3]
    assert confusion.tolist() == pixel_confusion(truth, kept[3], 3).tolist()


def test_metrics_are_json(overfit):
    _, metrics, _, _ = overfit
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    scores = {"miou", "mf1", "oa", "per_class", "confusion", "per_image"}
    assert set(metrics) == scores | {"images", "classes", "epoch", "train_images", "scored_on_training"}
    assert (metrics["images"], metrics["train_images"], metrics["epoch"]) == (1, 3, 12)
    assert metrics["scored_on_training"] is False


def test_two_runs_agree_bit_for_bit(random_backbone):
    s, folder = changed(PLAIN, epochs=2), random_backbone()
    first, second, other = (segment(folder, squares(), s, seed, CPU, quiet)[:2] for seed in (0, 0, 1))
    assert first == second
    assert first[1] != other[1]


@pytest.mark.parametrize(
    "name, bands, crop, size",
    [("resnet18", 13, 64, (40, 70)), (NETWORKS[1], 3, 224, (64, 64)), (NETWORKS[2], 13, 96, (70, 40))],
)
def test_any_network_bands_and_sizes(random_backbone, name, bands, crop, size):
    "A batch of two and a batch of one, images smaller than the crop, and inference on odd sizes."
    data, lines = squares(4, size, bands), []
    metrics, *_ = segment(random_backbone(name, bands), data, changed(PLAIN, crop=crop), on=CPU, say=lines.append)
    assert sum(map(sum, metrics["confusion"])) == (data.mask(3) != IGNORE).sum()
    assert any("saturation" in line for line in lines) == (bands != 3)


def test_the_result_says_when_training_images_are_scored(random_backbone):
    data = squares(2)
    data.splits["test"] = data.splits["train"]
    metrics, *_ = segment(random_backbone(), data, changed(PLAIN, batch=1), on=CPU, say=quiet)
    assert metrics["scored_on_training"] is True


def test_inference_tiles_cover_an_image():
    seen = np.zeros((160, 128), int)
    for top, left, bottom, right in inference_tiles((150, 101), changed(PLAIN, overlap=0.25)):
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1
    assert seen.max() > 1


# --- errors


def with_split(name, index):
    data = squares()
    data.splits[name] = np.array(index, int)
    return data


def with_unlabelled(*rows):
    "The test image, and the images `rows` without a labelled pixel, which train."
    items = squares().items
    for i in rows:
        items[i][1][:] = IGNORE
    return Memory(items, rows, [3])


def with_wrong_value():
    data = squares()
    data.items[3][1][0, 5] = 77
    return data


def for_change():
    data = squares()
    data.task = "change"
    return data


@pytest.mark.parametrize(
    "data, values, why",
    [
        (squares(), dict(train="trian"), r"segment.train: fake has no split 'trian' \(did you mean 'train'\?\)"),
        (squares(), dict(test="val"), "segment.test: fake has no split 'val'"),
        (with_unlabelled(0, 1), {}, "no pixel of split 'train' is labelled"),
        (with_split("test", [2, 3]), {}, "fake: 1 image is in both 'train' and 'test', the first is img/2.png"),
        (with_split("test", []), {}, "segment.test: split 'test' of fake is empty"),
        (for_change(), {}, "fake: its task is change, not segment"),
        (with_wrong_value(), {}, r"the mask of img/3.png holds 77, but classes are 0 to 2: .* cmid_stage labels"),
        (squares(bands=4), {}, r"fake: images have 4 bands, but \S+ takes 3"),
        (squares(), dict(crop=32, batch=1), "segment.batch: batch norm would see one crop of 32 px"),
        (squares(), dict(lr=1e30, epochs=3), "loss is not finite at step"),
    ],
)
def test_errors_are_one_line(random_backbone, data, values, why):
    with pytest.raises(CmidError, match=why) as error:
        segment(random_backbone(), data, changed(PLAIN, **values), on=CPU, say=quiet)
    assert "\n" not in str(error.value)


# --- figures


UNKNOWN = [f"class {i}" for i in range(40)]
KINDS = "water tree grass field building road car soil snow wetland clutter".split()


def least_distance(names):
    "Of the colours of two classes, in RGB"
    return min(np.linalg.norm(a - b) for a, b in combinations(palette(names), 2))


def test_colours_distinguish_classes_errors_and_ignored_pixels():
    fixed = palette(UNKNOWN[:21])
    assert len(np.unique(fixed.round(3), axis=0)) == 21
    assert np.array_equal(palette(UNKNOWN)[21:], fixed[:19])
    assert np.array_equal(fixed[:5], palette(UNKNOWN[:5]))
    every = np.concatenate([fixed, palette(KINDS)])
    assert min(np.linalg.norm(every - to_rgb(ERROR_COLOUR), axis=1)) > 0.2
    assert min(np.linalg.norm(every - 1, axis=1)) > 0.2
    painted = paint_mask(np.array([[1, IGNORE]]), UNKNOWN[:2])
    assert painted.tolist() == [[fixed[1].tolist(), [1, 1, 1]]]


def test_colours_are_natural_by_name():
    red, green, blue = range(3)
    for names, band in (
        (["water", "SeaLake", "rivers", "Water body"], blue),
        (["Trees", "forest", "low_vegetation", "HerbaceousVegetation"], green),
        (["Buildings", "roof", "bare-soil"], red),
    ):
        for name in names:
            assert palette([name])[0].argmax() == band, name
    for name in ("road", "Roads", "impervious surfaces"):
        assert np.ptp(palette([name])[0]) < 0.1, name
    for name in ("water tank", "car park", "road sign", "7", ""):
        assert np.array_equal(palette([name]), palette(["unknown"])), name
    assert np.array_equal(palette(["ship", "water", "harbour"])[1], palette(["water"])[0])


@pytest.mark.parametrize(
    "names",
    [
        KINDS,
        ["car", "truck", "small-vehicle", "large-vehicle"],
        ["forest", "evergreen forest", "grass", "pasture", "water", "river"],
        [*UNKNOWN[:10], *KINDS],
        [*KINDS[:6], *UNKNOWN[:3]],
    ],
)
def test_classes_of_one_model_are_told_apart(names):
    assert least_distance(names) >= (0.2 if len(names) < 12 else 0.09)
    assert least_distance(names[::-1]) >= (0.2 if len(names) < 12 else 0.09)


def test_errors_are_where_ground_truth_and_prediction_differ():
    image, truth = np.full((3, 1, 3), 100, "uint8"), np.array([[0, 1, IGNORE]], "uint8")
    correct, wrong, ignored = error_overlay(image, truth, np.zeros((1, 3), "uint8"))[0]
    assert np.ptp(correct) == 0
    assert tuple(wrong) == to_rgb(ERROR_COLOUR)
    assert ignored.tolist() == [1, 1, 1]


def panels(fig):
    return [ax for ax in fig.axes if ax.images]


@pytest.mark.parametrize("bands, classes", [(1, 2), (3, 6), (13, 30)])
def test_figures_of_any_scene(bands, classes):
    data = squares(3, (70, 300), bands, min(classes, 3))
    data.classes = [f"a class with a long name {i}" for i in range(classes)]
    guesses = {i: np.full(mask.shape, classes - 1, "uint8") for i, (_, mask) in enumerate(data.items)}
    examples = segmentation_examples(data, [0, largest_image(data, [1, 2])], guesses)
    fig = segmentation_figure(examples, data.classes)
    scene = segmentation_scene_figure(examples[0], data.classes, inference_tiles(data.sizes[0], PLAIN))
    assert [ax.get_title() for ax in panels(fig)[:4]] == ["image", "ground truth", "prediction", "errors"]
    assert (len(panels(fig)), len(panels(scene))) == (8, 4)
    occurring = {0, 1, min(classes, 3) - 1, classes - 1}
    legend = {text.get_text() for text in fig.legends[0].get_texts()}
    assert {data.classes[i] for i in occurring} | {"wrong", "not labelled"} <= legend
    assert len(scene.axes[0].patches) == len(windows(96, 320, 64, 0))
    fig.savefig(os.devnull, format="png")
    scene.savefig(os.devnull, format="png")


@pytest.mark.parametrize("size", [(3, 3000), (3000, 5), (1, 1), (1, 900)])
def test_figures_of_narrow_images(size):
    rng = np.random.default_rng(0)
    mask, image = rng.integers(0, 3, size).astype("uint8"), rng.integers(0, 256, (3, *size)).astype("uint8")
    data = Memory([(image, mask)], [0], [0])
    examples = segmentation_examples(data, [0], {0: mask})
    scene = segmentation_scene_figure(examples[0], data.classes, inference_tiles(size, PLAIN))
    for fig, longest in ((segmentation_figure(examples, data.classes), 280), (scene, 700)):
        fig.savefig(os.devnull, format="png")
        factor = -(-max(size) // longest)
        shapes = {ax.images[0].get_array().shape[:2] for ax in panels(fig)}
        assert shapes == {tuple(n // min(factor, n) for n in size)}


@pytest.mark.parametrize("stage", ["segment", "change"])
def test_scores_are_written_before_figures_are_drawn(stage):
    "An error in a figure never costs a training."
    notebook = json.loads((Path(__file__).parents[2] / f"nbs/pipeline/{stage}.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert 0 < code.index("stage.finish(") < code.index("stage.figure(")


def test_the_largest_image_of_a_split():
    sizes = (9, 9), (5, 20), (4, 4)
    data = Memory([(np.zeros((3, *size), "uint8"), np.zeros(size, "uint8")) for size in sizes], [0], [0, 2])
    assert largest_image(data, [0, 2]) == 0
    assert largest_image(data, [0, 1, 2]) == 1
