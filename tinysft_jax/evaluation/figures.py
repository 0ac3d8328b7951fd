"""Figures with their standard errors."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """A mean over cases.

    Attributes:
      value: the mean.
      cases: how many it is over.
      standard_error: of the mean, from the cases' differences; None for a single case.
    """

    value: float
    cases: int
    standard_error: float | None


def mean(values: Sequence[float | None], weights: Sequence[float] | None = None) -> Figure | None:
    """The weighted mean of the cases that have a value; None if there are none.

    The weights, a case's tokens, are drawn with the cases. So the mean is a ratio of two sums, and its error that of a
    ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4): s.e.² = n/(n − 1) Σ w²(v − mean)² / (Σ w)². With
    equal weights that is the standard error of the mean.
    """
    weights = [1.0] * len(values) if weights is None else weights
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    n, total = len(pairs), math.fsum(weight for _, weight in pairs)
    if not n:
        return None
    centre = math.fsum(weight * value for value, weight in pairs) / total
    if n == 1:
        return Figure(centre, n, None)
    squares = math.fsum((weight * (value - centre)) ** 2 for value, weight in pairs)
    return Figure(centre, n, math.sqrt(squares * n / (n - 1)) / total)


def differences(values: Sequence[float | None], others: Sequence[float | None]) -> list[float | None]:
    """Case by case, a value minus the other; None where one of them is missing."""
    pairs = zip(values, others, strict=True)
    return [None if value is None or other is None else value - other for value, other in pairs]
