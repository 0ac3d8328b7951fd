"""Packing as a plan: which items share a row is known before the first row of an epoch is read.

An item, a conversation or a pair of them, is never cut. A row is a pure function of lengths, row length, seed, epoch
and index, so the position of a run in its data is one number: the rows consumed.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt32

from tinysft_jax.console import UserError

# The lengths that share a row, longest first.
Pattern = tuple[int, ...]


@dataclass(frozen=True)
class PackingPlan:
    """The rows of one epoch."""

    order: UInt32[np.ndarray, " items"]  # item indices, row after row
    row_starts: Int[np.ndarray, " rows_and_1"]  # where each row begins in `order`, then where the last one ends

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> UInt32[np.ndarray, " k"]:
        """The items of row `index`."""
        return self.order[self.row_starts[index] : self.row_starts[index + 1]]

    def first(self, n_rows: int) -> "PackingPlan":
        """The first rows alone."""
        return PackingPlan(self.order[: self.row_starts[n_rows]], self.row_starts[: n_rows + 1])


class Packing:
    """Which lengths share a row of `seq_len` tokens, the same in all epochs; an epoch draws the items.

    `lengths` are those of the items, `noun` is what one is called. Raises: UserError, if one is longer than a row.
    """

    def __init__(self, lengths: Int[np.ndarray, " n"], seq_len: int, noun: str = "conversation"):
        self.seq_len, self._lengths = seq_len, lengths
        self._kept: tuple[tuple[int, int] | None, PackingPlan | None] = None, None
        counts = np.bincount(lengths)
        if len(counts) > seq_len + 1:
            raise UserError(
                f"seq_len is {seq_len}, but the longest {noun} has {len(counts) - 1:,} tokens; "
                "raise it, or prepare with a smaller --max_tokens"
            )
        demand = {length: count for length, count in enumerate(counts.tolist()) if count}
        rows = sorted(fill_rows(demand, seq_len).items())
        # Equal fingerprints, data and seeds give equal rows.
        self.fingerprint = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
        self._row_counts = np.array([n for _, n in rows], np.int64)
        self._pattern_sizes = np.array([len(pattern) for pattern, _ in rows], np.int64)
        # The patterns concatenated, in a dtype for which NumPy has a radix sort (up to 16 bits).
        self._dtype = np.min_scalar_type(seq_len)
        self._pattern_lengths = np.array([length for pattern, _ in rows for length in pattern], self._dtype)
        self._pattern_starts = np.cumsum(self._pattern_sizes) - self._pattern_sizes
        self.n_rows = int(self._row_counts.sum())  # of every epoch
        self.most_items = int(self._pattern_sizes.max(initial=0))  # in a row
        # The share of the rows' tokens that are not padding.
        self.fill = float(counts @ np.arange(len(counts))) / max(1, self.n_rows * seq_len)

    def epoch(self, seed: int = 0, epoch: int = 0) -> PackingPlan:
        """The rows of an epoch; those of the last one asked for are kept."""
        kept, plan = self._kept  # another thread may replace it
        if kept != (seed, epoch):
            self._kept, plan = (None, None), None  # or two epochs' plans would exist while the next is made
            plan = self._assign(seed, epoch)
            self._kept = (seed, epoch), plan
        return plan

    def _assign(self, seed: int, epoch: int) -> PackingPlan:
        """Assigns every item to exactly one row.

        The patterns come in random order. Each place in a pattern gets the next of the shuffled items of its length.
        """
        random = np.random.default_rng([seed, epoch])
        patterns = random.permutation(np.repeat(np.arange(len(self._row_counts), dtype=np.uint32), self._row_counts))
        sizes = self._pattern_sizes[patterns]
        row_starts = np.concatenate([[0], np.cumsum(sizes)])
        within_patterns = np.repeat(self._pattern_starts[patterns] - row_starts[:-1], sizes)
        within_patterns += np.arange(row_starts[-1])
        places = self._pattern_lengths[within_patterns]
        del within_patterns  # with millions of items, memory counts
        chosen = random.permutation(np.arange(len(self._lengths), dtype=np.uint32))
        chosen = chosen[np.argsort(self._lengths[chosen].astype(self._dtype), kind="stable")]
        order = np.empty_like(chosen)
        order[np.argsort(places, kind="stable")] = chosen
        return PackingPlan(order, row_starts)


# The search ends when the rows exceed the lower bound by at most this share.
TOLERANCE = 0.002


def fill_rows(demand: dict[int, int], capacity: int) -> Counter[Pattern]:
    """Chooses which lengths share a row: best fit with a look-ahead over the whole row, in up to three orders.

    A row begins with one length and is filled as well as possible, with the earlier lengths of an order where there is
    a choice. The longest first is best if rows hold many items. If they hold two to four, often the most common
    lengths or the shortest must come first, or nothing is left that fits them.

    `demand`: the number of items of each length, from 1 to `capacity`, the tokens of a row. Returns the number
    of rows of each pattern, for the order that needs the fewest.
    """
    lower_bound = -(-sum(length * count for length, count in demand.items()) // capacity)
    found = []
    for by_count, first in ((False, 0), (True, 0), (False, -1)):
        found.append(_fill_in_order(demand, capacity, by_count, first))
        if found[-1].total() <= lower_bound * (1 + TOLERANCE):
            break
    return min(found, key=Counter.total)


def _fill_in_order(demand: dict[int, int], capacity: int, by_count: bool, first: int) -> Counter[Pattern]:
    """Fills rows in one order, from the longest or the most common length; a row begins with its `first`."""
    left = dict(sorted(demand.items(), reverse=True))
    rows: Counter[Pattern] = Counter()
    while left:
        order = sorted(left, key=left.get, reverse=True) if by_count else list(left)
        pattern = _fullest_row(left, order, order[first], capacity)
        uses = Counter(pattern)
        n = min(left[length] // count for length, count in uses.items())
        rows[pattern] += n
        for length, count in uses.items():
            left[length] -= n * count
            if not left[length]:
                del left[length]
    return rows


def _fullest_row(left: dict[int, int], order: list[int], first: int, capacity: int) -> Pattern:
    """`first`, and the lengths that fill the row best with it, the earlier ones in `order` where there is a choice."""
    room = capacity - first
    # Bit s of sums[i]: some of the first i lengths add up to s. The search ends when some fill the room.
    sums, within_room = [1], (1 << room + 1) - 1
    for length in order:
        reached, copies = sums[-1], min(left[length] - (length == first), room // length)
        while copies:
            step = (copies + 1) // 2  # every number of copies is a sum of such steps
            reached |= reached << step * length
            copies -= step
        sums.append(reached & within_room)
        if reached >> room & 1:
            break
    best, pattern = sums[-1].bit_length() - 1, [first]
    for length, before in zip(reversed(order[: len(sums) - 1]), reversed(sums[:-1]), strict=True):
        while not before >> best & 1:
            best -= length
            pattern.append(length)
    return tuple(sorted(pattern, reverse=True))
