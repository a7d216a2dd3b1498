"Oriented R-CNN: losses by arithmetic, trained and frozen parts, tiles, whole images, and runs from end to end."

import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.data.labelled import windows
from cmid.method import backbones
from cmid.tasks import detect as module
from cmid.tasks.boxes import (
    assign_targets,
    decode_midpoints,
    encode_boxes,
    encode_midpoints,
    make_anchors,
    paired_iou,
    rotated_iou,
    to_convention,
    to_polygon,
    upright_bounds,
)
from cmid.tasks.detect import (
    OrientedRCNN,
    TileDataset,
    detect,
    detect_image,
    fine_tune_detection,
    frozen_stages,
    head_losses,
    mirror_tile,
    pad_to_batch,
    pool_boxes,
    proposal_losses,
    sample_rois,
    select_proposals,
)
from cmid.tasks.dota import detection_scene_figure, detections_figure, match_detections, windows_by_scale
from cmid.tasks.finetune import resolved
from cmid.train.checkpoint import export_backbone, load_backbone
from tests.tools.cards import random_card
from tests.tools.runs import changed, quiet

CPU, PAPER = torch.device("cpu"), Params(profile="paper").detect
SMALL = dict(tile=64, gap=16, channels=8, head_hidden=16, proposals=20, detections=20, precision="float32")
QUICK = PAPER.model_copy(update=SMALL | dict(epochs=1, steps=[], warmup_steps=0, drop_path=0.0))
SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"
MEAN, STD = [0.43] * 3, [0.1] * 3


def some_boxes(n, seed=0):
    "n boxes within 200 px, le90."
    g = torch.Generator().manual_seed(seed)
    size = 4 + torch.rand(n, 2, generator=g) * 56
    centre = torch.rand(n, 2, generator=g) * 200
    angle = (torch.rand(n, 1, generator=g) - 0.5) * math.pi
    return to_convention(torch.cat([centre, size, angle], 1))


NO_BOXES, NO_LABELS = torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)
TWO_BOXES = torch.tensor([[30.0, 30.0, 24.0, 12.0, 0.4], [70.0, 40.0, 30.0, 20.0, -1.0]])


class Bars:
    "Labelled images in memory: bars on noise, at any angle, whose colour is their class; the last image is empty."

    folder, task = "bars", "detect"

    def __init__(self, sizes=((96, 96), (96, 96), (96, 96)), each=4, bands=3):
        rng = np.random.default_rng(0)
        n = len(sizes)
        self.bands, self.classes, self.sizes = bands, ["red", "green"], np.array(sizes)
        self.names = [f"{i}.png" for i in range(n)]
        self.splits = dict(train=np.arange(n), test=np.arange(n), none=np.array([n - 1]))
        self.boxes, self.images = [], []
        for i, (h, w) in enumerate(sizes):
            noise = rng.normal(110, 12, (bands, h, w))
            self.boxes.append(self._boxes(rng, h, w, each * (i < n - 1)))
            self.images.append(self._image(noise, self.boxes[-1].numpy()))

    def _boxes(self, rng, h, w, n):
        "Up to n boxes that do not overlap"
        boxes = torch.zeros(0, 5)
        for _ in range(500):
            centre = rng.uniform(14, w - 14), rng.uniform(14, h - 14)
            shape = rng.uniform(20, 30), rng.uniform(8, 12), rng.uniform(-1.57, 1.57)
            box = torch.tensor([[*centre, *shape]], dtype=torch.float32)
            if len(boxes) < n and not (len(boxes) and rotated_iou(box, boxes).max() > 0):
                boxes = torch.cat([boxes, box])
        return boxes

    def _image(self, noise, boxes):
        image = noise.copy()
        y, x = np.mgrid[: image.shape[1], : image.shape[2]] + 0.5
        for k, (cx, cy, width, height, angle) in enumerate(boxes):
            along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
            across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
            image[k % 2 % self.bands, (abs(along) < width / 2) & (abs(across) < height / 2)] += 90
        return image.clip(0, 255).astype("uint8")

    def image(self, i):
        return self.images[i]

    def objects(self, i):
        n = len(self.boxes[i])
        polygons = to_polygon(self.boxes[i]).numpy()
        return dict(polygons=polygons, classes=np.arange(n) % 2, difficult=np.zeros(n, bool))


