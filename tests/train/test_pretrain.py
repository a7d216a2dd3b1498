"The training loop around the method: other bands, an incomplete last batch, one image a step, a loss that is off."

import numpy as np
import pytest
import torch

from cmid.base.params import Params
from cmid.train.pretrain import pretrain_learner, run_pretraining
from tests.tools.runs import quiet


class Pool:
    "What a learner needs of a prepared dataset: eleven images of five bands."

    bands, side, mean, std = 5, 64, [0.4] * 5, [0.2] * 5

    def __init__(self):
        self.pixels = np.random.default_rng(0).integers(0, 256, (11, 5, 64, 64), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index]


def settings(**changes):
    return Params(profile="smoke").pretrain.model_copy(update=dict(epochs=2, batch=4) | changes)


def pretrain(backbone, settings):
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    return run_pretraining(pretrain_learner(Pool(), np.arange(11), settings, backbone, on=cpu, say=quiet))


@pytest.mark.parametrize(
    "backbone, changes, steps",
    [
        pytest.param("resnet18", dict(variant="byol"), 4, id="byol, the incomplete last batch is dropped"),
        pytest.param("vit_small_patch16_224", dict(precision="bfloat16"), 4, id="bfloat16"),
        pytest.param("resnet18", dict(batch=1, epoch_images=2), 4, id="one image a step"),
    ],
)
def test_training_runs(backbone, changes, steps):
    learn = pretrain(backbone, settings(**changes))
    assert learn.cmid.done == steps
    for point in learn.journal.curve:
        assert np.isfinite(list(point.values())).all()


def test_losses_that_are_off_are_0():
    weights = settings().weights.model_copy(update=dict(contrast=0.0, distillation=0.0))
    learn = pretrain("resnet18", settings(weights=weights))
    last = learn.journal.epochs[-1]
    assert last["contrast"] == last["distillation"] == 0
    assert last["reconstruction"] > 0


def test_an_error_in_a_step_leaves_mixed_precision(monkeypatch):
    "What runs after it computes with its own weights in its own precision, and the learner has its model again."
    cpu = torch.device("cpu")
    learn = pretrain_learner(Pool(), np.arange(11), settings(precision="bfloat16"), "resnet18", on=cpu, say=quiet)

    def fail(*_):
        assert torch.is_autocast_enabled("cpu")
        raise RuntimeError("broken")

    model = learn.model
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="broken"):
        run_pretraining(learn)
    assert not torch.is_autocast_enabled("cpu")
    assert learn.model is model
