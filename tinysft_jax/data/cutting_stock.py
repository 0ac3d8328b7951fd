"""Which lengths share a row, so that few rows hold them all: cutting stock.

Millions of conversations have no more than some hundred different lengths. So rows are planned on the histogram of
lengths: a pattern is a way to fill a row, and the question is how many rows to make by each pattern.
"""

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64, Int64
from scipy.optimize import linprog
from scipy.sparse import csc_array

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
