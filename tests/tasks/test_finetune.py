"What all fine-tuned tasks share: the order of images, batches ahead of the step, no wait in it, scores by class."

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from cmid.base.errors import CmidError
from cmid.base.scores import class_table
from cmid.bench.operators import NoHostReads
from cmid.tasks import finetune
from cmid.tasks.change import ChangePairs
from cmid.tasks.classify import AugmentedScenes, rand_augment
from cmid.tasks.detect import TileDataset
from cmid.tasks.finetune import DeviceBatches, ShuffledBatches, TaskItems
from cmid.tasks.segment import SegmentationCrops
from tests.tools.runs import quiet
from tests.tools.trainings import COUNT, TASKS, Images, settings_of, train


@pytest.mark.parametrize(
    "n, batch, sizes",
    [(10, 4, [4, 3, 3]), (9, 4, [3, 3, 3]), (5, 1, [1] * 5), (3, 16, [3]), (33, 16, [11] * 3), (1680, 16, [16] * 105)],
)
def test_every_image_once_an_epoch(n, batch, sizes):
    order = ShuffledBatches(np.arange(100, 100 + n), batch, seed=1)
    epochs = []
    for epoch in range(2):
        order.epoch = epoch
        steps, batches = zip(*order)
        assert steps == tuple(range(epoch * len(order), (epoch + 1) * len(order)))
        assert [len(rows) for rows in batches] == sizes
        epochs.append(np.concatenate(batches).tolist())
        assert sorted(epochs[-1]) == list(range(100, 100 + n))
    assert epochs[0] != epochs[1]


def test_the_table_of_classes_is_scikit_learns():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 6, (2, 300))
    correct = rng.random(300) < 0.6
    guess[correct] = truth[correct]
    confusion = np.zeros((6, 6), int)
    np.add.at(confusion, (truth, guess), 1)
    table = class_table(confusion, "abcdef")
    expected = np.transpose(precision_recall_fscore_support(truth, guess, labels=range(6)))
    found = [[scores[key] for key in ("precision", "recall", "f1", "images")] for scores in table.values()]
    assert np.allclose(found, expected)
    assert list(table) == list("abcdef")


# --- batches on a device


class Numbered(TaskItems):
    "Batches that tell their step, with a list of texts and tensors."

    def __getitem__(self, at):
        step, rows = at
        return torch.full((len(rows), 1, 2, 2), step, dtype=torch.uint8), [("a", 1)], torch.tensor(rows)


class FakeStream:
    "A GPU's stream, which notes what happens."

    def __init__(self, name, notes):
        self.name, self.notes, self.events = name, notes, 0

    def record_event(self):
        self.events += 1
        return self.events

    def wait_event(self, event):
        self.notes.append(("wait", event))


def test_a_gpu_copies_the_next_batch_before_it_works_on_this_one(monkeypatch):
    "Each step waits for its own copy alone, in its stream, and all of its tensors are kept until then."
    notes = []
    step, gpu = FakeStream("step", notes), SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "Stream", lambda on: FakeStream("copy", notes))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(notes.append(("in", stream.name))))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda on: step if on is gpu else None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda o, stream: notes.append(("kept", stream.name)))
    monkeypatch.setattr(finetune, "to_device", lambda batch, on, non_blocking: notes.append(non_blocking) or batch)
    loader = DataLoader(Numbered(), sampler=ShuffledBatches(range(5), 2), batch_size=None)
    for images, texts, _ in DeviceBatches(loader, gpu):
        assert texts == [["a", 1]]
        notes.append(("step", images.unique().item()))
    copied, kept = [("in", "copy"), True], [("kept", "step")] * 2
    first, second, third = ([("wait", k), *kept, ("step", k - 1)] for k in (1, 2, 3))
    assert notes == [*copied, *copied, *first, *copied, *second, *third]


@pytest.mark.parametrize("count", [1, 5])
def test_every_batch_is_given_once(count):
    loader = DataLoader(Numbered(), sampler=ShuffledBatches(range(count), 2), batch_size=None)
    batches = DeviceBatches(loader, torch.device("cpu"))
    rows = [rows.tolist() for _, _, rows in batches]
    assert len(rows) == len(batches)
    assert sorted(sum(rows, [])) == list(range(count))


# --- augmentation on a device


def items_of(task, images):
    "The training items of a task."
    if task == "segment":
        return SegmentationCrops(images, 32, [0.5, 1.5], images.mean)
    if task == "change":
        return ChangePairs(images, range(COUNT), 32)
    if task == "detect":
        return TileDataset(images, range(COUNT), settings_of("detect"), images.mean)
    augment = rand_augment("rand-m9-n4-mstd0.5-p1.0", images.mean)
    return AugmentedScenes(images, images.labels, (0.3, 1.0), augment)


def on_a_gpu(batch):
    "A batch whose tensors have no values, and say that they are on a GPU."
    if isinstance(batch, (list, tuple)):
        return [on_a_gpu(o) for o in batch]
    return torch.empty_like(batch, device="cuda") if isinstance(batch, torch.Tensor) else batch


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("task", TASKS)
def test_augmentation_stays_on_the_device_of_its_batch(task, count):
    "No operator mixes devices, and none needs a value; the result is as on the CPU, for one item and for odd numbers."
    items = items_of(task, Images(task))
    batch = items[3, np.arange(count)]
    images, targets = items.augmented(*batch)
    assert 0 <= images.min() < images.max() <= 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_images, fake_targets = items_of(task, Images(task)).augmented(*on_a_gpu(batch))
    pairs = [(images, fake_images), (targets, fake_targets)] if task != "detect" else [(images, fake_images)]
    for found, fake in pairs:
        assert (fake.device.type, fake.shape, fake.dtype) == ("cuda", found.shape, found.dtype)


# --- steps that do not wait


@contextmanager
def steps_without_host_reads(monkeypatch):
    "Each training step raises where it reads a value; gives the numbers of steps."
    original, steps = finetune.Learner.one_batch, []

    def one_batch(self, i, batch):
        with NoHostReads():
            original(self, i, batch)
        steps.append(i)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.Learner, "one_batch", one_batch)
        yield steps


@pytest.mark.parametrize("task", [task for task in TASKS if task != "detect"])
def test_no_step_reads_a_value_on_the_host(task, random_backbone, monkeypatch):
    "Augmentation, network, losses and optimiser; a GPU never waits for the host."
    init = random_backbone("test_resnet", 3, 32)
    more = dict(randaugment="rand-m9-mstd0.5", mixup=0.8, cutmix=1.0) if task == "classify" else {}
    with steps_without_host_reads(monkeypatch) as steps:
        train(task, init, say=quiet, epochs=2, **more)
    assert len(steps) == (4 if task == "classify" else 6)


def test_a_step_of_detection_reads_values(random_backbone, monkeypatch):
    "As suppression must: how many boxes are left decides what comes after."
    init = random_backbone("test_resnet", 3, 32)
    with steps_without_host_reads(monkeypatch), pytest.raises(CmidError, match="reads a tensor's value"):
        train("detect", init, say=quiet, epochs=1)
