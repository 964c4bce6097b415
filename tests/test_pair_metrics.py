"""What the scores of pairs are summed up to: expected values are published ones or worked out by hand."""

import math
import statistics

import numpy as np
import pytest
from PIL import Image

from stagekit.pair_metrics import (
    by_length,
    calibration,
    correlation,
    draw_scores,
    mean_interval,
    pair_accuracy,
    wilson_interval,
)


def array(*values):
    return np.array(values, dtype=float)


def score_interval(rate, trials):
    """Where the score test rejects: the roots of (p - rate)^2 = z^2 p (1 - p) / trials, from numpy."""
    share = statistics.NormalDist().inv_cdf(0.975) ** 2 / trials
    return sorted(np.roots([1 + share, -(2 * rate + share), rate**2]).real)


# -- interval --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_proportion_is_the_published_one(successes, trials, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), Table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0.5, 1), (2.5, 4), (60.5, 64), (1.5, 2.0), (7, 7)])
def test_half_successes_give_the_interval_of_the_score_test(successes, trials):
    assert wilson_interval(successes, trials) == pytest.approx(score_interval(successes / trials, trials), abs=1e-7)


def test_the_interval_never_leaves_zero_to_one():
    for trials in range(1, 400):
        assert 0 <= wilson_interval(0, trials)[0] < 1e-12 and wilson_interval(0, trials)[1] < 1
        assert 1 >= wilson_interval(trials, trials)[1] > 1 - 1e-12 and wilson_interval(trials, trials)[0] > 0


# -- accuracy --------------------------------------------------------------------------------------------------------


def test_a_tie_is_half_right():
    found = pair_accuracy(array(2, 1, 0, 3), array(1, 1, 1, 0), np.ones(4))
    assert found["accuracy"] == 2.5 / 4
    low, high = score_interval(2.5 / 4, 4)
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((low, high), abs=1e-7)


def test_the_pairs_of_a_ranking_count_as_one_prompt():
    """One pair of its own (right), three of a ranking (a tie, wrong, right): (1 + (0.5 + 0 + 1) / 3) / 2 = 0.75."""
    found = pair_accuracy(array(2, 1, 0, 3), array(1, 1, 1, 0), array(1, 1 / 3, 1 / 3, 1 / 3))
    assert found["accuracy"] == pytest.approx(0.75)
    low, high = score_interval(0.75, 2)  # of two prompts, not of four pairs
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((low, high), abs=1e-7)


def test_scores_that_are_all_the_same_are_half_right():
    assert pair_accuracy(np.zeros(10), np.zeros(10), np.ones(10))["accuracy"] == 0.5


# -- correlation -----------------------------------------------------------------------------------------------------


def test_the_correlation_is_pearsons():
    # Deviations -1.5 -0.5 0.5 1.5 and -1.75 0.25 -0.75 2.25: products 5.5, squares 5 and 8.75.
    assert correlation(array(1, 2, 3, 4), array(1, 3, 2, 5)) == pytest.approx(5.5 / math.sqrt(5 * 8.75))
    x, y = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0], [2.0, 7.0, 1.0, 8.0, 2.5, 8.0]
    assert correlation(array(*x), array(*y)) == pytest.approx(statistics.correlation(x, y))
    assert correlation(array(1, 2, 3), array(3, 2, 1)) == pytest.approx(-1)


@pytest.mark.parametrize(("x", "y"), [((1, 1, 1), (1, 2, 3)), ((1, 2, 3), (4, 4, 4)), ((1,), (2,)), ((), ())])
def test_where_one_side_does_not_vary_the_correlation_is_zero(x, y):
    assert correlation(array(*x), array(*y)) == 0


# -- calibration -----------------------------------------------------------------------------------------------------


def logit(probability):
    return math.log(probability / (1 - probability))


def test_calibration_of_six_pairs_worked_out_by_hand():
    #            right         wrong         right         wrong         right         right
    difference = [logit(0.52), -logit(0.56), logit(0.65), -logit(0.72), logit(0.95), logit(0.91)]
    base = array(0, 3, -2, 1, 5, 0.5)
    error, bins = calibration(base + difference, base)
    expected = [
        {"from": 0.5, "to": 0.6, "pairs": 2, "confidence": 0.54, "accuracy": 0.5},
        {"from": 0.6, "to": 0.7, "pairs": 1, "confidence": 0.65, "accuracy": 1.0},
        {"from": 0.7, "to": 0.8, "pairs": 1, "confidence": 0.72, "accuracy": 0.0},
        {"from": 0.9, "to": 1.0, "pairs": 2, "confidence": 0.93, "accuracy": 1.0},
    ]
    assert len(bins) == len(expected), "a bin without pairs is left out"
    for found, wanted in zip(bins, expected, strict=True):
        assert found == pytest.approx(wanted)
    assert error == pytest.approx((2 * 0.04 + 0.35 + 0.72 + 2 * 0.07) / 6)


