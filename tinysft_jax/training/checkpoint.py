"""Checkpoints of a run, and its best model so far."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from tinysft_jax import files, processes
from tinysft_jax.errors import RunError, reason
from tinysft_jax.model_directory import ModelDescription, Params, write_model
from tinysft_jax.training.step import TrainState


class Checkpoints:
    """The newest checkpoints of a work directory (`checkpoints/<step>/`), written in the background.

    Args:
      workdir: the work directory.
      keep: how many to keep.
    """

    def __init__(self, workdir: Path, keep: int):
        self._directory = workdir / "checkpoints"
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of its every step
        policies = ocp.training
        self._checkpointer = ocp.training.Checkpointer(
            self._directory.resolve(),
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
            with self._one_line("write"):
                self._checkpointer.save_async(step, state, custom_metadata=progress)

    def progress(self, step: int) -> dict[str, Any]:
        """What was saved with a checkpoint.

        Raises:
          RunError: if it can't be read.
        """
        with self._one_line("read"):
            return self._checkpointer.metadata(step).custom_metadata

    def restore(self, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
        """Reads a checkpoint, whatever mesh wrote it.

        Args:
          step: which.
          shapes: of what was saved.
          shardings: where each array shall lie.

        Raises:
          RunError: if it can't be read.
        """
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        with self._one_line("read"):
            return self._checkpointer.load(step, wanted)

    def wait(self) -> None:
        """Returns when all that was started is written.

        Raises:
          RunError: if something could not be.
        """
        with self._one_line("write"):
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits, and lets go of orbax's threads."""
        with self._one_line("write"):
            self._checkpointer.close()

    @contextlib.contextmanager
    def _one_line(self, verb: str) -> Iterator[None]:
        """Turns orbax's and tensorstore's errors into one line; errors of the background show up later."""
        try:
            yield
        except (ValueError, OSError, KeyError) as error:
            raise RunError(f"can't {verb} {self._directory}: {reason(error)}") from None


def save_best(workdir: Path, step: int, params: Params, description: ModelDescription) -> None:
    """Writes `models/<step>`, points `model` at it, and removes the model it pointed at before.

    A reader of `model` sees the old model or the new one, whole, at any moment.
    """
    models = workdir / "models"
    directory, aside = models / str(step), models / f".{step}.partial"
    first = processes.is_first()
    # Written already, if the run before was killed after it: the same steps, the same model.
    is_written = processes.first_decides(directory.exists())
    if first and not is_written:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    if not is_written:
        processes.barrier("directory of the best model")
        write_model(aside, params, description)
        processes.barrier("best model")
    if first:
        if not is_written:
            files.replace(aside, directory)
        files.link(workdir / "model", directory)
        for other in models.iterdir():
            if other != directory:
                shutil.rmtree(other, ignore_errors=True)
