"Views, against slow formulas that compute one pixel, image or colour at a time."

import math
from colorsys import hsv_to_rgb, rgb_to_hsv

import numpy as np
import pytest
import torch

from cmid.method.images import blur, constants, crop, crop_matrices, jitter, random_boxes, resample, shift_hue
from cmid.method.masking import fill_mean
from cmid.method.views import Colours, TwoViews, draw_colours, stack_views, strong


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def keys(d):
    "Keys' cubic of one distance, a = -1/2."
    d = abs(d)
    if d <= 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


def axis_weights(start, length, source, out, flipped):
    "Weights (out, source) of one axis, tap by tap."
    weights = np.zeros((out, source))
    for i in range(out):
        at = start + (i + 0.5) * length / out - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            inside = min(max(tap, start), start + length - 1)
            weights[out - 1 - i if flipped else i, inside] += keys(at - tap)
    return weights


def slow_crop(image, box, flipped, size):
    top, left, height, width = (int(o) for o in box)
    rows = axis_weights(top, height, image.shape[1], size[0], False)
    columns = axis_weights(left, width, image.shape[2], size[1], flipped)
    return rows @ image.double().numpy() @ columns.T


@pytest.mark.parametrize(
    "shape, out",
    [
        pytest.param((3, 3, 32, 32), (32, 32), id="square"),
        pytest.param((2, 4, 24, 40), (24, 40), id="not square"),
        pytest.param((1, 1, 20, 20), (12, 30), id="one image, another size"),
        pytest.param((2, 13, 17, 31), (16, 16), id="13 bands, odd"),
    ],
)
def test_crops_are_those_of_the_formula(shape, out):
    x = torch.rand(shape, generator=generator())
    boxes = random_boxes(shape[0], shape[2:], (0.02, 1.0), generator=generator(1))
    boxes[0] = torch.tensor([shape[2] - 3.0, 1.0, 3.0, 1.0])  # at a border, a single pixel wide
    flipped = torch.arange(shape[0]) % 2 == 0
    found = crop(x, boxes, flipped, out)
    wanted = np.stack([slow_crop(*each, out) for each in zip(x, boxes, flipped)])
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_whole_images_stay_as_they_are_bit_by_bit():
    x = torch.rand(2, 3, 224, 224, generator=generator())
    whole = torch.tensor([0.0, 0.0, 224.0, 224.0]).expand(2, 4)
    assert torch.equal(crop(x, whole, torch.tensor([False, True])), torch.stack([x[0], x[1].flip(2)]))


