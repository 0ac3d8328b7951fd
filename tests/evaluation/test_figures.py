"""Means with their standard errors, shares with their intervals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.evaluation.report import Figure, difference, mean


def test_mean_by_hand():
    """0, 1/2, 1: variance 1/4, standard error sqrt(1/4 / 3)."""
    figure = mean([0.0, None, 0.5, 1.0])
    error = math.sqrt(1 / 12)
    assert figure[:3] == (0.5, 3, pytest.approx(error)) and not figure.share
    assert (figure.low, figure.high) == pytest.approx((0.5 - 1.96 * error, 0.5 + 1.96 * error), abs=1e-4)


def test_weighted_mean_by_hand():
    """(1·4 + 3·2) / 4 = 2.5; residuals 1·1.5 and 3·(-0.5): sqrt(2 · (2.25 + 2.25)) / 4 = 0.75."""
    assert mean([4.0, 2.0], [1.0, 3.0])[:3] == (2.5, 2, pytest.approx(0.75))


def test_nothing_and_a_single_case():
    assert mean([None]) is None and mean([]) is None and difference([None], [1.0]) is None
    assert mean([0.5]) == difference([0.75], [0.25]) == Figure(0.5, 1, None, None, None, False)


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_the_intervals_that_were_published(hits, n, low, high):
    """Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3."""
    figure, wrong = mean([1.0] * hits + [0.0] * (n - hits)), mean([0.0] * hits + [1.0] * (n - hits))
    assert figure.share and figure.value == hits / n
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=5e-5)
    assert (wrong.low, wrong.high) == pytest.approx((1 - figure.high, 1 - figure.low))
    assert figure.standard_error == pytest.approx((figure.high - figure.low) / 2 / 1.96, rel=1e-4)


def test_a_difference_of_shares_has_the_interval_that_was_published():
    """The example of `ci.prop.ps` in the R package statpsych, whose authors' method it is."""
    pairs = [(0.0, 0.0)] * 12 + [(0.0, 1.0)] * 4 + [(1.0, 0.0)] * 26 + [(1.0, 1.0)] * 6
    figure = difference(*zip(*pairs, strict=True))
    assert figure[:3] == (22 / 48, 48, pytest.approx(0.09448809)) and figure.share
    assert (figure.low, figure.high) == pytest.approx((0.2548067, 0.6251933))


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=30))
def test_intervals_hold_their_value_and_are_never_empty(pairs):
    ones, others = zip(*pairs, strict=True)
    for figure, least in ((mean(ones), 0), (difference(ones, others), -1)):
        assert least <= figure.low <= figure.value <= figure.high <= 1 and figure.low < figure.high


def test_differences_are_paired_and_leave_out_what_is_missing():
    """Alike values that are no shares differ by nothing; a difference that is 0 or 1 alone makes no share."""
    assert difference([1.0, None, 0.5], [0.25, 1.0, None])[:2] == (0.75, 1)
    assert not difference([0.5, 0.25], [0.5, 0.25]).share


@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=50))
def test_equal_weights_give_the_usual_standard_error(values):
    figure = mean(values, [3.0] * len(values))
    assert figure.value == pytest.approx(np.mean(values))
    assert figure.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)


def test_the_weighted_error_is_that_of_repeated_draws():
    """Against the spread of the weighted mean over many samples of cases whose values depend on their weights."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        weights = rng.integers(1, 40, 60)
        found.append(mean((5 / weights + rng.normal(0, 0.3, 60)).tolist(), weights.astype(float).tolist()))
    spread = np.std([figure.value for figure in found])
    assert np.mean([figure.standard_error for figure in found]) == pytest.approx(spread, rel=0.05)
