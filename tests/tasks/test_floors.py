"Floors of the probe: image statistics and random convolutions by arithmetic, and through the probe of backbones."

import numpy as np
import pytest
import torch

from cmid.base.errors import CmidError
from cmid.base.scores import unpack_answers
from cmid.settings.probe import Probe
from cmid.settings.study import FLOORS
from cmid.tasks import floors
from cmid.tasks.floors import (
    FLOOR_ENCODERS,
    ImageStatistics,
    RandomConvolutions,
    frozen_encoder,
    random_patches,
)
from cmid.tasks.probe import probe
from cmid.tasks.scene_classes import pooled_features
from cmid.train.checkpoint import read_card
from tests.tools.runs import changed
from tests.tools.scenes import paint_scenes, prepare_scenes

SETTINGS = Probe(
    train="train",
    test="test",
    neighbours=5,
    metric="cosine",
    vote="weighted",
    scaler="none",
    temperature=0.07,
    fractions=[1.0],
    regularisation=[0.1, 10.0],
    batch=4,
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    "3 classes of 12 images, 8 to train and 4 to test, of colours that hardly overlap."
    folder = tmp_path_factory.mktemp("scenes")
    return prepare_scenes(folder, paint_scenes(folder, 12, train=8, noise=(12, 20)))


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def features(encoder, images):
    return encoder(images)[-1].flatten(1)


# Image statistics


def test_statistics_of_a_constant_and_of_a_two_valued_image():
    constant = np.full((1, 2, 8, 6), 51, np.uint8)
    halves = np.zeros((1, 2, 8, 6), np.uint8)
    halves[:, 0, :, :3], halves[:, 1, :2] = 255, 102  # a half of 1, and a quarter of 0.4
    found = pooled_features(ImageStatistics(), np.concatenate([constant, halves]), [0, 1], [0.0] * 2, [1.0] * 2)
    due = [[0.2, 0.2, 0.0, 0.0], [0.5, 0.1, 0.5, 0.4 * 3**0.5 / 4]]
    assert np.allclose(found, due, atol=1e-6)


def test_statistics_do_not_see_where_pixels_lie():
    image = noise(1, 3, 8, 8)
    shuffled = image.flatten(2)[..., torch.randperm(64)].view_as(image)
    assert torch.allclose(features(ImageStatistics(), image), features(ImageStatistics(), shuffled), atol=1e-6)


# Random convolutions


def by_hand(patches, image):
    "The formula, place by place: float64 (2 K,)."
    patches, image = np.asarray(patches, float), np.asarray(image, float)
    contrast = patches - patches.mean((1, 2, 3), keepdims=True)
    filters = contrast / np.sqrt((contrast**2).sum((1, 2, 3), keepdims=True))
    side, (height, width) = patches.shape[-1], image.shape[1:]
    positive, negative = [], []
    for f in filters:
        bias = np.sqrt(np.mean([(f * p).sum() ** 2 for p in patches]))
        windows = [
            image[:, y : y + side, x : x + side] for y in range(height - side + 1) for x in range(width - side + 1)
        ]
        answers = np.array([(f * window).sum() for window in windows])
        positive.append(np.maximum(answers - bias, 0).mean())
        negative.append(np.maximum(-answers - bias, 0).mean())
    return np.array(positive + negative)


@pytest.mark.parametrize("bands, side", [(1, 3), (3, 3), (5, 2)])
def test_random_convolutions_are_their_formula(bands, side):
    patches, images = noise(6, bands, side, side), noise(2, bands, 9, 11, seed=1)
    found = features(RandomConvolutions(patches), images)
    assert found.shape == (2, 12)
    for row, image in zip(found, images):
        assert np.allclose(row, by_hand(patches, image), atol=1e-5)
    assert (found > 0).any()


def test_a_filter_answers_most_where_its_patch_lies():
    patches, image = noise(4, 3, 3, 3), torch.full((1, 3, 20, 20), 0.5)
    places = [(2, 3), (2, 12), (11, 3), (12, 13)]
    for patch, (top, left) in zip(patches, places):
        image[0, :, top : top + 3, left : left + 3] = patch
    answers = torch.nn.functional.conv2d(image, RandomConvolutions(patches).filters)[0]
    found = [divmod(int(answer.argmax()), answer.shape[-1]) for answer in answers]
    assert found == places


def test_a_pattern_may_lie_anywhere():
    encoder, image = RandomConvolutions(noise(8, 3, 3, 3)), torch.full((1, 3, 24, 30), 0.3)
    image[..., 4:10, 5:12] = noise(3, 6, 7, seed=1)
    found = features(encoder, image)
    assert torch.allclose(features(encoder, image.roll((8, 11), (2, 3))), found, atol=1e-6)
    assert not torch.allclose(features(encoder, image.flip(-1)), found, atol=1e-4)  # but it may not be mirrored


def test_brightness_does_not_count_and_contrast_of_patches_neither():
    patches, images = noise(8, 3, 3, 3), noise(2, 3, 12, 12, seed=1)
    plain, steep = RandomConvolutions(patches), RandomConvolutions(0.5 * patches + 0.2)
    assert torch.allclose(features(plain, images + 0.2), features(plain, images), atol=1e-5)
    assert torch.allclose(steep.filters, plain.filters, atol=1e-6)
    assert torch.allclose(steep.bias, 0.5 * plain.bias, atol=1e-6)


def test_flat_patches_give_zeros_and_nothing_else():
    flat = torch.full((3, 3, 3, 3), 0.7)
    assert features(RandomConvolutions(flat), noise(2, 3, 12, 12)).eq(0).all()
    some = torch.cat([flat, noise(3, 3, 3, 3)])
    assert features(RandomConvolutions(some), noise(2, 3, 12, 12)).isfinite().all()


def test_features_do_not_depend_on_how_many_images_are_held(monkeypatch):
    encoder, images = RandomConvolutions(noise(8, 3, 3, 3)), noise(5, 3, 12, 12, seed=1)
    whole = features(encoder, images)
    monkeypatch.setattr(floors, "CHUNK", 1)
    assert torch.allclose(features(encoder, images), whole, atol=1e-6)


def test_patches_are_parts_of_training_images_and_repeat(scenes):
    train = scenes.splits["train"]
    patches = random_patches(scenes, train, 30, 4, seed=3)
    assert patches.equal(random_patches(scenes, train, 30, 4, seed=3))
    assert not patches.equal(random_patches(scenes, train, 30, 4, seed=4))
    images = scenes[train]
    windows = np.lib.stride_tricks.sliding_window_view(images, (4, 4), (2, 3)).transpose(0, 2, 3, 1, 4, 5)
    known = {window.tobytes() for window in windows.reshape(-1, 3, 4, 4)}
    assert {patch.tobytes() for patch in (patches * 255).round().byte().numpy()} <= known


# Through the probe


def test_names_are_those_of_the_settings():
    assert tuple(FLOOR_ENCODERS) == FLOORS["probe"]


@pytest.mark.parametrize("init", FLOOR_ENCODERS)
def test_floors_go_through_the_probe_of_backbones(scenes, init):
    frozen = frozen_encoder(init, None, scenes, SETTINGS)
    assert (frozen.facts["pretraining_data"], frozen.facts["made_by"]) == (None, None)
    assert frozen.facts["floor"]
    metrics, answers = probe(*frozen[:3], scenes, SETTINGS)
    assert metrics["test_images"] == 12
    assert unpack_answers(answers["linear"]["1.0"], 12).sum() == metrics["linear"]["1.0"]["correct"]
    assert metrics["linear"]["1.0"]["accuracy"] > 0.9  # colours are enough
    again, _ = probe(*frozen_encoder(init, None, scenes, SETTINGS)[:3], scenes, SETTINGS)
    assert again == metrics


def test_the_seed_draws_other_patches(scenes):
    first, other = (frozen_encoder("randomconv", None, scenes, SETTINGS, seed).encoder for seed in (0, 1))
    assert not first.filters.equal(other.filters)


def test_a_backbone_is_as_its_folder_says(scenes, random_backbone):
    folder = random_backbone(side=32)
    frozen, card = frozen_encoder("random-resnet18", folder, scenes, SETTINGS), read_card(folder)
    assert (frozen.mean, frozen.std) == (card.mean, card.std)
    assert frozen.facts == dict(pretraining_data=None, made_by=None)


def test_errors_are_one_line(scenes, tmp_path):
    with pytest.raises(CmidError, match="has no split 'trian' .did you mean 'train'"):
        frozen_encoder("randomconv", None, scenes, changed(SETTINGS, train="trian"))
    with pytest.raises((CmidError, FileNotFoundError), match="imagestat"):
        frozen_encoder("imagestat", tmp_path / "imagestat", scenes, SETTINGS)
