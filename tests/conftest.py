"""For all tests: no progress bars among the lines that are compared, and what is long is slow too."""

import os

import pytest

os.environ["TQDM_DISABLE"] = "1"  # before anything is imported


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    "A test that is `long` is also `slow`, so that `-m 'not slow'` leaves both out."
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)
