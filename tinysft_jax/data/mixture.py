"""Several data sets at once, `PATH=WEIGHT,PATH=WEIGHT`: the sets, and which of them each row of a run comes from."""

import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tinysft_jax.console import UserError
from tinysft_jax.data.store import PreparedData

LEAST_SHARE = Fraction(1, 100)


class Part(NamedTuple):
    """A data set of a mixture, or the only one."""

    name: str  # the last part of its path; empty for the only one
    share: Fraction  # of the rows
    data: PreparedData


def open_parts(path: str) -> list[Part]:
    """Opens a data set, or several.

    Raises: UserError, if one can't be read, a weight is no positive number or makes less than 1 % of the rows, two sets
    have one name, or they differ in tokenizer, chat template or kind (conversations or pairs).
    """
    if "=" not in path or os.path.exists(os.path.expanduser(path)):
        return [Part("", Fraction(1), PreparedData(path))]
    entries = [entry.rpartition("=") for entry in path.split(",")]
    weights = [_parse_weight(weight, where, path) for where, _, weight in entries]
    names = [os.path.basename(os.path.abspath(where)) for where, *_ in entries]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"data.path has two data sets called {repeated[0]}; metrics name them so: rename one directory")
    parts = []
    for (where, *_), name, weight in zip(entries, names, weights, strict=True):
        share = weight / sum(weights)
        if share < LEAST_SHARE:
            raise UserError(f"data.path: {where} has {float(share):.2%} of the weights; give each data set 1 % or more")
        parts.append(Part(name, share, PreparedData(where)))
        _check_alike(parts[0].data, parts[-1].data)
    return parts


def _parse_weight(weight: str, where: str, path: str) -> Fraction:
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not where or not 0 < value < math.inf:
        raise UserError(
            f"data.path is {path!r}; several data sets are PATH=WEIGHT,PATH=WEIGHT with weights above 0, such as "
            "a=0.8,b=0.2"
        )
    return Fraction(str(value))  # of 0.1, a tenth


def _check_alike(first: PreparedData, other: PreparedData) -> None:
    same_files = first.tokenizer.files == other.tokenizer.files != {}  # a template may put in the day it is read on
    for key in ("tokenizer",) if same_files else ("tokenizer", "chat_template"):
        if first.description[key] != other.description[key]:
            raise UserError(
                f"{first.directory} and {other.directory} differ in their {key.replace('_', ' ')}; prepare both for "
                "one model, with the same --tokenizer, or --template and --bpe_ranks"
            )
    if first.per_item != other.per_item:
        raise UserError(f"{first.directory} and {other.directory} can't be mixed: one holds pairs, one conversations")


class Schedule:
    """Which part of a mixture each row of a run comes from: exact over windows of rows, and evenly spread in each."""

    def __init__(self, shares: Sequence[Fraction], window: int):
        self._shares, self._window = tuple(shares), window

    def place(self, row: int) -> tuple[int, int]:
        """A row's part, and its number among the rows of that part."""
        window, index = divmod(row, self._window)
        parts, numbers = _lay_out(self._shares, self._window, window)
        return int(parts[index]), int(numbers[index])

    def rows_before(self, row: int) -> list[int]:
        """How many rows of each part come before this one."""
        window, index = divmod(row, self._window)
        within = np.bincount(_lay_out(self._shares, self._window, window)[0][:index], minlength=len(self._shares))
        before = _rows_before(self._shares, window * self._window)
        return [first + more for first, more in zip(before, within.tolist(), strict=True)]


def _rows_before(shares: tuple[Fraction, ...], row: int) -> list[int]:
    """How many rows of each part come before the first of a window: their shares, rounded."""
    ends = [row * bound.numerator // bound.denominator for bound in itertools.accumulate(shares)]
    return [end - start for start, end in itertools.pairwise((0, *ends))]


@functools.lru_cache(maxsize=4)
def _lay_out(shares: tuple[Fraction, ...], size: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of each row of a window, and the row's number among those of its part."""
    first, last = (_rows_before(shares, number * size) for number in (window, window + 1))
    counts = [after - before for before, after in zip(first, last, strict=True)]
    parts = np.repeat(np.arange(len(counts)), counts)
    within = np.concatenate([np.arange(count) for count in counts])
    # The j-th of n rows belongs where (j + 1/2) / n of the window is.
    order = np.argsort((within + 0.5) / np.repeat(counts, counts), kind="stable")
    return parts[order], (within + np.repeat(first, counts))[order]
