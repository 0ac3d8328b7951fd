"""Validation loss by task and over all tasks, on a fixed sample of packed rows; every supervised token counts once."""

from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinysft_jax.data.batches import BatchSource, epoch_batches
from tinysft_jax.data.packing import plan_epoch
from tinysft_jax.data.store import PreparedData
from tinysft_jax.parameters import Params
from tinysft_jax.sharding import batch_shards, global_batch, process_part
from tinysft_jax.training.log import ALL_TASKS

# Upper limits, in percent of the rows that a run trains on: all periodic evaluations together, and the final one.
# An evaluated row needs no backward pass: about a third of the FLOPs.
PERIODIC_PERCENT = 7
FINAL_PERCENT = 3


class Evaluator:
    """Evaluates the first rows of a shuffled packing plan of the validation split, which has `n_rows` in all.

    The plan depends on data, row length and seed alone, so the sample is the same at every evaluation, after a resume,
    and on any devices; each conversation is in it with the same probability; a larger sample contains a smaller one.
    """

    def __init__(self, data: PreparedData, config: ConfigDict, mesh: Mesh):
        self._split, self._tasks, self._mesh = data.split("valid"), data.tasks, mesh
        self._seq_len = config.data.seq_len
        self._plan = plan_epoch(self._split.lengths, self._seq_len, config.seed)
        self.n_rows, shards = len(self._plan), batch_shards(mesh)
        self._batch_size = -(-min(config.train.eval_batch_size, max(1, self.n_rows)) // shards) * shards

    def losses(
        self, eval_step: Callable, params: Params, n_rows: int, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Mean negative log-likelihood of a supervised token, in nats, over the first `n_rows`, as metrics.

        Several tasks have one each besides. Empty if no token is supervised, or if `should_stop` before some batch.
        """
        sums = [np.zeros((2, len(self._tasks)))]
        for batch in self._batches(n_rows):
            if should_stop():
                return {}
            sums.append(eval_step(params, batch))
        # The sums stay on the device until all batches are dispatched; they are added in float64.
        nll, weight = np.sum(np.array(jax.device_get(sums), np.float64), axis=0)
        if not weight.any():
            return {}
        by_task = {f"{ALL_TASKS}/{self._tasks[i]}": float(nll[i] / weight[i]) for i in np.flatnonzero(weight)}
        return {ALL_TASKS: float(nll.sum() / weight.sum()), **(by_task if len(by_task) > 1 else {})}

    def _batches(self, n_rows: int) -> Iterator[dict[str, jax.Array]]:
        plan = self._plan.first(n_rows)
        source = BatchSource(self._split, plan, self._batch_size, self._seq_len, process_part(self._mesh))
        for index, batch in enumerate(epoch_batches(source)):
            # Segment s of a row is the row's s-th conversation; rows beyond the plan are empty.
            first, segments = plan.row_starts[np.minimum(source.rows(index), len(plan))], batch["segment_ids"]
            conversations = plan.order[first[:, None] + segments - 1]
            tasks = np.where(segments > 0, self._split.tasks[conversations], 0).astype(np.int32)
            yield global_batch(self._mesh, batch | {"tasks": tasks})


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
