"""Packing as a plan: which conversations share a row is settled for an epoch before its first row is read.

A conversation is never cut, and a row's content depends on (lengths, row length, seed, epoch) alone. So the position
of a run in its data is one number, the rows it has read.
"""

import hashlib
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt32

from tinysft_jax.data.cutting_stock import cut
from tinysft_jax.errors import RunError, UserError
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
