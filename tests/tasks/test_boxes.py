"Turned boxes: overlaps are those of an independent geometry library, suppression is the greedy one, RoIAlign is torchvision's where that has one."

import math

import numpy as np
import pytest
import shapely
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from cmid.tasks import boxes as module
from cmid.tasks.boxes import (
    upright_bounds,
    to_convention,
    from_polygon,
    paired_iou,
    rotated_iou,
    rotated_nms,
    rotated_roi_align,
    roi_sample_points,
    to_polygon,
)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def boxes_of(n, g, side=60.0, low=5.0, high=50.0):
    "Centres within `side`, sides between low and high (evenly in their logarithm), any angle up to a turn either way."
    return torch.cat(
        [
            torch.rand(n, 2, generator=g) * side,
            low * (high / low) ** torch.rand(n, 2, generator=g),
            (torch.rand(n, 1, generator=g) - 0.5) * 4 * math.pi,
        ],
        1,
    )


def shapes(boxes):
    return shapely.polygons(to_polygon(boxes.double()).numpy())


def reference(a, b):
    "IoU of pairs by shapely; 0 where neither has an area"
    a, b = shapes(a), shapes(b)
    both = shapely.area(shapely.intersection(a, b))
    either = shapely.area(a) + shapely.area(b) - both
    return np.where(either > 0, both / np.where(either > 0, either, 1), 0)


def moved(boxes, g, shift=0.0, grow=0.0, turn=0.0):
    "Boxes near the given ones: shifted by a share of their shorter side, and so on"
    r = lambda *o: torch.rand(*o, generator=g) - 0.5
    n = len(boxes)
    out = boxes.clone()
    out[:, :2] += shift * r(n, 2) * boxes[:, 2:4].amin(1, keepdim=True)
    out[:, 2:4] *= 1 + grow * r(n, 2)
    out[:, 4] += turn * r(n)
    return out


# Pairs ------------------------------------------------------------------------------------------------------------
N = 11000


def pairs(kind):
    g = rng(len(kind))
    far = boxes_of(N, g, 5000.0, 0.5, 3000.0)
    if kind == "random":
        return boxes_of(N, g), boxes_of(N, g)
    if kind == "tiny, at 5,000 px":
        a = boxes_of(N, g, 5000.0, 2.0, 4.0)
        return a, moved(a, g, 1.5, 0.6, 1.0)
    if kind == "huge aspect":
        return far, moved(far, g, 1.0, 0.0, 0.01)
    if kind == "identical":
        return far, far.clone()
    if kind == "identical, in other words":
        return far, torch.cat([far[:, :2], far[:, [3, 2]], far[:, 4:] + math.pi / 2], 1)
    if kind == "nested":
        b = far.clone()
        b[:, 2:4] *= torch.rand(N, 1, generator=g)
        return far, b
    if kind == "touching":
        b = far.clone()
        b[:, 0] += far[:, 2] * far[:, 4].cos()
        b[:, 1] += far[:, 2] * far[:, 4].sin()
        return far, b
    if kind == "whole numbers":
        return [
            torch.randint(0, 8, (N, 5), generator=g).float() * torch.tensor([1.0, 1.0, 1.0, 1.0, math.pi / 4])
            for _ in "ab"
        ]  # shared edges, corners on edges, no width
    if kind == "huge":
        return boxes_of(N, g, 2e4, 1e3, 2e4), boxes_of(N, g, 2e4, 1.0, 2e4)
    if kind == "no width":
        return [boxes_of(N, g, 20.0) * torch.tensor(o) for o in ([1.0, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0, 1.0])]
    if kind == "far apart":
        b = boxes_of(N, g)
        b[:, 0] += 1e6
        return boxes_of(N, g), b


KINDS = (
    "random",
    "tiny, at 5,000 px",
    "huge aspect",
    "identical",
    "identical, in other words",
    "nested",
    "touching",
    "whole numbers",
    "huge",
    "no width",
    "far apart",
)


