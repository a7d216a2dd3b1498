"""For all tests: no progress bars among the lines that are compared, what is long is slow too, and mixed precision ends
with a test."""

import os

import pytest
import torch

os.environ["TQDM_DISABLE"] = "1"  # before anything is imported


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    "A test that is `long` is also `slow`, so that `-m 'not slow'` leaves both out."
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def mixed_precision_ends():
    "A step that a test interrupts may leave autocast on, whose copies of weights would then be those of other tests."
    yield
    torch.set_autocast_enabled("cpu", False)
    torch.autocast_increment_nesting()
    while torch.autocast_decrement_nesting() > 0:
        pass
    torch.clear_autocast_cache()
