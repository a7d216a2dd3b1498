"Oriented detection: offsets by arithmetic, assigners by a slow loop, every part learns, and what was shown is found again."

import json
import math
import os

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import numpy as np
import pytest
import torch
from torch import nn

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.data.labelled import windows
from cmid.method import backbones
from cmid.tasks import detect as module
from cmid.tasks.boxes import (
    make_anchors,
    upright_bounds,
    to_convention,
    decode_boxes,
    decode_midpoints,
    encode_boxes,
    encode_midpoints,
    from_polygon,
    paired_iou,
    rotated_iou,
    to_polygon,
    wrap_angle,
)
from cmid.tasks.boxes import assign_targets, sample_anchors
from cmid.tasks.detect import OrientedRCNN, TileDataset, detect, detect_image, sample_rois, fine_tune_detection, frozen_stages, head_losses, mirror_tile, pool_boxes, proposal_losses, select_proposals, pad_to_batch
from cmid.tasks.dota import detections_figure, match_detections, scaled_tile, detection_scene_figure, windows_by_scale
from cmid.tasks.finetune import resolved
from cmid.train.checkpoint import export_backbone, load_backbone

CPU, PAPER = torch.device("cpu"), Params(profile="paper").detect
QUICK = PAPER.model_copy(
    update=dict(
        tile=64,
        gap=16,
        epochs=1,
        steps=[],
        warmup_steps=0,
        channels=8,
        head_hidden=16,
        proposals=20,
        detections=20,
        precision="float32",
        drop_path=0.0,
    )
)
changed = lambda settings, **o: settings.model_copy(update=o)
quiet = lambda line: None
SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"


def some(n, seed=0, low=4.0, high=60.0):
    "n boxes of all kinds, le90."
    g = torch.Generator().manual_seed(seed)
    size = low + torch.rand(n, 2, generator=g) * (high - low)
    return to_convention(
        torch.cat([torch.rand(n, 2, generator=g) * 200, size, (torch.rand(n, 1, generator=g) - 0.5) * math.pi], 1)
    )


def is_le90(b):
    return bool(
        (
            (b[:, 2] >= b[:, 3])
            & (b[:, 3] >= 1 - 1e-6)
            & (b[:, 4] >= -math.pi / 2)
            & (b[:, 4] < math.pi / 2)
            & b.isfinite().all(1)
        ).all()
    )


class Bars:
    "Labelled images in memory: bars on noise, at any angle, whose colour is their class; the last image is empty."

    folder, task = "bars", "detect"

    def __init__(self, sizes=((96, 96), (96, 96), (96, 96)), each=4, bands=3, seed=0):
        rng = np.random.default_rng(seed)
        n = len(sizes)
        self.bands, self.classes, self.sizes = bands, ["red", "green"], np.array(sizes)
        self.names = [f"{i}.png" for i in range(n)]
        self.splits = dict(train=np.arange(n), test=np.arange(n), none=np.array([n - 1]))
        self.made = [self._made(rng, h, w, each * (i < n - 1)) for i, (h, w) in enumerate(sizes)]

    def _made(self, rng, h, w, n):
        x, boxes = rng.normal(110, 12, (self.bands, h, w)), torch.zeros(0, 5)
        y, c = np.mgrid[:h, :w] + 0.5
        for _ in range(500):
            b = torch.tensor(
                [
                    [
                        rng.uniform(14, w - 14),
                        rng.uniform(14, h - 14),
                        rng.uniform(20, 30),
                        rng.uniform(8, 12),
                        rng.uniform(-1.57, 1.57),
                    ]
                ],
                dtype=torch.float32,
            )
            if len(boxes) < n and not (len(boxes) and rotated_iou(b, boxes).max() > 0):
                boxes = torch.cat([boxes, b])
        for k, b in enumerate(boxes.numpy()):
            u, v = (
                (c - b[0]) * np.cos(b[4]) + (y - b[1]) * np.sin(b[4]),
                (y - b[1]) * np.cos(b[4]) - (c - b[0]) * np.sin(b[4]),
            )
            x[k % 2 % self.bands, (abs(u) < b[2] / 2) & (abs(v) < b[3] / 2)] += 90
        return x.clip(0, 255).astype("uint8"), dict(
            polygons=to_polygon(boxes).numpy(), classes=np.arange(len(boxes)) % 2, difficult=np.zeros(len(boxes), bool)
        )

    def __len__(self):
        return len(self.made)

    def image(self, i):
        return self.made[i][0]

    def objects(self, i):
        return self.made[i][1]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders of untrained backbones, made once; a `method` other than random makes them count as pretrained."
    at, made = tmp_path_factory.mktemp("models"), {}

    def get(name="resnet18", bands=3, method="random"):
        key = f"{method}-{name}-{bands}"
        if key not in made:
            torch.manual_seed(0)
            card = dict(
                mean=[0.43] * bands,
                std=[0.1] * bands,
                bands=[f"b{i}" for i in range(bands)],
                method=method,
                parameters={},
                data_hash=None,
                data_licence=None,
                provenance={},
                health={},
            )
            made[key] = export_backbone(backbones.create(name, bands, 64), at / key, card)
        return made[key]

    return get


def network(still=None, classes=3, **o):
    torch.manual_seed(0)
    return OrientedRCNN(backbones.create("resnet18", 3, 64), classes, changed(QUICK, **o), still)


# --- what is published