@pytest.mark.parametrize("kind", KINDS)
def test_overlaps_are_those_of_shapely(kind):
    "121,000 pairs in float32: the worst error is below 1e-5 (asked: 1e-4)."
    a, b = pairs(kind)
    found, expected = paired_iou(a, b).numpy(), reference(a, b)
    error = np.abs(found - expected)
    assert error.max() < 1e-5, (
        f"{kind}: {error.max():.1e} at {a[error.argmax()].tolist()} and {b[error.argmax()].tolist()}"
    )
    some = dict(zip(KINDS, (0.2, 0.99, 0.99, 1.0, 1.0, 0.99, None, 0.2, 0.05, 0, 0)))[
        kind
    ]  # the pairs are what they are called
    if some is not None:
        assert (expected > 0).mean() >= some and (some or expected.max() == 0)
    assert (found >= 0).all() and (found <= 1).all()
    if kind in ("identical", "identical, in other words"):
        assert found.min() > (0.9999 if kind == "identical" else 0.99)
    if kind == "touching":
        assert found.max() < 1e-3  # their corners are float32, too


def test_all_pairs_are_the_pairs(monkeypatch):
    a, b = boxes_of(300, rng(0), 200.0), boxes_of(170, rng(1), 200.0)
    whole = rotated_iou(a, b)
    for i in range(0, 300, 37):
        assert torch.allclose(whole[i], paired_iou(a[i].expand(170, 5), b), atol=1e-7)
    for k in (50, 1000, 10**9):
        monkeypatch.setitem(module.PAIRS_PER_BLOCK, "cpu", k)
        assert torch.allclose(rotated_iou(a, b), whole, atol=1e-7)
    assert 0.02 < (whole > 0).float().mean() < 0.5
    for n, m in ((0, 5), (5, 0), (0, 0)):
        assert rotated_iou(a[:n], b[:m]).shape == (n, m)
    assert paired_iou(a[:0], b[:0]).shape == (0,) and rotated_iou(a.double(), b.double()).dtype == torch.float64


def test_only_near_pairs_are_clipped(monkeypatch):
    "2,000 by 2,000 spread over a large image are cheap: of four million pairs, few are looked at."
    seen = []
    clip = module._iou
    monkeypatch.setattr(module, "_iou", lambda a, b: (seen.append(a.shape[1]), clip(a, b))[1])
    b = boxes_of(2000, rng(0), 4000.0, 10.0, 60.0)
    rotated_iou(b, b)
    assert 2000 <= sum(seen) < 20000


def test_numbers_that_are_none():
    good = torch.tensor([[0.0, 0.0, 4.0, 2.0, 0.3]])
    bad = good.repeat(7, 1)
    bad[range(5), range(5)] = torch.tensor([math.nan, math.inf, -math.inf, math.nan, math.inf])
    bad[5, 2] = -4.0
    bad[6, 2:4] = -1.0
    assert (
        rotated_iou(bad, good).abs().max() == 0
        and rotated_iou(good, bad).abs().max() == 0
        and paired_iou(bad, good.expand(7, 5)).abs().max() == 0
    )


