"A shift between two dates is found where there is one, and nowhere else."

import numpy as np

from cmid.data.pairs import MIN_PEAK, phase_offset


def test_peak_of_unrelated_images_is_low():
    def peak(seed):
        first, second = (np.random.default_rng(o).integers(0, 256, (3, 128, 128), np.uint8) for o in (seed, 100 + seed))
        return phase_offset(first, second)[1]

    assert max(peak(seed) for seed in range(20)) < MIN_PEAK / 2
