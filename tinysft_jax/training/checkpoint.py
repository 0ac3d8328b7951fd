"""Checkpoints of a run, and its best model so far."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from tinysft_jax import files, processes
from tinysft_jax.errors import RunError, reason
from tinysft_jax.model_directory import ModelDescription, Params, write_model
from tinysft_jax.quiet import ORBAX_ERRORS, quiet_orbax
from tinysft_jax.training.step import TrainState
from tinysft_jax.training.workdir import own

_NONE, _ALL_DAMAGED = -1, -2

# Names in checkpoints/: of what is finished, and of what is being written (also by orbax) or removed.
_FINISHED, _UNFINISHED = r"[0-9]+", r"\.[0-9]+\.(partial|old).*"
# Names in models/.
_MODELS = r"[0-9]+(\.before)?|\.[0-9]+\.partial"


class Checkpoints:
    """The newest checkpoints of a work directory, `checkpoints/<step>/`.

    Each is written aside in the background, by orbax, then its manifest, and then it is renamed: so what has a step's
    number for its name was finished, and what is not as its manifest says was damaged since. Orbax itself would not
    notice.

    Attributes:
      newest: the step of the newest checkpoint that is sound, or is being written; None as long as there is none.

    Args:
      workdir: the work directory; nothing is written before `clear`.
      keep: how many to keep.
    """

    def __init__(self, workdir: Path, keep: int):
        self._directory, self._keep = (workdir / "checkpoints").absolute(), keep
        self.newest: int | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # while it writes in the background as well

    def find_newest(self) -> str:
        """Finds the newest checkpoint that is as it was written.

        Returns:
          What is wrong with newer ones; empty if nothing is.

        Raises:
          RunError: if there are checkpoints, and all are damaged.
        """
        answer, damage = _NONE, []
        if processes.is_first():
            for step in reversed(self._steps()):
                fault = files.find_damage(self._path(step))
                answer = step if fault is None else _ALL_DAMAGED
                if fault is None:
                    break
                damage.append(f"checkpoint {step} is damaged: {fault}")
        answer = processes.first_decides(answer)
        if answer == _ALL_DAMAGED:
            raise RunError(
                f"no sound checkpoint in {self._directory}: {'; '.join(damage) or 'see process 0'}; put one back, or "
                "choose another --workdir to start over"
            )
        self.newest = None if answer == _NONE else answer
        return "; ".join(damage)

    def clear(self) -> None:
        """Makes the directory, and removes what is newer than the newest sound checkpoint, or was never finished.

        To be called by the first process alone.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        newest = _NONE if self.newest is None else self.newest
        newer = [path for path in own(self._directory, _FINISHED) if int(path.name) > newest]
        for path in [*newer, *own(self._directory, _UNFINISHED)]:
            shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Starts to write; returns once the state has been copied to host memory.

        Args:
          step: steps done.
          state: may be donated afterwards.
          progress: JSON; what a run that continues must know besides.

        Raises:
          RunError: if this one can't be written, or the one before could not.
        """
        if self.newest == step:
            return
        self._finish_writing()
        with self._one_line("write"):
            response = ocp.save_async(self._aside(step), state, custom_metadata=progress)
        self._writing = self._writer.submit(self._finish, step, response.result)
        self.newest = step

    def progress(self, step: int) -> Any:
        """What was saved with a checkpoint, as JSON; nobody has looked at it.

        Raises:
          RunError: if it can't be read.
        """
        with self._one_line("read"):
            return ocp.metadata(self._path(step)).custom_metadata

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
            return ocp.load(self._path(step), wanted)

    def wait(self) -> None:
        """Returns when what was started is finished; all processes call it.

        Raises:
          RunError: if it could not be.
        """
        self._finish_writing()
        # The first process alone finishes a checkpoint, and the others must not be gone before.
        processes.barrier("checkpoint finished")

    def close(self) -> None:
        """Waits, ends the thread, and gives back the room of what could not be finished."""
        try:
            self._finish_writing()
        finally:
            self._writer.shutdown()
            if processes.is_first():
                for path in own(self._directory, _UNFINISHED):
                    shutil.rmtree(path, ignore_errors=True)

    def _finish(self, step: int, written: Callable[[], None]) -> None:
        """The part of writing that is done in the background."""
        written()  # by all processes
        if processes.is_first():
            files.write_manifest(self._aside(step))
            self._aside(step).rename(self._path(step))
            for old in self._steps()[: -self._keep]:
                aside = self._directory / f".{old}.old"
                self._path(old).rename(aside)
                shutil.rmtree(aside, ignore_errors=True)

    def _finish_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing:
            with self._one_line("write"):
                writing.result()

    def _steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(int(path.name) for path in own(self._directory, _FINISHED))

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _aside(self, step: int) -> Path:
        return self._directory / f".{step}.partial"

    @contextlib.contextmanager
    def _one_line(self, verb: str) -> Iterator[None]:
        """Turns orbax's and tensorstore's errors into one line."""
        try:
            with quiet_orbax():
                yield
        except ORBAX_ERRORS as error:
            raise RunError(f"can't {verb} {self._directory}: {reason(error)}") from None


def save_best(workdir: Path, step: int, params: Params, description: ModelDescription) -> None:
    """Writes `models/<step>`, points `model` at it, and removes the model it pointed at before.

    A reader of `model` sees the old model or the new one, whole, at any moment.
    """
    models = workdir / "models"
    directory, aside = models / str(step), models / f".{step}.partial"
    first = processes.is_first()
    if first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    processes.barrier("directory of the best model")
    write_model(aside, params, description)
    processes.barrier("best model")
    if first:
        files.replace(aside, directory)
        files.link(workdir / "model", directory)
        for other in own(models, _MODELS):
            if other != directory:
                shutil.rmtree(other, ignore_errors=True)