def test_paper_profile_is_the_published_recipe():
    s = PAPER
    assert (s.epochs, s.batch, s.steps, s.warmup_steps, s.clip, s.momentum, s.frozen_stages) == (
        12,
        2,
        [8, 11],
        500,
        35.0,
        0.9,
        1,
    )
    assert (
        s.tile,
        s.gap,
        s.anchor,
        s.channels,
        s.head_hidden,
        s.proposals,
        s.score,
        s.nms,
        s.detections,
        s.metric,
        s.scales,
        s.samples,
        s.flip,
        s.turn,
    ) == (1024, 200, 8.0, 256, 1024, 2000, 0.05, 0.1, 2000, "voc07", [1.0], [256, 512], 0.5, 0.0)
    got = [
        (o.optimiser, o.lr, o.weight_decay, o.drop_path)
        for o in (resolved(s, name, module.PUBLISHED_DETECT) for name in ("resnet50", "swin_base_patch4_window7_224", VIT))
    ]
    assert got == [("sgd", 0.005, 1e-4, 0.0)] + [("adamw", 1e-4, 0.05, 0.2)] * 2


# --- offsets


def test_midpoint_offsets_come_back():
    "Random boxes and random anchors, and every border of le90."
    b = some(2000)
    c, half = some(2000, 1)[:, :4].split(2, 1)
    anchors = torch.cat([c, half], 1)
    back = decode_midpoints(anchors, encode_midpoints(anchors, b))
    assert is_le90(back) and paired_iou(back.double(), b.double()).min() > 0.999
    for w, h in ((20.0, 10.0), (10.0, 10.0), (500.0, 2.0), (2.0, 1.0)):
        angles = torch.tensor([-math.pi / 2, -1.5707, -1e-3, -1e-4, -1e-6, 0.0, 1e-6, 1e-4, 1e-3, 0.7, 1.5707])
        b = torch.cat([torch.tensor([50.0, 60.0, w, h]).expand(len(angles), 4), angles[:, None]], 1)
        back = decode_midpoints(anchors[: len(angles)], encode_midpoints(anchors[: len(angles)], b))
        assert is_le90(back) and paired_iou(back.double(), b.double()).min() > 0.95, (
            w,
            h,
        )  # 500 x 2 px: a thousandth of a pixel counts


def test_midpoint_offsets_are_those_of_the_polygon():
    "The topmost vertex is right of the middle by the fifth number, the rightmost below it by the sixth; shares of the bounds."
    b = some(300)
    anchor = torch.tensor([[100.0, 100.0, 32.0, 32.0]]).expand(300, 4)
    d = encode_midpoints(anchor, b) * torch.tensor(module.SPREAD)
    p = to_polygon(b)
    r = upright_bounds(b)
    size = r[:, 2:] - r[:, :2]
    top, right = p[torch.arange(300), p[..., 1].argmin(1)], p[torch.arange(300), p[..., 0].argmax(1)]
    assert torch.allclose(d[:, 4], (top[:, 0] - b[:, 0]) / size[:, 0], atol=1e-4) and torch.allclose(
        d[:, 5], (right[:, 1] - b[:, 1]) / size[:, 1], atol=1e-4
    )
    assert (
        torch.allclose(d[:, :2] * 32 + 100, b[:, :2], atol=1e-3)
        and torch.allclose(d[:, 2:4].exp() * 32, size, rtol=1e-4)
        and d[:, 4:].abs().max() <= 0.5 + 1e-5
    )


def test_any_offsets_are_a_box():
    g = torch.Generator().manual_seed(0)
    anchors = torch.tensor([[0.0, 0.0, 32.0, 32.0], [9.0, 9.0, 45.0, 23.0]])
    for scale in (0.0, 0.3, 3.0, 1e4):
        for decode, k, rois in ((decode_midpoints, 6, anchors.repeat(500, 1)), (decode_boxes, 5, some(1000))):
            assert is_le90(decode(rois, torch.randn(1000, k, generator=g) * scale)), (scale, k)


def test_parallelogram_becomes_the_rectangle_of_its_longer_diagonal():
    "Bounds 40 x 30, vertices 5 right of the top's middle and 3 below the right one's: half diagonals (5, -15) and (20, 3), of lengths 15.8 and 20.2."
    d = torch.tensor([[0.0, 0.0, math.log(4), math.log(3), 5 / 40, 3 / 30]]) / torch.tensor(module.SPREAD)
    got = decode_midpoints(torch.tensor([[7.0, 8.0, 10.0, 10.0]]), d)
    top, right = np.array([5.0, -15]), np.array([20.0, 3])
    top *= np.linalg.norm(right) / np.linalg.norm(top)
    want = from_polygon(torch.tensor(np.stack([top, right, -top, -right]) + [7, 8])[None]).float()
    assert torch.allclose(got, want, atol=1e-4)


def test_corrections_come_back():
    rois, b = some(2000, 2), some(2000, 3)
    d = encode_boxes(rois, b)
    back = decode_boxes(rois, d)
    assert (
        is_le90(back)
        and paired_iou(back.double(), b.double()).min() > 0.999
        and (d[:, 4] * 0.1).abs().max() <= math.pi / 4 + 1e-5
    )
    assert torch.allclose(encode_boxes(b, b), torch.zeros_like(b), atol=1e-5)
    a = torch.tensor([[0.0, 0.0, 20.0, 20.001, 0.0]])
    a = to_convention(a)
    near = torch.tensor([[0.0, 0.0, 20.001, 20.0, 0.0]])
    assert encode_boxes(a, near).abs().max() < 0.01  # sides swapped, turned by 90°: the same box


