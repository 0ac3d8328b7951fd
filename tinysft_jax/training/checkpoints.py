"""The work directory and its checkpoints: whose it is, what it holds, and whether a run may continue."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from tinysft_jax import distributed, files, locks
from tinysft_jax.checkpoints import ORBAX_ERRORS, quiet_orbax, write_model
from tinysft_jax.console import RunError, UserError, reason
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import PreparedData
from tinysft_jax.files import COUNT, NUMBER, REAL_OR_NULL, Kind, Schema, check
from tinysft_jax.parameters import ModelDescription, Params
from tinysft_jax.training.config import flat
from tinysft_jax.training.state import RANDOM
from tinysft_jax.training.step import TrainState, warmup_cosine

LOCK = ".lock"

# What a run writes, besides checkpoints. The configuration says whose all of it is, so it is moved last.
_OUTPUTS = (
    "models",
    "model",
    "metrics.jsonl",
    "skipped_steps.jsonl",
    "loss.png",
    "wandb_id",
    "profile",
    "huggingface",
    "model.pt",
    "exports.json",
    "config.json",
)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[str]:
    """Keeps other runs out of a work directory while the block runs; makes it, and removes it if nothing came of it.

    Yields:
      What the user should know; empty if there is nothing.

    Raises:
      UserError: if another run is there, or the directory can't be used; in all processes.
      OSError: if it can't be written; in the first process, a RunError in the others.
    """
    with contextlib.ExitStack() as stack:
        note = ""

        def hold() -> None:
            nonlocal note
            files.check_pattern_free(workdir)
            stack.enter_context(files.maybe_new_directory(workdir))
            note = stack.enter_context(locks.held(workdir / LOCK, f"{workdir} is in use by another run"))
            _check_links(workdir)

        distributed.on_first(hold)
        yield note


def _check_links(workdir: Path) -> None:
    """Raises: UserError, if the file system has no symbolic links; better now than at the first evaluation."""
    probe = workdir / f"{LOCK}.link"
    try:
        files.link(probe, workdir)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{workdir} is on a file system without symbolic links ({reason(error)}), and a run's best model is one; "
            "choose another --workdir"
        ) from None


def set_aside_other_run(workdir: Path, identity: dict[str, Any]) -> str:
    """Moves what another run left in a work directory, of which there is no checkpoint, into a directory in it.

    Args:
      workdir: the work directory.
      identity: of the run that is about to begin; see `resume.run_identity`.

    Returns:
      A line that says where it is; empty if there is nothing.
    """
    found = [workdir / name for name in _OUTPUTS if (workdir / name).exists() or (workdir / name).is_symlink()]
    before = _identity_in(workdir)
    if not found or (before and not differences(before, identity)):
        return ""
    kept = next(path for n in range(1, 10**9) if not (path := workdir / f"earlier-{n}").exists())
    kept.mkdir()
    for path in found:
        path.rename(kept / path.name)
    return f"{workdir} held the beginning of another run, which is now in {kept}"


def set_models_aside(workdir: Path, step: int) -> None:
    """Takes models of steps after `step` out of the way: the run will reach these again, perhaps otherwise.

    `model` keeps pointing at the same content, under another name.
    """
    for path in own(workdir / "models", r"[0-9]+"):
        if int(path.name) > step:
            if (workdir / "model").resolve() == path.resolve():
                kept = path.with_name(f"{path.name}.before")
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(path, kept)
                files.link(workdir / "model", kept)
            shutil.rmtree(path)


def own(directory: Path, names: str) -> list[Path]:
    """The directories in `directory` that have one of this program's names, a regular expression; no others."""
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if re.fullmatch(names, path.name) and path.is_dir()]


def _identity_in(workdir: Path) -> dict[str, Any] | None:
    """Whose the work directory was; None if it does not say, as those of older programs."""
    try:
        content = files.read_json(workdir / "config.json", "a work directory", format_version=1)
        check(content, {"run": {TOTAL_STEPS: COUNT}})
    except UserError:
        return None
    return content["run"]


TOTAL_STEPS = "steps"
FORMAT_VERSION = 1  # of what a checkpoint says besides arrays