TINY = ((64, 64),) * 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders of untrained backbones, made once; a `method` other than random makes them count as pretrained."
    at, made = tmp_path_factory.mktemp("models"), {}

    def get(name="resnet18", bands=3, method="random"):
        key = f"{method}-{name}-{bands}"
        if key not in made:
            torch.manual_seed(0)
            card = random_card([f"b{i}" for i in range(bands)], mean=0.43, std=0.1) | dict(method=method)
            made[key] = export_backbone(backbones.create(name, bands, 64), at / key, card)
        return made[key]

    return get


def network(frozen=None, **keys):
    "Untrained, for three classes."
    torch.manual_seed(0)
    return OrientedRCNN(backbones.create("resnet18", 3, 64), 3, changed(QUICK, **keys), frozen)


# What is published


def test_paper_profile_is_the_published_recipe():
    training = dict(epochs=12, batch=2, steps=[8, 11], warmup_steps=500, clip=35.0, momentum=0.9, frozen_stages=1)
    tiles = dict(tile=1024, gap=200, scales=[1.0], flip=0.5, turn=0.0)
    net = dict(anchor=8.0, channels=256, head_hidden=1024, proposals=2000, samples=[256, 512])
    evaluation = dict(score=0.05, nms=0.1, detections=2000, metric="voc07")
    for key, expected in (training | tiles | net | evaluation).items():
        assert getattr(PAPER, key) == expected, key


@pytest.mark.parametrize(
    "name,expected",
    [
        ("resnet50", ("sgd", 0.005, 1e-4, 0.0)),
        ("swin_base_patch4_window7_224", ("adamw", 1e-4, 0.05, 0.2)),
        (VIT, ("adamw", 1e-4, 0.05, 0.2)),
    ],
)
def test_optimisers_are_the_published_ones(name, expected):
    s = resolved(PAPER, name, module.PUBLISHED_DETECT)
    assert (s.optimiser, s.lr, s.weight_decay, s.drop_path) == expected


# Losses


def all_right(maps, anchors):
    "Scores and offsets of two images, the second of them empty, that are exactly right; which anchors are positive."
    centre, half = anchors[:, :2], anchors[:, 2:] / 2
    overlaps = box_iou(torch.cat([centre - half, centre + half], 1), upright_bounds(TWO_BOXES))
    kind, which = assign_targets(overlaps, 0.7, 0.3, True)
    n = len(anchors)
    scores = torch.stack([torch.where(kind == 1, 30.0, -30.0), torch.full((n,), -30.0)])
    deltas = torch.stack([encode_midpoints(anchors, TWO_BOXES[which]), torch.zeros(n, 6)])
    return scores, deltas, kind == 1


def test_proposal_losses_by_arithmetic():
    "What is exactly right costs nothing; six offsets that are off by one cost 1 - beta / 2 each."
    sizes = [(16, 24), (8, 12)]
    maps = make_anchors(sizes, [4, 8], 8.0)
    scores, deltas, positive = all_right(maps, torch.cat(maps))
    boxes = [TWO_BOXES, NO_BOXES]
    torch.manual_seed(0)
    right = proposal_losses(maps, sizes, scores, deltas, boxes, 256)
    assert max(right.values()) < 1e-5
    wrong = proposal_losses(maps, sizes, scores, deltas + 1, boxes, 256)
    assert wrong["objectness"] < 1e-5
    sampled = min(positive.sum().item(), 128)
    expected = sampled * 6 * (1 - 1 / 18) / 512  # 256 anchors of each image
    assert wrong["offsets"].item() == pytest.approx(expected, rel=1e-4)