# --- assigner and sampler


def slowly(o, high, low, closest):
    "The assigner, one candidate after the other."
    kind, which = [], []
    for row in o.tolist():
        best = max(row)
        kind.append(1 if best >= high else 0 if best < low else -1)
        which.append(row.index(best))
    for i, row in enumerate(o.tolist() if closest else []):
        near = [(v, j) for j, v in enumerate(row) if 0 < max(o[:, j].tolist()) <= v + CLOSEST_TOLERANCE]
        if near:
            kind[i], which[i] = 1, max(near)[1]
    return kind, which


@pytest.mark.parametrize("closest", [False, True])
def test_assigner_is_the_slow_one(closest):
    for seed in range(20):
        o = torch.rand(60, 4, generator=torch.Generator().manual_seed(seed)) ** 2
        o[:, 3] *= 0.2
        got = assign_targets(o, 0.7, 0.3, closest)
        want = slowly(o, 0.7, 0.3, closest)
        assert got[0].tolist() == want[0] and all(
            a == b for a, b, k in zip(got[1].tolist(), want[1], want[0]) if k == 1
        )


def test_small_objects_find_an_anchor():
    "A car of 12 x 5 px: below .3 of every anchor of 32 px, and still learnt."
    anchors = make_anchors([(8, 8)], [4], 8.0)[0]
    c, half = anchors.split(2, 1)
    half = half / 2
    from torchvision.ops import box_iou

    o = box_iou(torch.cat([c - half, c + half], 1), upright_bounds(torch.tensor([[15.0, 17.0, 12.0, 5.0, 0.3]])))
    assert 0 < o.max() < 0.3
    kind, which = assign_targets(o, 0.7, 0.3, True)
    assert (kind == 1).any() and set(kind.tolist()) == {0, 1} and not which[kind == 1].any()


@pytest.mark.parametrize(
    "n,objects,neither,count,share",
    [
        (1000, 300, 100, 256, 0.5),
        (1000, 3, 0, 256, 0.5),
        (50, 10, 5, 512, 0.25),
        (40, 40, 0, 16, 0.25),
        (30, 0, 30, 8, 0.5),
        (1, 0, 0, 256, 0.5),
    ],
)
def test_sampler_draws_what_there_is(n, objects, neither, count, share):
    kind = torch.tensor([1] * objects + [-1] * neither + [0] * (n - objects - neither), dtype=torch.int8)
    seen = set()
    for seed in range(5):
        torch.manual_seed(seed)
        i, positive, counted = sample_anchors(kind, count, share)
        assert len(i) == min(count, n)
        i, positive = i[counted], positive[counted]
        p = min(objects, int(count * share))
        assert (positive.sum(), (~positive).sum()) == (p, min(n - objects - neither, count - p))
        assert len(set(i.tolist())) == len(i) and (kind[i] == positive.to(torch.int8)).all()
        seen |= set(i.tolist())
    assert len(seen) > len(i) or len(i) in (0, n - neither)


# --- losses


def test_losses_vanish_where_all_is_said():
    "Scores and offsets that are right cost nothing; the same with one thing wrong cost something."
    boxes, labels = (
        [torch.tensor([[30.0, 30.0, 24.0, 12.0, 0.4], [70.0, 40.0, 30.0, 20.0, -1.0]]), torch.zeros(0, 5)],
        [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)],
    )
    sizes = [(16, 24), (8, 12)]
    maps = make_anchors(sizes, [4, 8], 8.0)
    anchors = torch.cat(maps)
    c, half = anchors.split(2, 1)
    half = half / 2
    from torchvision.ops import box_iou

    kind, which = assign_targets(box_iou(torch.cat([c - half, c + half], 1), upright_bounds(boxes[0])), 0.7, 0.3, True)
    n = len(anchors)
    scores = torch.stack([torch.where(kind == 1, 30.0, -30.0), torch.full((n,), -30.0)])
    deltas = torch.stack([encode_midpoints(anchors, boxes[0][which]), torch.zeros(n, 6)])
    torch.manual_seed(0)
    got = proposal_losses(maps, sizes, scores, deltas, boxes, 256)
    assert max(got.values()) < 1e-5
    off = proposal_losses(maps, sizes, scores, deltas + 1, boxes, 256)
    per = 6 * (1 - 1 / 18)
    assert off["objectness"] < 1e-5  # six numbers off by one, each 1 - beta / 2
    k = min((kind == 1).sum().item(), 128)
    assert off["offsets"].item() == pytest.approx(k * per / 512, rel=1e-4)  # 256 of each image
    proposals = [torch.cat([boxes[0] + 0.5, some(30)]), some(30, 1)]
    torch.manual_seed(0)
    rois, *rest = sample_rois(proposals, boxes, 512)
    which, positive, counted = rest
    assert (
        positive[0].sum() == 4 and not positive[1].any() and all(o.all() for o in counted)
    )  # the objects themselves, and their near proposals
    y = torch.cat([torch.where(p, l[w] if len(l) else 0, 3) for p, l, w in zip(positive, labels, which)])
    logits = nn.functional.one_hot(y, 4) * 60.0
    right = torch.cat([encode_boxes(r, b[w] if len(b) else r) for r, b, w in zip(rois, boxes, which)])
    assert max(head_losses(logits, right, rois, *rest, boxes, labels).values()) < 1e-5
    off = head_losses(logits.roll(1, 1), right + 2, rois, *rest, boxes, labels)
    assert off["classes"].item() == pytest.approx(60, rel=1e-3) and off["boxes"].item() == pytest.approx(
        4 * 5 * 1.5 / len(y), rel=1e-4
    )


