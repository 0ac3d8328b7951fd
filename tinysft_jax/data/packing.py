"""Packing as a plan: which conversations share a row is settled for an epoch before its first row is read.

A conversation is never cut, and a row's content depends on (lengths, row length, seed, epoch) alone. So the position
of a run in its data is one number, the rows it has read.
"""

import dataclasses

import numpy as np
from jaxtyping import Int, UInt32

from tinysft_jax.errors import UserError

# Conversations that are packed together: rows fill better in larger windows (the rest that no conversation fits is
# shared by more rows), while the random order of an epoch is kept from one window to the next.
WINDOW = 16_384


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """The rows of one epoch.

    Attributes:
      order: conversation indices, row after row.
      row_starts: where each row begins in `order`; one more entry than rows.
    """

    order: UInt32[np.ndarray, " conversations"]
    row_starts: Int[np.ndarray, " rows_and_1"]

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> UInt32[np.ndarray, " k"]:
        """The conversations of row `index`."""
        return self.order[self.row_starts[index] : self.row_starts[index + 1]]


def plan_epoch(
    lengths: Int[np.ndarray, " n"],
    seq_len: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    among: Int[np.ndarray, " m"] | None = None,
) -> PackingPlan:
    """Assigns every conversation to exactly one row.

    Conversations are shuffled, cut into windows, and each window is packed best-fit in decreasing order of length;
    then the rows of a window are shuffled.

    Args:
      lengths: each conversation's tokens.
      seq_len: tokens a row.
      seed: of the shuffle.
      epoch: each has its own order.
      shuffle: False: windows in the given order, as evaluation reads them.
      among: the conversations to pack; None: all.

    Raises:
      UserError: if a conversation is longer than a row.
    """
    chosen = np.arange(len(lengths), dtype=np.uint32) if among is None else np.asarray(among, np.uint32)
    if len(chosen) and lengths[chosen].max() > seq_len:
        raise UserError(
            f"data.seq_len is {seq_len}, but the longest conversation has {lengths[chosen].max()} tokens; "
            "raise data.seq_len or prepare with a smaller --max_tokens"
        )
    random = np.random.default_rng([seed, epoch])
    if shuffle:
        chosen = random.permutation(chosen)
    order, row_lengths = np.empty_like(chosen), []
    for start in range(0, len(chosen), WINDOW):
        window = chosen[start : start + WINDOW]
        rows = _best_fit(lengths[window], seq_len)
        n_rows = int(rows.max()) + 1
        if shuffle:
            rows = random.permutation(n_rows)[rows]
        order[start : start + WINDOW] = window[np.argsort(rows, kind="stable")]
        row_lengths.append(np.bincount(rows, minlength=n_rows))
    row_starts = np.cumsum(np.concatenate([[0], *row_lengths]))
    return PackingPlan(order, row_starts)


def _best_fit(lengths: Int[np.ndarray, " n"], seq_len: int) -> Int[np.ndarray, " n"]:
    """Best-fit decreasing: each conversation goes to the fullest row that still has room for it.

    The rows with a given room are a stack; bit r of one integer says whether stack r has any. So the best row is the
    lowest bit at or above the conversation's length, and a conversation costs a few machine operations.

    Returns:
      Each conversation's row.
    """
    rows = np.empty(len(lengths), np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms, n_rows = 0, 0
    descending = np.argsort(-lengths.astype(np.int64), kind="stable")
    for index, length in zip(descending.tolist(), lengths[descending].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            stack = rows_with_room[room]
            row = stack.pop()
            if not stack:
                rooms ^= 1 << room
        else:
            row, room = n_rows, seq_len
            n_rows += 1
        rows[index] = row
        if left := room - length:
            rows_with_room[left].append(row)
            rooms |= 1 << left
    return rows