def test_gradients_of_overlaps():
    g = rng(5)
    a = boxes_of(12, g, 8.0, 4.0, 12.0).double()
    b = moved(a, g, 0.8, 0.5, 1.0)
    assert torch.autograd.gradcheck(paired_iou, (a.requires_grad_(), b.requires_grad_()))
    assert torch.autograd.gradcheck(rotated_iou, (a[:4].detach().requires_grad_(), b[:3].detach().requires_grad_()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_at_kinks_too(kind):
    a, b = (o[:500].clone().requires_grad_() for o in pairs(kind))
    paired_iou(a, b).sum().backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()
    if kind == "identical":
        assert (a.grad[:, :2].abs().amax(1) < 1e3).all()


def test_gradient_does_not_depend_on_what_is_exactly_parallel():
    "Of two upright boxes, as of two that are turned alike: the flat edges' branch gives the general one's gradient."
    base = torch.tensor([[0.0, 0.0, 6.0, 4.0, 0.0], [1.0, 1.0, 5.0, 3.0, 0.0]], dtype=torch.float64)
    got = []
    for turn in (0.0, 1e-5):
        a, b = (base[k : k + 1] + torch.tensor([0.0, 0.0, 0.0, 0.0, k * turn]) for k in (0, 1))
        a.requires_grad_()
        paired_iou(a, b).sum().backward()
        got.append(a.grad)
    assert torch.allclose(*got, atol=1e-4) and got[0][0, :4].abs().min() > 1e-3


# Conventions and corners ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("to", ["le90", "le135", "oc"])
def test_conventions_describe_the_same_rectangles(to):
    a = boxes_of(2000, rng(2)).double()
    b = to_convention(a, to)
    q = math.pi / 2
    assert paired_iou(a, b).min() > 1 - 1e-9
    low, high = dict(le90=(-q, q), le135=(-q / 2, 1.5 * q), oc=(0, q))[to]
    assert (b[:, 4] >= low - 1e-12).all() and (b[:, 4] <= high + 1e-12).all()
    assert to == "oc" or (b[:, 2] >= b[:, 3]).all()
    assert torch.equal(to_convention(b, to), b)  # once is enough
    for other in ("le90", "le135", "oc"):
        assert torch.allclose(to_convention(to_convention(a, other), to), b, atol=1e-9)


def test_unknown_convention():
    with pytest.raises(ValueError, match="no convention 'le180'"):
        to_convention(torch.zeros(1, 5), "le180")


def test_bounds_are_those_of_shapely():
    a = boxes_of(500, rng(3)).double()
    assert np.allclose(upright_bounds(a).numpy(), shapely.bounds(shapes(a)), atol=1e-9)


@pytest.mark.parametrize("k", [3, 4, 8])
def test_least_rectangles_are_those_of_shapely(k):
    "Of points anywhere: the area is shapely's, and all points are within."
    points = torch.rand(1500, k, 2, generator=rng(k), dtype=torch.float64) * 50 + 3000
    b = from_polygon(points)
    expected = shapely.area(shapely.minimum_rotated_rectangle(shapely.multipoints(points.numpy())))
    assert np.allclose((b[:, 2] * b[:, 3]).numpy(), expected, rtol=1e-6)
    grown = b.clone()
    grown[:, 2:4] += 1e-6
    assert shapely.covers(shapes(grown)[:, None], shapely.points(points.numpy())).all()
    assert (
        (b[:, 2] >= b[:, 3]).all() and (b[:, 4] >= -math.pi / 2 - 1e-12).all() and (b[:, 4] < math.pi / 2 + 1e-12).all()
    )


def test_corners_and_back():
    a = to_convention(boxes_of(3000, rng(4), 5000.0, 1.0, 500.0))
    assert paired_iou(from_polygon(to_polygon(a.double())), a.double()).min() > 1 - 1e-9
    assert paired_iou(from_polygon(to_polygon(a)), a).min() > 0.99  # corners in float32, 1 px at 5,000
    assert from_polygon(to_polygon(a)).dtype == torch.float32


# Suppression ------------------------------------------------------------------------------------------------------
def greedy(boxes, scores, iou, classes=None):
    "One after the other, with shapely"
    good = torch.isfinite(boxes).all(1) & torch.isfinite(scores)
    c = torch.zeros(len(boxes)) if classes is None else classes
    kept = []
    n = len(boxes)
    clean = torch.where(good[:, None], boxes, 0.0)
    table = reference(clean.repeat_interleave(n, 0), clean.repeat(n, 1)).reshape(n, n)
    for i in sorted((int(o) for o in good.nonzero()), key=lambda o: (-scores[o].item(), o)):
        if all(c[i] != c[k] or table[i, k] <= iou for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("at_once", [1, 7, 256])
def test_suppression_is_the_greedy_one(at_once, monkeypatch):
    monkeypatch.setitem(module.NMS_CHUNK, "cpu", at_once)
    for seed in range(30):
        g = rng(seed)
        n = int(torch.randint(1, 30, (1,), generator=g))
        truth = boxes_of(1 + seed % 5, g, 60.0, 10.0, 40.0)
        b = moved(truth[torch.randint(len(truth), (n,), generator=g)], g, 0.6, 0.5, 0.6)
        s = torch.rand(n, generator=g)
        c = torch.randint(3, (n,), generator=g) if seed % 2 else None
        if seed % 3 == 0:
            s = (s * 4).round() / 4  # ties
        if seed % 4 == 0:
            b[::3] = b[0].clone()  # duplicates
        if seed % 5 == 0:
            b[n // 2, 2] = math.nan
            s[n // 3] = math.inf
            s[-1] = math.nan
        for iou in (0.1, 0.5, 0.8):
            assert rotated_nms(b, s, iou, c).tolist() == greedy(b, s, iou, c), (seed, iou)


def test_a_chain_is_walked_to_its_end():
    "Each box suppresses the next: the worst case for rounds, here 600 long."
    n = 600
    b = torch.stack(
        [torch.arange(n) * 4.0, torch.zeros(n), torch.full((n,), 8.0), torch.full((n,), 4.0), torch.zeros(n)], 1
    )
    assert rotated_nms(b, -torch.arange(n).float(), 0.3).tolist() == list(range(0, n, 2))


def test_rounds_are_few(monkeypatch):
    "2,000 crowded boxes, settled at once as on a GPU: the device is asked a few times, not once a box."
    asked = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: (asked.append(1), equal(a, b))[1])
    monkeypatch.setitem(module.NMS_CHUNK, "cpu", 1024)
    g = rng(0)
    b = moved(boxes_of(200, g, 1024.0, 20.0, 60.0).repeat_interleave(10, 0), g, 0.5, 0.3, 0.5)
    kept = rotated_nms(b, torch.rand(2000, generator=g), 0.3)
    assert 150 < len(kept) < 1500 and len(asked) < 30


def test_suppression_of_nothing_and_of_all():
    none = torch.zeros(0, 5)
    assert (
        rotated_nms(none, none[:, 0], 0.5).tolist() == []
        and rotated_nms(none, none[:, 0], 0.5, none[:, 0].long()).dtype == torch.int64
    )
    assert rotated_nms(torch.full((3, 5), math.nan), torch.ones(3), 0.5).tolist() == []
    same = torch.tensor([[5.0, 5.0, 4.0, 2.0, 0.1]]).repeat(500, 1)
    assert rotated_nms(same, torch.ones(500), 0.5).tolist() == [0]
    assert rotated_nms(same, torch.ones(500), 1.0).tolist() == list(range(500))  # nothing overlaps by more than all


# RoIAlign ---------------------------------------------------------------------------------------------------------
def regions(n, g, side=100.0, high=80.0):
    return torch.cat([torch.randint(3, (n, 1), generator=g), boxes_of(n, g, side, 4.0, high)], 1)


@pytest.mark.parametrize("size,samples,scale", [(7, 2, 0.25), (3, 1, 0.5), (5, 3, 0.125)])
def test_upright_regions_are_torchvisions(size, samples, scale):
    "Also partly and wholly outside, and on maps of one row."
    g = rng(size)
    r = regions(200, g, 130.0).double()
    r[:, 5] = 0
    for shape in ((3, 4, 30, 22), (3, 2, 1, 9)):
        maps = torch.randn(shape, generator=g, dtype=torch.float64)
        expected = roi_align(maps, torch.cat([r[:, :1], upright_bounds(r[:, 1:])], 1), size, scale, samples, True)
        assert (rotated_roi_align(maps, r, size, scale, samples) - expected).abs().max() < 1e-9
    maps = torch.randn(3, 4, 30, 22, generator=g)
    assert (
        rotated_roi_align(maps, r.float(), size, scale, samples)
        - roi_align(maps, torch.cat([r[:, :1], upright_bounds(r[:, 1:])], 1).float(), size, scale, samples, True)
    ).abs().max() < 5e-5


def test_turned_regions_are_read_where_they_lie():
    "Against grid_sample, which knows nothing of boxes: inside, where borders do not matter."
    g = rng(1)
    maps = torch.randn(3, 4, 40, 48, generator=g, dtype=torch.float64)
    r = regions(100, g, 40.0, 30.0).double()
    r[:, 1:3] += 60
    points = roi_sample_points(r[:, 1:], 7, 2) / 4  # 160 by 192 px of image
    grid = points * 2 / torch.tensor([48.0, 40.0], dtype=torch.float64) - 1
    expected = torch.cat(
        [
            F.avg_pool2d(F.grid_sample(maps[int(k) : int(k) + 1], o[None], align_corners=False), 2)
            for k, o in zip(r[:, 0], grid)
        ]
    )
    assert (rotated_roi_align(maps, r, 7, 1 / 4) - expected).abs().max() < 1e-9


def test_a_ramp_is_read_exactly():
    "Bilinear reading keeps what is linear, so bins show their own centres; at any angle, scale and number of samples."
    for stride in (1, 4, 8):
        y, x = torch.meshgrid(*[(torch.arange(120 // stride, dtype=torch.float64) + 0.5) * stride] * 2, indexing="ij")
        maps = torch.stack([x, y, x - 2 * y])[None].repeat(3, 1, 1, 1)
        r = regions(200, rng(stride), 10.0, 50.0).double()
        r[:, 1:3] += 55
        got = rotated_roi_align(maps, r, 5, 1 / stride, 3)
        x, y = roi_sample_points(r[:, 1:], 5, 1).unbind(-1)
        assert (got - torch.stack([x, y, x - 2 * y], 1)).abs().max() < 1e-9


def test_quarter_turns():
    "Turning the box is turning the image back; half a turn reverses rows and columns."
    maps = torch.randn(1, 3, 32, 32, generator=rng(0), dtype=torch.float64)
    box = torch.tensor([[0.0, 16.0, 16.0, 24.0, 10.0, 0.0]], dtype=torch.float64)
    upright = rotated_roi_align(maps, box)
    for k in (1, 2, 3):
        turned = box.clone()
        turned[:, 5] = k * math.pi / 2
        assert (rotated_roi_align(maps, turned) - rotated_roi_align(maps.rot90(k, (2, 3)), box)).abs().max() < 1e-9
    assert (
        rotated_roi_align(maps, turned - torch.tensor([0, 0, 0, 0, 0, math.pi / 2], dtype=torch.float64))
        - upright.flip(2, 3)
    ).abs().max() < 1e-9


def test_gradient_reaches_the_maps():
    g = rng(0)
    maps = torch.randn(3, 2, 6, 5, generator=g, dtype=torch.float64, requires_grad=True)
    r = regions(5, g, 20.0, 20.0).double()
    assert torch.autograd.gradcheck(lambda o: rotated_roi_align(o, r, 3, 1 / 4), maps)
    up = r.clone()
    up[:, 5] = 0
    grads = []
    for o in (
        rotated_roi_align(maps, up, 3, 1 / 4),
        roi_align(maps, torch.cat([up[:, :1], upright_bounds(up[:, 1:])], 1), 3, 1 / 4, 2, True),
    ):
        grads.append(torch.autograd.grad(o.square().sum(), maps)[0])
    assert torch.allclose(*grads, atol=1e-9) and grads[0].abs().max() > 0


def test_no_region_has_a_gradient_too():
    maps = torch.randn(2, 3, 8, 8, requires_grad=True)
    out = rotated_roi_align(maps, torch.zeros(0, 6))
    out.sum().backward()
    assert out.shape == (0, 3, 7, 7) and maps.grad.abs().max() == 0


def test_memory_formats_and_types():
    g = rng(3)
    maps = torch.randn(3, 8, 20, 20, generator=g)
    r = regions(20, g)
    plain = rotated_roi_align(maps, r, scale=1 / 4)
    assert torch.equal(rotated_roi_align(maps.contiguous(memory_format=torch.channels_last), r, scale=1 / 4), plain)
    for dtype in (torch.bfloat16, torch.float16):  # read in float32, rounded once
        got = rotated_roi_align(maps.to(dtype), r, scale=1 / 4)
        assert got.dtype == dtype and torch.equal(
            got, rotated_roi_align(maps.to(dtype).float(), r, scale=1 / 4).to(dtype)
        )


def test_regions_that_are_none_see_zeros():
    maps = torch.ones(1, 2, 6, 6, requires_grad=True)
    r = torch.tensor(
        [[0.0, math.nan, 3.0, 2.0, 2.0, 0.0], [0.0, 3.0, 3.0, math.inf, 2.0, 0.0], [0.0, 900.0, 3.0, 2.0, 2.0, 0.4]]
    )
    out = rotated_roi_align(maps, r)
    out.sum().backward()
    assert out.abs().max() == 0 and maps.grad.abs().max() == 0


# Devices ----------------------------------------------------------------------------------------------------------
def test_tensors_are_made_where_the_input_is():
    "With another default device, whatever is made without saying where does not fit its input."
    g = rng(0)
    a, r, maps = boxes_of(30, g), regions(9, g), torch.randn(3, 2, 9, 9, generator=g)
    expected = (
        rotated_iou(a, a),
        rotated_nms(a, a[:, 0], 0.1),
        rotated_roi_align(maps, r),
        from_polygon(to_polygon(a)),
        to_convention(a, "oc"),
        upright_bounds(a),
    )
    with torch.device("meta"):
        got = (
            rotated_iou(a, a),
            rotated_nms(a, a[:, 0], 0.1),
            rotated_roi_align(maps, r),
            from_polygon(to_polygon(a)),
            to_convention(a, "oc"),
            upright_bounds(a),
        )
        assert rotated_nms(a[:0], a[:0, 0], 0.1).device.type == "cpu"
    assert all(torch.equal(x, y) for x, y in zip(got, expected))
