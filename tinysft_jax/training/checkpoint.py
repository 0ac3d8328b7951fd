"""Checkpoints of a run, and its best model so far."""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from tinysft_jax import files
from tinysft_jax.errors import RunError
from tinysft_jax.model_directory import ModelDescription, Params, write_model
from tinysft_jax.training.step import TrainState


class Checkpoints:
    """The newest checkpoints of a work directory (`checkpoints/<step>/`), written in the background.

    Args:
      workdir: the work directory.
      keep: how many to keep.
    """

    def __init__(self, workdir: Path, keep: int):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of its every step
        policies = ocp.training
        self._checkpointer = ocp.training.Checkpointer(
            (workdir / "checkpoints").resolve(),
            # The loop decides when to save.
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest finished checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Starts to write; returns once the state has been copied to host memory.

        Args:
          step: steps done.
          state: may be donated afterwards.
          progress: JSON; what a run that continues must know besides.
        """
        if self.latest_step != step:
            self._checkpointer.save_async(step, state, custom_metadata=progress)

    def restore(self, step: int, state: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint, whatever mesh wrote it.

        Args:
          step: which.
          state: arrays or shapes like those saved.
          shardings: where each array shall lie.

        Returns:
          The state, and the `progress` that was saved with it.

        Raises:
          RunError: if it can't be read.
        """
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        try:
            return self._checkpointer.load(step, wanted), self._checkpointer.metadata(step).custom_metadata
        except (ValueError, OSError, KeyError) as error:
            reason = str(error).splitlines()[0][:300]
            raise RunError(f"can't read checkpoint {step} of {self._checkpointer.directory}: {reason}") from None

    def wait(self) -> None:
        """Returns when all that was started is written."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits, and lets go of orbax's threads."""
        self._checkpointer.close()


def save_best(workdir: Path, step: int, params: Params, description: ModelDescription) -> None:
    """Writes `models/<step>`, points `model` at it, and removes the model it pointed at before.

    A reader of `model` sees the old model or the new one, whole, at any moment.
    """
    models = workdir / "models"
    directory, aside = models / str(step), models / f".{step}.partial"
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    write_model(aside, params, description)
    if first:
        files.replace(aside, directory)
        files.link(workdir / "model", directory)
        for other in models.iterdir():
            if other != directory:
                shutil.rmtree(other, ignore_errors=True)
