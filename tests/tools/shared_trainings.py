"What each of several processes does that fine-tune together; alone, it is the training of one process."

import os
import signal
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cmid.base.errors import CmidError, cli
from cmid.tasks.change import ChangeNet
from cmid.tasks.classify import Classifier
from cmid.tasks.detect import OrientedRCNN
from cmid.tasks.finetune import FineTuneCallback, TaskItems, linear_decay, train_dense
from cmid.tasks.segment import Segmenter
from cmid.train.checkpoint import load_backbone
from cmid.train.processes import follow_launcher, launch, process_group, rank, wait_for_the_first
from tests.tools.runs import quiet
from tests.tools.trainings import COUNT, CPU, TASKS, Images, checkpoint_every_epoch, settings_of, train

ROOT = Path(__file__).parents[2]
ALL = 2**14  # more than there are anchors and RoIs: none is sampled at random


class Still(nn.Module):
    "A network in float64 and in evaluation mode: nothing is random, and no image depends on the others of its batch."

    def __init__(self, model):
        super().__init__()
        self.model = model.double()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, images, targets=None):
        if isinstance(targets, (tuple, list)):
            boxes, labels = targets
            targets = [box.double() for box in boxes], labels
        return self.model(images.double(), targets)


def still_network(task, init):
    torch.manual_seed(0)
    encoder, settings = load_backbone(init)[0], settings_of(task)
    if task == "segment":
        model = Segmenter(encoder, 2, settings.channels, settings.auxiliary)
    elif task == "change":
        model = ChangeNet(encoder, "bit", settings)
    elif task == "detect":
        model = OrientedRCNN(encoder, 2, settings.model_copy(update=dict(samples=[ALL, ALL])))
    else:
        model = Classifier(encoder, 2)
    return Still(model)


class FixedItems(TaskItems):
    "Whole images, which do not depend on the step; no two have as many labelled pixels, and some have no object."

    def __init__(self, task):
        self.task, self.images = task, Images(task)
        for i, mask in enumerate(self.images.masks):
            mask[: 4 + 4 * i] = 255

    def boxes(self, i):
        boxes = torch.tensor([[16.0 + i, 12.0, 18.0, 8.0, 0.2]])
        return boxes[: int(i) % 3]

    def __getitem__(self, at):
        _, rows = at
        images = torch.from_numpy(self.images.pixels[0][rows])
        masks, labels = (torch.from_numpy(o[rows]) for o in (self.images.masks, self.images.labels))
        if self.task == "segment":
            return images, masks
        if self.task == "change":
            return torch.from_numpy(self.images.pixels[:, rows]).transpose(0, 1), masks
        if self.task == "detect":
            boxes = [self.boxes(i) for i in rows]
            return images, (boxes, [torch.zeros(len(o), dtype=torch.long) for o in boxes])
        return images, labels


def train_still(task, init, processes=1):
    "Weights and epochs of two epochs of batches of 4 and 3."
    model = still_network(task, init)
    settings = settings_of("segment", epochs=2, batch=4, processes=processes, lr=0.05, weight_decay=0.01)
    settings = settings.model_copy(update=dict(optimiser="sgd", momentum=0.9, clip=1.0))
    data = model, FixedItems(task), np.arange(COUNT), settings, [0.5] * 3, [0.2] * 3
    epochs = train_dense(*data, "segment", linear_decay, 0, CPU, quiet)
    return {key: value.clone() for key, value in model.state_dict().items()}, epochs


def disturb_at(step, how):
    "Kill the second process after a step, send it SIGTERM, or let it raise an error."
    original = FineTuneCallback.after_batch

    def after_batch(self):
        original(self)
        if rank() == 1 and self.step == step:
            if how == "error":
                raise CmidError("the second process has no room")
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)

    FineTuneCallback.after_batch = after_batch


def say_first(line):
    if rank() == 0:
        print(line)


def shared(work, init, folder, *args):
    "What `work` names."
    if work == "still":
        results = {task: train_still(task, init, 2) for task in TASKS}
        if rank() == 0:
            torch.save(results, Path(folder) / "still.pt")
        return
    step, how = args
    disturb_at(step, how)
    train("change", init, Path(folder), say_first, processes=2, batch=4)


@cli
def worker(*args):
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    checkpoint_every_epoch()
    follow_launcher()
    try:
        with process_group(CPU):
            shared(*args)
    except CmidError as error:
        wait_for_the_first(error)
        raise


def in_two(say, *args):
    "Runs `worker` in two processes. Raises as `launch`."
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.tools.shared_trainings import worker; "
    launch(2, ["-c", script + f"worker(*{[str(o) if isinstance(o, Path) else o for o in args]!r})"], "worker", say)
