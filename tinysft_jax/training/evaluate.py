"""Validation loss by task and over all tasks, on a fixed sample of packed rows; every supervised token counts once."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinysft_jax.data.batches import Batch, BatchSource, by_segment, epoch_batches
from tinysft_jax.data.mixture import Part
from tinysft_jax.data.packing import Packing, PackingPlan
from tinysft_jax.data.store import Split
from tinysft_jax.parameters import Params
from tinysft_jax.sharding import batch_shards, global_batch, process_part
from tinysft_jax.training.log import VAL, VAL_LOSS

# Upper limits, in percent of the rows that a run trains on: all periodic evaluations together, and the final one.
# An evaluated row needs no backward pass: about a third of the FLOPs.
PERIODIC_PERCENT = 7
FINAL_PERCENT = 3


class _Sample(NamedTuple):
    """The validation rows of a part of a mixture, or of the only data set, in random order."""

    name: str  # of the part
    share: Fraction
    tasks: list[str]
    split: Split
    plan: PackingPlan


class Evaluator:
    """Evaluates the first rows of a shuffled packing plan of the validation split, which has `n_rows` in all.

    The plan depends on data, row length and seed alone, so the sample is the same at every evaluation, after a resume,
    and on any devices; each item is in it with the same probability; a larger sample contains a smaller one. Of a
    mixture, each part has its share of the rows, as far as it has so many.

    `n_segments`: of a row, at most, also where one has `most_items`.
    """

    noun = "rows"  # what is evaluated

    def __init__(self, parts: list[Part], config: ConfigDict, mesh: Mesh, most_items: int = 1):
        self._mesh, self._seq_len, self._samples, self.packings = mesh, config.data.seq_len, [], []
        for part in parts:
            split = part.data.split("valid")
            self.packings.append(packing := Packing(split.item_lengths, self._seq_len, split.item_noun))
            plan = packing.epoch(config.seed)
            self._samples.append(_Sample(part.name, part.share, part.data.tasks, split, plan))
        self.n_rows, shards = sum(packing.n_rows for packing in self.packings), batch_shards(mesh)
        self.batch_size = -(-min(config.train.eval_batch_size, max(1, self.n_rows)) // shards) * shards
        self.n_tasks = max(len(sample.tasks) for sample in self._samples)
        most_items = max(most_items, *(packing.most_items for packing in self.packings))
        self.n_segments = parts[0].data.per_item * most_items
        self.reference: list[np.ndarray] = []  # of each part, what a batch has by segment; see `DPO`

    def losses(
        self, eval_step: Callable, params: Params, n_rows: int, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """The objective's loss and other figures over the first `n_rows`, as metrics: "val_loss" and so on.

        Several tasks have a loss each besides; of a mixture, so has each part, and the whole is weighted by the parts'
        shares. Empty if there is nothing to evaluate, or if `should_stop` before some batch.
        """
        found = []
        for number, (sample, rows) in enumerate(zip(self._samples, self.sizes(n_rows), strict=True)):
            sums: list[dict[str, jax.Array]] = []
            for batch in self._batches(number, rows):
                if should_stop():
                    return {}
                sums.append(eval_step(params, batch))
            # The sums stay on the device until all batches are dispatched.
            totals = _add_up(jax.device_get(sums))
            if totals and totals["normalizer"].any():
                found.append((sample, totals))
        return _metrics(found)

    def sizes(self, n_rows: int) -> list[int]:
        """How many of `n_rows` are of each part: their shares, where one has so many."""
        sizes = [0] * len(self._samples)
        for _ in range(min(n_rows, self.n_rows)):
            left = (i for i, sample in enumerate(self._samples) if sizes[i] < len(sample.plan))
            sizes[min(left, key=lambda i: (sizes[i] + 1) / self._samples[i].share)] += 1
        return sizes

    def _batches(self, number: int, n_rows: int) -> Iterator[Batch]:
        sample = self._samples[number]
        split, plan = sample.split, sample.plan.first(n_rows)
        for rows, batch in packed_batches(split, plan, self.batch_size, self._seq_len, self._mesh):
            batch["tasks"] = by_segment([split.tasks[row].astype(np.int32) for row in rows], self.n_segments)
            if self.reference:
                values = [self.reference[number][row] for row in rows]
                batch["reference"] = by_segment(values, self.n_segments)
            yield global_batch(self._mesh, batch)


def _add_up(sums: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The totals of all batches, in float64."""
    return {name: np.sum([of[name] for of in sums], axis=0, dtype=np.float64) for name in (sums[0] if sums else ())}


def _metrics(found: list[tuple[_Sample, dict[str, np.ndarray]]]) -> dict[str, float]:
    """The metrics of the samples' sums by task."""
    metrics, shares = {}, sum(sample.share for sample, _ in found)
    for sample, totals in found:
        normalizer, prefix = totals.pop("normalizer"), f"{sample.name}/" if sample.name else ""
        with_data, share = np.flatnonzero(normalizer), float(sample.share / shares)
        for name, sums in totals.items():
            mean = float(sums.sum() / normalizer.sum())
            metrics[VAL + name] = metrics.get(VAL + name, 0.0) + share * mean
            if sample.name:
                metrics[f"{VAL}{name}/{sample.name}"] = mean
        if len(with_data) > 1:
            of_tasks = {sample.tasks[i]: float(totals["loss"][i] / normalizer[i]) for i in with_data}
            metrics |= {f"{VAL_LOSS}/{prefix}{task}": loss for task, loss in of_tasks.items()}
    return metrics


def packed_batches(
    split: Split, plan: PackingPlan, batch_size: int, seq_len: int, mesh: Mesh
) -> Iterator[tuple[list[np.ndarray], Batch]]:
    """This process's part of a plan's batches, each with its rows' conversations; rows beyond the plan are empty."""
    source = BatchSource(split, plan, batch_size, seq_len, process_part(mesh))
    for index, batch in enumerate(epoch_batches(source)):
        yield [source.segments_of(row) for row in source.rows(index)], batch


def evaluation_rows(config: ConfigDict, total_steps: int, split_rows: int, rows_before: int = 0) -> tuple[int, int]:
    """Rows of each periodic evaluation, and of the final one.

    A resumed run keeps the number that it had, `rows_before`, unless `train.eval_batches` is set: losses of two samples
    can't be compared.
    """
    train = config.train
    trained_rows, batch = total_steps * train.batch_size, train.eval_batch_size
    share = trained_rows * PERIODIC_PERCENT // 100 // n_evaluations(total_steps, train.eval_interval)
    periodic = train.eval_batches * batch or rows_before or max(share // batch, 1) * batch
    final = max(trained_rows * FINAL_PERCENT // 100 // batch * batch, periodic)
    return min(periodic, split_rows), split_rows if train.final_eval == "all" else min(final, split_rows)


def n_evaluations(total_steps: int, eval_interval: int) -> int:
    """Before the first step, every `eval_interval` steps, and after the last."""
    return 1 + -(-total_steps // eval_interval)
