"What pretraining and fine-tuning share: learning rate and weight decay."

import pytest
import torch

from cmid.method.backbones import create
from cmid.train.training import UNDECAYED, lr_at, parameter_groups


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_biases_norms_and_tokens_do_not_decay(name):
    model = create(name, 3, 64)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    without, decayed = parameter_groups(model, 0.05)
    assert (without["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert {id(parameter) for group in (without, decayed) for parameter in group["params"]} == set(names)
    for parameter in decayed["params"]:
        assert parameter.ndim > 1
        assert names[id(parameter)].split(".")[-1] not in UNDECAYED
    for parameter in without["params"]:
        assert parameter.ndim < 2 or names[id(parameter)].split(".")[-1] in UNDECAYED


def test_the_learning_rate_rises_linearly_and_falls_by_half_a_cosine():
    rates = [lr_at(step, 110, 10, 2.0, 0.0) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = cosine(optimiser, 100)
    for rate in rates[10:]:
        assert rate == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-9)
        optimiser.step()
        schedule.step()
