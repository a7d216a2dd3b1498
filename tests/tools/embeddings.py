"Small backbones and images, and the command that makes tables of them."

import pytest
import torch

from cmid.apply.embed import cmid_embed
from cmid.method.backbones import create
from cmid.train.checkpoint import export_backbone
from tests.tools.cards import random_card
from tests.tools.rasters import tiff


def backbone(folder, bands=3, architecture="resnet18", **entries):
    "Folder of a random backbone; `entries` are of its card."
    torch.manual_seed(0)
    card = random_card([f"band {i + 1}" for i in range(bands)], mean=0.4)
    return export_backbone(create(architecture, bands, 64), folder, card | entries)


def smooth(seed, bands=3, side=70):
    "Random uint8 pixels (bands, side, side) with structure."
    coarse = torch.rand(1, bands, 5, 5, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return fine[0].mul(255).byte().numpy()


def folder_of_images(folder, count=5, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        tiff(folder / f"{i}.tif", smooth(i), **options)
    return folder


def run(*arguments):
    cmid_embed([str(o) for o in arguments])


def refused(capsys, *arguments):
    "The one line that the command ends with"
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cmid_embed:")]
    assert len(said) == 1
    return said[0]
