"Runs that were made to collapse are stopped and named; those that differ from them by the cure alone are not."

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
FAST = dict(
    lr=0.003, momentum=[0.5, 0.9]
)  # a teacher that follows at once: what takes thousands of steps at .996 takes forty


class Scenes:
    "64 generated scenes of 64 px."

    bands, side, mean, std = 3, 64, [0.34] * 3, [0.14] * 3
    labels = np.arange(64) % len(CLASSES)
    splits = {"train": np.arange(64)}

    def __init__(self):
        self.pixels = np.stack(
            [scene(list(CLASSES)[k], i, size=64)[0].transpose(2, 0, 1) for i, k in enumerate(self.labels)]
        )

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.pixels[i]


@pytest.fixture(scope="module")
def scenes():
    return Scenes()


def train(scenes, weights=(1.0, 1.0, 1.0), **more):
    "A finished run on one thread."
    p = Params(profile="smoke")
    w = dict(zip(("reconstruction", "contrast", "distillation"), weights))
    said = []
    s = p.pretrain.model_copy(update=SMALL | dict(weights=p.pretrain.weights.model_copy(update=w)) | more)
    torch.manual_seed(0)
    l = pretrain_learner(
        scenes,
        np.arange(64),
        s,
        "resnet18",
        on=torch.device("cpu"),
        say=said.append,
        health=p.health.model_copy(update=dict(images=32)),
        labelled=scenes,
    )
    l.said = said
    return run_pretraining(l)


def no_negatives(query, key, queue, temperature):
    return (2 - 2 * (query * key.detach()).sum(1)).mean()


def test_no_negatives(scenes, monkeypatch):
    monkeypatch.setattr(model, "info_nce", no_negatives)
    with pytest.raises(
        CmidError,
        match=r"^collapsed: projection std 0\.0\d+ since epoch \d \(healthy: about 0\.18\); .* no checkpoint from before is there$",
    ):
        train(scenes, (0.0, 1.0, 0.0), **FAST)


def test_no_centre(scenes):
    with pytest.raises(
        CmidError, match=r"^collapsed: every place picks the same prototype since epoch \d \(local loss 0\."
    ):
        train(scenes, (0.0, 0.0, 1.0), centre_momentum=1.0, **FAST)


def test_huge_learning_rate(scenes):
    with pytest.raises(
        CmidError, match=r"^collapsed: (student|teacher) feature std [\d.e-]+ since epoch 1 \(healthy: about 0\.044\)"
    ):
        train(scenes, lr=3.0)


@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_with_negatives_and_centre(scenes, weights):
    "The same settings without the fault."
    assert train(scenes, weights, **FAST).cmid.done == 6 * 8


def test_healthy(scenes):
    "The published teacher and learning rate: no alarm, and what idles in so short a run is said once."
    l = train(scenes)
    end = pretrain_summary(l)
    assert end["student_std"] > 0.4 / 512**0.5 and end["knn"] > 1 / len(CLASSES) and end["queue_age"] == 2
    assert end["reconstruction_skill"] < 0 and [o for o in end["warnings"] if "no better than a flat colour" in o]
    assert len([o for o in l.said if o.startswith("warning: the reconstruction")]) == 1
