"Runs that are made to collapse stop with the name of the collapse; runs without the fault do not."

import numpy as np
import pytest
import torch

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.data.layout import CLASSES
from cmid.data.scenes import scene
from cmid.method import model
from cmid.train.pretrain import pretrain_learner, pretrain_summary, run_pretraining

SMALL = dict(
    epochs=6,
    batch=8,
    warmup_epochs=1,
    queue=32,
    prototypes=64,
    projector_hidden=64,
    projector_dim=32,
    head_hidden=64,
    head_dim=32,
)
FAST = dict(lr=0.003, momentum=[0.5, 0.9])  # a fast teacher: what takes thousands of steps at .996 takes forty


class Scenes:
    "64 generated scenes of 64 px."

    bands, side, mean, std = 3, 64, [0.34] * 3, [0.14] * 3
    labels = np.arange(64) % len(CLASSES)
    splits = {"train": np.arange(64)}

    def __init__(self):
        names = list(CLASSES)
        images = [scene(names[label], i, size=64)[0] for i, label in enumerate(self.labels)]
        self.pixels = np.stack([image.transpose(2, 0, 1) for image in images])

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.pixels[i]


@pytest.fixture(scope="module")
def scenes():
    return Scenes()


def train(scenes, weights=(1.0, 1.0, 1.0), say=None, **more):
    "A finished run."
    params = Params(profile="smoke")
    weights = dict(zip(("reconstruction", "contrast", "distillation"), weights))
    losses = params.pretrain.weights.model_copy(update=weights)
    torch.manual_seed(0)
    learn = pretrain_learner(
        scenes,
        np.arange(64),
        params.pretrain.model_copy(update=SMALL | dict(weights=losses) | more),
        "resnet18",
        on=torch.device("cpu"),
        say=say or (lambda _: None),
        health=params.health.model_copy(update=dict(images=32)),
        labelled=scenes,
    )
    return run_pretraining(learn)


def no_negatives(query, key, queue, temperature):
    return (2 - 2 * (query * key.detach()).sum(1)).mean()


@pytest.mark.slow
def test_no_negatives(scenes, monkeypatch):
    monkeypatch.setattr(model, "info_nce", no_negatives)
    text = (
        r"^collapsed: projection std 0\.0\d+ since epoch \d \(healthy: about 0\.18\); "
        r".* there is no earlier checkpoint$"
    )
    with pytest.raises(CmidError, match=text):
        train(scenes, (0.0, 1.0, 0.0), **FAST)


@pytest.mark.slow
def test_no_centre(scenes):
    text = r"^collapsed: every place picks the same prototype since epoch \d \(local loss 0\."
    with pytest.raises(CmidError, match=text):
        train(scenes, (0.0, 0.0, 1.0), centre_momentum=1.0, **FAST)


@pytest.mark.slow
def test_huge_learning_rate(scenes):
    text = r"^collapsed: (student|teacher) feature std [\d.e-]+ since epoch 1 \(healthy: about 0\.044\)"
    with pytest.raises(CmidError, match=text):
        train(scenes, lr=3.0)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_with_negatives_and_centre(scenes, weights):
    "The same settings without the fault."
    assert train(scenes, weights, **FAST).cmid.done == 6 * 8


@pytest.mark.slow
def test_healthy(scenes):
    "The published teacher and learning rate: no alarm, and what idles in so short a run is reported once."
    lines = []
    end = pretrain_summary(train(scenes, say=lines.append))
    assert end["student_std"] > 0.4 / 512**0.5
    assert end["knn"] > 1 / len(CLASSES)
    assert end["queue_age"] == 2
    assert end["reconstruction_skill"] < 0
    assert any("no better than a flat colour" in warning for warning in end["warnings"])
    assert len([line for line in lines if line.startswith("warning: the reconstruction")]) == 1