def slow_blur(image, sigma, radius):
    "Both axes, pixel by pixel, the border mirrored without its pixel."
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    padded = np.pad(image, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    out = np.zeros(image.shape)
    for dy, down in enumerate(kernel / kernel.sum()):
        for dx, right in enumerate(kernel / kernel.sum()):
            out += down * right * padded[:, dy : dy + image.shape[1], dx : dx + image.shape[2]]
    return out


@pytest.mark.parametrize("shape", [(3, 3, 20, 20), (1, 1, 9, 31), (2, 13, 33, 8)])
def test_blur_is_that_of_the_formula(shape):
    x = torch.rand(shape, generator=generator())
    sigma, radius = torch.tensor([0.1, 0.9, 2.0])[: shape[0]], torch.tensor([3.5, 1.0, 2.9])[: shape[0]]
    found = blur(x, sigma, radius)
    for image, s, r, ours in zip(x.double().numpy(), sigma.tolist(), radius.tolist(), found):
        np.testing.assert_allclose(ours, slow_blur(image, s, int(r)), atol=2e-6)


def slow_jitter(image, factors, order):
    "The four parts, one image in float64."
    brightness, contrast, saturation, hue = (o.item() for o in factors)
    x, rgb = image.double().numpy(), len(image) == 3
    luma = np.array([0.299, 0.587, 0.114]) if rgb else np.full(len(image), 1 / len(image))
    for part in order:
        if part == 0:
            x = np.clip(x * brightness, 0, 1)
        elif part == 1:
            x = np.clip(contrast * x + (1 - contrast) * (luma @ x.mean((1, 2))), 0, 1)
        elif part == 2 and rgb:
            x = np.clip(saturation * x + (1 - saturation) * np.tensordot(luma, x, 1), 0, 1)
        elif rgb:
            x = np.apply_along_axis(turned, 0, x, hue)
    return x


def turned(colour, share):
    hue, saturation, value = rgb_to_hsv(*colour)
    return hsv_to_rgb((hue + share) % 1, saturation, value)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
@pytest.mark.parametrize("shape", [(3, 3, 7, 12), (1, 3, 5, 5), (2, 4, 6, 8), (2, 1, 6, 8)])
def test_jitter_is_that_of_the_formula(shape, order):
    x = torch.rand(shape, generator=generator())
    x[0, :, :2] = x[0, :1, :2]  # grey: no hue
    factors = torch.tensor([[0.6, 1.4, 1.0], [1.4, 0.7, 1.0], [0.8, 1.2, 1.0], [-0.1, 0.5, 0.0]])[:, : shape[0]]
    before = x.clone()
    found = jitter(x, *factors, order)
    for image, ours, amounts in zip(x, found, factors.T):
        np.testing.assert_allclose(ours, slow_jitter(image, amounts, order), atol=1e-5)
    assert torch.equal(x, before)  # the caller's images are not changed


def test_every_turn_of_every_hue():
    "Corners of the colour cube and their neighbours, turned by any share."
    levels = torch.tensor([0.0, 1e-3, 0.5, 1 - 1e-3, 1.0])
    colours = torch.cartesian_prod(levels, levels, levels)
    for share in (-0.5, -0.1, 0.0, 1 / 6, 0.5):
        found = shift_hue(colours[..., None, None], torch.full((len(colours),), share))
        wanted = [turned(colour.tolist(), share) for colour in colours.double()]
        np.testing.assert_allclose(found.flatten(1), wanted, atol=3e-5)


def unchanged(batch, shape):
    "Colours that leave images as they are."
    zeros, ones = torch.zeros(batch), torch.ones(batch)
    noise = torch.randn(batch, *shape, generator=generator())
    return Colours(
        torch.stack([ones, ones, ones, zeros]), (0, 1, 2, 3), 1e-3 * ones, ones, noise, zeros, 2 * ones, zeros
    )


def test_what_comes_after_jitter():
    "Noise, then solarise, then greyscale, each on the images that it was drawn for."
    x = torch.rand(4, 3, 8, 10, generator=generator(1))
    keep = unchanged(4, x.shape[1:])
    torch.testing.assert_close(strong(x, keep), x, rtol=0, atol=1e-7)

    chosen = torch.tensor([0.0, 1, 0, 1])
    noisy = (x + 0.02 * chosen.view(-1, 1, 1, 1) * keep.noise).clamp(0, 1)
    found = strong(x, keep._replace(deviation=0.02 * chosen))
    torch.testing.assert_close(found, noisy, rtol=0, atol=1e-6)
    found = strong(x, keep._replace(mirror=2 - chosen))
    solarised = torch.where((x >= 0.5) & (chosen.view(-1, 1, 1, 1) == 1), 1 - x, x)
    torch.testing.assert_close(found, solarised, rtol=0, atol=1e-6)
    found = strong(x, keep._replace(greyed=chosen))
    luma = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(found[[1, 3]], luma[[1, 3]].expand(-1, 3, -1, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[[0, 2]], x[[0, 2]], rtol=0, atol=1e-7)


def test_how_often_and_how_much_colours_change():
    "Shares within five standard deviations; amounts over the whole of their range and never beyond it."
    n = 20000
    colours = draw_colours((n, 3, 1, 1), generator())
    changed = (colours.factors != torch.tensor([1.0, 1, 1, 0])[:, None]).all(0)
    chosen = dict(jitter=changed, noise=colours.deviation > 0, solarise=colours.mirror == 1, grey=colours.greyed == 1)
    for (name, found), share in zip(chosen.items(), (0.8, 0.6, 0.2, 0.2)):
        assert abs(found.float().mean().item() - share) < 5 * (share * (1 - share) / n) ** 0.5, name
    assert set(colours.mirror.unique().tolist()) == {1.0, 2.0}
    assert set(colours.greyed.unique().tolist()) == {0.0, 1.0}
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.012, 0.028), (0.1, 2.0), (1.0, 4.0)]
    values = [*colours.factors[:, changed], colours.deviation[colours.deviation > 0], colours.sigma, colours.radius]
    for found, (low, high) in zip(values, ranges):
        edge = (high - low) / 100
        assert low <= found.min() < low + edge
        assert high - edge < found.max() <= high
        assert abs(found.mean().item() - (low + high) / 2) < edge
    independent = torch.corrcoef(torch.stack([o.float() for o in chosen.values()]))
    assert (independent - torch.eye(4)).abs().max() < 5 / n**0.5


