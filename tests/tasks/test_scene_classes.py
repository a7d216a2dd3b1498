"Splits, subsets and features of scene classes: every image is used once, and no test image is used for training."

import numpy as np
import pytest
import torch
from torch import nn

from cmid.base.errors import CmidError
from cmid.method import backbones
from cmid.tasks.scene_classes import class_splits, pooled_features, subsample


class MeanColour(nn.Module):
    "The image as its own feature map: features are normalised mean colours."

    def forward(self, images):
        return [images]


def noise(n, bands=3, side=32):
    return np.random.default_rng(0).integers(0, 256, (n, bands, side, side), "uint8")


# --- features


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("bands", [1, 4])
def test_features_are_pooled_normalised_maps(name, bands):
    torch.manual_seed(0)
    encoder = backbones.create(name, bands, 64)
    images, index = noise(5, bands, 64), [3, 0, 4, 1, 3]
    mean, std = np.linspace(0.3, 0.5, bands), np.linspace(0.1, 0.2, bands)
    features = pooled_features(encoder, images, index, mean, std, batch=2)
    normalised = (images[index] / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = encoder.eval()(torch.from_numpy(normalised).float())[-1].flatten(2).mean(2)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.allclose(features, expected, atol=1e-4)


def test_the_batch_size_does_not_change_features():
    torch.manual_seed(0)
    encoder, images = backbones.create("resnet18", img_size=32), noise(7)
    expected = pooled_features(encoder, images, range(7), [0.5] * 3, [0.2] * 3, batch=1)
    for batch in (3, 7, 64):
        features = pooled_features(encoder, images, range(7), [0.5] * 3, [0.2] * 3, batch=batch)
        assert torch.allclose(features, expected, atol=1e-4)


def test_the_encoder_is_left_as_it_was():
    encoder = backbones.create("resnet18", img_size=32).train()
    encoder.model.layer1.eval()
    weights = {key: value.clone() for key, value in encoder.state_dict().items()}
    modes = [part.training for part in encoder.modules()]
    images = np.zeros((2, 3, 32, 32), "uint8")
    pooled_features(encoder, images, [0, 1], [0.5] * 3, [0.2] * 3)
    with pytest.raises(CmidError):  # also after an error
        pooled_features(encoder, images[:, :1], [0, 1], [0.5] * 3, [0.2] * 3)
    assert [part.training for part in encoder.modules()] == modes
    assert all(torch.equal(value, weights[key]) for key, value in encoder.state_dict().items())


def test_images_are_read_in_the_order_of_the_disk():
    "Each image is read once, and features are returned in the order that was asked."
    asked, images = [], noise(45, side=8)

    class Watched:
        def __getitem__(self, rows):
            asked.extend(rows)
            return images[rows]

    index = np.random.default_rng(1).permutation(45)
    features = pooled_features(MeanColour(), Watched(), index, [0.4] * 3, [0.2] * 3, batch=7)
    assert asked == list(range(45))
    assert np.allclose(features, (images[index].mean((2, 3)) / 255 - 0.4) / 0.2, atol=1e-4)


class DividesByZero(nn.Module):
    def forward(self, images):
        return [images / (images[:, :1] - images[:, :1])]


@pytest.mark.parametrize(
    "encoder, index, bands, why",
    [
        (MeanColour(), [0], 3, "images have 2 bands, but mean and std have 3"),
        (MeanColour(), [], 2, "no images"),
        (DividesByZero(), range(3), 2, "3 of 3 images are not finite"),
    ],
)
def test_bad_features_are_errors(encoder, index, bands, why):
    images = np.zeros((3, 2, 32, 32), "uint8")
    with pytest.raises(CmidError, match=why):
        pooled_features(encoder, images, index, [0.5] * bands, [0.2] * bands)


# --- subsets of the labels


@pytest.mark.parametrize("seed", range(3))
def test_subsets_are_nested_and_stratified(seed):
    labels = np.random.default_rng(seed).integers(0, 7, 900)
    index = np.random.default_rng(9).choice(900, 500, replace=False)
    available = np.bincount(labels[index], minlength=7)
    smaller = set()
    for fraction in (0.001, 0.01, 0.1, 0.33, 0.5, 1.0):
        part = subsample(labels, index, fraction, seed)
        assert smaller <= set(part) <= set(index)
        assert (np.diff(part) > 0).all()
        counts = np.bincount(labels[part], minlength=7)
        assert (counts == np.maximum(1, np.floor(fraction * available + 0.5))).all()
        smaller = set(part)
    assert smaller == set(index)


def test_subsets_depend_on_the_seed_alone():
    labels = np.arange(300) % 3
    orders = [np.random.default_rng(k).permutation(300) for k in range(3)]
    parts = [subsample(labels, order, 0.1, 5).tolist() for order in orders]
    assert parts[0] == parts[1] == parts[2]
    assert subsample(labels, np.arange(300), 0.1, 6).tolist() != parts[0]


# --- splits


class Prepared:
    "What `class_splits` reads of a prepared dataset."

    folder, classes = "fake", ["a", "b"]
    source = "{}.png".format

    def __init__(self, labels, train, test):
        self.labels = labels
        self.splits = dict(train=np.array(train), test=np.array(test, int))


LABELS = np.array([0, 1, 0, 1, -1, -1])


@pytest.mark.parametrize(
    "prepared, test, why",
    [
        (Prepared(LABELS, [0, 1], [2, 3]), "tets", r"no split 'tets' \(did you mean 'test'\?\); it has train, test"),
        (Prepared(LABELS, [0, 1], [2, 3]), "train", "2 images are in both 'train' and 'train', the first is 0.png"),
        (Prepared(LABELS, [0, 1], [1, 2]), "test", "1 image is in both 'train' and 'test', the first is 1.png"),
        (Prepared(LABELS, [0, 1], [4, 5]), "test", "2 images are in split 'test' without a class, the first is 4.png"),
        (Prepared(LABELS, [0, 2], [1, 3]), "test", "2 images are in 'test' of a class that 'train' does not have"),
        (Prepared(LABELS, [0, 1], []), "test", "split 'test' is empty"),
        (Prepared(None, [0, 1], [2, 3]), "test", "has no classes; name a labelled dataset"),
    ],
)
def test_bad_splits_are_errors_of_one_line(prepared, test, why):
    with pytest.raises(CmidError, match=why) as error:
        class_splits(prepared, "train", test)
    assert "\n" not in str(error.value)
