"The order of an epoch depends on seed and epoch alone; processes divide it, and corpora are mixed by weight."

import threading
import tracemalloc

import numpy as np
import pytest
import torch

from cmid.base.errors import CmidError
from cmid.data.batches import Batches, CorpusMix, counts_by_weight, distinct_images, select_corpus


class Rows:
    "Stands for any number of images: each shows its number, and the threads that read are recorded."

    def __init__(self, n):
        self.n = n
        self.threads = set()

    def __len__(self):
        return self.n

    def __getitem__(self, rows):
        self.threads.add(threading.get_ident())
        return np.asarray(rows % 251).astype("uint8")[:, None, None, None]


def rows_of(batches):
    return torch.stack([rows for _, rows in batches]).numpy()


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_order_of_first_version(epoch):
    "The numbers that a run without mix and processes has drawn since the first version."
    batches = Batches(Rows(50), np.arange(50), 8, seed=3)
    expected = np.random.default_rng([3, epoch]).permutation(50)[:48].reshape(6, 8)
    assert (batches.order(epoch) == expected).all()


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_processes_divide_an_epoch(processes):
    "Side by side, the batches of all processes are those of one process, also from the middle of an epoch."
    batches = [Batches(Rows(100), np.arange(100), 12, rank=rank, processes=processes) for rank in range(processes)]
    for of_process in batches:
        of_process.epoch = 2
        of_process.first = 3
    side_by_side = np.concatenate([rows_of(o) for o in batches], 1)
    assert (side_by_side == batches[0].order(2)[3:]).all()


def test_batch_that_processes_cannot_divide():
    with pytest.raises(CmidError, match="pretrain.batch: 10 must be divisible by pretrain.processes: 4"):
        Batches(Rows(20), np.arange(20), 10, processes=4)


def test_pixels_belong_to_rows_and_another_thread_reads_them():
    images = Rows(300)
    for pixels, rows in Batches(images, np.arange(300), 16):
        assert pixels.dtype == torch.uint8
        assert rows.dtype == torch.int64
        assert (pixels.flatten() == rows % 251).all()
    assert images.threads
    assert threading.get_ident() not in images.threads


def test_abandoned_loop_ends_its_thread():
    before = threading.active_count()
    iterator = iter(Batches(Rows(10_000), np.arange(10_000), 1))
    next(iterator)
    assert threading.active_count() == before + 1
    iterator.close()
    for _ in range(100):
        if threading.active_count() == before:
            return
        threading.Event().wait(0.05)
    raise AssertionError("the thread still runs")


def test_epoch_of_one_corpus_is_never_longer_than_it():
    "No image is shown twice, even where an epoch of more images is asked for."
    batches = Batches(Rows(10), np.arange(10), 4, epoch_images=50)
    assert (batches.count, len(batches)) == (10, 2)
    assert len(np.unique(batches.order(0))) == 8


# --- mixes


@pytest.mark.parametrize("count, weights", [(1000, [1, 2, 3]), (7, [0.2, 0.2, 0.2, 0.4]), (10**7, [1e-6, 1]), (5, [1])])
def test_counts_add_up_and_differ_from_their_quota_by_less_than_one(count, weights):
    counts = counts_by_weight(count, weights)
    quota = count * np.array(weights) / sum(weights)
    assert counts.sum() == count
    assert (np.abs(counts - quota) < 1).all()


def test_mix_shows_each_corpus_by_its_weight():
    "600 images at 1 : 2 are 200 and 400: 200 of 1,000 images once each, and 100 images four times."
    mix = CorpusMix([np.arange(1000), np.arange(1000, 1100)], [1, 2])
    batches = Batches(Rows(1100), mix, 20, epoch_images=600)
    for epoch in range(3):
        shown = np.bincount(batches.order(epoch).ravel(), minlength=1100)
        assert shown[:1000].sum() == 200
        assert shown[:1000].max() == 1
        assert (shown[1000:] == 4).all()


def test_mix_is_shuffled_and_repeats():
    mix = CorpusMix([np.arange(1000), np.arange(1000, 1100)], [1, 2])
    batches, again = (Batches(Rows(1100), mix, 20, epoch_images=600) for _ in range(2))
    assert not (batches.order(0) == batches.order(1)).all()
    assert (batches.order(5) == again.order(5)).all()
    of_second = (batches.order(0) >= 1000).sum(1)
    assert of_second.max() < 20  # shuffled together, not one corpus after the other


def test_mix_of_lists():
    images = Rows(30)
    images.splits = dict(a=np.arange(10), b=np.arange(5, 30))
    mix = select_corpus(images, dict(b=1.0, a=3.0))
    assert len(mix) == 35
    assert (distinct_images(mix) == np.arange(30)).all()
    assert Batches(images, mix, 7).count == 35


@pytest.mark.parametrize("split", ["c", dict(a=1.0, c=1.0)])
def test_unknown_list(split):
    images = Rows(30)
    images.splits = dict(a=np.arange(10), b=np.arange(5, 30))
    with pytest.raises(CmidError, match="pretrain.split: this dataset has no list 'c'; known: a, b"):
        select_corpus(images, split)


# --- millions


def test_epoch_of_a_million_images_keeps_no_object_for_each_image():
    "A permutation of a million numbers is 8 MB; at most twice that is held at once."
    batches = Batches(Rows(10**6), np.arange(10**6), 256)
    tracemalloc.start()
    try:
        iterator = iter(batches)
        next(iterator)
        iterator.close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6


# --- a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_reach_the_gpu_before_the_step():
    device = torch.device("cuda", torch.cuda.current_device())
    on_gpu, on_host = (Batches(Rows(4000), np.arange(4000), 100, on=o) for o in (device, None))
    results = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pixels, rows in on_gpu:
            results.append((pixels.sum(), rows * 2))  # nothing here waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(o.device == device for result in results for o in result)
    doubled = torch.stack([rows for _, rows in results]).cpu().numpy()
    assert (doubled == 2 * rows_of(on_host)).all()
    assert [int(total) for total, _ in results] == [int(pixels.sum()) for pixels, _ in on_host]
