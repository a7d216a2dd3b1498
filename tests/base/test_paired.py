"Intervals over seeds and images hold, and agree with what is known where one of the two does nothing."

import math

import numpy as np
import pytest
from scipy.stats import norm, t as student, ttest_1samp

from cmid.base.paired import answer_interval, count_interval, crossed_interval, joined_interval, student_interval
from cmid.base.scores import difference


def answers(rng, skill, seeds, images, spread):
    "Answers to the same images: an image is hard for all, a seed is lucky for one backbone"
    hard = rng.standard_normal(images)
    latent = [s + hard + spread * rng.standard_normal((seeds, 1)) + rng.standard_normal((seeds, images)) for s in skill]
    return latent[0] > 0, latent[1] > 0


def test_without_images_it_is_the_t_test():
    by_seed = np.array([0.02, 0.05, 0.01, 0.04])
    expected = ttest_1samp(by_seed, 0).confidence_interval()
    found = crossed_interval(np.tile(by_seed[:, None], 7))
    assert found == pytest.approx((by_seed.mean(), expected.low, expected.high))
    assert student_interval(by_seed) == pytest.approx(found)


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_without_seeds_it_is_the_paired_interval_of_mcnemar(seeds):
    "Of n images, b only the first has right and c only the second: variance (b + c - (b - c)^2 / n) / n^2, nearly."
    b, c, n = 60, 25, 1000
    d = np.repeat([1, -1, 0], [b, c, n - b - c])
    mean, low, high = crossed_interval(np.tile(d, (seeds, 1)))
    half = student.ppf(0.975, n - 1) * math.sqrt((b + c - (b - c) ** 2 / n) / n / (n - 1))
    assert (mean, low, high) == pytest.approx(((b - c) / n, (b - c) / n - half, (b - c) / n + half))


def test_more_sources_never_make_it_narrower():
    rng = np.random.default_rng(3)
    for _ in range(50):
        d = rng.standard_normal((3, 1)) * rng.random() + rng.standard_normal(40) + rng.standard_normal((3, 40))
        _, low, high = crossed_interval(d)
        _, seed_low, seed_high = student_interval(d.mean(1))
        assert low <= seed_low <= seed_high <= high


def test_joined_intervals():
    assert joined_interval(0.0, [(-0.3, 0.3), (-0.4, 0.0)]) == pytest.approx((-0.5, 0.3))
    assert joined_interval(1.0, [(1.1, 1.2)]) == pytest.approx((1.0, 1.2))  # a percentile beyond the estimate


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.6])
def test_the_interval_of_answers_holds(seeds, spread):
    rng, skill = np.random.default_rng(seeds), (0.9, 0.6)
    truth = -np.diff(norm.cdf(np.array(skill) / (2 + spread**2) ** 0.5))[0]
    found = [answer_interval(*answers(rng, skill, seeds, 150, spread)) for _ in range(400)]
    assert np.mean([low <= truth <= high for _, low, high in found]) > 0.93


@pytest.mark.parametrize("seeds", [1, 3])
def test_counts_hold_and_are_wider(seeds):
    rng, skill, spread = np.random.default_rng(7), (0.9, 0.6), 0.1 * (seeds > 1)
    truth, inside, wider = -np.diff(norm.cdf(np.array(skill) / (2 + spread**2) ** 0.5))[0], [], []
    for _ in range(300):
        a, b = answers(rng, skill, seeds, 150, spread)
        mean, low, high = count_interval(a.sum(1), b.sum(1), 150)
        paired, paired_low, paired_high = answer_interval(a, b)
        assert mean == pytest.approx(paired)
        inside.append(low <= truth <= high)
        wider.append(high - low > paired_high - paired_low)
    assert np.mean(inside) > 0.95
    assert np.mean(wider) > 0.9


def test_extremes_stay_in_range():
    all_right, all_wrong = np.ones((2, 6), bool), np.zeros((2, 6), bool)
    mean, low, high = answer_interval(all_right, all_wrong)
    assert (mean, high) == (1, 1) and 0 < low < 1
    assert count_interval([6, 6], [0, 0], 6)[2] == 1
    assert answer_interval(all_right, all_right)[1] < 0 < answer_interval(all_right, all_right)[2]


def test_counts_of_seeds_with_other_images_are_shares_of_their_own():
    mean, low, high = count_interval([600, 80], [500, 40], [1000, 100])
    own = [difference(600, 1000, 500, 1000), difference(80, 100, 40, 100)]
    half = 12.7062047 * 0.15  # Student's t of one degree of freedom; the mean of .1 and .4 has the standard error .15
    assert mean == pytest.approx(0.25)
    below = np.hypot(0.25 - np.mean([span[0] for span in own]), half)
    above = np.hypot(np.mean([span[1] for span in own]) - 0.25, half)
    assert (low, high) == (pytest.approx(max(-1, 0.25 - below)), pytest.approx(min(1, 0.25 + above)))
    assert count_interval([80, 600], [40, 500], [100, 1000]) == pytest.approx((mean, low, high))
