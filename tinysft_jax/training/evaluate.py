"""Validation loss, for each task and over all: every conversation once, every supervised token with equal weight."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinysft_jax.data.dataset import PreparedData
from tinysft_jax.data.packing import plan_epoch
from tinysft_jax.data.pipeline import BatchSource, epoch_batches
from tinysft_jax.sharding import global_batch

ALL_TASKS = "sft/val_loss"


class Evaluator:
    """The validation split, packed task by task.

    Args:
      data: the prepared data set.
      batch_size: rows of the global batch.
      seq_len: tokens a row.
      max_batches: of each task; 0: all.
      part: which of how many parts of each batch this process reads.
    """

    def __init__(
        self, data: PreparedData, batch_size: int, seq_len: int, max_batches: int = 0, part: tuple[int, int] = (0, 1)
    ):
        split = data.split("valid")
        self._max_batches = max_batches
        self._sources = {}
        for task_id, name in enumerate(data.tasks):
            if len(members := np.flatnonzero(split.tasks == task_id)):
                plan = plan_epoch(split.lengths, seq_len, among=members)
                self._sources[name] = BatchSource(split, plan, batch_size, seq_len, part)

    def losses(
        self,
        eval_step: Callable[[Any, dict[str, jax.Array]], Any],
        params: Any,
        mesh: Mesh,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Mean negative log-likelihood of a supervised token, in nats.

        Args:
          eval_step: jitted, of `make_eval_step`.
          params: of the model.
          mesh: where the batches go.
          should_stop: asked before each batch; once it says yes, there is no result.

        Returns:
          `sft/val_loss`, and `sft/val_loss/<task>` where there are several tasks. Empty if it was stopped, or no
          token is supervised.
        """
        sums: dict[str, list[Any]] = {}
        for task in self._sources:
            for batch in self._batches(task, mesh):
                if should_stop():
                    return {}
                sums.setdefault(task, []).append(eval_step(params, batch))
        # The sums stayed on the device until all was dispatched, and are added up in float64.
        totals = {task: np.sum(np.array(jax.device_get(pairs), np.float64), axis=0) for task, pairs in sums.items()}
        totals = {f"{ALL_TASKS}/{task}": total for task, total in totals.items() if total[1]}
        if not totals:
            return {}
        nll, weight = np.sum(list(totals.values()), axis=0)
        by_task = {key: float(total[0] / total[1]) for key, total in totals.items()}
        return {ALL_TASKS: float(nll / weight), **(by_task if len(by_task) > 1 else {})}

    def _batches(self, task: str, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
        for index, batch in enumerate(epoch_batches(self._sources[task])):
            if self._max_batches and index == self._max_batches:
                return
            yield global_batch(mesh, batch)