def test_every_order_of_jitter_is_drawn():
    orders = {draw_colours((1, 3, 1, 1), generator(seed)).order for seed in range(400)}
    assert len(orders) == 24


@pytest.mark.parametrize("size, scale, aspect", [((64, 64), (0.3, 1), (3 / 4, 4 / 3)), ((40, 96), (0.05, 1), (0.5, 3))])
def test_boxes_are_the_first_that_fit(size, scale, aspect):
    "One image at a time, from the same random numbers."
    found = random_boxes(200, size, scale, aspect, generator(3))
    candidates = torch.rand(200, 10, 4, generator=generator(3)).double().numpy()
    for box, tries in zip(found.tolist(), candidates):
        wanted = first_that_fits(tries, size, scale, aspect)
        if wanted is not None:
            assert box == wanted
    assert ((found[:, :2] >= 0) & (found[:, :2] + found[:, 2:] <= torch.tensor(size))).all()


def first_that_fits(tries, size, scale, aspect):
    for area, ratio, y, x in tries:
        pixels = size[0] * size[1] * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = math.exp(math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * ratio)
        h, w = round((pixels / ratio) ** 0.5), round((pixels * ratio) ** 0.5)
        if h <= size[0] and w <= size[1]:
            return [math.floor(y * (size[0] - h + 1)), math.floor(x * (size[1] - w + 1)), h, w]
    return None


