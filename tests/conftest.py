"""For all tests: no progress bars among the lines that are compared, what is long is slow too, modules with slow tests
run first, and mixed precision ends with a test."""

import os

os.environ["TQDM_DISABLE"] = "1"  # before anything that imports tqdm

import pytest
import torch


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """A test that is `long` is also `slow`, so that `-m 'not slow'` leaves both out. Modules with slow tests come
    first: one that began last would leave the other workers idle. Within a module the order stays."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def mixed_precision_ends():
    "A step that is interrupted must leave autocast, whose copies of weights would be used by what comes after it."
    yield
    left = torch.is_autocast_enabled("cpu")
    torch.set_autocast_enabled("cpu", False)
    assert not left, "the test, or what it calls, left autocast on"
