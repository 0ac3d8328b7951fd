"""Figures, and how sure they are."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

Values = Sequence[float | None]  # by case; None where a metric doesn't apply

Z = NormalDist().inv_cdf(0.975)  # standard errors to each side of a 95 % interval


class Figure(NamedTuple):
    """A mean over cases.

    Attributes:
      value: the mean.
      cases: how many it is over.
      standard_error: of the mean, from the cases' differences; of a share, its interval's half-width / 1.96. None for a
        single case that is no share, and so are the next two.
      low: the lower end of the mean's 95 % interval.
      high: the upper end.
      share: whether all cases are 0 or 1, so that the mean is a share, or a difference of two shares.
    """

    value: float
    cases: int
    standard_error: float | None
    low: float | None
    high: float | None
    share: bool


def mean(values: Values, weights: Sequence[float] | None = None) -> Figure | None:
    """The weighted mean of the cases that have a value; None if there are none.

    Without weights, values that are all 0 or 1 are a share, with the interval of Wilson, Probable inference, the law of
    succession, and statistical inference, 1927: it says something about 100 of 100, too, where the cases' spread is 0.
    """
    known = [value for value in values if value is not None]
    if weights is not None or not known or not _are_shares(known):
        return _weighted_mean(values, weights)
    n, share = len(known), sum(known) / len(known)
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return _share(share, n, centre - half, centre + half, least=0)


def difference(values: Values, others: Values, weights: Sequence[float] | None = None) -> Figure | None:
    """The mean of value minus other, case by case, over the cases that have both; None if there are none.

    Of shares, with the adjusted Wald interval of Bonett & Price, Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data, 2012, https://doi.org/10.3102/1076998611411915. It adds a case to those
    that only the first is right in, and one to those that only the second is.
    """
    pairs = list(zip(values, others, strict=True))
    known = [pair for pair in pairs if None not in pair]
    if weights is not None or not known or not all(map(_are_shares, known)):
        return _weighted_mean([None if None in pair else pair[0] - pair[1] for pair in pairs], weights)
    n, only_first, only_second = len(known), known.count((1, 0)), known.count((0, 1))
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = Z * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    return _share((only_first - only_second) / n, n, first - second - half, first - second + half, least=-1)


def _are_shares(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _share(value: float, n: int, low: float, high: float, least: int) -> Figure:
    """A figure from `least` to 1; round-off at the ends must not put it outside its interval."""
    low, high = min(max(low, least), value), max(min(high, 1.0), value)
    return Figure(value, n, (high - low) / (2 * Z), low, high, share=True)


def _weighted_mean(values: Values, weights: Sequence[float] | None) -> Figure | None:
    """The mean with its standard error.

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
        return Figure(centre, n, None, None, None, share=False)
    error = math.sqrt(math.fsum((weight * (value - centre)) ** 2 for value, weight in pairs) * n / (n - 1)) / total
    return Figure(centre, n, error, centre - Z * error, centre + Z * error, share=False)