SHAPES = [(4, 3, 64, 64), (1, 1, 32, 96), (2, 13, 96, 64), (3, 2, 64, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_views_are_made_of_what_was_drawn(shape):
    "View A by the slow formula; both in memory as one batch of channels-last images; the same draws, the same views."
    bands, stride = shape[1], 16
    make = TwoViews(torch.linspace(0.3, 0.6, bands), torch.linspace(0.1, 0.3, bands), stride)
    images = pixels(*shape)
    draws = make.draw(shape, generator(5))
    views = make.render(images, draws)
    crops = [slow_crop(*each, shape[2:]) for each in zip(images / 255, draws.boxes[0], draws.flipped[0])]
    weak = (torch.from_numpy(np.stack(crops)).clamp(0, 1) - make.mean) / make.std
    torch.testing.assert_close(views.images[0].double(), weak, rtol=0, atol=1e-3)

    assert views.images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert views.images.flatten(0, 1).data_ptr() == views.images.data_ptr()
    assert views.masks.shape == (2, shape[0], shape[2] // 32, shape[3] // 32)
    for first, second in zip(views, make.render(images, draws)):
        assert torch.equal(first, second)
    for first, second in zip(views, make(images, generator(5))):
        assert torch.equal(first, second)
    for first, second in zip(views, stack_views(*views.pair())):
        assert torch.equal(first, second)


@pytest.mark.parametrize("stride", [16, 32])
def test_crops_of_a_ramp_hold_the_coordinates_of_their_cells(stride):
    "Each pixel of the two bands holds its row and column: the mean of a cell of the crop is the cell's centre."
    side, batch = 128, 12
    middles = torch.arange(float(side))
    ramp = torch.stack(torch.meshgrid(middles, middles, indexing="ij")).byte().expand(batch, 2, side, side)
    make = TwoViews([0.0, 0.0], [1.0, 1.0], stride)
    draws = make.draw(ramp.shape, generator(2))
    views = make.render(ramp, draws)
    crops = make.crop(ramp, draws)
    cells = torch.nn.functional.avg_pool2d(crops.flatten(0, 1) * 255 + 0.5, stride).flatten(2).mT
    inner = torch.ones(side // stride, side // stride, dtype=torch.bool)
    if stride == 16:  # at the border the crop repeats its last pixel
        inner[[0, -1]] = inner[:, [0, -1]] = False
    error = (cells.unflatten(0, (2, batch)) - views.centres).abs()[:, :, inner.flatten()]
    assert error.max() < (0.01 if stride == 16 else 0.15)
    assert draws.flipped.any() and not draws.flipped.all()


def test_published_centres_have_the_start_of_the_crop_as_fractions():
    make = TwoViews([0.5] * 3, [0.2] * 3, fidelity="published")
    draws = make.draw((2, 3, 64, 96), generator())
    centres = make.render(pixels(2, 3, 64, 96), draws).centres
    for view in range(2):
        for image in range(2):
            top, left, h, w = draws.boxes[view, image].tolist()
            columns = [left / 96 + (j + 0.5) / 3 * w for j in range(3)]
            if draws.flipped[view, image]:
                columns.reverse()
            wanted = [(top / 64 + (i + 0.5) / 2 * h, x) for i in range(2) for x in columns]
            torch.testing.assert_close(centres[view, image], torch.tensor(wanted))


@pytest.mark.parametrize("side", [64, 224])
@pytest.mark.parametrize("kind", ["noise", "black or white", "white"])
def test_crops_in_half_precision_stay_within_half_a_level(side, kind):
    "Products of float16 against float64, for boxes of any size: below half of one of the source's 255 levels."
    batch = 12
    images = pixels(batch, 3, side, side)
    if kind == "black or white":
        images = (images > 127).byte() * 255
    elif kind == "white":
        images.fill_(255)
    boxes = random_boxes(batch, (side, side), (0.001, 1.0), (0.1, 10.0), generator(1))
    matrices = crop_matrices(boxes, torch.arange(batch) % 2 == 0, (side, side), (side, side))
    rows, columns = matrices[0] / 255, matrices[1]
    half = resample(images, rows.half(), columns.half()).clamp_(0, 1)
    exact = resample(images, rows.double(), columns.double()).clamp_(0, 1)
    assert half.dtype == torch.float16
    assert (half - exact).abs().max() < 0.5 / 255
    coarse = resample(images, rows.bfloat16(), columns.bfloat16()).clamp_(0, 1)
    assert (coarse - exact).abs().max() > 0.5 / 255  # bfloat16 would not do


def test_half_precision_is_for_cuda():
    "On a CPU the crops are those of float32, whatever is asked for CUDA."
    images, draws = pixels(2, 3, 64, 64), None
    for products in (torch.float16, torch.float32):
        make = TwoViews([0.5] * 3, [0.2] * 3, products=products)
        draws = draws or make.draw(images.shape, generator())
        assert torch.equal(make.crop(images, draws), TwoViews([0] * 3, [1] * 3).crop(images, draws))


def test_masks_of_both_views_at_once():
    x, masks = torch.rand(2, 3, 4, 64, 96), torch.rand(2, 3, 2, 3) < 0.5
    filled = fill_mean(x, masks)
    for view in range(2):
        assert torch.equal(filled[view], fill_mean(x[view], masks[view]))


def test_constants_are_made_once_for_each_device():
    assert constants((1.0, 2.0), torch.device("cpu")) is constants((1.0, 2.0), torch.device("cpu"))
    assert constants((1.0, 2.0), torch.device("meta")).device.type == "meta"
