"""Packing as a plan: which conversations share a row is settled for an epoch before its first row is read.

A conversation is never cut, and a row's content depends on (lengths, row length, seed, epoch) alone. So the position
of a run in its data is one number, the rows it has read.
"""

import hashlib
import itertools
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int, Int64, UInt32
from scipy.optimize import linprog
from scipy.sparse import csc_array

from tinysft_jax.console import RunError, UserError
from tinysft_jax.locks import temporary_directory


class PackingPlan:
    """The rows of one epoch.

    A plan lies in files of a temporary directory: processes that read it share its memory, and memory that is short
    can be taken from it.

    Attributes:
      order: conversation indices, row after row.
      row_starts: where each row begins in `order`; one more entry than rows.

    Args:
      directory: written by `create`.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self.order: UInt32[np.ndarray, " conversations"] = np.asarray(np.load(directory / "order.npy", mmap_mode="r"))
        self.row_starts: Int[np.ndarray, " rows_and_1"] = np.asarray(
            np.load(directory / "row_starts.npy", mmap_mode="r")
        )

    @classmethod
    def create(
        cls, order: UInt32[np.ndarray, " conversations"], row_starts: Int[np.ndarray, " rows_and_1"]
    ) -> "PackingPlan":
        """A plan with files of its own.

        They are removed when the plan is no longer used, or the program ends; or by the next program if this is killed.

        Raises:
          RunError: if they can't be written.
        """
        try:
            directory, lock = temporary_directory("tinysft-jax-plan-")
            try:
                np.save(directory / "order.npy", order)
                np.save(directory / "row_starts.npy", row_starts)
                plan = cls(directory)
            except BaseException:
                _remove(directory, lock)
                raise
        except OSError as error:
            raise RunError(
                f"can't write the plan of an epoch to {tempfile.gettempdir()}: {error.strerror or error}; set TMPDIR "
                f"to a directory with {(order.nbytes + row_starts.nbytes) >> 20:,} MiB to spare"
            ) from None
        weakref.finalize(plan, _remove, directory, lock)
        return plan

    def __reduce__(self):
        # Another process maps the files itself instead of being sent their content.
        return PackingPlan, (self._directory,)

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> UInt32[np.ndarray, " k"]:
        """The conversations of row `index`."""
        return self.order[self.row_starts[index] : self.row_starts[index + 1]]

    def first(self, n_rows: int) -> "PackingPlan":
        """A plan of the first rows alone."""
        return PackingPlan.create(self.order[: self.row_starts[n_rows]], self.row_starts[: n_rows + 1])


def _remove(directory: Path, lock: int | None) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    if lock is not None:
        os.close(lock)


class Packing:
    """Which lengths share a row, settled once for all epochs; an epoch draws the conversations.

    Args:
      lengths: each conversation's tokens.
      seq_len: tokens a row.
      among: the conversations to pack; None: all.

    Attributes:
      seq_len: tokens a row.
      n_rows: rows of every epoch.
      fill: the share of the rows' tokens that are no padding.
      fingerprint: names the rows' lengths. Where it is the same, so are the rows of an epoch.

    Raises:
      UserError: if a conversation is longer than a row.
    """

    def __init__(self, lengths: Int[np.ndarray, " n"], seq_len: int, among: Int[np.ndarray, " m"] | None = None):
        self.seq_len, self._lengths = seq_len, lengths
        self._among = None if among is None else np.asarray(among, np.uint32)
        counts = np.bincount(lengths if among is None else lengths[among])
        if len(counts) > seq_len + 1:
            raise UserError(
                f"data.seq_len is {seq_len}, but the longest conversation has {len(counts) - 1} tokens; "
                "raise data.seq_len or prepare with a smaller --max_tokens"
            )
        patterns = sorted(cut({int(length): int(counts[length]) for length in np.flatnonzero(counts)}, seq_len).items())
        self.fingerprint = hashlib.sha256(repr(patterns).encode()).hexdigest()[:16]
        self._row_counts = np.array([rows for _, rows in patterns], np.int64)
        # The patterns one after the other, in a dtype that is sorted by counting up to 16 bits.
        self._dtype = np.min_scalar_type(seq_len)
        self._pattern_sizes = np.array([len(pattern) for pattern, _ in patterns], np.int64)
        self._pattern_starts = np.cumsum(self._pattern_sizes) - self._pattern_sizes
        self._pattern_lengths = np.array([length for pattern, _ in patterns for length in pattern], self._dtype)
        self.n_rows = int(self._row_counts.sum())
        self.fill = float(counts @ np.arange(len(counts))) / max(1, self.n_rows * seq_len)

    def epoch(self, seed: int = 0, epoch: int = 0) -> PackingPlan:
        """Assigns every conversation to exactly one row.

        The patterns are laid out in a random order; each place in a row is for some length, and gets the next of the
        shuffled conversations of that length.

        Args:
          seed: of the shuffle.
          epoch: each has its own order.
        """
        random = np.random.default_rng([seed, epoch])
        patterns = random.permutation(np.repeat(np.arange(len(self._row_counts), dtype=np.uint32), self._row_counts))
        sizes = self._pattern_sizes[patterns]
        row_starts = np.concatenate([[0], np.cumsum(sizes)])
        within_patterns = np.repeat(self._pattern_starts[patterns] - row_starts[:-1], sizes)
        within_patterns += np.arange(row_starts[-1])
        places = self._pattern_lengths[within_patterns]
        del within_patterns  # with millions of conversations, memory counts
        chosen = np.arange(len(self._lengths), dtype=np.uint32) if self._among is None else self._among
        chosen = random.permutation(chosen)
        chosen = chosen[np.argsort(self._lengths[chosen].astype(self._dtype), kind="stable")]
        order = np.empty_like(chosen)
        order[np.argsort(places, kind="stable")] = chosen
        return PackingPlan.create(order, row_starts)


def plan_epoch(
    lengths: Int[np.ndarray, " n"],
    seq_len: int,
    seed: int = 0,
    epoch: int = 0,
    among: Int[np.ndarray, " m"] | None = None,
) -> PackingPlan:
    """The rows of one epoch, where no other is asked for; see `Packing`."""
    return Packing(lengths, seq_len, among).epoch(seed, epoch)


# The lengths that share a row.
Pattern = tuple[int, ...]

# Rows that the search may leave above the least possible number of them, as a share.
TOLERANCE = 0.002
MAX_ITERATIONS = 50
# How much the prices by which patterns are looked for keep to the best known ones.
SMOOTHING = 0.8


def cut(demand: dict[int, int], capacity: int) -> Counter[Pattern]:
    """Fills rows with all that is demanded.

    The linear programme of Gilmore and Gomory ("A linear programming approach to the cutting-stock problem", 1961)
    tells by which patterns to make how many rows, if rows could be had in fractions. Whole rows of that are kept, and
    best-fit decreasing packs the rest. Where best-fit decreasing alone comes as near to full rows, it is taken.

    Args:
      demand: how many conversations there are of each length; lengths from 1 to `capacity`.
      capacity: tokens a row.

    Returns:
      The number of rows of each pattern. It depends on the arguments only.
    """
    by_best_fit = best_fit_decreasing(demand, capacity)
    full = -(-sum(length * count for length, count in demand.items()) // capacity)
    if by_best_fit.total() <= full * (1 + TOLERANCE):
        return by_best_fit
    relaxed = _relaxed(demand, capacity, by_best_fit)
    rows: Counter[Pattern] = Counter()
    rest = Counter(demand)
    for pattern, fraction in relaxed.items():
        uses = Counter(pattern)
        whole = min(int(fraction + 1e-6), *(rest[length] // count for length, count in uses.items()))
        rows[pattern] = whole
        rest.subtract({length: count * whole for length, count in uses.items()})
    rows += best_fit_decreasing(+rest, capacity)  # adding drops what is zero
    return min(by_best_fit, rows, key=Counter.total)


def best_fit_decreasing(demand: dict[int, int], capacity: int) -> Counter[Pattern]:
    """Gives each conversation, from the longest to the shortest, to the fullest row with room for it.

    Rows that hold the same are kept as one entry. The entries with a given room are a stack; bit r of one integer says
    whether stack r has any. So the best row is the lowest bit at or above the length.

    Returns:
      The number of rows of each pattern.
    """
    stacks: list[list[tuple[Pattern, int]]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for length in sorted(demand, reverse=True):
        left = demand[length]
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                pattern, rows = stacks[room].pop()
            else:
                room, pattern, rows = capacity, (), left
            # A row that got one stays the fullest with room until there is none: it gets as many as it can.
            each = min(room // length, left)
            used = min(rows, left // each)
            left -= each * used
            if fitting and rows > used:
                stacks[room].append((pattern, rows - used))
            if not stacks[room]:
                rooms &= ~(1 << room)
            new_room = room - each * length
            stacks[new_room].append((pattern + (length,) * each, used))
            rooms |= 1 << new_room
    patterns: Counter[Pattern] = Counter()
    for pattern, rows in itertools.chain.from_iterable(stacks):
        patterns[pattern] += rows
    return patterns


def _relaxed(demand: dict[int, int], capacity: int, start: Iterable[Pattern]) -> dict[Pattern, float]:
    """The least number of rows, in fractions, by column generation.

    Each round solves the programme over the patterns known so far. Its dual values are prices of the lengths; patterns
    worth more than a row, at these prices, make the next solution better. Any prices give a lower bound of the rows:
    the worth of all that is demanded over that of the best row (Farley, "A note on bounding a class of linear
    programming problems, including cutting stock problems", 1990). The search is over when the bound is near.

    Prices jump about from round to round, so patterns are looked for at a mean of them and the prices of the best
    bound (Wentges, "Weighted Dantzig-Wolfe decomposition for linear mixed-integer programming", 1997). The first of
    these are the lengths themselves: a row is worth what it is filled with.
    """
    lengths = np.array(sorted(demand))
    wanted = np.array([demand[length] for length in lengths.tolist()])
    best_prices = lengths / capacity
    bound, found = best_prices @ wanted, _best_patterns(lengths, best_prices, capacity)[1]
    patterns = dict.fromkeys([*start, *((length,) * (capacity // length) for length in lengths.tolist()), *found])
    for _ in range(MAX_ITERATIONS):
        rows, prices = _solve(lengths, wanted, list(patterns), capacity)
        if rows.sum() <= bound * (1 + TOLERANCE):
            break
        price_of, known = dict(zip(lengths.tolist(), prices.tolist(), strict=True)), len(patterns)
        for share in (SMOOTHING, 0.0):
            tried = share * best_prices + (1 - share) * prices
            worth, found = _best_patterns(lengths, tried, capacity)
            if (new_bound := tried @ wanted / worth) > bound:
                bound, best_prices = new_bound, tried / worth
            patterns |= dict.fromkeys(p for p in found if sum(map(price_of.__getitem__, p)) > 1 + 1e-6)
            if len(patterns) > known:
                break
        else:
            break  # no pattern is worth more than a row: this is the least
    return dict(zip(patterns, rows.tolist(), strict=False))


def _solve(
    lengths: Int64[np.ndarray, " n"], wanted: Int64[np.ndarray, " n"], patterns: list[Pattern], capacity: int
) -> tuple[Float64[np.ndarray, " patterns"], Float64[np.ndarray, " n"]]:
    """The rows to make by each pattern, and the lengths' prices in rows."""
    sizes = [len(pattern) for pattern in patterns]
    used = np.searchsorted(lengths, np.fromiter(itertools.chain.from_iterable(patterns), np.int64))
    uses = csc_array((np.ones(len(used)), used, np.cumsum([0, *sizes])), shape=(len(lengths), len(patterns)))
    uses.sum_duplicates()
    # Simplex: its solution is a vertex, where few patterns have any rows, so little is lost when they are rounded.
    result = linprog(np.ones(len(patterns)), A_ub=-uses, b_ub=-wanted, method="highs-ds")
    return result.x, np.maximum(-result.ineqlin.marginals, 0)


def _best_patterns(
    lengths: Int64[np.ndarray, " n"], prices: Float64[np.ndarray, " n"], capacity: int
) -> tuple[float, list[Pattern]]:
    """The worth of the best row, and for each length the best of the rows that hold it: an unbounded knapsack."""
    worth = np.zeros(capacity + 1)  # of the best row of at most c tokens
    last = np.full(capacity + 1, -1)  # the index of a length in it; -1: nothing that a row of c - 1 has not
    for c in range(int(lengths[0]), capacity + 1):
        fitting = np.searchsorted(lengths, c, side="right")
        worths = worth[c - lengths[:fitting]] + prices[:fitting]
        best = worths.argmax()
        worth[c] = worth[c - 1]
        if worths[best] > worth[c]:
            worth[c], last[c] = worths[best], best
    sizes, choice, patterns = lengths.tolist(), last.tolist(), []
    for length in sizes:
        pattern, room = [length], capacity - length
        while room:
            if choice[room] < 0:
                room -= 1
            else:
                pattern.append(sizes[choice[room]])
                room -= pattern[-1]
        patterns.append(tuple(sorted(pattern, reverse=True)))
    return float(worth[-1]), patterns