def test_head_losses_by_arithmetic():
    "What is exactly right costs nothing; wrong classes cost their logit, five corrections off by two 1.5 each."
    boxes, labels = [TWO_BOXES, NO_BOXES], [torch.tensor([0, 2]), NO_LABELS]
    proposals = [torch.cat([TWO_BOXES + 0.5, some_boxes(30)]), some_boxes(30, 1)]
    torch.manual_seed(0)
    rois, which, positive, counted = sampled = sample_rois(proposals, boxes, 512)
    assert positive[0].sum() == 4  # the objects themselves, and their near proposals
    assert not positive[1].any()
    assert all(o.all() for o in counted)
    y = torch.cat([torch.where(positive[0], labels[0][which[0]], 3), torch.full((len(rois[1]),), 3)])
    logits = nn.functional.one_hot(y, 4) * 60.0
    right = torch.cat([encode_boxes(rois[0], TWO_BOXES[which[0]]), torch.zeros(len(rois[1]), 5)])
    assert max(head_losses(logits, right, *sampled, boxes, labels).values()) < 1e-5
    wrong = head_losses(logits.roll(1, 1), right + 2, *sampled, boxes, labels)
    assert wrong["classes"].item() == pytest.approx(60, rel=1e-3)
    assert wrong["boxes"].item() == pytest.approx(4 * 5 * 1.5 / len(y), rel=1e-4)


def untrained(net):
    "Parameters without a finite gradient that is somewhere not 0."
    grads = {name: p.grad for name, p in net.named_parameters()}
    return [name for name, grad in grads.items() if grad is None or not grad.isfinite().all() or not grad.any()]


def test_every_part_is_trained():
    "After one step of images with and without objects each parameter has a gradient."
    net = network().train()
    for layer in net.pyramid.encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)  # timm begins some at 0
    large = torch.tensor([[90.0, 40.0, 130.0, 60.0, -1.0], [60.0, 60.0, 400.0, 300.0, 0.2]])
    targets = [torch.cat([TWO_BOXES[:1], large]), NO_BOXES], [torch.tensor([0, 2, 1]), NO_LABELS]
    losses = net(torch.randn(2, 3, 128, 160), targets)
    assert set(losses) == {"objectness", "offsets", "classes", "boxes"}
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert untrained(net) == ["pyramid.encoder.mask_token"]