def test_every_part_learns():
    "After one step of images with and without objects each parameter has a gradient that is finite and somewhere not 0."
    net = network().train()
    [
        nn.init.ones_(o.weight) for o in net.pyramid.encoder.modules() if isinstance(o, nn.BatchNorm2d)
    ]  # timm begins some at 0
    boxes = [
        torch.tensor([[30.0, 30.0, 24.0, 12.0, 0.4], [90.0, 40.0, 130.0, 60.0, -1.0], [60.0, 60.0, 400.0, 300.0, 0.2]]),
        torch.zeros(0, 5),
    ]
    losses = net(torch.randn(2, 3, 128, 160), (boxes, [torch.tensor([0, 2, 1]), torch.zeros(0, dtype=torch.long)]))
    assert set(losses) == {"objectness", "offsets", "classes", "boxes"} and all(
        o.isfinite() and o.ndim == 0 for o in losses.values()
    )
    sum(losses.values()).backward()
    assert [
        k for k, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ] == ["pyramid.encoder.mask_token"]


def test_no_objects_at_all():
    "A batch without any object: finite losses, those of boxes 0; a network that finds nothing says so in the right shapes."
    net = network().train()
    losses = net(torch.randn(1, 3, 64, 64), ([torch.zeros(0, 5)], [torch.zeros(0, dtype=torch.long)]))
    sum(losses.values()).backward()
    assert (losses["offsets"], losses["boxes"]) == (0, 0) and all(
        p.grad is None or p.grad.isfinite().all() for p in net.parameters()
    )
    nn.init.constant_(net.head.classes.bias, -50)
    nn.init.constant_(net.head.classes.bias[-1:], 50)
    found = detect_image(net.eval(), np.zeros((3, 70, 45), "uint8"), net.settings, [0.5] * 3, [0.2] * 3)
    assert [found[k].shape for k in ("boxes", "scores", "classes")] == [(0, 5), (0,), (0,)]


# --- network


