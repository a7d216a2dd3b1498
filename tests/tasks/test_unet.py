"A U-Net from scratch: the row that needs no backbone, trained, scored and kept as the others are."

import json

import numpy as np
import pytest
import torch

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.settings.study import FLOORS
from cmid.study.result_schemas import checked_result
from cmid.study.results import Result
from cmid.tasks.change import change, change_mask
from cmid.tasks.dense import UNET, UNet, start_card, unet_card
from cmid.tasks.segment import fine_tune_segmentation, segment
from tests.tools.runs import changed, quiet

CPU = torch.device("cpu")
BRIEF = dict(crop=64, epochs=1, batch=2, optimiser="adamw", lr=1e-3, precision="float32", warmup_steps=1)
SEGMENT = changed(Params(profile="smoke").segment, **BRIEF)
CHANGE = changed(Params(profile="smoke").change, **BRIEF)


class Memory:
    "Labelled images in memory, of one date or of two."

    folder, hash = "fake", "0" * 64

    def __init__(self, task, items, train, test, classes=2):
        self.task, self.items = task, items
        self.splits = dict(train=np.asarray(train), test=np.asarray(test))
        self.classes = [f"c{i}" for i in range(classes)]
        self.bands = len(items[0][0])
        self.sizes = np.array([item[-1].shape for item in items])
        self.names = [f"{i}.png" for i in range(len(items))]

    def image(self, i):
        return self.items[i][0]

    def second(self, i):
        return self.items[i][1]

    def mask(self, i):
        return self.items[i][-1]


