"Rotated boxes: IoU as of an independent geometry library, NMS as of a greedy loop, RoIAlign as of torchvision."

import math

import numpy as np
import pytest
import shapely
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, roi_align

from cmid.tasks import boxes as module
from cmid.tasks.boxes import (
    assign_targets,
    decode_boxes,
    decode_midpoints,
    encode_boxes,
    encode_midpoints,
    from_polygon,
    make_anchors,
    paired_iou,
    roi_sample_points,
    rotated_iou,
    rotated_nms,
    rotated_roi_align,
    sample_anchors,
    to_convention,
    to_polygon,
    upright_bounds,
    wrap_angle,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_boxes(n, g, side=60.0, low=5.0, high=50.0):
    "Centres within `side`, sides between low and high (evenly in their logarithm), any angle up to a turn either way."
    centre = torch.rand(n, 2, generator=g) * side
    size = low * (high / low) ** torch.rand(n, 2, generator=g)
    angle = (torch.rand(n, 1, generator=g) - 0.5) * 4 * math.pi
    return torch.cat([centre, size, angle], 1)


def le90_boxes(n, seed=0, low=4.0, high=60.0):
    "n boxes within 200 px, le90."
    g = generator(seed)
    size = low + torch.rand(n, 2, generator=g) * (high - low)
    centre = torch.rand(n, 2, generator=g) * 200
    angle = (torch.rand(n, 1, generator=g) - 0.5) * math.pi
    return to_convention(torch.cat([centre, size, angle], 1))


def is_le90(b):
    angles = (b[:, 4] >= -math.pi / 2) & (b[:, 4] < math.pi / 2)
    sides = (b[:, 2] >= b[:, 3]) & (b[:, 3] >= 1 - 1e-6)
    return bool((angles & sides & b.isfinite().all(1)).all())


def shapes(boxes):
    return shapely.polygons(to_polygon(boxes.double()).numpy())


def reference_iou(a, b):
    "IoU of pairs by shapely; 0 where neither has an area."
    a, b = shapes(a), shapes(b)
    both = shapely.area(shapely.intersection(a, b))
    either = shapely.area(a) + shapely.area(b) - both
    return np.where(either > 0, both / np.where(either > 0, either, 1), 0)


def moved(boxes, g, shift=0.0, grow=0.0, turn=0.0):
    "Boxes near the given ones: shifted by a share of their shorter side, grown by a share, turned by radians."

    def noise(*shape):
        return torch.rand(*shape, generator=g) - 0.5

    n = len(boxes)
    out = boxes.clone()
    out[:, :2] += shift * noise(n, 2) * boxes[:, 2:4].amin(1, keepdim=True)
    out[:, 2:4] *= 1 + grow * noise(n, 2)
    out[:, 4] += turn * noise(n)
    return out


# IoU of pairs

N = 11000


def random_pairs(g):
    return random_boxes(N, g), random_boxes(N, g)


def tiny_pairs(g):
    a = random_boxes(N, g, 5000.0, 2.0, 4.0)
    return a, moved(a, g, 1.5, 0.6, 1.0)


def far_boxes(g):
    return random_boxes(N, g, 5000.0, 0.5, 3000.0)


def long_pairs(g):
    a = far_boxes(g)
    return a, moved(a, g, 1.0, 0.0, 0.01)


def identical_pairs(g):
    a = far_boxes(g)
    return a, a.clone()


def renamed_pairs(g):
    "The same rectangles with swapped sides."
    a = far_boxes(g)
    return a, torch.cat([a[:, :2], a[:, [3, 2]], a[:, 4:] + math.pi / 2], 1)


def nested_pairs(g):
    a = far_boxes(g)
    b = a.clone()
    b[:, 2:4] *= torch.rand(N, 1, generator=g)
    return a, b


def touching_pairs(g):
    a = far_boxes(g)
    b = a.clone()
    b[:, 0] += a[:, 2] * a[:, 4].cos()
    b[:, 1] += a[:, 2] * a[:, 4].sin()
    return a, b


def whole_number_pairs(g):
    "Shared edges, corners on edges, no width."
    units = torch.tensor([1.0, 1.0, 1.0, 1.0, math.pi / 4])
    return [torch.randint(0, 8, (N, 5), generator=g).float() * units for _ in "ab"]


def huge_pairs(g):
    return random_boxes(N, g, 2e4, 1e3, 2e4), random_boxes(N, g, 2e4, 1.0, 2e4)


def flat_pairs(g):
    keep = [1.0, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0, 1.0]
    return [random_boxes(N, g, 20.0) * torch.tensor(o) for o in keep]


def separate_pairs(g):
    b = random_boxes(N, g)
    b[:, 0] += 1e6
    return random_boxes(N, g), b


PAIRS = dict(  # least share of pairs that overlap: the pairs are what they are called
    random=(random_pairs, 0.2),
    tiny=(tiny_pairs, 0.99),
    long=(long_pairs, 0.99),
    identical=(identical_pairs, 1.0),
    renamed=(renamed_pairs, 1.0),
    nested=(nested_pairs, 0.99),
    touching=(touching_pairs, None),
    whole_numbers=(whole_number_pairs, 0.2),
    huge=(huge_pairs, 0.05),
    flat=(flat_pairs, 0),
    separate=(separate_pairs, 0),
)


def pairs(kind):
    return PAIRS[kind][0](generator(len(kind)))


@pytest.mark.parametrize("kind", PAIRS)
def test_overlaps_are_those_of_shapely(kind):
    "121,000 pairs in float32: the worst error is below 1e-5."
    a, b = pairs(kind)
    found, expected = paired_iou(a, b).numpy(), reference_iou(a, b)
    error = np.abs(found - expected)
    worst = error.argmax()
    assert error.max() < 1e-5, (kind, a[worst].tolist(), b[worst].tolist())
    assert (found >= 0).all()
    assert (found <= 1).all()
    share = PAIRS[kind][1]
    if share is not None:
        assert (expected > 0).mean() >= share
        assert share or expected.max() == 0
    if kind in ("identical", "renamed"):
        assert found.min() > (0.9999 if kind == "identical" else 0.99)
    if kind == "touching":
        assert found.max() < 1e-3  # their corners are float32, too


def test_all_pairs_are_the_pairs(monkeypatch):
    a, b = random_boxes(300, generator(0), 200.0), random_boxes(170, generator(1), 200.0)
    every = rotated_iou(a, b)
    for i in range(0, 300, 37):
        assert torch.allclose(every[i], paired_iou(a[i].expand(170, 5), b), atol=1e-7)
    for k in (50, 1000, 10**9):
        monkeypatch.setitem(module.PAIRS_PER_BLOCK, "cpu", k)
        assert torch.allclose(rotated_iou(a, b), every, atol=1e-7)
    assert 0.02 < (every > 0).float().mean() < 0.5
    for n, m in ((0, 5), (5, 0), (0, 0)):
        assert rotated_iou(a[:n], b[:m]).shape == (n, m)
    assert paired_iou(a[:0], b[:0]).shape == (0,)
    assert rotated_iou(a.double(), b.double()).dtype == torch.float64


def test_only_near_pairs_are_computed(monkeypatch):
    "2,000 by 2,000 spread over a large image are cheap: of four million pairs, few are looked at."
    seen = []
    iou = module._iou

    def counting(a, b):
        seen.append(a.shape[1])
        return iou(a, b)

    monkeypatch.setattr(module, "_iou", counting)
    b = random_boxes(2000, generator(0), 4000.0, 10.0, 60.0)
    rotated_iou(b, b)
    assert 2000 <= sum(seen) < 20000


def test_boxes_that_are_not_finite_overlap_nothing():
    good = torch.tensor([[0.0, 0.0, 4.0, 2.0, 0.3]])
    bad = good.repeat(7, 1)
    bad[range(5), range(5)] = torch.tensor([math.nan, math.inf, -math.inf, math.nan, math.inf])
    bad[5, 2] = -4.0
    bad[6, 2:4] = -1.0
    assert rotated_iou(bad, good).abs().max() == 0
    assert rotated_iou(good, bad).abs().max() == 0
    assert paired_iou(bad, good.expand(7, 5)).abs().max() == 0


def test_gradients_of_overlaps():
    g = generator(5)
    a = random_boxes(12, g, 8.0, 4.0, 12.0).double()
    b = moved(a, g, 0.8, 0.5, 1.0)
    few = a[:4].detach().requires_grad_(), b[:3].detach().requires_grad_()
    assert torch.autograd.gradcheck(paired_iou, (a.requires_grad_(), b.requires_grad_()))
    assert torch.autograd.gradcheck(rotated_iou, few)


@pytest.mark.parametrize("kind", PAIRS)
def test_gradients_are_finite_at_kinks_too(kind):
    a, b = (o[:500].clone().requires_grad_() for o in pairs(kind))
    paired_iou(a, b).sum().backward()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()
    if kind == "identical":
        assert (a.grad[:, :2].abs().amax(1) < 1e3).all()


def test_gradient_does_not_depend_on_what_is_exactly_parallel():
    "Of two upright boxes, as of two that are nearly so: the branch of flat edges gives the general one's gradient."
    base = torch.tensor([[0.0, 0.0, 6.0, 4.0, 0.0], [1.0, 1.0, 5.0, 3.0, 0.0]], dtype=torch.float64)
    gradients = []
    for turn in (0.0, 1e-5):
        a, b = (base[k : k + 1] + torch.tensor([0.0, 0.0, 0.0, 0.0, k * turn]) for k in (0, 1))
        a.requires_grad_()
        paired_iou(a, b).sum().backward()
        gradients.append(a.grad)
    assert torch.allclose(*gradients, atol=1e-4)
    assert gradients[0][0, :4].abs().min() > 1e-3


# Conventions and corners


@pytest.mark.parametrize("to", ["le90", "le135", "oc"])
def test_conventions_describe_the_same_rectangles(to):
    a = random_boxes(2000, generator(2)).double()
    b = to_convention(a, to)
    q = math.pi / 2
    assert paired_iou(a, b).min() > 1 - 1e-9
    low, high = dict(le90=(-q, q), le135=(-q / 2, 1.5 * q), oc=(0, q))[to]
    assert (b[:, 4] >= low - 1e-12).all()
    assert (b[:, 4] <= high + 1e-12).all()
    assert to == "oc" or (b[:, 2] >= b[:, 3]).all()
    assert torch.equal(to_convention(b, to), b)  # once is enough
    for other in ("le90", "le135", "oc"):
        assert torch.allclose(to_convention(to_convention(a, other), to), b, atol=1e-9)


def test_unknown_convention():
    with pytest.raises(ValueError, match="no convention 'le180'"):
        to_convention(torch.zeros(1, 5), "le180")


def test_bounds_are_those_of_shapely():
    a = random_boxes(500, generator(3)).double()
    assert np.allclose(upright_bounds(a).numpy(), shapely.bounds(shapes(a)), atol=1e-9)


@pytest.mark.parametrize("k", [3, 4, 8])
def test_least_rectangles_are_those_of_shapely(k):
    "Of points anywhere: the area is shapely's, and all points are within."
    points = torch.rand(1500, k, 2, generator=generator(k), dtype=torch.float64) * 50 + 3000
    b = from_polygon(points)
    expected = shapely.area(shapely.minimum_rotated_rectangle(shapely.multipoints(points.numpy())))
    assert np.allclose((b[:, 2] * b[:, 3]).numpy(), expected, rtol=1e-6)
    grown = b.clone()
    grown[:, 2:4] += 1e-6
    assert shapely.covers(shapes(grown)[:, None], shapely.points(points.numpy())).all()
    assert (b[:, 2] >= b[:, 3]).all()
    assert (b[:, 4] >= -math.pi / 2 - 1e-12).all()
    assert (b[:, 4] < math.pi / 2 + 1e-12).all()


def test_corners_and_back():
    a = to_convention(random_boxes(3000, generator(4), 5000.0, 1.0, 500.0))
    assert paired_iou(from_polygon(to_polygon(a.double())), a.double()).min() > 1 - 1e-9
    assert paired_iou(from_polygon(to_polygon(a)), a).min() > 0.99  # corners in float32, 1 px at 5,000
    assert from_polygon(to_polygon(a)).dtype == torch.float32


# NMS


def greedy(boxes, scores, iou, classes=None):
    "One box after the other, with shapely."
    good = torch.isfinite(boxes).all(1) & torch.isfinite(scores)
    c = torch.zeros(len(boxes)) if classes is None else classes
    kept = []
    n = len(boxes)
    clean = torch.where(good[:, None], boxes, 0.0)
    table = reference_iou(clean.repeat_interleave(n, 0), clean.repeat(n, 1)).reshape(n, n)
    for i in sorted((int(k) for k in good.nonzero()), key=lambda k: (-scores[k].item(), k)):
        if all(c[i] != c[k] or table[i, k] <= iou for k in kept):
            kept.append(i)
    return kept


def crowd(seed):
    "Boxes around a few objects, scores and classes: with ties, duplicates and numbers that are not finite."
    g = generator(seed)
    n = int(torch.randint(1, 30, (1,), generator=g))
    objects = random_boxes(1 + seed % 5, g, 60.0, 10.0, 40.0)
    boxes = moved(objects[torch.randint(len(objects), (n,), generator=g)], g, 0.6, 0.5, 0.6)
    scores = torch.rand(n, generator=g)
    classes = torch.randint(3, (n,), generator=g) if seed % 2 else None
    if seed % 3 == 0:
        scores = (scores * 4).round() / 4  # ties
    if seed % 4 == 0:
        boxes[::3] = boxes[0].clone()  # duplicates
    if seed % 5 == 0:
        boxes[n // 2, 2] = math.nan
        scores[n // 3] = math.inf
        scores[-1] = math.nan
    return boxes, scores, classes


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_suppression_is_the_greedy_one(chunk, monkeypatch):
    monkeypatch.setitem(module.NMS_CHUNK, "cpu", chunk)
    for seed in range(30):
        boxes, scores, classes = crowd(seed)
        for iou in (0.1, 0.5, 0.8):
            expected = greedy(boxes, scores, iou, classes)
            assert rotated_nms(boxes, scores, iou, classes).tolist() == expected, (seed, iou)


def test_a_chain_is_walked_to_its_end():
    "Each box suppresses the next: the worst case for rounds, here 600 long."
    n = 600
    b = torch.zeros(n, 5)
    b[:, 0] = torch.arange(n) * 4.0
    b[:, 2] = 8.0
    b[:, 3] = 4.0
    assert rotated_nms(b, -torch.arange(n).float(), 0.3).tolist() == list(range(0, n, 2))


def test_rounds_are_few(monkeypatch):
    "2,000 crowded boxes, decided at once as on a GPU: the device is asked a few times, not once a box."
    asked = []
    equal = torch.equal

    def counting(a, b):
        asked.append(1)
        return equal(a, b)

    monkeypatch.setattr(torch, "equal", counting)
    monkeypatch.setitem(module.NMS_CHUNK, "cpu", 1024)
    g = generator(0)
    b = moved(random_boxes(200, g, 1024.0, 20.0, 60.0).repeat_interleave(10, 0), g, 0.5, 0.3, 0.5)
    kept = rotated_nms(b, torch.rand(2000, generator=g), 0.3)
    assert 150 < len(kept) < 1500
    assert len(asked) < 30


def test_suppression_of_nothing_and_of_all():
    none = torch.zeros(0, 5)
    assert rotated_nms(none, none[:, 0], 0.5).tolist() == []
    assert rotated_nms(none, none[:, 0], 0.5, none[:, 0].long()).dtype == torch.int64
    assert rotated_nms(torch.full((3, 5), math.nan), torch.ones(3), 0.5).tolist() == []
    same = torch.tensor([[5.0, 5.0, 4.0, 2.0, 0.1]]).repeat(500, 1)
    assert rotated_nms(same, torch.ones(500), 0.5).tolist() == [0]
    assert rotated_nms(same, torch.ones(500), 1.0).tolist() == list(range(500))  # nothing overlaps by more than 1


# RoIAlign


def regions(n, g, side=100.0, high=80.0):
    return torch.cat([torch.randint(3, (n, 1), generator=g), random_boxes(n, g, side, 4.0, high)], 1)


def upright(rois):
    "Corners of boxes at angle 0, as torchvision takes them."
    return torch.cat([rois[:, :1], upright_bounds(rois[:, 1:])], 1)


@pytest.mark.parametrize("size,samples,scale", [(7, 2, 0.25), (3, 1, 0.5), (5, 3, 0.125)])
def test_upright_regions_are_torchvisions(size, samples, scale):
    "Also partly and wholly outside, and on maps of one row."
    g = generator(size)
    rois = regions(200, g, 130.0).double()
    rois[:, 5] = 0
    for shape in ((3, 4, 30, 22), (3, 2, 1, 9)):
        maps = torch.randn(shape, generator=g, dtype=torch.float64)
        expected = roi_align(maps, upright(rois), size, scale, samples, True)
        assert (rotated_roi_align(maps, rois, size, scale, samples) - expected).abs().max() < 1e-9
    maps = torch.randn(3, 4, 30, 22, generator=g)
    expected = roi_align(maps, upright(rois).float(), size, scale, samples, True)
    assert (rotated_roi_align(maps, rois.float(), size, scale, samples) - expected).abs().max() < 5e-5


def test_rotated_regions_are_read_where_they_lie():
    "Against grid_sample, which knows nothing of boxes: inside, where borders do not matter."
    g = generator(1)
    maps = torch.randn(3, 4, 40, 48, generator=g, dtype=torch.float64)
    rois = regions(100, g, 40.0, 30.0).double()
    rois[:, 1:3] += 60
    points = roi_sample_points(rois[:, 1:], 7, 2) / 4  # 160 by 192 px of image
    grid = points * 2 / torch.tensor([48.0, 40.0], dtype=torch.float64) - 1
    expected = []
    for k, points in zip(rois[:, 0].long(), grid):
        values = F.grid_sample(maps[k : k + 1], points[None], align_corners=False)
        expected.append(F.avg_pool2d(values, 2))
    assert (rotated_roi_align(maps, rois, 7, 1 / 4) - torch.cat(expected)).abs().max() < 1e-9


def test_a_ramp_is_read_exactly():
    "Bilinear reading keeps what is linear, so bins hold their own centres; at any angle, scale and number of samples."
    for stride in (1, 4, 8):
        y, x = torch.meshgrid(*[(torch.arange(120 // stride, dtype=torch.float64) + 0.5) * stride] * 2, indexing="ij")
        maps = torch.stack([x, y, x - 2 * y])[None].repeat(3, 1, 1, 1)
        rois = regions(200, generator(stride), 10.0, 50.0).double()
        rois[:, 1:3] += 55
        found = rotated_roi_align(maps, rois, 5, 1 / stride, 3)
        x, y = roi_sample_points(rois[:, 1:], 5, 1).unbind(-1)
        assert (found - torch.stack([x, y, x - 2 * y], 1)).abs().max() < 1e-9


def test_quarter_turns():
    "Turning the box is turning the image back; half a turn reverses rows and columns."
    maps = torch.randn(1, 3, 32, 32, generator=generator(0), dtype=torch.float64)
    box = torch.tensor([[0.0, 16.0, 16.0, 24.0, 10.0, 0.0]], dtype=torch.float64)
    read = rotated_roi_align(maps, box)
    turned = box.clone()
    for k in (1, 2, 3):
        turned[:, 5] = k * math.pi / 2
        assert (rotated_roi_align(maps, turned) - rotated_roi_align(maps.rot90(k, (2, 3)), box)).abs().max() < 1e-9
    turned[:, 5] = math.pi
    assert (rotated_roi_align(maps, turned) - read.flip(2, 3)).abs().max() < 1e-9


def test_gradient_reaches_the_maps():
    g = generator(0)
    maps = torch.randn(3, 2, 6, 5, generator=g, dtype=torch.float64, requires_grad=True)
    rois = regions(5, g, 20.0, 20.0).double()
    assert torch.autograd.gradcheck(lambda o: rotated_roi_align(o, rois, 3, 1 / 4), maps)
    rois[:, 5] = 0
    ours = rotated_roi_align(maps, rois, 3, 1 / 4)
    theirs = roi_align(maps, upright(rois), 3, 1 / 4, 2, True)
    gradients = [torch.autograd.grad(o.square().sum(), maps)[0] for o in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-9)
    assert gradients[0].abs().max() > 0


def test_no_region_has_a_gradient_too():
    maps = torch.randn(2, 3, 8, 8, requires_grad=True)
    out = rotated_roi_align(maps, torch.zeros(0, 6))
    out.sum().backward()
    assert out.shape == (0, 3, 7, 7)
    assert maps.grad.abs().max() == 0


def test_memory_formats_and_types():
    g = generator(3)
    maps = torch.randn(3, 8, 20, 20, generator=g)
    rois = regions(20, g)
    plain = rotated_roi_align(maps, rois, scale=1 / 4)
    last = maps.contiguous(memory_format=torch.channels_last)
    assert torch.equal(rotated_roi_align(last, rois, scale=1 / 4), plain)
    for dtype in (torch.bfloat16, torch.float16):  # read in float32, rounded once
        found = rotated_roi_align(maps.to(dtype), rois, scale=1 / 4)
        expected = rotated_roi_align(maps.to(dtype).float(), rois, scale=1 / 4).to(dtype)
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_regions_that_are_not_finite_see_zeros():
    maps = torch.ones(1, 2, 6, 6, requires_grad=True)
    rois = torch.tensor(
        [[0.0, math.nan, 3.0, 2.0, 2.0, 0.0], [0.0, 3.0, 3.0, math.inf, 2.0, 0.0], [0.0, 900.0, 3.0, 2.0, 2.0, 0.4]]
    )
    out = rotated_roi_align(maps, rois)
    out.sum().backward()
    assert out.abs().max() == 0
    assert maps.grad.abs().max() == 0


# Coding


def test_midpoint_offsets_come_back():
    "Random boxes and random anchors."
    b = le90_boxes(2000)
    anchors = le90_boxes(2000, 1)[:, :4]
    back = decode_midpoints(anchors, encode_midpoints(anchors, b))
    assert is_le90(back)
    assert paired_iou(back.double(), b.double()).min() > 0.999


@pytest.mark.parametrize("w,h", [(20.0, 10.0), (10.0, 10.0), (500.0, 2.0), (2.0, 1.0)])
def test_midpoint_offsets_come_back_at_every_limit_of_le90(w, h):
    angles = torch.tensor([-math.pi / 2, -1.5707, -1e-3, -1e-4, -1e-6, 0.0, 1e-6, 1e-4, 1e-3, 0.7, 1.5707])
    b = torch.cat([torch.tensor([50.0, 60.0, w, h]).expand(len(angles), 4), angles[:, None]], 1)
    anchors = le90_boxes(2000, 1)[: len(angles), :4]
    back = decode_midpoints(anchors, encode_midpoints(anchors, b))
    assert is_le90(back)
    assert paired_iou(back.double(), b.double()).min() > 0.95  # 500 x 2 px: a thousandth of a pixel counts


def test_midpoint_offsets_are_those_of_the_polygon():
    "The topmost corner is right of the middle by the fifth number, the rightmost below it by the sixth."
    b = le90_boxes(300)
    anchor = torch.tensor([[100.0, 100.0, 32.0, 32.0]]).expand(300, 4)
    d = encode_midpoints(anchor, b) * torch.tensor(module.MIDPOINT_SCALES)
    p = to_polygon(b)
    bounds = upright_bounds(b)
    size = bounds[:, 2:] - bounds[:, :2]
    top, right = p[torch.arange(300), p[..., 1].argmin(1)], p[torch.arange(300), p[..., 0].argmax(1)]
    assert torch.allclose(d[:, 4], (top[:, 0] - b[:, 0]) / size[:, 0], atol=1e-4)
    assert torch.allclose(d[:, 5], (right[:, 1] - b[:, 1]) / size[:, 1], atol=1e-4)
    assert torch.allclose(d[:, :2] * 32 + 100, b[:, :2], atol=1e-3)
    assert torch.allclose(d[:, 2:4].exp() * 32, size, rtol=1e-4)
    assert d[:, 4:].abs().max() <= 0.5 + 1e-5


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 1e4])
def test_any_offsets_are_a_box(scale):
    g = generator(0)
    anchors = torch.tensor([[0.0, 0.0, 32.0, 32.0], [9.0, 9.0, 45.0, 23.0]]).repeat(500, 1)
    assert is_le90(decode_midpoints(anchors, torch.randn(1000, 6, generator=g) * scale))
    assert is_le90(decode_boxes(le90_boxes(1000), torch.randn(1000, 5, generator=g) * scale))


def test_corners_stay_on_the_sides_of_their_bounds():
    "A corner that is moved by more than half a side stops at the end of the side."
    anchor = torch.tensor([[7.0, 8.0, 10.0, 12.0]])
    far, end = (torch.tensor([[0.1, 0.2, 0.3, -0.3, shift, -shift]]) for shift in (5.0, 1.0))
    assert torch.equal(decode_midpoints(anchor, far), decode_midpoints(anchor, end))


def test_parallelogram_becomes_the_rectangle_of_its_longer_diagonal():
    """Bounds 40 x 30, corners 5 right of the top's middle and 3 below the right one's:
    half diagonals (5, -15) and (20, 3), of lengths 15.8 and 20.2."""
    d = torch.tensor([[0.0, 0.0, math.log(4), math.log(3), 5 / 40, 3 / 30]]) / torch.tensor(module.MIDPOINT_SCALES)
    found = decode_midpoints(torch.tensor([[7.0, 8.0, 10.0, 10.0]]), d)
    top, right = np.array([5.0, -15]), np.array([20.0, 3])
    top *= np.linalg.norm(right) / np.linalg.norm(top)
    expected = from_polygon(torch.tensor(np.stack([top, right, -top, -right]) + [7, 8])[None]).float()
    assert torch.allclose(found, expected, atol=1e-4)


def test_corrections_come_back():
    rois, b = le90_boxes(2000, 2), le90_boxes(2000, 3)
    d = encode_boxes(rois, b)
    back = decode_boxes(rois, d)
    assert is_le90(back)
    assert paired_iou(back.double(), b.double()).min() > 0.999
    assert (d[:, 4] * 0.1).abs().max() <= math.pi / 4 + 1e-5
    assert torch.allclose(encode_boxes(b, b), torch.zeros_like(b), atol=1e-5)


def test_swapped_sides_need_no_correction():
    "Sides swapped and turned by 90°: the same box."
    a = to_convention(torch.tensor([[0.0, 0.0, 20.0, 20.001, 0.0]]))
    near = torch.tensor([[0.0, 0.0, 20.001, 20.0, 0.0]])
    assert encode_boxes(a, near).abs().max() < 0.01


def test_angles_are_wrapped():
    found = wrap_angle(torch.tensor([-math.pi / 2, math.pi / 2, 3.2, -1.58])).tolist()
    assert found == pytest.approx([-math.pi / 2, -math.pi / 2, 3.2 - math.pi, -1.58 + math.pi], abs=1e-6)


def test_scales_are_filled_in_and_not_copied():
    row = module._constants(module.CORRECTION_SCALES, torch.zeros(1))
    assert torch.equal(row, torch.tensor(module.CORRECTION_SCALES))


# Assigning and sampling anchors


def assigned_slowly(overlaps, high, low, closest):
    "The assigner, one anchor after the other."
    kind, which = [], []
    best = overlaps.amax(0).tolist()
    for row in overlaps.tolist():
        most = max(row)
        kind.append(1 if most >= high else 0 if most < low else -1)
        which.append(row.index(most))
        near = [(v, j) for j, v in enumerate(row) if 0 < best[j] <= v + module.CLOSEST_TOLERANCE]
        if closest and near:
            kind[-1], which[-1] = 1, max(near)[1]
    return kind, which


@pytest.mark.parametrize("closest", [False, True])
def test_assigner_is_the_slow_one(closest):
    for seed in range(20):
        overlaps = torch.rand(60, 4, generator=generator(seed)) ** 2
        overlaps[:, 3] *= 0.2
        kind, which = (o.tolist() for o in assign_targets(overlaps, 0.7, 0.3, closest))
        slow_kind, slow_which = assigned_slowly(overlaps, 0.7, 0.3, closest)
        positive = [i for i, k in enumerate(kind) if k == 1]
        assert kind == slow_kind
        assert [which[i] for i in positive] == [slow_which[i] for i in positive]


def test_small_objects_find_an_anchor():
    "A car of 12 x 5 px: its IoU with every anchor of 32 px is below .3, and still it has positives."
    anchors = make_anchors([(8, 8)], [4], 8.0)[0]
    centre, half = anchors[:, :2], anchors[:, 2:] / 2
    bounds = upright_bounds(torch.tensor([[15.0, 17.0, 12.0, 5.0, 0.3]]))
    overlaps = box_iou(torch.cat([centre - half, centre + half], 1), bounds)
    assert 0 < overlaps.max() < 0.3
    kind, which = assign_targets(overlaps, 0.7, 0.3, True)
    assert set(kind.tolist()) == {0, 1}
    assert not which[kind == 1].any()


SAMPLES = [  # anchors, positives, ignored, size of the sample, share of positives
    (1000, 300, 100, 256, 0.5),
    (1000, 3, 0, 256, 0.5),
    (50, 10, 5, 512, 0.25),
    (40, 40, 0, 16, 0.25),
    (30, 0, 30, 8, 0.5),
    (1, 0, 0, 256, 0.5),
]


@pytest.mark.parametrize("n,positives,ignored,count,share", SAMPLES)
def test_a_sample_has_what_there_is(n, positives, ignored, count, share):
    background = n - positives - ignored
    kind = torch.tensor([1] * positives + [-1] * ignored + [0] * background, dtype=torch.int8)
    seen = set()
    for seed in range(5):
        torch.manual_seed(seed)
        i, positive, counted = sample_anchors(kind, count, share)
        assert len(i) == min(count, n)
        i, positive = i[counted], positive[counted]
        p = min(positives, int(count * share))
        assert (positive.sum(), (~positive).sum()) == (p, min(background, count - p))
        assert len(set(i.tolist())) == len(i)
        assert (kind[i] == positive.to(torch.int8)).all()
        seen |= set(i.tolist())
    assert len(seen) > len(i) or len(i) in (0, n - ignored)


# Devices


def test_tensors_are_made_where_the_input_is():
    "With another default device, whatever is made without saying where does not fit its input."
    g = generator(0)
    a, rois, maps = random_boxes(30, g), regions(9, g), torch.randn(3, 2, 9, 9, generator=g)

    def everything():
        yield rotated_iou(a, a)
        yield rotated_nms(a, a[:, 0], 0.1)
        yield rotated_roi_align(maps, rois)
        yield from_polygon(to_polygon(a))
        yield to_convention(a, "oc")
        yield upright_bounds(a)

    expected = list(everything())
    with torch.device("meta"):
        found = list(everything())
        assert rotated_nms(a[:0], a[:0, 0], 0.1).device.type == "cpu"
    assert all(torch.equal(x, y) for x, y in zip(found, expected))