def test_boxes_look_at_the_map_of_their_size():
    "Maps that hold their own number: boxes up to twice 56 px see the first, then each doubling the next."
    maps = [torch.full((2, 1, 512 // s, 512 // s), float(k)) for k, s in enumerate((4, 8, 16, 32))]
    side = [5.0, 100.0, 111.0, 113.0, 223.0, 225.0, 447.0, 449.0, 900.0]
    b = torch.tensor([[256.0, 256.0, 2 * o, o / 2, 0.3] for o in side])
    got = pool_boxes(maps, [b[:4], b[4:]])
    assert got.shape == (9, 1, 7, 7) and got[:, 0, 3, 3].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    maps = [torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 512 // s, 512 // s) for s in (4, 8, 16, 32)]
    assert pool_boxes(maps, [b[:4], b[4:]])[:, 0, 3, 3].tolist() == [0] * 4 + [1] * 5
    assert pool_boxes(maps, [b[:0], b[:0]]).shape == (0, 1, 7, 7)


def test_proposals_are_the_best_of_each_map():
    a = make_anchors([(4, 4), (2, 2)], [32, 64], 1.0)
    g = torch.Generator().manual_seed(0)
    s = [torch.rand(2, len(o), generator=g) for o in a]
    d = [torch.zeros(2, len(o), 6) for o in a]
    got = select_proposals(a, s, d, 1000)
    assert [len(o) for o in got] == [2 * 20, 2 * 20]  # of three anchors of a place two are the same box
    best = [select_proposals(a, s, d, 3)[b] for b in range(2)]
    assert all(torch.equal(o, w[:3]) for o, w in zip(best, got)) and not got[0].requires_grad
    for b in range(2):
        k = max((s[m][b].max(), m) for m in range(2))[1]
        assert torch.allclose(best[b][0], decode_midpoints(a[k][s[k][b].argmax()][None], torch.zeros(1, 6))[0])


def test_only_a_pretrained_resnet_is_frozen(models):
    "Stem and first stage stay, statistics too; of random weights all learns; transformers have nothing of it."
    data = Bars(each=2)
    before = {}
    for method, still in (("cmid", True), ("random", False)):
        said = []
        net, _ = fine_tune_detection(
            models(method=method),
            data,
            data.splits["train"],
            changed(QUICK, optimiser="sgd", lr=0.05, weight_decay=0.0),
            on=CPU,
            say=said.append,
        )
        was = load_backbone(models(method=method))[0].state_dict()
        same = {k for k, v in net.pyramid.encoder.state_dict().items() if torch.equal(v, was[k])}
        part = lambda *names: {k for k in was if any(f".{n}" in k for n in names)}
        weights = {k for k, _ in net.pyramid.encoder.named_parameters()}
        stem = {k for k in weights if k.startswith(("model.conv1", "model.bn1", "model.layer1"))}
        statistics = part("running_mean", "running_var")
        assert (
            (stem <= same) == still
            and (statistics <= same) == still
            and any("keep their" in o for o in said) == still
            and not {k for k in weights if "layer2" in k and "conv1" in k} & same
        )
    assert [frozen_stages(backbones.create(n, 3, 64), "cmid", 2) for n in ("resnet18", SWIN, VIT)] == [2, None, None]
    assert {k for k, p in network(still=2).named_parameters() if not p.requires_grad and "layer2" in k} and not [
        k for k, p in network(still=0).named_parameters() if not p.requires_grad
    ]


@pytest.mark.parametrize("steps,learns", [([2, 3], 2), ([], 4), ([9], 4)])
def test_random_statistics_settle_when_the_rate_falls(models, monkeypatch, steps, learns):
    "They move with every step until the epoch that is named first, and never after it; without one they move to the end."
    moved, said = [], []
    step = OrientedRCNN.forward

    def watched(self, *o):
        at = {k: v for k, v in self.pyramid.encoder.named_buffers() if "running" in k}
        before = {k: v.clone() for k, v in at.items()}
        out = step(self, *o)
        differs = {not torch.equal(before[k], v) for k, v in at.items()}
        moved.append(*differs)
        assert len(at) == 40
        return out

    monkeypatch.setattr(OrientedRCNN, "forward", watched)
    data = Bars(each=2)
    fine_tune_detection(models(), data, data.splits["train"], changed(QUICK, epochs=4, steps=steps), on=CPU, say=said.append)
    each = len(moved) // 4
    assert moved == [True] * learns * each + [False] * (4 - learns) * each and any(
        "anew for 2 epochs: random" in o if learns == 2 else "anew: random" in o for o in said
    )


# --- tiles


def test_tiles_hold_the_objects_where_they_are():
    "Mirrored and turned, a box still covers its bar: what is bright lies inside."
    data = Bars(((130, 90), (70, 45), (64, 64)), each=3)
    s = changed(QUICK, turn=0.5)
    tiles = TileDataset(data, data.splits["train"], s, [0.43] * 3, seed=1)
    shapes, looks = set(), set()
    assert {o[0] for o in tiles.tiles} == {0, 1}  # a tile without objects teaches nothing
    for step in range(12):
        x, (boxes, labels) = tiles[step, np.arange(len(tiles))]
        assert (
            x.dtype == torch.uint8
            and x.shape[2] % 32 == x.shape[3] % 32 == 0
            and [len(o) for o in boxes] == [len(o) for o in labels]
        )
        shapes.add(tuple(x.shape))
        looks.add(x[0].sum(0).numpy().tobytes())
        for image, b, l in zip(x.float(), boxes, labels):
            for o, k in zip(b, l):
                y, c = o[1].int().item(), o[0].int().item()
                if 1 <= y < image.shape[1] - 1 and 1 <= c < image.shape[2] - 1:
                    assert image[k, y - 1 : y + 2, c - 1 : c + 2].mean() > 160
    assert len(looks) >= 6 and torch.equal(
        tiles[3, np.array([0])][0], TileDataset(data, data.splits["train"], s, [0.43] * 3, seed=1)[3, np.array([0])][0]
    )


def test_each_stage_draws_as_many_as_asked(monkeypatch):
    asked, real = [], module.sample_anchors
    monkeypatch.setattr(module, "sample_anchors", lambda kind, *o: asked.append(o) or real(kind, *o))
    network(samples=[8, 16]).train()(
        torch.randn(1, 3, 64, 64), ([torch.tensor([[30.0, 30.0, 24.0, 12.0, 0.4]])], [torch.tensor([1])])
    )
    assert sorted(asked) == [(8, 0.5), (16, 0.25)]


def test_flips_are_as_often_as_asked():
    "Left to right and top to bottom by themselves: none at 0, both always at 1, each in half of the tiles at the published .5."
    data = Bars(((64, 64),) * 2, each=3)
    plain = torch.from_numpy(np.array(data.image(0)))

    def seen(flip):
        tiles = TileDataset(data, [0], changed(QUICK, flip=flip), [0.43] * 3)
        return [tiles[step, np.array([0])][0][0] for step in range(200)]

    assert all(torch.equal(o, plain) for o in seen(0.0)) and all(torch.equal(o, plain.flip(1, 2)) for o in seen(1.0))
    counts = [sum(torch.equal(o, plain.flip(k)) for o in seen(0.5)) for k in ((), (1,), (2,), (1, 2))]
    assert sum(counts) == 200 and min(counts) > 25


def test_every_mirror_is_its_own_inverse():
    x, b = torch.randint(256, (2, 32, 48), dtype=torch.uint8), some(20)
    for flags in ((1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1)):
        y, c = mirror_tile(*mirror_tile(x, b, *flags), *flags)
        assert torch.equal(x, y) and paired_iou(b, c).min() > 0.999
    assert wrap_angle(torch.tensor([-math.pi / 2, math.pi / 2, 3.2, -1.58])).tolist() == pytest.approx(
        [-math.pi / 2, -math.pi / 2, 3.2 - math.pi, -1.58 + math.pi], abs=1e-6
    )


def test_small_images_are_filled_up():
    x = pad_to_batch(
        [torch.full((2, 5, 70), 9, dtype=torch.uint8), torch.full((2, 33, 4), 8, dtype=torch.uint8)],
        torch.tensor([1, 2], dtype=torch.uint8),
    )
    assert (
        x.shape == (2, 2, 64, 96)
        and (x[0, :, :5, :70] == 9).all()
        and (x[1, :, :33, :4] == 8).all()
        and (x[0, 0, 5:] == 1).all()
        and (x[1, 1, :, 4:] == 2).all()
    )


def test_whole_images_are_put_together_from_tiles():
    "A network that finds the middle of each tile, and something beside it: moved to where the tile was; what lies beside the image is none."

    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            h, w = x.shape[-2:]
            return [
                dict(
                    boxes=torch.tensor([[w / 2, h / 2, 20.0, 8.0, 0.5], [500.0, 5.0, 9.0, 9.0, 0.0]]),
                    scores=torch.tensor([0.9, 0.8]),
                    classes=torch.tensor([1, 0]),
                )
                for _ in x
            ]

    image = np.zeros((3, 100, 150), "uint8")
    s = changed(QUICK, batch=3)
    found = detect_image(Middle(), image, s, [0.5] * 3, [0.2] * 3)
    tiles = windows(100, 150, 64, 16)
    assert sorted(found["boxes"][:, :2].tolist()) == sorted(
        [[(l + r) / 2, (t + b) / 2] for t, l, b, r in tiles]
    ) and found["classes"].tolist() == [1] * len(tiles)


@pytest.mark.parametrize("scale", (0.5, 0.37, 1.5, 2.5))
@pytest.mark.parametrize("bands", (1, 3, 13))
def test_a_scaled_tile_shows_each_point_where_its_boxes_say(scale, bands):
    "A ramp stays a ramp: what the network sees at x was at x / scale of the tile, to the rounding of whole numbers; no tile is larger than asked for."
    image = np.broadcast_to(np.arange(100, dtype="uint8") * 2, (bands, 60, 100))
    x = scaled_tile(image, (3, 7, 50, 81), scale)
    assert x.dtype == torch.uint8 and x.shape == (bands, math.ceil(47 * scale), math.ceil(74 * scale))
    at = (torch.arange(x.shape[2]) + 0.5) / scale
    assert ((x - (at + 7 - 0.5) * 2).abs()[:, :, 4:-4] <= 0.6).all()
    assert all(
        o.tolist() == want
        for (_, o), want in zip(
            windows_by_scale((128, 200), changed(QUICK, scales=[0.5, 2.0])),
            ([[0, 0, 128, 128], [0, 72, 128, 200]], windows(128, 200, 32, 8).tolist()),
        )
    )
    ((_, tiles),) = windows_by_scale((900, 1300), changed(QUICK, scales=[scale]))
    assert (tiles[:, 2:] - tiles[:, :2]).max() * scale <= 64 and tiles[:, 2].max() == 900 and tiles[:, 3].max() == 1300


def test_one_pixel_remains_of_the_smallest_image():
    for o, s, want in (
        ((1, 1), 0.05, (2, 1, 1)),
        ((1, 2), 0.2, (2, 1, 1)),
        ((3, 40), 0.34, (2, 2, 14)),
        ((1, 1), 0.2 - 2e-17, (2, 1, 1)),
    ):
        x = scaled_tile(np.full((2, *o), 7, "uint8"), (0, 0, *o), s)
        assert x.shape == want and (x == 7).all()


def test_fine_patterns_are_averaged():
    "A checkerboard of single pixels is grey at a quarter of its size."
    x = scaled_tile((np.indices((64, 64)).sum(0) % 2 * 200).astype("uint8")[None], (0, 0, 64, 64), 0.25).float()
    assert x.shape == (1, 16, 16) and (x - 100).abs().max() < 8


@pytest.mark.parametrize("width,scale", [(1001, 0.5), (1919, 0.1), (99, 0.05), (150, 1.0), (77, 1.5)])
def test_the_last_pixel_is_looked_at(width, scale):
    "A network that finds something in the last pixel of the image and something just beyond it: the first counts, the second does not."

    class Edge(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return [
                dict(
                    boxes=torch.tensor(
                        [[(width - 0.5) * scale, 4.0, 8.0, 4.0, 0.0], [(width + 0.5) * scale, 4.0, 8.0, 4.0, 0.0]]
                    ),
                    scores=torch.tensor([0.9, 0.8]),
                    classes=torch.tensor([1, 0]),
                )
                for _ in x
            ]

    found = detect_image(
        Edge(), np.zeros((3, 200, width), "uint8"), changed(QUICK, tile=1024, scales=[scale]), [0.5] * 3, [0.2] * 3
    )
    assert found["classes"].tolist() == [1] and found["boxes"][0, 0].item() == pytest.approx(width - 0.5, rel=1e-5)


def test_a_plain_scale_changes_nothing():
    data = Bars(((130, 90),) * 2, each=3)
    tiles = TileDataset(data, [0], changed(QUICK, flip=0.0), [0.43] * 3)
    i, (t, l, b, r), *_ = tiles.tiles[0]
    assert torch.equal(
        tiles[0, np.array([0])][0][0, :, : b - t, : r - l], torch.from_numpy(data.image(0)[:, t:b, l:r].copy())
    )


@pytest.mark.parametrize("scales", ([0.5], [2.0], [0.5, 1.0, 1.5]))
def test_tiles_of_every_scale_cover_their_bars(scales):
    "What is bright lies inside the boxes at any scale; an image gives tiles at each."
    data = Bars(((130, 90), (70, 45)), each=3)
    tiles = TileDataset(data, [0, 1], changed(QUICK, scales=scales, turn=0.5), [0.43] * 3)
    assert {o[-1] for o in tiles.tiles} == {*scales}
    count = 0
    for step in range(4):
        x, (boxes, labels) = tiles[step, np.arange(len(tiles))]
        for image, b, l in zip(x.float(), boxes, labels):
            for o, k in zip(b, l):
                y, c = o[1].int().item(), o[0].int().item()
                if 1 <= y < image.shape[1] - 1 and 1 <= c < image.shape[2] - 1:
                    assert image[k, y, c] > 160
                    count += 1
    assert count >= 20


def test_detections_of_every_scale_come_back_in_pixels_of_the_image():
    "A network that finds the middle of what it sees: where that is in the image, and as large as it is there."

    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))
            self.kind = 0

        def forward(self, x):
            self.kind += 1
            return [
                dict(
                    boxes=torch.tensor([[16.0, 12.0, 20.0, 8.0, 0.5], [500.0, 5.0, 9.0, 9.0, 0.0]]),
                    scores=torch.tensor([0.9, 0.8]),
                    classes=torch.tensor([self.kind, 0]),
                )
                for _ in x
            ]

    s = changed(QUICK, batch=99, scales=[0.5, 1.0, 1.5])
    found = detect_image(Middle(), np.zeros((3, 60, 60), "uint8"), s, [0.5] * 3, [0.2] * 3)
    want = [
        [16 / k + l, 12 / k + t, 20 / k, 8 / k]
        for k, tiles in windows_by_scale((60, 60), s)
        for t, l, *_ in tiles.tolist()
    ]
    assert (
        sorted(found["boxes"][:, :4].tolist()) == [pytest.approx(o, abs=1e-4) for o in sorted(want)]
        and (found["boxes"][:, 4] == 0.5).all()
        and {*found["classes"].tolist()} == {1, 2, 3}
    )


# --- the whole


def test_learns_by_heart_and_says_so(models):
    "Bars of two classes at any angle: every one is found, once; the result is as JSON takes it, and agrees with itself."
    data, said = Bars(), []
    s = changed(
        QUICK,
        tile=96,
        batch=1,
        epochs=45,
        steps=[38],
        warmup_steps=10,
        channels=32,
        head_hidden=64,
        proposals=60,
        anchor=6.0,
        optimiser="adamw",
        lr=0.002,
        weight_decay=0.01,
    )
    r, epochs, found = detect(models(), data, s, 0, CPU, said.append)
    assert (
        r["map"] >= 0.9
        and r["map"] == r["map50_voc07"]
        and (r["images"], r["objects"], r["train_images"], r["epoch"], r["scored_on_training"], r["metric"])
        == (3, 8, 3, 45, True, "voc07")
    )
    assert (
        json.loads(json.dumps(r, allow_nan=False)) == r
        and list(r["per_class"]) == data.classes
        and sum(o["objects"] for o in r["per_class"].values()) == 8
        and len(r["matches"]["red"]) == r["per_class"]["red"]["detections"]
    )
    assert (
        r["per_class"]["red"]["detections"] == sum((o["classes"] == 0).sum().item() for o in found)
        and len(epochs) == 45
        and epochs[-1]["loss"] < epochs[0]["loss"]
        and len([o for o in said if o.startswith("epoch ")]) == 45
    )
    hits = [match_detections({k: v[o["scores"] > 0.5] for k, v in o.items()}, data.objects(i)) for i, o in enumerate(found)]
    assert sum(m.sum() for *_, m in hits) <= 1
    fig = detections_figure(data, [0, 1, 2], found)
    assert [ax.get_title() for ax in fig.axes[:3]] == [
        f"{(h := judged({k: v[f['scores'] >= 0.3] for k, v in f.items()}, data.objects(i)))[0].sum()} of {len(h[2])} found, {h[1].sum()} false"
        for i, f in enumerate(found)
    ]
    scene = detection_scene_figure(data.image(0), found[0], data.classes, windows_by_scale((96, 96), QUICK))
    assert (
        len(scene.axes[0].patches) == 4
        and f"{(found[0]['scores'] >= 0.3).sum()} detections" in scene.axes[0].get_title()
    )
    scene.canvas.draw()


def test_scores_are_written_where_they_can_be_read():
    some_of = lambda n: dict(boxes=some(n), scores=torch.ones(n), classes=torch.zeros(n, dtype=torch.long))
    draw = lambda n: detection_scene_figure(np.zeros((3, 90, 90), "uint8"), some_of(n), ["ship"], [(1.0, [(0, 0, 90, 90)])]).axes[
        0
    ]
    assert [len(draw(n).texts) for n in (3, MAX_SCORE_TEXTS, MAX_SCORE_TEXTS + 1)] == [3, MAX_SCORE_TEXTS, 0] and "1 tile;" in draw(
        3
    ).get_title()


def test_several_scales_from_end_to_end(models):
    "Learnt from and looked at at two sizes that leave pixels in part; a short last batch; the figure shows the tiles of both."
    data = Bars(((45, 51), (33, 64), (97, 70)))
    s = changed(QUICK, scales=[0.5, 1.3], batch=3, optimiser="adamw", lr=1e-4, weight_decay=0.01, score=0.0)
    r, epochs, found = detect(models(), data, s, 0, CPU, quiet)
    assert r["images"] == 3 and math.isfinite(epochs[0]["loss"])
    for i, o in enumerate(found):
        h, w = data.sizes[i]
        x, y = o["boxes"][:, :2].T
        assert len(x) and (x >= 0).all() and (y >= 0).all() and (x < w).all() and (y < h).all()
    assert (
        len(detection_scene_figure(data.image(2), found[2], data.classes, windows_by_scale((97, 70), s)).axes[0].patches)
        == sum(len(o) for _, o in windows_by_scale((97, 70), s))
        > 2
    )


def test_what_is_difficult_or_without_labels_is_not_held_against_it():
    "Of two bars one is difficult: neither found nor missed, and detections of it are not false. Without labels nothing is false."
    data = Bars(each=2)
    p = data.objects(0)["polygons"]
    data.made[0][1]["difficult"][1] = True
    f = dict(boxes=from_polygon(torch.tensor(p)), scores=torch.tensor([0.9, 0.8]), classes=torch.tensor([0, 1]))
    none = {k: v[:0] for k, v in f.items()}
    title = lambda *o, **more: [ax.get_title() for ax in detections_figure(data, [0], *o, **more).axes[:1]]
    assert [o.tolist() for o in match_detections(f, data.objects(0))] == [[True, False], [False, False], [False, False]] and [
        o.tolist() for o in match_detections(none, data.objects(0))
    ] == [[], [], [True, False]]
    assert title([f]) == ["1 of 1 found, 0 false"] and title([none]) == ["0 of 1 found, 0 false"]
    data.made[0] = data.made[0][0], {k: v[:0] for k, v in data.objects(0).items()}
    assert title([f]) == ["0 of 0 found, 2 false"] and title([f], known=False) == ["2 found, without labels"]


def test_a_step_copies_no_numbers_from_the_host(monkeypatch):
    "Forward and backward of a step make no tensor of numbers of Python's, which on a GPU would be a copy to wait for; values are the same."
    net = network().train()
    x, boxes = (
        torch.randn(2, 3, 64, 96),
        [torch.tensor([[30.0, 30.0, 24.0, 12.0, 0.4], [70.0, 40.0, 30.0, 20.0, -1.0]]), torch.zeros(0, 5)],
    )
    labels = [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)]
    row = module._filled(module.PRECISION, x)
    assert torch.equal(row, torch.tensor(module.PRECISION))
    assert torch.equal(to_polygon(boxes[0])[0, 0], to_polygon(boxes[0].flip(0))[1, 0])
    from sys import _getframe

    asked = []

    def seen(f):
        return lambda *o, **k: (asked.append(_getframe(1).f_globals["__name__"]), f(*o, **k))[1]

    for at, o in ((torch, "tensor"), (torch, "as_tensor"), (torch, "from_numpy"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(at, o, seen(getattr(at, o)))
    sum(net(x, (boxes, labels)).values()).backward()
    assert not [o for o in asked if o.startswith("cmid")], asked  # torchvision's suppression makes one


def test_two_runs_agree_bit_for_bit(models):
    data, runs = Bars(each=3), []
    for seed in (3, 3, 4):
        torch.rand(len(runs) + 1)
        net, epochs = fine_tune_detection(
            models(), data, data.splits["train"], changed(QUICK, epochs=2, turn=0.5), seed, CPU, quiet
        )
        runs.append((net.state_dict(), epochs))
    (a, one), (b, two), (c, three) = runs
    assert (
        all(torch.equal(a[k], b[k]) for k in a)
        and one == two
        and one != three
        and not torch.equal(a["head.box.weight"], c["head.box.weight"])
    )


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
    "Odd sizes, some smaller than a tile, one without objects: a step with the optimiser of the family; what comes out is finite."
    data = Bars(((70, 45), (64, 97), (33, 40)), 2, bands)
    r, epochs, found = detect(
        models(name, bands),
        data,
        changed(QUICK, epochs=2, steps=[1], batch=batch, precision=precision),
        on=CPU,
        say=quiet,
    )
    assert (
        all(np.isfinite(v) for v in epochs[0].values())
        and all(o["boxes"].isfinite().all() and ((0 <= o["scores"]) & (o["scores"] <= 1)).all() for o in found)
        and len(found) == 3
        and r["map"] is not None
    )
    assert all((o["boxes"][:, 0] < w).all() and (o["boxes"][:, 1] < h).all() for o, (h, w) in zip(found, data.sizes))


def test_what_is_wrong_is_named(models):
    data = Bars()
    go = lambda folder=models(), **o: detect(folder, data, changed(QUICK, **o), on=CPU, say=quiet)
    with pytest.raises(
        CmidError,
        match=r"params.yaml: detect.train: bars has no split 'trane' \(did you mean 'train'\?\); known: train, test, none",
    ):
        go(train="trane")
    with pytest.raises(CmidError, match="detect.test: bars has no split 'val'"):
        go(test="val")
    with pytest.raises(CmidError, match="bars: no image of split 'none' has an object to learn from"):
        go(train="none", test="none")
    with pytest.raises(CmidError, match="bars: 1 images are in both 'none' and 'test'"):
        go(train="none")
    with pytest.raises(CmidError, match="images have 3 bands, .*random-resnet18-5 was made for 5; take the same bands"):
        go(models(bands=5))
    with pytest.raises(CmidError, match="detect.batch: batch norm would see one tile of 32 px"):
        detect(models(), Bars(((32, 32), (64, 64)), 1), changed(QUICK, batch=1), on=CPU, say=quiet)
    with pytest.raises(CmidError, match=r"detect.steps: \[11, 8\] do not rise"):
        go(steps=[11, 8])
    with pytest.raises(CmidError, match="detect.frozen_stages: 5 are more than the 4"):
        go(frozen_stages=5)
    with pytest.raises(CmidError, match="detect.precision: float16 needs a GPU"):
        go(precision="float16")
    with pytest.raises(CmidError, match=r"loss is not finite at step \d+ .*lower detect.lr"):
        go(lr=1e30, epochs=20, optimiser="sgd", clip=None)