def test_fewer_bins_average_over_more_pairs():
    difference = array(logit(0.6), -logit(0.7), logit(0.8), logit(0.9))
    error, bins = calibration(difference, np.zeros(4), num_bins=1)
    assert bins == [pytest.approx({"from": 0.5, "to": 1.0, "pairs": 4, "confidence": 0.75, "accuracy": 0.75})]
    assert error == pytest.approx(0)


def test_ties_are_half_sure_and_half_right():
    error, bins = calibration(array(1, 2), array(1, 2))
    assert bins == [{"from": 0.5, "to": 0.6, "pairs": 2, "confidence": 0.5, "accuracy": 0.5}]
    assert error == 0


@pytest.mark.filterwarnings("error")
def test_complete_certainty_stays_finite():
    error, bins = calibration(array(800, -800), array(0, 0))
    assert bins == [{"from": 0.9, "to": 1.0, "pairs": 2, "confidence": 1.0, "accuracy": 0.5}]
    assert error == 0.5


# -- length ----------------------------------------------------------------------------------------------------------


def test_accuracy_is_told_apart_by_which_answer_is_longer():
    found = by_length(
        chosen=array(1, 2, 0, 1, 3, 0, 5),
        rejected=array(2, 1, 0, 2, 1, 1, 4),
        chosen_length=array(5, 8, 90, 100, 110, 112, 40),
        rejected_length=array(10, 10, 100, 100, 100, 100, 20),
        weights=array(1, 1, 0.5, 0.5, 1, 1, 1),
    )
    assert [(group["group"], group["pairs"]) for group in found] == [
        ("better answer shorter", 2),
        ("about as long", 3),
        ("better answer longer", 2),
    ]
    # wrong, right; a tie at half weight, wrong at half weight, right at one; wrong, right
    assert [group["accuracy"] for group in found] == pytest.approx([0.5, 1.25 / 2, 0.5])
    low, high = score_interval(1.25 / 2, 2)
    assert (found[1]["accuracy_low"], found[1]["accuracy_high"]) == pytest.approx((low, high), abs=1e-7)


def test_a_group_of_lengths_without_pairs_is_left_out():
    found = by_length(array(1, 0), array(0, 1), array(30, 40), array(10, 10), np.ones(2))
    assert [group["group"] for group in found] == ["better answer longer"]
    assert found[0]["accuracy"] == 0.5


# -- picture ---------------------------------------------------------------------------------------------------------


def coloured(image):
    """Pixels of each third of the picture that are neither white nor grey nor black."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    strong = pixels.max(axis=2) - pixels.min(axis=2) > 40
    return [int(part.sum()) for part in np.array_split(strong, 3, axis=1)]


def test_the_picture_opens_and_none_of_its_three_panels_is_blank(tmp_path):
    dice = np.random.default_rng(0)
    chosen, rejected = dice.normal(1, 1, 50), dice.normal(0, 1, 50)
    lengths = dice.integers(5, 200, (2, 50))
    _, bins = calibration(chosen, rejected)
    draw_scores(chosen, rejected, *lengths, bins, tmp_path / "scores.png", "Scores")
    with Image.open(tmp_path / "scores.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) >= 400
        assert min(coloured(image)) > 200


def test_scores_that_are_all_the_same_can_be_drawn(tmp_path):
    same = np.zeros(3)
    _, bins = calibration(same, same)
    draw_scores(same, same, array(7, 7, 7), array(7, 7, 7), bins, str(tmp_path / "scores.png"), "Scores")
    with Image.open(tmp_path / "scores.png") as image:
        assert min(coloured(image)) > 20


# -- means -----------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_two_standard_errors_wide_to_either_side():
    values = array(2, 4, 4, 6)  # mean 4, squared deviations 8 / 3 in the mean of three
    half = 1.959964 * math.sqrt(8 / 3) / 2
    assert mean_interval(values) == pytest.approx((4, 4 - half, 4 + half))
    assert mean_interval(array(7)) == (7, None, None)
