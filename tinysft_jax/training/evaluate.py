"""Validation loss, for each task and over all: every conversation once, every supervised token with equal weight."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinysft_jax.data.dataset import PreparedData
from tinysft_jax.data.packing import plan_epoch
from tinysft_jax.data.pipeline import Batch, BatchSource, epoch_batches
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
                plan = plan_epoch(split.lengths, seq_len, shuffle=False, among=members)
                self._sources[name] = BatchSource(split, plan, batch_size, seq_len, part)

    def __bool__(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self._sources)

    def losses(self, eval_step: Callable[[Any, Batch], Any], params: Any, mesh: Mesh) -> dict[str, float]:
        """Mean negative log-likelihood of a supervised token, in nats.

        Args:
          eval_step: jitted, of `make_eval_step`.
          params: of the model.
          mesh: where the batches go.

        Returns:
          `sft/val_loss`, and `sft/val_loss/<task>` where there are several tasks.
        """
        # The sums stay on the device until all is dispatched, and are added up in float64.
        sums = {task: [eval_step(params, batch) for batch in self._batches(task, mesh)] for task in self._sources}
        totals = {task: np.sum(np.array(jax.device_get(pairs), np.float64), axis=0) for task, pairs in sums.items()}
        nll, weight = np.sum(list(totals.values()), axis=0)
        losses = {ALL_TASKS: _mean(nll, weight)}
        if len(totals) > 1:
            losses |= {f"{ALL_TASKS}/{task}": _mean(*total) for task, total in totals.items()}
        return losses

    def _batches(self, task: str, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
        for index, batch in enumerate(epoch_batches(self._sources[task])):
            if self._max_batches and index == self._max_batches:
                return
            yield global_batch(mesh, batch)


def _mean(nll: float, weight: float) -> float:
    return float(nll / weight) if weight else math.nan
