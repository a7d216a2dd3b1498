"Fixtures of all tasks' tests: backbones with random weights, in the form of pretrained ones."

import pytest
import torch

from cmid.method import backbones
from cmid.train.checkpoint import export_backbone
from tests.tools.cards import random_card


def _export(folder, name, bands, side):
    torch.manual_seed(0)
    card = random_card([f"b{i}" for i in range(bands)], mean=0.45)
    return export_backbone(backbones.create(name, bands, side), folder, card)


@pytest.fixture(scope="session")
def random_backbone(tmp_path_factory):
    "A function that gives the folder of a random backbone by architecture, bands and side; each is made once."
    parent, made = tmp_path_factory.mktemp("models"), {}

    def get(name="resnet18", bands=3, side=64):
        key = f"{name}-{bands}-{side}"
        if key not in made:
            made[key] = _export(parent / key, name, bands, side)
        return made[key]

    return get
