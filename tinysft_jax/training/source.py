"""Where a run's batches come from: its data sets, as a function of the step."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from tinysft_jax.console import UserError
from tinysft_jax.data.batches import Batch, by_segment, epoch_batches, make_batch
from tinysft_jax.data.mixture import Part, Schedule
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import Split

WINDOW = 100  # batches over which the shares of a mixture are exact


class PartRows(NamedTuple):
    """The packed rows of a part, epoch after epoch."""

    split: Split
    packing: Packing
    per_epoch: int  # rows: the packing's, and then empty ones


class StepBatches:
    """Random access to the batches of a run by step (a grain data source)."""

    def __init__(self, parts: list[PartRows], schedule: Schedule, config: ConfigDict, own: slice, n_steps: int):
        self._parts, self._schedule, self._own, self._n_steps = parts, schedule, own, n_steps
        self._seed, self._batch_size, self._seq_len = config.seed, config.train.batch_size, config.data.seq_len
        self.reference: list[np.ndarray] = []  # of each part, the reference's log-likelihood of each answer
        self.n_segments = 0  # of a row of them

    def __len__(self) -> int:
        return self._n_steps

    def __getitem__(self, step) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        places = self.places(int(step))
        rows = [[self._parts[part].split.conversation(i) for i in members.tolist()] for part, members in places]
        batch = make_batch(rows, self._seq_len)
        for number, part in enumerate(self._parts):
            part.split.check_ids(batch["tokens"][[place for place, (of, _) in enumerate(places) if of == number]])
        if self.reference:
            values = [self.reference[part][members] for part, members in places]
            batch["reference"] = by_segment(values, self.n_segments)
        return batch

    def places(self, step: int, everywhere: bool = False) -> list[tuple[int, np.ndarray]]:
        """The part and the conversations of each row of a step's batch; of this process's rows, or of all."""
        first = step * self._batch_size
        rows = range(first, first + self._batch_size)[slice(None) if everywhere else self._own]
        return [self._place(row) for row in rows]

    def _place(self, row: int) -> tuple[int, np.ndarray]:
        number, row = self._schedule.place(row)
        split, packing, per_epoch = self._parts[number]
        epoch, row = divmod(row, per_epoch)
        items = packing.epoch(self._seed, epoch).row(row) if row < packing.n_rows else np.zeros(0, np.uint32)
        return number, split.conversations_of(items)


class TrainingBatches(contextlib.AbstractContextManager):
    """A run's batches, of which this process builds its part.

    Called with the parameters and a step, counted from 0, it returns the batch that this step trains on. Batches of
    data don't depend on the parameters. Those of the following steps are built meanwhile.
    """

    per_sample, accumulation, is_ahead = 1, None, True  # see `Rollouts`

    def __init__(self, config: ConfigDict, parts: list[Part], process_part: tuple[int, int]):
        batch_size, rows = config.train.batch_size, []
        self._parts, self._workers = parts, config.data.num_workers
        for part in parts:
            split = part.data.split("train")
            if not len(split):
                raise UserError(f"{part.data.directory} has no training conversation")
            packing = Packing(split.item_lengths, config.data.seq_len, split.item_noun)
            # Alone, each epoch of a data set begins with a batch.
            per_epoch = packing.n_rows if part.name else -(-packing.n_rows // batch_size) * batch_size
            rows.append(PartRows(split, packing, per_epoch))
        self.packings, self._batch_size = [each.packing for each in rows], batch_size
        longest, rows_of_longest = max(zip(parts, rows, strict=True), key=lambda each: each[1].packing.n_rows)
        epoch_rows = -(-rows_of_longest.packing.n_rows // longest.share)
        epochs, steps_per_epoch = config.train.num_epochs, -(-epoch_rows // batch_size)
        self.total_steps = config.train.max_steps if epochs is None else epochs * steps_per_epoch
        index, count = process_part
        own = slice(index * batch_size // count, (index + 1) * batch_size // count)
        self.schedule = Schedule([part.share for part in parts], WINDOW * batch_size)
        self.source = StepBatches(rows, self.schedule, config, own, self.total_steps)
        self._next: int = -1
        self._batches: Iterator[Batch] | None = None

    def __call__(self, params: Any, step: int) -> Batch:
        if self._batches is None or step != self._next:
            self.close()
            self._batches = epoch_batches(self.source, step, self._workers)
        self._next = step + 1
        return next(self._batches)

    def close(self) -> None:
        """Ends what builds batches."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def metrics(self, step: int) -> dict[str, int]:
        """Of a mixture, the rows of each part in the steps up to this one."""
        counts = self.schedule.rows_before(step * self._batch_size)
        return {f"rows/{part.name}": n for part, n in zip(self._parts, counts, strict=True) if part.name}

    def conversations(self, step: int) -> list[int | str]:
        """The conversations in the batch of a step, counted from 1; in a mixture with the names of their sets."""
        places = self.source.places(step - 1, everywhere=True)
        names = [f"{part.name}:" if part.name else "" for part in self._parts]
        found = [(names[part], conversation) for part, members in places for conversation in members.tolist()]
        return [f"{name}{conversation}" if name else conversation for name, conversation in found]
