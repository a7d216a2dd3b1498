"""Make a run that collapses, to see what its curves look like: nbs/how-long.ipynb shows it.

    python studies/collapse.py

64 generated scenes of 64 px, and a learning rate that is a thousand times too large. The alarm that would stop the run
is switched off (`health.collapse: 0`), so that the curves go on. Writes studies/collapsed: epochs.json as every
pretraining writes it, and run.json with the settings, the health that was watched, the commit and the device.
"""

import time
from pathlib import Path

import numpy as np
import torch

from cmid.base.files import root, write_json
from cmid.base.params import Params
from cmid.base.runtime import provenance
from cmid.data.layout import CLASSES
from cmid.data.scenes import scene
from cmid.train.pretrain import pretrain_learner, run_pretraining

IMAGES, SIDE = 64, 64
SETTINGS = dict(
    lr=3.0,
    epochs=8,
    batch=8,
    warmup_epochs=1,
    teacher_temperature_epochs=2,
    queue=32,
    prototypes=64,
    projector_hidden=64,
    projector_dim=32,
    head_hidden=64,
    head_dim=32,
)


class Scenes:
    "A few generated scenes, each with its class."

    bands, side, mean, std = 3, SIDE, [0.34] * 3, [0.14] * 3
    labels = np.arange(IMAGES) % len(CLASSES)
    splits = {"train": np.arange(IMAGES)}

    def __init__(self):
        names = list(CLASSES)
        images = [scene(names[label], i, size=SIDE)[0] for i, label in enumerate(self.labels)]
        self.pixels = np.stack([image.transpose(2, 0, 1) for image in images])

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        return self.pixels[i]


def main():
    params, begun, scenes = Params(root(), profile="smoke"), time.perf_counter(), Scenes()
    settings = params.pretrain.model_copy(update=SETTINGS)
    health = params.health.model_copy(update=dict(images=32, collapse=0.0))
    torch.manual_seed(0)
    device = torch.device("cpu")
    learn = pretrain_learner(scenes, np.arange(IMAGES), settings, "resnet18", on=device, health=health, labelled=scenes)
    run_pretraining(learn)
    facts = dict(init="cmid-resnet18", images=IMAGES, side=SIDE, seconds=round(time.perf_counter() - begun, 1))
    facts |= dict(health=health.model_dump(), parameters=settings.model_dump())
    folder = Path(__file__).parent / "collapsed"
    write_json(folder / "epochs.json", learn.journal.epochs)
    write_json(folder / "run.json", provenance(device) | facts)


if __name__ == "__main__":
    main()
