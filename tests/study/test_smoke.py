"Temporary studies are removed with the process that made them."

import multiprocessing
from pathlib import Path

import pytest

from cmid.study.smoke import smoke_study


def make_study(queue):
    queue.put(smoke_study())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are spawned here")
def test_a_process_of_a_pool_leaves_no_study_behind():
    "As `nbdev_test` runs notebooks: such a process ends without what `atexit` registers."
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=make_study, args=(queue,))
    process.start()
    folder = queue.get()
    process.join()
    assert isinstance(folder, Path) and "cmid-smoke-" in folder.name
    assert not folder.exists()
