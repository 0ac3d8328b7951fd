"""Means and their standard errors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.evaluation.figures import Figure, differences, mean


def test_mean_by_hand():
    """0, 1, 1: variance (1/3 + ...) 1/3, standard error sqrt(1/3 / 3) = 1/3."""
    figure = mean([0.0, None, 1.0, 1.0])
    assert figure == (pytest.approx(2 / 3), 3, pytest.approx(1 / 3))


def test_weighted_mean_by_hand():
    """(1·4 + 3·2) / 4 = 2.5; residuals 1·1.5 and 3·(-0.5): sqrt(2 · (2.25 + 2.25)) / 4 = 0.75."""
    assert mean([4.0, 2.0], [1.0, 3.0]) == (2.5, 2, pytest.approx(0.75))


def test_nothing_and_a_single_case():
    assert mean([None]) is None and mean([]) is None
    assert mean([0.5]) == Figure(0.5, 1, None)


def test_differences_leave_out_what_is_missing():
    assert differences([1.0, None, 0.5], [0.25, 1.0, None]) == [0.75, None, None]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
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