def bright(size=(64, 64), bands=3, dates=1, seed=0):
    "Noise with a bright square in the last date, and the mask of the square."
    rng = np.random.default_rng(seed)
    images = rng.integers(60, 90, (dates, bands, *size), np.uint8)
    top, left = (int(rng.integers(n // 2)) for n in size)
    mask = np.zeros(size, np.uint8)
    mask[top : top + size[0] // 2, left : left + size[1] // 2] = 1
    images[-1][:, mask == 1] += 120
    return *images, mask


def tiles(n=4, **options):
    return Memory("segment", [bright(seed=i, **options) for i in range(n)], range(n - 1), [n - 1])


def pairs(n=4, **options):
    return Memory("change", [bright(dates=2, seed=i, **options) for i in range(n)], range(n - 1), [n - 1])


def test_its_name_is_that_of_the_settings():
    assert FLOORS["segment"] == FLOORS["change"] == (UNET,)


# The network


@pytest.mark.parametrize("bands, size", [(1, (32, 32)), (3, (64, 96)), (5, (32, 160))])
def test_any_bands_and_multiples_of_32(bands, size):
    torch.manual_seed(0)
    single, double = UNet(bands, 4).eval(), UNet(bands, 2, dates=2).eval()
    assert single(torch.rand(1, bands, *size)).shape == (1, 4, *size)
    assert double(torch.rand(1, 2, bands, *size)).shape == (1, 2, *size)


def test_both_dates_are_stacked_as_bands():
    torch.manual_seed(0)
    network, images = UNet(3, 2, dates=2).eval(), torch.rand(2, 2, 3, 32, 32)
    stacked = torch.cat([images[:, 0], images[:, 1]], 1)
    assert torch.allclose(network(images), network.network(stacked), atol=1e-6)
    weights = network.network.encoder.conv1.weight
    assert weights.shape[1] == 6
    with torch.no_grad():
        weights[:, 3:] = 0  # blind to the second date
    assert network(images).equal(network(torch.stack([images[:, 0], 1 - images[:, 1]], 1)))


def test_no_weights_are_downloaded_and_the_seed_draws_others(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a U-Net from scratch needs no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    data, settings = tiles(), SEGMENT
    first, again, other = (
        fine_tune_segmentation(None, data, data.splits["train"], settings, seed, CPU, quiet)[0].state_dict()
        for seed in (0, 0, 1)
    )
    assert all(first[key].equal(again[key]) for key in first)
    assert not all(first[key].equal(other[key]) for key in first)


# What it takes


@pytest.mark.parametrize("make", [tiles, pairs])
def test_inputs_are_normalised_by_its_training_images(make):
    data = make(bands=4, size=(40, 33))
    card = start_card(None, data, data.splits["train"])
    images = [image for i in data.splits["train"] for image in data.items[i][:-1]]
    values = np.stack(images).transpose(1, 0, 2, 3).reshape(4, -1) / 255
    assert np.allclose(card.mean, values.mean(1), atol=1e-9)
    assert np.allclose(card.std, values.std(1), atol=1e-9)
    assert card.bands == ["band 1", "band 2", "band 3", "band 4"]
    assert (card.in_chans, card.data_hash, card.provenance) == (4, None, {})


def test_sizes_count_by_their_pixels_and_a_constant_band_is_not_blown_up():
    items = [(np.full((1, 2, 2), 0, np.uint8), None), (np.full((1, 6, 2), 255, np.uint8), None)]
    data = Memory("segment", [(image, image[0]) for image, _ in items], [0, 1], [0])
    assert unet_card(data, [0, 1]).mean == [0.75]
    assert unet_card(data, [0]).std == [1 / 255]


# Trained and scored as the others


@pytest.fixture(scope="module")
def trained():
    "Tiles, settings, metrics, epochs and what was trained."
    data, settings, kept = tiles(5, size=(40, 33)), changed(SEGMENT, epochs=16, lr=4e-3, crop=32), {}
    metrics, epochs, _ = segment(None, data, settings, on=CPU, say=quiet, trained=kept.update)
    return data, settings, metrics, epochs, kept


def test_it_learns_to_segment(trained):
    _, _, metrics, epochs, kept = trained
    assert metrics["miou"] > 0.8
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert isinstance(kept["model"], UNet)
    assert kept["settings"].optimiser == "adamw"


def test_it_learns_what_changed(tmp_path):
    data, kept = pairs(5, size=(32, 32)), {}
    settings = changed(CHANGE, epochs=16, lr=4e-3, crop=32)
    metrics, epochs, shown = change(None, data, settings, on=CPU, say=quiet, trained=kept.update)
    assert list(metrics["heads"]) == list(epochs) == list(kept["models"]) == [UNET]
    assert metrics["heads"][UNET]["f1"] > 0.8
    assert [list(pair["guesses"]) for pair in shown] == [[UNET]]
    card = start_card(None, data, data.splits["train"])
    guess = change_mask(kept["models"][UNET], *data.items[4][:2], card.mean, card.std, settings)
    assert np.array_equal(guess, shown[0]["guesses"][UNET])
    assert checked_result("change", Result(json.loads(json.dumps(metrics)), {}, tmp_path))


def test_metrics_have_the_form_of_the_others(trained, tmp_path):
    metrics = trained[2]
    assert checked_result("segment", Result(json.loads(json.dumps(metrics)), {}, tmp_path)).metrics == metrics


def test_it_costs_as_many_steps_as_a_backbone(random_backbone):
    data, pair_data = tiles(5, size=(32, 32)), pairs(5, size=(32, 32))
    two = dict(epochs=2)
    of_backbone = segment(random_backbone(), data, changed(SEGMENT, **two), on=CPU, say=quiet)[1]
    of_unet = segment(None, data, changed(SEGMENT, **two), on=CPU, say=quiet)[1]
    epochs = change(random_backbone(), pair_data, changed(CHANGE, **two), on=CPU, say=quiet)[1]
    epochs |= change(None, pair_data, changed(CHANGE, **two), on=CPU, say=quiet)[1]
    schedule = [[(epoch["step"], epoch["lr"]) for epoch in run] for run in (of_backbone, of_unet, *epochs.values())]
    assert schedule[0] == schedule[1]
    assert schedule[2] == schedule[3] == schedule[4]
    assert list(epochs) == ["bit", "difference", UNET]


def test_settings_that_are_null_are_those_of_a_resnet():
    kept, data = {}, tiles()
    settings = changed(SEGMENT, optimiser=None, lr=None, weight_decay=None, drop_path=None)
    segment(None, data, settings, on=CPU, say=quiet, trained=kept.update)
    assert (kept["settings"].optimiser, kept["settings"].lr) == ("sgd", 0.01)


@pytest.mark.parametrize("bands", [1, 5])
def test_a_batch_of_one_and_images_that_are_smaller_than_a_crop(bands):
    small = dict(bands=bands, size=(40, 50))
    assert segment(None, tiles(3, **small), changed(SEGMENT, batch=1), on=CPU, say=quiet)[0]["images"] == 1
    assert change(None, pairs(3, **small), changed(CHANGE, batch=1), on=CPU, say=quiet)[0]["images"] == 1


@pytest.mark.parametrize(
    "section, run, data, settings",
    [
        ("segment", segment, tiles, SEGMENT),
        ("change", change, pairs, CHANGE),
    ],
)
def test_a_single_value_for_batch_norm_is_refused(section, run, data, settings):
    with pytest.raises(CmidError, match=f"params.yaml: {section}.batch: batch norm would see one crop of 32 px"):
        run(None, data(3), changed(settings, batch=1, crop=32), on=CPU, say=quiet)
