"Confidence intervals of accuracy, by their definition; answers image by image."

from statistics import NormalDist

import numpy as np
import pytest

from cmid.base.errors import CmidError
from cmid.base.scores import pack_answers, unpack_answers, wilson


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


@pytest.mark.parametrize("n", [1, 7, 8, 9, 420, 8000])
def test_answers_come_back(n):
    "A text of 4 characters for every 24 images, which another number of images refuses."
    correct = np.random.default_rng(n).random(n) < 0.6
    correct[-1] = True
    text = pack_answers(correct)
    assert len(text) == 4 * -(-n // 24)
    assert unpack_answers(text, n).tolist() == correct.tolist()
    for other in (n - 1, n + 8):
        with pytest.raises(CmidError, match="not of"):
            unpack_answers(text, other)


@pytest.mark.parametrize("text", [None, 3, "sA=", "sA==\n", "\u00e9\u00e9==", []])
def test_what_is_not_base64_is_refused(text):
    with pytest.raises(CmidError, match="not in base64; run the stage again"):
        unpack_answers(text, 4)
