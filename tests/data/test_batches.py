"An epoch's order is arithmetic: of seed and epoch, shared out over processes, mixed by weight."

import threading
import tracemalloc

import numpy as np
import pytest
import torch

from cmid.base.errors import CmidError
from cmid.data.batches import Batches, Mix, corpus, members, shares


class Rows:
    "Stands for any number of images: each shows its number, and who reads it is recorded."

    def __init__(self, n):
        self.n, self.threads = n, set()

    def __len__(self):
        return self.n

    def __getitem__(self, rows):
        self.threads.add(threading.get_ident())
        return np.asarray(rows % 251).astype("uint8")[:, None, None, None]


def rows_of(batches):
    return torch.stack([o[1] for o in batches]).numpy()


def test_the_order_is_what_it_always_was():
    "The numbers that a run without mix and processes has drawn since the first version."
    b = Batches(Rows(50), np.arange(50), 8, seed=3)
    for epoch in (0, 1, 7):
        assert (b.order(epoch) == np.random.default_rng([3, epoch]).permutation(50)[:48].reshape(6, 8)).all()


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_processes_share_an_epoch(processes):
    "Side by side, the processes' batches are the one process's, in the middle of an epoch too."
    parts = [Batches(Rows(100), np.arange(100), 12, rank=r, processes=processes) for r in range(processes)]
    for o in parts:
        o.epoch, o.first = 2, 3
    assert (np.concatenate([rows_of(o) for o in parts], 1) == parts[0].order(2)[3:]).all()


def test_a_batch_that_cannot_be_shared_out():
    with pytest.raises(CmidError, match="pretrain.batch: 10 images cannot be shared out over pretrain.processes: 4"):
        Batches(Rows(20), np.arange(20), 10, processes=4)


def test_pixels_are_those_of_the_rows_and_another_thread_reads_them():
    images = Rows(300)
    b = Batches(images, np.arange(300), 16)
    for pixels, rows in b:
        assert pixels.dtype == torch.uint8 and rows.dtype == torch.int64 and (pixels.flatten() == rows % 251).all()
    assert images.threads and threading.get_ident() not in images.threads


def test_a_loop_that_is_left_ends_its_thread():
    before = threading.active_count()
    it = iter(Batches(Rows(10_000), np.arange(10_000), 1))
    next(it)
    it.close()
    for _ in range(100):
        if threading.active_count() == before:
            return
        threading.Event().wait(0.05)
    assert threading.active_count() == before


# --- mixes


@pytest.mark.parametrize("count, weights", [(1000, [1, 2, 3]), (7, [0.2, 0.2, 0.2, 0.4]), (10**7, [1e-6, 1]), (5, [1])])
def test_shares_add_up_and_lie_next_to_their_quota(count, weights):
    n, quota = shares(count, weights), count * np.array(weights) / sum(weights)
    assert n.sum() == count and (np.abs(n - quota) < 1).all()


def test_a_mix_shows_each_corpus_by_its_weight():
    "600 images at 1 : 2 are 200 and 400: 200 of 1,000 once each, and 100 images four times."
    mix = Mix([np.arange(1000), np.arange(1000, 1100)], [1, 2])
    b = Batches(Rows(1100), mix, 20, epoch_images=600)
    for epoch in range(3):
        seen = np.bincount(b.order(epoch).ravel(), minlength=1100)
        assert seen[:1000].sum() == 200 and seen[:1000].max() == 1 and (seen[1000:] == 4).all()
    assert (
        not (b.order(0) == b.order(1)).all()
        and (b.order(5) == Batches(Rows(1100), mix, 20, epoch_images=600).order(5)).all()
    )
    assert (
        (np.bincount((b.order(0) >= 1000).sum(1), minlength=21)[20]) == 0
    )  # shuffled together, not one after the other


def test_a_mix_of_lists():
    images = Rows(30)
    images.splits = dict(a=np.arange(10), b=np.arange(5, 30))
    mix = corpus(images, dict(b=1.0, a=3.0))
    assert len(mix) == 35 and (members(mix) == np.arange(30)).all() and Batches(images, mix, 7).count == 35
    for bad in ("c", dict(a=1.0, c=1.0)):
        with pytest.raises(CmidError, match="pretrain.split: 'c' is no list of this dataset; known: a, b"):
            corpus(images, bad)


# --- millions


def test_an_epoch_of_a_million_images_keeps_no_object_an_image():
    "A permutation of a million numbers is 8 MB; twice that is the most that is held at once."
    b = Batches(Rows(10**6), np.arange(10**6), 256)
    tracemalloc.start()
    try:
        it = iter(b)
        next(it)
        it.close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6


# --- a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_reach_the_gpu_before_the_step():
    on = torch.device("cuda", torch.cuda.current_device())
    b, host = (Batches(Rows(4000), np.arange(4000), 100, on=o) for o in (on, None))
    got = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pixels, rows in b:
            got.append((pixels.sum(), rows * 2))  # nothing here waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(o.device == on for g in got for o in g)
    assert (torch.stack([o[1] for o in got]).cpu().numpy() == 2 * rows_of(host)).all() and [int(o[0]) for o in got] == [
        int(p.sum()) for p, _ in host
    ]
