"""From a prepared split and a packing plan to batches, through grain."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Float32, Int32

from tinysft_jax.console import RunError, reason
from tinysft_jax.data.packing import PackingPlan, plan_epoch
from tinysft_jax.data.store import PreparedData, Split
from tinysft_jax.data.workers import STOP_SIGNALS, stop_signals_blocked

# `[B, T]` arrays: tokens int32; segment_ids int32, 1.. in each row, 0 for padding; positions int32, from 0 in every
# conversation; targets int32, the next token; weights float32, 0 where nothing is supervised.
Batch = dict[str, Int32[np.ndarray, "B T"] | Float32[np.ndarray, "B T"]]

# Batches that a worker keeps ready.
READ_AHEAD = 4

# Workers hand over batches in shared memory. What a killed one leaves there, Python's tracker of such things removes;
# that it also complains is of no use to anyone.
_QUIET_TRACKER = "ignore:resource_tracker"


class BatchSource:
    """Random access to the batches of an epoch (a grain data source): batch i is a pure function of the plan.

    The last batch of an epoch is filled up with empty rows, so each conversation occurs once an epoch.

    Args:
      split: the conversations.
      plan: the epoch's rows.
      batch_size: rows of the global batch.
      seq_len: tokens a row.
      part: which of how many equal parts of each batch to build; one for each process.

    Raises:
      UserError: for a batch with a token id that is not of the vocabulary.
    """

    def __init__(self, split: Split, plan: PackingPlan, batch_size: int, seq_len: int, part: tuple[int, int] = (0, 1)):
        self.split, self.plan, self.batch_size, self.seq_len = split, plan, batch_size, seq_len
        index, count = part
        self.part = slice(index * batch_size // count, (index + 1) * batch_size // count)

    def __len__(self) -> int:
        return -(-len(self.plan) // self.batch_size)

    def __getitem__(self, index) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        rows = self.rows(index)
        batch = _empty_batch(len(rows), self.seq_len)
        for place, row in enumerate(rows):
            if row < len(self.plan):
                _fill_row(batch, place, [self.split.conversation(i) for i in self.plan.row(row).tolist()])
        self.split.check_ids(batch["tokens"])
        return batch

    def rows(self, index) -> range:
        """The plan's rows in batch `index`, this part of it; those that the plan doesn't have are empty."""
        return range(self.batch_size * int(index), self.batch_size * (int(index) + 1))[self.part]


def epoch_batches(source: BatchSource, start: int = 0, num_workers: int = 0) -> Iterator[Batch]:
    """Reads an epoch's batches ahead.

    Args:
      source: the epoch.
      start: the first batch to read; a resumed run passes how many it has read.
      num_workers: processes that build batches; 0: threads of this one. The batches are the same.
    """
    dataset = grain.MapDataset.source(source)[start:]
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD))
    if num_workers:
        options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=READ_AHEAD)
        dataset = dataset.mp_prefetch(options, _prepare_worker)
        if _QUIET_TRACKER not in sys.warnoptions:
            sys.warnoptions.append(_QUIET_TRACKER)
        with stop_signals_blocked():
            resource_tracker.ensure_running()
    iterator = iter(dataset)
    try:
        while True:
            with stop_signals_blocked():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch
    # What grain says of a worker that is gone, or raises in its place.
    except (RuntimeError, OSError, MemoryError, EOFError) as error:
        raise RunError(
            f"the data can't be read on: {reason(error)}; if memory was short, choose a smaller data.num_workers"
        ) from None
    finally:
        iterator.close()  # ends the workers


def batches(
    data_dir: str | Path, split: str = "train", batch_size: int = 8, seq_len: int = 1024, seed: int = 0, epoch: int = 0
) -> Iterator[Batch]:
    """The batches of one epoch of a prepared data set.

    Args:
      data_dir: what `prepare` wrote.
      split: "train" or "valid".
      batch_size: rows a batch.
      seq_len: tokens a row.
      seed: of the order.
      epoch: each has its own order.

    Yields:
      Dicts of `[batch_size, seq_len]` arrays; see `Batch`.

    Raises:
      UserError: if the data can't be read, or a conversation is longer than `seq_len`.
    """
    data = PreparedData(data_dir).split(split)
    return epoch_batches(BatchSource(data, plan_epoch(data.lengths, seq_len, seed, epoch), batch_size, seq_len))


def _prepare_worker(worker_index: int, worker_count: int) -> None:
    """A worker ends when it is told to, or when its parent is gone however that ended."""
    os.setpgrp()  # what is sent to the whole group (Ctrl-C, say) is the parent's business
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


def _empty_batch(n_rows: int, seq_len: int) -> Batch:
    keys = ("tokens", "segment_ids", "positions", "targets")
    batch = {key: np.zeros((n_rows, seq_len), np.int32) for key in keys}
    return batch | {"weights": np.zeros((n_rows, seq_len), np.float32)}


def _fill_row(batch: Batch, row: int, conversations: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Lays conversations side by side; position i's target is token i + 1, within its conversation only."""
    start = 0
    for segment, (ids, supervised) in enumerate(conversations, 1):
        end = start + len(ids)
        batch["tokens"][row, start:end] = ids
        batch["segment_ids"][row, start:end] = segment
        batch["positions"][row, start:end] = np.arange(len(ids))
        batch["targets"][row, start : end - 1] = ids[1:]
        batch["weights"][row, start : end - 1] = supervised[1:]
        start = end
