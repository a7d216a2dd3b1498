"Confidence intervals of accuracy, by their definition."

from statistics import NormalDist

import pytest

from cmid.base.scores import wilson


@pytest.mark.parametrize("correct, n", [(0, 1), (1, 1), (3, 7), (45, 90), (89, 90), (7999, 8000)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_ends_of_wilsons_interval_are_z_standard_errors_away(correct, n, confidence):
    "The standard error is that of the end itself, not that of the observed share."
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = wilson(correct, n, confidence)
    assert 0 <= low <= correct / n <= high <= 1
    assert low < high
    for end in (low, high):
        if 0 < end < 1:
            assert abs(correct / n - end) == pytest.approx(z * (end * (1 - end) / n) ** 0.5, rel=1e-6)
