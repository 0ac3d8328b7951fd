"""A prepared split and a packing plan → batches, with grain."""

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Float32, Int, Int32

from tinysft_jax.console import RunError, reason
from tinysft_jax.data.packing import Packing, PackingPlan
from tinysft_jax.data.store import PreparedData, Split
from tinysft_jax.data.workers import STOP_SIGNALS, stop_signals_blocked

# tokens int32; segment_ids int32, from 1 in each row, 0: padding; positions int32, from 0 in each conversation;
# targets int32, the next token; weights float32, 0 where the target is not supervised.
Batch = dict[str, Int32[np.ndarray, "B T"] | Float32[np.ndarray, "B T"]]

READ_AHEAD = 4  # batches of each worker

# Workers pass batches in shared memory. When one is killed, Python's resource tracker frees it, and would warn.
_QUIET_TRACKER = "ignore:resource_tracker"


class BatchSource:
    """Random access to the batches of an epoch (a grain data source): batch i is a pure function of the plan.

    The last batch of an epoch is padded with empty rows, so each conversation occurs once an epoch. `batch_size` is the
    rows of the global batch. `part`, (index, count), says which of how many equal parts to build: each process has one.
    Raises: UserError, for a batch with a token id outside the vocabulary.
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
        rows = [map(self.split.conversation, self.segments_of(row).tolist()) for row in self.rows(index)]
        batch = make_batch(rows, self.seq_len)
        self.split.check_ids(batch["tokens"])
        return batch

    def rows(self, index) -> range:
        """The plan's rows in this part of batch `index`; those beyond the plan's end are empty."""
        return range(self.batch_size * int(index), self.batch_size * (int(index) + 1))[self.part]

    def segments_of(self, row: int) -> Int[np.ndarray, " segments"]:
        """The conversations of a row, in the order of its segments; those of an item are side by side."""
        return self.split.conversations_of(self.plan.row(row) if row < len(self.plan) else self.plan.order[:0])


def make_batch(rows: Sequence[Iterable[tuple[np.ndarray, np.ndarray]]], seq_len: int) -> Batch:
    """The batch of these rows, each of conversations: their ids, and which of them are supervised.

    The target of token i is token i + 1 of the same conversation.
    """
    shape = (len(rows), seq_len)
    batch = {key: np.zeros(shape, np.int32) for key in ("tokens", "segment_ids", "positions", "targets")}
    batch["weights"] = np.zeros(shape, np.float32)
    for place, conversations in enumerate(rows):
        start = 0
        for segment, (ids, supervised) in enumerate(conversations, 1):
            end = start + len(ids)
            batch["tokens"][place, start:end] = ids
            batch["segment_ids"][place, start:end] = segment
            batch["positions"][place, start:end] = np.arange(len(ids))
            batch["targets"][place, start : end - 1] = ids[1:]
            batch["weights"][place, start : end - 1] = supervised[1:]
            start = end
    return batch


def by_segment(values: list[np.ndarray], n_segments: int) -> np.ndarray:
    """`[rows, n_segments]`: of each row the values of its segments, then 0."""
    return np.stack([np.pad(row, (0, n_segments - len(row))) for row in values])


def epoch_batches(source: BatchSource, start: int = 0, num_workers: int = 0) -> Iterator[Batch]:
    """Yields the batches of an epoch from batch `start` on; they don't depend on `num_workers` (0: a thread).

    Raises: RunError, if a worker dies, or the data can't be read.
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
            with stop_signals_blocked():  # the first call starts the workers, which inherit the mask
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch
    except (RuntimeError, OSError, MemoryError, EOFError) as error:  # grain's, when a worker dies
        raise RunError(
            f"the data can't be read: {reason(error)}; if memory was short, choose a smaller data.num_workers"
        ) from None
    finally:
        iterator.close()  # ends the workers


def _prepare_worker(worker_index: int, worker_count: int) -> None:
    """Lets a worker end when it is told to, or with its parent."""
    os.setpgrp()  # Ctrl-C is for the parent
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


def batches(
    data_dir: str | Path, split: str = "train", batch_size: int = 8, seq_len: int = 1024, seed: int = 0, epoch: int = 0
) -> Iterator[Batch]:
    """The batches of one epoch of a prepared data set: dicts of `[batch_size, seq_len]` arrays; see `Batch`.

    Raises: UserError, if the data can't be read, or a conversation (of pairs, both together) is longer than `seq_len`.
    """
    data = PreparedData(data_dir).split(split)
    plan = Packing(data.item_lengths, seq_len, data.item_noun).epoch(seed, epoch)
    return epoch_batches(BatchSource(data, plan, batch_size, seq_len))
