"Small fine-tunings of all four tasks, on images in memory: for tests of what may happen to a training."

import signal

import numpy as np
import torch

from cmid.base.params import Params
from cmid.tasks.change import fine_tune_change
from cmid.tasks.classify import fine_tune_classifier
from cmid.tasks.detect import fine_tune_detection
from cmid.tasks.segment import fine_tune_segmentation
from cmid.train import resume

CPU = torch.device("cpu")
COUNT = 7  # images: batches of 3, 2 and 2
TASKS = "segment", "change", "detect", "classify"
SMALL = dict(
    segment=dict(channels=8, crop=32, scale=[0.5, 1.5]),
    change=dict(channels=4, crop=32, decoder_layers=1, optimiser="adamw", lr=1e-3),
    detect=dict(tile=32, steps=[2], channels=8, head_hidden=8, proposals=10),
    classify=dict(validation=0.4, randaugment=None, erasing=0.5),
)
SHARED = dict(epochs=3, batch=3, drop_path=0.3, precision="float32")


class Images:
    "Seven noisy images with two classes of scenes, masks, second dates, and a bar in each."

    bands, side, hash, folder, classes = 3, 32, "generated", "generated", ["a", "b"]
    mean, std = [0.5] * 3, [0.2] * 3

    def __init__(self, task="segment"):
        rng = np.random.default_rng(0)
        self.task = task
        self.sizes = np.array([[32, 32]] * COUNT)
        self.labels = np.arange(COUNT) % 2
        self.pixels = rng.integers(0, 200, (2, COUNT, 3, 32, 32), dtype=np.uint8)
        self.masks = rng.integers(0, 2, (COUNT, 4, 4), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        self.masks[:, :5] = 255
        self.pixels[0] += 55 * self.masks[:, None] % 56
        self.splits = dict(train=np.arange(COUNT), test=np.arange(COUNT))

    def __len__(self):
        return COUNT

    def __getitem__(self, rows):
        return self.pixels[0][rows]

    def image(self, i):
        return self.pixels[0, i]

    def second(self, i):
        return self.pixels[1, i]

    def mask(self, i):
        return self.masks[i]

    def objects(self, i):
        bar = np.float32([[4, 6], [24, 8], [24, 16], [4, 14]]) + i
        return dict(polygons=bar[None], classes=np.array([i % 2]), difficult=np.zeros(1, bool))


def settings_of(task, **values):
    "The settings of a training that takes a second."
    return getattr(Params(profile="smoke"), task).model_copy(update=SHARED | SMALL[task] | values)


def store_in(folder, code="code"):
    "What `Stage.store` gives."
    return dict(folder=folder, root=folder, code=code, commit=None, program=[])


def train(task, init, folder=None, say=print, code="code", **values):
    "Weights and epochs of a training, which keeps checkpoints in a folder."
    images, settings, index = Images(task), settings_of(task, **values), np.arange(COUNT)
    given = dict(seed=0, on=CPU, say=say, store=folder and store_in(folder, code))
    if task == "segment":
        model, epochs, _ = fine_tune_segmentation(init, images, index, settings, **given)
    elif task == "change":
        model, epochs = fine_tune_change(init, images, index, "bit", settings, **given)
    elif task == "detect":
        model, epochs = fine_tune_detection(init, images, index, settings, **given)
    else:
        learn = fine_tune_classifier(init, images, index, settings, **given)
        model, epochs = learn.model, learn.classification.epochs
    return {key: value.clone() for key, value in model.state_dict().items()}, epochs


def checkpoint_every_epoch():
    "Checkpoints are due as soon as an epoch is done."
    resume.SECONDS = resume.TIMES_AS_LONG = 0


def differing(a, b):
    "Keys of weights that are not the same bits."
    assert a.keys() == b.keys()
    return [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])]


def train_and_die(task, init, folder, seconds, result):
    "For a process of its own: a training that the kernel ends after so many seconds of computing (0: never)."
    torch.set_num_threads(1)
    checkpoint_every_epoch()
    if seconds:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process at once, as `kill -9` does
    weights, epochs = train(task, init, folder, lambda line: None)
    signal.setitimer(signal.ITIMER_PROF, 0)
    torch.save(dict(weights=weights, epochs=epochs), result)