_COUNTS: Kind = ("two whole numbers", lambda value: isinstance(value, list) and [*map(type, value)] == [int, int])
_PROGRESS: Schema = {
    "format_version": NUMBER,
    "run": {TOTAL_STEPS: COUNT},
    "best_loss": REAL_OR_NULL,
    "best_step": COUNT,
    "evaluated_step": NUMBER,
    "eval_rows": COUNT,
    "skipped_steps": _COUNTS,
    "model": {},
}


def check_progress(progress: Any, where: Path) -> None:
    """Looks at what a checkpoint says besides arrays.

    Raises:
      RunError: if it is of a newer program, or says what can't be.
    """
    try:
        check(progress, {"format_version": NUMBER})
        if progress["format_version"] > FORMAT_VERSION:
            raise UserError("it is of a newer program; upgrade tinysft-jax")
        check({"eval_rows": 0} | progress, _PROGRESS)  # which programs before did not write
    except UserError as error:
        raise RunError(f"can't continue from {where}: {error}") from None


def run_identity(config: ConfigDict, data: PreparedData, packing: Packing, total_steps: int) -> dict[str, Any]:
    """What must not change when a run continues: its model, its data and their order, the arithmetic of a step.

    Returns:
      JSON, by name.
    """
    values = flat(config)
    is_random = config.init_from in ("", RANDOM)
    shape = {key: value for key, value in values.items() if key.startswith("model.")} if is_random else {}
    return {
        "init_from": config.init_from,
        **shape,
        "data": files.sha256(data.directory / "manifest.json")[:16],
        "chat_template": data.description["chat_template"],
        "tokenizer": data.description["tokenizer"],
        "seed": config.seed,
        "data.seq_len": config.data.seq_len,
        "packing": packing.fingerprint,
        "train.batch_size": config.train.batch_size,
        **{key: value for key, value in values.items() if key.startswith("optimizer.")},
        TOTAL_STEPS: total_steps,
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What distinguishes two identities, other than that the run is longer."""
    keys = dict.fromkeys((*now, *before))
    if before.get(TOTAL_STEPS, 0) <= now[TOTAL_STEPS]:
        del keys[TOTAL_STEPS]
    return [
        f"{key} was {_shown(before, key)}, now {_shown(now, key)}"
        for key in keys
        if before.get(key) != now.get(key)
        and not (key == "init_from" and _start(before.get(key)) == _start(now.get(key)))
    ]


def _start(init_from: Any) -> str:
    """What `init_from` means, however it is written."""
    if init_from in ("", RANDOM):
        return RANDOM
    return os.path.realpath(os.path.expanduser(str(init_from)))


def what_more_steps_do(config: ConfigDict, before: int, now: int, step: int) -> str:
    """How the learning rate goes on in a run of `now` steps that was one of `before`, `step` of them done."""
    rates = [
        float(warmup_cosine(config.optimizer.learning_rate, config.optimizer.warmup_steps, total)(step))
        for total in (now, before)
    ]
    return (
        f"the run is longer than it was, {now:,} steps instead of {before:,}: the learning rate of step {step + 1:,} "
        f"is {rates[0]:.2e} instead of {rates[1]:.2e}, and falls to 0 at step {now:,}"
    )


def _shown(identity: dict[str, Any], key: str) -> str:
    value = identity.get(key, "")
    return "empty" if value == "" else str(value)


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
        if distributed.is_first():
            for step in reversed(self._steps()):
                fault = files.find_damage(self._path(step))
                answer = step if fault is None else _ALL_DAMAGED
                if fault is None:
                    break
                damage.append(f"checkpoint {step} is damaged: {fault}")
        answer = distributed.first_decides(answer)
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
        distributed.barrier("checkpoint finished")

    def close(self) -> None:
        """Waits, ends the thread, and gives back the room of what could not be finished."""
        try:
            self._finish_writing()
        finally:
            self._writer.shutdown()
            if distributed.is_first():
                for path in own(self._directory, _UNFINISHED):
                    shutil.rmtree(path, ignore_errors=True)

    def _finish(self, step: int, written: Callable[[], None]) -> None:
        """The part of writing that is done in the background."""
        written()  # by all processes
        if distributed.is_first():
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
    first = distributed.is_first()
    if first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    distributed.barrier("directory of the best model")
    write_model(aside, params, description)
    distributed.barrier("best model")
    if first:
        files.replace(aside, directory)
        files.link(workdir / "model", directory)
        for other in own(models, _MODELS):
            if other != directory:
                shutil.rmtree(other, ignore_errors=True)
