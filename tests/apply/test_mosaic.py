"Blending in strips: equal to the blending of scoring, whatever the geometry."

import numpy as np
import pytest
import torch

from cmid.apply.mosaic import BatchRunner, WindowGrid, blended_strips
from cmid.base.errors import CmidError
from cmid.tasks.dense import blended

CPU = torch.device("cpu")


def assembled(image, grid, predict, classes, invalid=None, done=0, batch=4):
    def read(top, left, height, width):
        assert 0 <= top <= top + height <= image.shape[-2] and 0 <= left <= left + width <= image.shape[-1]
        part = np.s_[..., top : top + height, left : left + width]
        return image[part], None if invalid is None else invalid[part]

    found = torch.full((classes, *image.shape[-2:]), torch.nan)
    for strip, logits, _ in blended_strips(read, grid, classes, BatchRunner(predict, CPU, batch), done):
        found[:, strip.top : strip.top + strip.height, strip.left : strip.left + strip.width] = logits
    return found


@pytest.mark.parametrize("seed", range(12))
def test_any_geometry(seed):
    "Random sizes, overlaps, panels and beginnings; each window as its sum over all pixels says where it lies."
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(1, 300, 2))
    side, overlap = 32 * int(rng.integers(1, 4)), float(rng.choice([0, 0.25, 0.5, 0.75]))
    image = rng.integers(0, 256, (2, height, width), dtype=np.uint8)

    def predict(x):
        x = x.float()
        return torch.stack([x[:, 0] + x.mean((1, 2, 3))[:, None, None], x[:, 1] * x[:, 0].roll(3, 1)], 1)

    due = blended(predict, image, side, overlap)
    budget = int(rng.integers(1, 400)) * side * 8
    grid = WindowGrid(height, width, side, int(overlap * side), 8, budget)
    done = int(rng.integers(0, len(grid)))
    assert torch.equal(assembled(image, grid, predict, 2), due)
    part = assembled(image, grid, predict, 2, done=done)
    known = ~part.isnan()
    assert torch.equal(part[known], due[known])
    strips = [grid.strip(i) for i in range(done, len(grid))]
    assert known[0].sum() == sum(strip.height * strip.width for strip in strips)


def test_a_real_network_whatever_the_batch():
    "Convolutions of other batch sizes differ in the last digits only."
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)]
    network = torch.nn.Sequential(*layers).eval().requires_grad_(False)
    image = np.random.default_rng(0).integers(0, 256, (3, 210, 330), dtype=np.uint8)
    due = blended(lambda x: network(x.float() / 255), image, 64, 0.25)
    for batch in (1, 3, 16):
        found = assembled(image, WindowGrid(210, 330, 64, 16), lambda x: network(x.float() / 255), 4, batch=batch)
        torch.testing.assert_close(found, due, rtol=0, atol=1e-5)


def test_every_window_is_computed_once():
    calls = []

    def predict(x):
        calls.append(len(x))
        return x.float()

    image = np.zeros((1, 500, 700), np.uint8)
    grid = WindowGrid(500, 700, 64, 16, 4)
    assembled(image, grid, predict, 1)
    assert sum(calls) == grid.windows == 11 * 15


def test_windows_without_a_value_are_not_computed():
    calls = []

    def predict(x):
        calls.append(len(x))
        return x.float()

    image, invalid = np.zeros((1, 500, 700), np.uint8), np.ones((500, 700), bool)
    found = assembled(image, WindowGrid(500, 700, 64, 16, 4), predict, 1, invalid)
    assert not calls and (found == 0).all()
    invalid[250, 350] = False
    assembled(image, WindowGrid(500, 700, 64, 16, 4), predict, 1, invalid)
    assert 1 <= sum(calls) <= 4


def test_memory_that_runs_short():
    "Twice as many windows as fit: halved, said, and nothing is lost or repeated."
    lines = []

    def predict(x):
        if len(x) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return x.float()

    image = np.random.default_rng(0).integers(0, 256, (1, 128, 400), dtype=np.uint8)
    runner = BatchRunner(predict, CPU, 8, lines.append)
    grid = WindowGrid(128, 400, 64, 16)
    strips = blended_strips(lambda t, a, h, w: (image[:, t : t + h, a : a + w], None), grid, 1, runner)
    found = torch.cat([logits.clone() for _, logits, _ in strips], 1)
    torch.testing.assert_close(found, torch.from_numpy(image).float(), rtol=0, atol=1e-3)
    assert runner.size == 2 and len(lines) == 2
    wrong = BatchRunner(lambda x: torch.zeros(1) @ torch.zeros(2), CPU)
    with pytest.raises(RuntimeError, match="size"):
        list(wrong([image]))
    runner.predict = lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(CmidError, match="a single window of 64 x 64 px does not fit"):
        list(runner([image[:, :64, :64]]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_as_many_windows_as_fit():
    runner = BatchRunner(lambda x: x.float().repeat(1, 40, 1, 1), torch.device("cuda"))
    windows = (np.full((1, 64, 64), i, np.uint8) for i in range(200))
    assert [int(found[0, 0, 0]) for found in runner(windows)] == list(range(200))
    assert runner.size > 1
