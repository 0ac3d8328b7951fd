"""Validation loss, for each task and over all, of a fixed sample: every supervised token with equal weight."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32
from ml_collections import ConfigDict

from tinysft_jax.data.batches import Batch, BatchSource, epoch_batches
from tinysft_jax.data.packing import plan_epoch
from tinysft_jax.data.store import PreparedData
from tinysft_jax.sharding import batch_shards, global_batch, process_part
from tinysft_jax.training.log import ALL_TASKS

FINAL_EVALS = ("sample", "all")  # what `train.final_eval` may be

# The most that a run evaluates, as shares of the rows that it trains on: all of its periodic evaluations together, and
# the final one. A row that is evaluated costs about a third of one that is trained on, which has a backward pass too.
PERIODIC_PERCENT = 7
FINAL_PERCENT = 3


class Evaluator:
    """A fixed sample of the validation split, packed as training rows are.

    The sample is the first rows of a plan of the whole split. A plan shuffles its rows, and draws the conversations of
    each length for them at random. So a conversation is in the sample with the same probability as any other, a larger
    sample holds a smaller one, the largest has each conversation once, and the number of rows is exact. The plan
    depends on the data, the row length and the seed alone: the sample is the same at every evaluation, after a resume,
    and on any devices.

    Attributes:
      n_rows: of the whole split.

    Args:
      data: the prepared data set.
      seq_len: tokens a row.
      batch_size: rows of the global batch, at least; rounded up to what the mesh divides evenly.
      seed: of the sample.
      mesh: where the batches go.
    """

    def __init__(self, data: PreparedData, seq_len: int, batch_size: int, seed: int, mesh: Mesh):
        self._split, self._tasks, self._seq_len, self._mesh = data.split("valid"), data.tasks, seq_len, mesh
        self._plan = plan_epoch(self._split.lengths, seq_len, seed)
        self.n_rows, shards = len(self._plan), batch_shards(mesh)
        self._batch_size = -(-min(batch_size, max(1, self.n_rows)) // shards) * shards

    def describe(self, periodic: int, final: int, times: int) -> str:
        """A line that says what a run evaluates.

        Args:
          periodic: rows of each periodic evaluation.
          final: rows of the final one.
          times: how many periodic evaluations there are.
        """
        if not self.n_rows:
            return "validation: none, the data has no validation conversation; the last model will be kept"
        seen = [f"{n_rows:,} rows with {self._plan.row_starts[n_rows]:,}" for n_rows in (periodic, final)]
        return (
            f"validation: {seen[0]} of {len(self._split):,} conversations, {times:,} times; "
            f"the kept model at the end: {seen[1]}"
        )

    def losses(
        self,
        eval_step: Callable[[Any, dict[str, jax.Array]], Any],
        params: Any,
        n_rows: int,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Mean negative log-likelihood of a supervised token, in nats.

        Args:
          eval_step: jitted, of `make_eval_step`.
          params: of the model.
          n_rows: of the sample.
          should_stop: asked before each batch; once it says yes, there is no result.

        Returns:
          `sft/val_loss`, and `sft/val_loss/<task>` where there are several tasks. Empty if it was stopped, or no
          token is supervised.
        """
        sums = [np.zeros((2, len(self._tasks)))]
        for batch in self._batches(n_rows):
            if should_stop():
                return {}
            sums.append(eval_step(params, batch))
        # The sums stayed on the device until all was dispatched, and are added up in float64.
        nll, weight = np.sum(np.array(jax.device_get(sums), np.float64), axis=0)
        if not weight.any():
            return {}
        by_task = {f"{ALL_TASKS}/{self._tasks[i]}": float(nll[i] / weight[i]) for i in np.flatnonzero(weight)}
        return {ALL_TASKS: float(nll.sum() / weight.sum()), **(by_task if len(by_task) > 1 else {})}

    def _batches(self, n_rows: int) -> Iterator[dict[str, jax.Array]]:
        plan = self._plan.first(n_rows)
        source = BatchSource(self._split, plan, self._batch_size, self._seq_len, process_part(self._mesh))
        for index, batch in enumerate(epoch_batches(source)):
            yield global_batch(self._mesh, batch | {"tasks": self._task_ids(source, index, batch)})

    def _task_ids(self, source: BatchSource, index: int, batch: Batch) -> Int32[np.ndarray, "B T"]:
        """The task that each position belongs to; 0 where nothing is."""
        segments, plan = batch["segment_ids"], source.plan
        # Segment s of a row is the row's s-th conversation; a row after the last one has none.
        first = plan.row_starts[np.minimum(source.rows(index), len(plan))]
        conversations = plan.order[first[:, None] + segments - 1]
        return np.where(segments > 0, self._split.tasks[conversations], 0).astype(np.int32)


def evaluation_rows(
    config: ConfigDict, total_steps: int, split_rows: int, rows_before: int | None = None
) -> tuple[int, int]:
    """How many rows of the validation split a run evaluates.

    Args:
      config: of `configs/`.
      total_steps: of the run.
      split_rows: of the validation split.
      rows_before: of each periodic evaluation of a run that continues: unless a number is asked for, that stays, as
        losses of two samples can't be compared.

    Returns:
      The rows of each periodic evaluation, and those of the final one.
    """
    train = config.train
    trained_rows, a_batch = total_steps * train.batch_size, train.eval_batch_size
    share = trained_rows * PERIODIC_PERCENT // 100 // n_evaluations(total_steps, train.eval_interval)
    periodic = train.eval_batches * a_batch or rows_before or max(share // a_batch, 1) * a_batch
    final = max(trained_rows * FINAL_PERCENT // 100 // a_batch * a_batch, periodic)
    return min(periodic, split_rows), split_rows if train.final_eval == "all" else min(final, split_rows)


def n_evaluations(total_steps: int, eval_interval: int) -> int:
    """Before the first step, every `eval_interval` steps, and after the last."""
    return 1 + -(-total_steps // eval_interval)