def test_a_batch_without_objects():
    "Finite losses, those of boxes 0."
    net = network().train()
    losses = net(torch.randn(1, 3, 64, 64), ([NO_BOXES], [NO_LABELS]))
    sum(losses.values()).backward()
    assert losses["offsets"] == 0
    assert losses["boxes"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_a_network_that_finds_nothing():
    net = network().eval()
    nn.init.constant_(net.head.classes.bias, -50)
    nn.init.constant_(net.head.classes.bias[-1:], 50)
    found = detect_image(net, np.zeros((3, 70, 45), "uint8"), net.settings, MEAN, STD)
    assert [found[k].shape for k in ("boxes", "scores", "classes")] == [(0, 5), (0,), (0,)]


def test_each_stage_samples_as_many_as_asked(monkeypatch):
    asked, real = [], module.sample_anchors

    def watched(kind, *sizes):
        asked.append(sizes)
        return real(kind, *sizes)

    monkeypatch.setattr(module, "sample_anchors", watched)
    network(samples=[8, 16]).train()(torch.randn(1, 3, 64, 64), ([TWO_BOXES[:1]], [torch.tensor([1])]))
    assert sorted(asked) == [(8, 0.5), (16, 0.25)]


def test_a_step_copies_no_numbers_from_the_host(monkeypatch):
    "Forward and backward of a step make no tensor of Python's numbers, which on a GPU would be a copy to wait for."
    net, asked = network().train(), []
    x, boxes, labels = torch.randn(2, 3, 64, 96), [TWO_BOXES, NO_BOXES], [torch.tensor([0, 2]), NO_LABELS]

    def watched(function):
        def inner(*args, **keys):
            asked.append(sys._getframe(1).f_globals["__name__"])
            return function(*args, **keys)

        return inner

    for home, name in ((torch, "tensor"), (torch, "as_tensor"), (torch, "from_numpy"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(home, name, watched(getattr(home, name)))
    sum(net(x, (boxes, labels)).values()).backward()
    assert not [name for name in asked if name.startswith("cmid")]  # torchvision's NMS makes one


# The network


def test_boxes_are_read_from_the_map_of_their_size():
    "Maps that hold their own number: boxes up to twice 56 px are read from the first, then each doubling the next."
    maps = [torch.full((2, 1, 512 // stride, 512 // stride), float(k)) for k, stride in enumerate((4, 8, 16, 32))]
    sides = [5.0, 100.0, 111.0, 113.0, 223.0, 225.0, 447.0, 449.0, 900.0]
    b = torch.tensor([[256.0, 256.0, 2 * side, side / 2, 0.3] for side in sides])
    found = pool_boxes(maps, [b[:4], b[4:]])
    assert found.shape == (9, 1, 7, 7)
    assert found[:, 0, 3, 3].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_boxes_are_read_from_their_own_image():
    numbers = torch.arange(2.0).view(2, 1, 1, 1)
    maps = [numbers.expand(2, 1, 512 // stride, 512 // stride) for stride in (4, 8, 16, 32)]
    b = torch.tensor([[256.0, 256.0, 2 * side, side / 2, 0.3] for side in (5.0, 100.0, 225.0, 449.0, 900.0)])
    assert pool_boxes(maps, [b[:2], b[2:]])[:, 0, 3, 3].tolist() == [0] * 2 + [1] * 3
    assert pool_boxes(maps, [b[:0], b[:0]]).shape == (0, 1, 7, 7)


def test_proposals_are_the_best_of_each_map():
    anchors = make_anchors([(4, 4), (2, 2)], [32, 64], 1.0)
    g = torch.Generator().manual_seed(0)
    scores = [torch.rand(2, len(o), generator=g) for o in anchors]
    deltas = [torch.zeros(2, len(o), 6) for o in anchors]
    found = select_proposals(anchors, scores, deltas, 1000)
    best = select_proposals(anchors, scores, deltas, 3)
    assert [len(o) for o in found] == [2 * 20, 2 * 20]  # of three anchors of a cell two are the same box
    assert not found[0].requires_grad
    for b in range(2):
        assert torch.equal(best[b], found[b][:3])
        level = int(scores[1][b].max() > scores[0][b].max())
        winner = anchors[level][scores[level][b].argmax()]
        assert torch.allclose(best[b][0], decode_midpoints(winner[None], torch.zeros(1, 6))[0])


@pytest.mark.parametrize("method,frozen", [("cmid", True), ("random", False)])
def test_only_a_pretrained_resnet_is_frozen(models, method, frozen):
    "Its stem, first stage and statistics stay; of random weights everything is trained."
    data, said = Bars(TINY, 2), []
    s = changed(QUICK, batch=1, epochs=2, optimiser="sgd", lr=0.05, weight_decay=0.0)
    net, _ = fine_tune_detection(models(method=method), data, [0, 1], s, on=CPU, say=said.append)
    start = load_backbone(models(method=method))[0].state_dict()
    same = {k for k, v in net.pyramid.encoder.state_dict().items() if torch.equal(v, start[k])}
    weights = {k for k, _ in net.pyramid.encoder.named_parameters()}
    stem = {k for k in weights if k.startswith(("model.conv1", "model.bn1", "model.layer1"))}
    statistics = {k for k in start if "running_mean" in k or "running_var" in k}
    assert (stem <= same) == frozen
    assert (statistics <= same) == frozen
    assert any("stem and first 1 of 4 stages frozen, batch norms in evaluation mode" in o for o in said) == frozen
    assert not {k for k in weights if "layer2" in k and "conv1" in k} & same


def test_how_many_stages_are_frozen():
    assert [frozen_stages(backbones.create(name, 3, 64), "cmid", 2) for name in ("resnet18", SWIN, VIT)] == [
        2,
        None,
        None,
    ]
    assert [k for k, p in network(frozen=2).named_parameters() if not p.requires_grad and "layer2" in k]
    assert all(p.requires_grad for p in network(frozen=0).parameters())


@pytest.mark.parametrize("steps,trained", [([2, 3], 2), ([], 4), ([9], 4)])
def test_random_batch_norms_are_fixed_after_the_first_learning_rate_drop(models, monkeypatch, steps, trained):
    "Statistics move with every step until the epoch that is named first, and never after it; without one, to the end."
    moved, said = [], []
    forward = OrientedRCNN.forward

    def watched(self, *args):
        statistics = {k: v for k, v in self.pyramid.encoder.named_buffers() if "running" in k}
        before = {k: v.clone() for k, v in statistics.items()}
        losses = forward(self, *args)
        differs = {not torch.equal(before[k], v) for k, v in statistics.items()}
        assert len(statistics) == 40
        moved.append(*differs)  # all or none
        return losses

    monkeypatch.setattr(OrientedRCNN, "forward", watched)
    s = changed(QUICK, epochs=4, steps=steps)
    fine_tune_detection(models(), Bars(TINY, 2), [0, 1], s, on=CPU, say=said.append)
    each = len(moved) // 4
    assert moved == [True] * trained * each + [False] * (4 - trained) * each
    text = "batch norms for the first 2 epochs" if trained == 2 else "batch norms too"
    assert any(text in line for line in said)


# Tiles


def looks_bright(image, box, band, reach=0):
    "Mean around a box's centre; None at the edge of the image."
    y, x = int(box[1]), int(box[0])
    if not (1 <= y < image.shape[1] - 1 and 1 <= x < image.shape[2] - 1):
        return None
    return image[band, y - reach : y + reach + 1, x - reach : x + reach + 1].mean() > 160


@pytest.mark.parametrize("scales", ([1.0], [0.5], [2.0], [0.5, 1.0, 1.5]))
def test_tiles_hold_the_objects_where_they_are(scales):
    "At any scale, mirrored and transposed, a box still covers its bar: its centre is bright."
    data = Bars(((130, 90), (70, 45), (64, 64)), each=3)
    tiles = TileDataset(data, [0, 1, 2], changed(QUICK, turn=0.5, scales=scales), MEAN, seed=1)
    assert {tile[0] for tile in tiles.tiles} == {0, 1}  # a tile without objects is left out
    assert {tile[-1] for tile in tiles.tiles} == {*scales}
    seen = []
    for step in range(5):
        x, (boxes, labels) = tiles[step, np.arange(len(tiles))]
        assert x.dtype == torch.uint8
        assert x.shape[2] % 32 == x.shape[3] % 32 == 0
        for image, image_boxes, image_labels in zip(x.float(), boxes, labels):
            assert len(image_boxes) == len(image_labels)
            reach = int(min(scales) >= 1)
            seen += [looks_bright(image, box, band, reach) for box, band in zip(image_boxes, image_labels)]
    assert sum(o is not None for o in seen) >= 20
    assert False not in seen


def test_mirroring_differs_by_step_and_repeats_by_seed():
    data, s = Bars(((130, 90), (70, 45), (64, 64)), each=3), changed(QUICK, turn=0.5)
    tiles, again = (TileDataset(data, [0, 1], s, MEAN, seed=1) for _ in range(2))
    looks = {tiles[step, np.array([0])][0].numpy().tobytes() for step in range(12)}
    assert len(looks) >= 6
    assert torch.equal(tiles[3, np.array([0])][0], again[3, np.array([0])][0])


def test_flips_are_as_often_as_asked():
    "Left to right and top to bottom by themselves: none at 0, both always at 1, each in half of the tiles at .5."
    data = Bars(((64, 64),) * 2, each=3)
    plain = torch.from_numpy(np.array(data.image(0)))

    def seen(flip):
        tiles = TileDataset(data, [0], changed(QUICK, flip=flip), MEAN)
        return [tiles[step, np.array([0])][0][0] for step in range(200)]

    assert all(torch.equal(image, plain) for image in seen(0.0))
    assert all(torch.equal(image, plain.flip(1, 2)) for image in seen(1.0))
    images = seen(0.5)
    counts = [sum(torch.equal(image, plain.flip(axes)) for image in images) for axes in ((), (1,), (2,), (1, 2))]
    assert sum(counts) == 200
    assert min(counts) > 25


@pytest.mark.parametrize("flags", [(1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1)])
def test_every_mirror_is_its_own_inverse(flags):
    image, b = torch.randint(256, (2, 32, 48), dtype=torch.uint8), some_boxes(20)
    back, c = mirror_tile(*mirror_tile(image, b, *flags), *flags)
    assert torch.equal(image, back)
    assert paired_iou(b, c).min() > 0.999


def test_small_images_are_padded():
    images = [torch.full((2, 5, 70), 9, dtype=torch.uint8), torch.full((2, 33, 4), 8, dtype=torch.uint8)]
    x = pad_to_batch(images, torch.tensor([1, 2], dtype=torch.uint8))
    assert x.shape == (2, 2, 64, 96)
    assert (x[0, :, :5, :70] == 9).all()
    assert (x[1, :, :33, :4] == 8).all()
    assert (x[0, 0, 5:] == 1).all()
    assert (x[1, 1, :, 4:] == 2).all()


def test_a_tile_at_scale_1_is_the_image():
    data = Bars(((130, 90),) * 2, each=3)
    tiles = TileDataset(data, [0], changed(QUICK, flip=0.0), MEAN)
    _, (top, left, bottom, right), *_ = tiles.tiles[0]
    found = tiles[0, np.array([0])][0][0, :, : bottom - top, : right - left]
    assert np.array_equal(found.numpy(), data.image(0)[:, top:bottom, left:right])


# Whole images


class Answers(nn.Module):
    "A network that answers with the boxes that a function gives for an input of (height, width)."

    def __init__(self, boxes_of):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.boxes_of, self.calls = boxes_of, 0

    def forward(self, x):
        self.calls += 1
        boxes = torch.tensor(self.boxes_of(*x.shape[-2:]))
        classes = torch.tensor([self.calls, 0])
        return [dict(boxes=boxes, scores=torch.tensor([0.9, 0.8]), classes=classes) for _ in x]


def middle_and_beside(h, w):
    "A box in the middle of the tile, and one beside the tile."
    return [[w / 2, h / 2, 20.0, 8.0, 0.5], [500.0, 5.0, 9.0, 9.0, 0.0]]


def test_whole_images_are_merged_from_tiles():
    "The middles of all tiles are moved to where their tile was; what lies beside the image is dropped."
    image = np.zeros((3, 100, 150), "uint8")
    found = detect_image(Answers(middle_and_beside), image, changed(QUICK, batch=99), MEAN, STD)
    middles = [[(l + r) / 2, (t + b) / 2] for t, l, b, r in windows(100, 150, 64, 16)]  # noqa: E741
    assert sorted(found["boxes"][:, :2].tolist()) == sorted(middles)
    assert found["classes"].tolist() == [1] * len(middles)


def corner_and_beside(h, w):
    return [[16.0, 12.0, 20.0, 8.0, 0.5], [500.0, 5.0, 9.0, 9.0, 0.0]]


def test_detections_of_every_scale_are_in_pixels_of_the_image():
    s = changed(QUICK, batch=99, scales=[0.5, 1.0, 1.5])
    found = detect_image(Answers(corner_and_beside), np.zeros((3, 60, 60), "uint8"), s, MEAN, STD)
    expected = [
        [16 / scale + left, 12 / scale + top, 20 / scale, 8 / scale]
        for scale, tiles in windows_by_scale((60, 60), s)
        for top, left, *_ in tiles.tolist()
    ]
    assert sorted(found["boxes"][:, :4].tolist()) == [pytest.approx(row, abs=1e-4) for row in sorted(expected)]
    assert (found["boxes"][:, 4] == 0.5).all()
    assert {*found["classes"].tolist()} == {1, 2, 3}  # one call a scale


@pytest.mark.parametrize("width,scale", [(1001, 0.5), (1919, 0.1), (99, 0.05), (150, 1.0), (77, 1.5)])
def test_the_last_pixel_counts(width, scale):
    "Of a detection in the last pixel of the image and one just beyond it, the first is kept."

    def edge(h, w):
        return [[(width - 0.5) * scale, 4.0, 8.0, 4.0, 0.0], [(width + 0.5) * scale, 4.0, 8.0, 4.0, 0.0]]

    s = changed(QUICK, tile=1024, scales=[scale])
    found = detect_image(Answers(edge), np.zeros((3, 200, width), "uint8"), s, MEAN, STD)
    assert len(found["classes"]) == 1
    assert found["boxes"][0, 0].item() == pytest.approx(width - 0.5, rel=1e-5)


# Runs from end to end


@pytest.fixture(scope="module")
def run(models):
    "A short run at two scales that leave partial pixels, with a short last batch, evaluated on its training images."
    data, said = Bars(((45, 51), (97, 70), (33, 64))), []
    keys = dict(scales=[0.5, 1.3], batch=3, epochs=3, steps=[2], score=0.0, optimiser="adamw", lr=1e-3)
    s = changed(QUICK, weight_decay=0.01, **keys)
    return data, s, said, *detect(models(), data, s, 0, CPU, said.append)


def test_the_result_agrees_with_itself_and_is_json(run):
    data, _, _, result, _, found = run
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert list(result["per_class"]) == data.classes
    assert result["map"] == result["map50_voc07"]
    expected = dict(images=3, train_images=3, epoch=3, scored_on_training=True, metric="voc07")
    assert {k: result[k] for k in expected} == expected
    assert sum(o["objects"] for o in result["per_class"].values()) == result["objects"] == sum(map(len, data.boxes))
    for c, name in enumerate(data.classes):
        count = sum((o["classes"] == c).sum().item() for o in found)
        assert result["per_class"][name]["detections"] == len(result["matches"][name]) == count


def test_a_run_says_each_epoch(run):
    _, _, said, _, epochs, _ = run
    assert len(epochs) == 3
    assert all(math.isfinite(epoch["loss"]) for epoch in epochs)
    assert len([line for line in said if line.startswith("epoch ")]) == 3


def test_detections_lie_in_their_image(run):
    data, _, _, _, _, found = run
    for (h, w), detections in zip(data.sizes, found):
        x, y = detections["boxes"][:, :2].T
        assert len(x)
        assert ((x >= 0) & (y >= 0) & (x < w) & (y < h)).all()


def test_figures_of_a_run(run):
    "Counts in the titles are those of the matches; a scene shows the tiles of all scales."
    data, s, _, _, _, found = run
    figure = detections_figure(data, [0, 1, 2], found, 0.0)
    for i, ax in enumerate(figure.axes[:3]):
        hits, false, missed = match_detections(found[i], data.objects(i))
        assert ax.get_title() == f"{hits.sum()} of {len(missed)} found, {false.sum()} false"
    tiles = windows_by_scale((97, 70), s)
    scene = detection_scene_figure(data.image(1), found[1], data.classes, tiles)
    assert len(scene.axes[0].patches) == sum(len(o) for _, o in tiles) > 2
    assert f"{(found[1]['scores'] >= 0.3).sum()} detections" in scene.axes[0].get_title()
    scene.canvas.draw()


@pytest.mark.slow
def test_bars_are_learnt_by_heart(models):
    "Bars of two classes at any angle: every one is found, once, and nothing else is."
    data = Bars()
    keys = dict(tile=96, batch=1, epochs=45, steps=[38], warmup_steps=10, channels=32, head_hidden=64, proposals=60)
    s = changed(QUICK, anchor=6.0, optimiser="adamw", lr=0.002, weight_decay=0.01, **keys)
    result, epochs, found = detect(models(), data, s, 0, CPU, quiet)
    assert result["map"] >= 0.9
    assert result["objects"] == 8
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    missed = 0
    for i, detections in enumerate(found):
        confident = {name: values[detections["scores"] > 0.5] for name, values in detections.items()}
        missed += match_detections(confident, data.objects(i))[2].sum()
    assert missed <= 1


def test_two_runs_agree_bit_for_bit(models):
    data, runs = Bars(TINY, each=3), []
    s = changed(QUICK, epochs=2, turn=0.5)
    for seed in (3, 3, 4):
        torch.rand(len(runs) + 1)  # what was drawn before does not matter
        net, epochs = fine_tune_detection(models(), data, [0, 1], s, seed, CPU, quiet)
        runs.append((net.state_dict(), epochs))
    (first, epochs), (again, epochs_again), (other, other_epochs) = runs
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert epochs == epochs_again
    assert epochs != other_epochs
    assert not torch.equal(first["head.box.weight"], other["head.box.weight"])


@pytest.mark.parametrize(
    "name,bands,batch,precision",
    [
        ("resnet18", 5, 1, "float32"),
        ("resnet18", 1, 2, "bfloat16"),
        ("resnet18", 13, 3, "float32"),
        (SWIN, 3, 2, "float32"),
        (VIT, 4, 1, "float32"),
    ],
)
def test_any_backbone_bands_and_batch(models, name, bands, batch, precision):
    "Odd sizes, some smaller than a tile, one without objects: a step with the optimiser of the family."
    data = Bars(((70, 45), (64, 97), (33, 40)), 2, bands)
    s = changed(QUICK, epochs=2, steps=[1], batch=batch, precision=precision)
    result, epochs, found = detect(models(name, bands), data, s, on=CPU, say=quiet)
    assert all(np.isfinite(v) for v in epochs[0].values())
    assert result["map"] is not None
    assert len(found) == 3
    for detections, (h, w) in zip(found, data.sizes):
        assert detections["boxes"].isfinite().all()
        assert ((0 <= detections["scores"]) & (detections["scores"] <= 1)).all()
        assert (detections["boxes"][:, 0] < w).all()
        assert (detections["boxes"][:, 1] < h).all()


# What is refused

REFUSED = {
    r"detect.train: bars has no split 'trane' \(did you mean 'train'\?\); known: train, test, none": dict(
        train="trane"
    ),
    "detect.test: bars has no split 'val'": dict(test="val"),
    "bars: no image of split 'none' has an object to train on": dict(train="none", test="none"),
    r"detect.steps: \[11, 8\] must be strictly increasing": dict(steps=[11, 8]),
    "detect.frozen_stages: 5 is more than the 4 stages": dict(frozen_stages=5),
    "detect.precision: float16 needs a GPU": dict(precision="float16"),
    r"loss is not finite at step \d+ .*lower detect.lr": dict(lr=1e30, epochs=20, optimiser="sgd", clip=None),
}


@pytest.mark.parametrize("message", REFUSED)
def test_invalid_settings_are_refused(models, message):
    with pytest.raises(CmidError, match=message):
        detect(models(), Bars(), changed(QUICK, **REFUSED[message]), on=CPU, say=quiet)


def test_splits_that_share_images_are_refused(models):
    with pytest.raises(CmidError, match="bars: 1 image.*'none' and.*'test'"):
        detect(models(), Bars(), changed(QUICK, train="none"), on=CPU, say=quiet)


def test_other_bands_than_those_of_the_backbone_are_refused(models):
    message = "images have 3 bands, but .*random-resnet18-5 takes 5; use the same bands"
    with pytest.raises(CmidError, match=message):
        detect(models(bands=5), Bars(), QUICK, on=CPU, say=quiet)


def test_a_batch_norm_of_one_value_is_refused(models):
    message = "detect.batch: batch norm would see a single value per channel, from one tile of 32 px"
    with pytest.raises(CmidError, match=message):
        detect(models(), Bars(((32, 32), (64, 64)), 1), changed(QUICK, batch=1), on=CPU, say=quiet)
