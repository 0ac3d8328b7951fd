"""The work directory: its lock, its best model, its checkpoints, and whether a run may resume from them."""

import contextlib
import dataclasses
import itertools
import logging
import os
import re
import shutil
import time
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
from tinysft_jax.data.mixture import Part
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import PreparedData
from tinysft_jax.files import COUNT, NUMBER, REAL_OR_NULL, TEXT, Kind, Schema, check
from tinysft_jax.parameters import ModelDescription, Params
from tinysft_jax.training.config import flat
from tinysft_jax.training.state import RANDOM
from tinysft_jax.training.step import TrainState, warmup_cosine

LOCK = ".lock"
TOTAL_STEPS = "steps"  # in a run's identity

# What a run and its exports write besides checkpoints. config.json identifies the run, so it is moved last.
_OUTPUTS = (
    *("models", "model", "metrics.jsonl", "skipped_steps.jsonl", "loss.png", "wandb_id", "profile"),
    *("huggingface", "model.pt", "model.gguf", "exports.json", "config.json"),
)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[str]:
    """Creates the work directory and locks it for the block; it is removed again if it stays empty.

    Yields a note for the user, or "". Raises a UserError in all processes if another run uses the directory or it can't
    be used; if it can't be written, an OSError in the first process and a RunError in the others.
    """
    with contextlib.ExitStack() as stack:
        notes = [""]

        def hold() -> None:
            files.check_pattern_free(workdir)
            stack.enter_context(files.maybe_new_directory(workdir))
            notes.append(stack.enter_context(locks.held(workdir / LOCK, f"{workdir} is in use by another run")))
            try:
                files.link(workdir / f"{LOCK}.link", workdir)
                (workdir / f"{LOCK}.link").unlink()
            except OSError as error:
                raise UserError(
                    f"{workdir} is on a file system without symbolic links ({reason(error)}), and a run's best model "
                    "is one; choose another --workdir"
                ) from None

        distributed.on_first(hold)
        yield notes[-1]


def move_other_run(workdir: Path, identity: dict[str, Any]) -> str:
    """Moves what another run wrote before its first checkpoint into `workdir/earlier-N`; returns a note, or ""."""
    found = [path for name in _OUTPUTS if os.path.lexists(path := workdir / name)]
    with contextlib.suppress(UserError):  # no config.json, or a damaged one
        content = files.read_json(workdir / "config.json", "a work directory", format_version=1)
        check(content, {"run": {TOTAL_STEPS: COUNT}})
        if not differences(content["run"], identity):
            return ""
    if not found:
        return ""
    kept = next(path for n in itertools.count(1) if not (path := workdir / f"earlier-{n}").exists())
    kept.mkdir()
    for path in found:
        path.rename(kept / path.name)
    return f"{workdir} held the beginning of another run, which is now in {kept}"


def save_best(workdir: Path, step: int, params: Params, description: ModelDescription) -> None:
    """Writes `models/<step>`, points the link `model` at it, and removes the previous one: `model` is always whole."""
    models, link = workdir / "models", workdir / "model"
    directory, aside = models / str(step), models / f".{step}.partial"
    if distributed.is_first():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    distributed.barrier("directory of the best model")
    write_model(aside, params, description)
    distributed.barrier("best model")
    if distributed.is_first():
        if directory.exists():  # from before a kill, later than the checkpoint that the run resumed from
            before = models / f"{step}.before"
            shutil.copytree(directory, before, dirs_exist_ok=True)
            if link.resolve() == directory.resolve():
                files.link(link, before)
            shutil.rmtree(directory)
        aside.rename(directory)
        files.link(link, directory)
        for other in _matching(models, r"[0-9]+(\.before)?|\.[0-9]+\.partial"):
            if other != directory:
                shutil.rmtree(other, ignore_errors=True)


def _matching(directory: Path, names: str) -> list[Path]:
    """The directories in `directory` whose names match a regular expression; the others are the user's."""
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if re.fullmatch(names, path.name) and path.is_dir()]


def _remove(directory: Path) -> None:
    """Removes a directory; orbax's threads may still write there when one of them has failed."""
    for _ in range(100):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.05)


def data_hash(data: PreparedData) -> str:
    """A prepared data set's identity."""
    return files.sha256(data.directory / "manifest.json")[:16]


def run_identity(config: ConfigDict, parts: list[Part], packings: list[Packing], total_steps: int) -> dict[str, Any]:
    """What must not change when a run resumes: its model, the data and their order, the arithmetic of a step."""
    data = parts[0].data
    values, template = flat(config), data.description["chat_template"]
    sections = ("model.", "optimizer.") if config.init_from in ("", RANDOM) else ("optimizer.",)
    sections += (f"{config.objective}.", *(("reward",) if config.objective == "grpo" else ()))  # and its rewards
    mixed = [f"{part.share} {part.name} " if part.name else "" for part in parts]
    return {
        # Not of runs from before there was a choice.
        **({"objective": config.objective} if config.objective != "sft" else {}),
        "init_from": config.init_from,
        "data": ", ".join(share + data_hash(part.data) for share, part in zip(mixed, parts, strict=True)),
        "chat_template": template if isinstance(template, str | None) else data.description["tokenizer_hash"],
        "tokenizer": data.description["tokenizer"],
        "packing": " ".join(packing.fingerprint for packing in packings),
        **{key: values[key] for key in ("seed", "data.seq_len", "train.batch_size")},
        **{key: value for key, value in values.items() if key.startswith(sections)},
        TOTAL_STEPS: total_steps,
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How two identities differ, in words. More steps are no difference, nor is another spelling of a model's path."""

    def start(path: Any) -> str:
        return RANDOM if path in ("", RANDOM) else os.path.realpath(os.path.expanduser(str(path)))

    def differ(key: str, old: Any, new: Any) -> bool:
        if key == TOTAL_STEPS:
            return old > new
        return start(old) != start(new) if key == "init_from" else old != new

    def shown(value: Any) -> str:
        return "empty" if value in ("", None) else str(value)

    pairs = {key: (before.get(key), now.get(key)) for key in now | before}
    return [f"{key} was {shown(old)}, now {shown(new)}" for key, (old, new) in pairs.items() if differ(key, old, new)]


@dataclasses.dataclass
class RunStatus:
    """How far a run has come: what a checkpoint holds besides arrays."""

    run: dict[str, Any]  # the run's identity
    model: ModelDescription
    step: int = 0  # steps done, which is also the position in the data
    best_loss: float | None = None  # the lowest validation loss so far
    best_step: int = 0  # the step of the kept model; 0 while there is none
    evaluated_step: int = -1  # the last step that was evaluated
    eval_rows: int = 0  # of each periodic evaluation
    reference: str = ""  # hash of the model at the start, if the objective compares with it
    skipped_steps: tuple[int, ...] | list[int] = (0, 0)  # in the run, and in a row up to now


FORMAT_VERSION = 2  # of a checkpoint; version 1 had queries, keys and their moments interleaved
_TWO_COUNTS: Kind = ("two whole numbers", lambda value: isinstance(value, list) and [*map(type, value)] == [int, int])
_STATUS: Schema = {  # `RunStatus`, but for the step
    "run": {TOTAL_STEPS: COUNT},
    "model": {},
    "best_loss": REAL_OR_NULL,
    "best_step": COUNT,
    "evaluated_step": NUMBER,
    "eval_rows": COUNT,
    "reference": TEXT,
    "skipped_steps": _TWO_COUNTS,
}


class Checkpoints(contextlib.AbstractContextManager):
    """The newest checkpoints of a work directory, `checkpoints/<step>/`; saved in a `with` block.

    In the background orbax writes a checkpoint aside, its manifest follows, then it is renamed. So a directory named by
    a step was finished; if it differs from its manifest, it was damaged later, which orbax would not notice.
    """

    def __init__(self, workdir: Path, keep: int):
        self._directory, self._keep = (workdir / "checkpoints").absolute(), keep
        self.newest = -1  # step of the newest sound checkpoint, or of the one that is being written
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # while it writes in the background as well

    def find_newest(self) -> str:
        """Sets `newest`; returns how newer ones are damaged, or "". Raises: RunError, if all are damaged."""
        damage = []

        def find() -> None:
            for step in reversed(self._steps()):
                if (fault := files.find_damage(self._path(step))) is None:
                    self.newest = step
                    return
                damage.append(f"checkpoint {step} is damaged: {fault}")
            if damage:
                raise RunError(
                    f"no sound checkpoint in {self._directory}: {'; '.join(damage)}; put one back, or choose another "
                    "--workdir to start over"
                )

        distributed.on_first(find)
        self.newest = distributed.first_decides(self.newest)
        return "; ".join(damage)

    def resume(self, config: ConfigDict, identity: dict[str, Any], accept_changes: bool) -> tuple[RunStatus, list[str]]:
        """The status in the newest checkpoint, and notes about what the user has changed since.

        Raises a RunError if it can't be read; a UserError if it is of an older format, or, unless `accept_changes`,
        another run's.
        """
        where, workdir, total_steps = self._path(self.newest), self._directory.parent, identity[TOTAL_STEPS]
        with self._one_line("read"):
            content = ocp.metadata(where).custom_metadata
        try:
            check(content, {"format_version": NUMBER})
            if content["format_version"] > FORMAT_VERSION:
                raise UserError("it is of a newer program; upgrade tinysft-jax")
            content = {"eval_rows": 0, "reference": ""} | content  # which older programs did not write
            check(content, _STATUS)
        except UserError as error:
            raise RunError(f"can't resume from {where}: {error}") from None
        if content["format_version"] < FORMAT_VERSION:
            raise UserError(
                f"{where} is of an older program, whose optimizer state this one can't use; start from the run's best "
                f"model in a new work directory: --config.init_from={workdir} --workdir=DIR"
            )
        changes, before = "; ".join(differences(content["run"], identity)), content["run"][TOTAL_STEPS]
        was, now = (of.get("objective", "sft") for of in (content["run"], identity))
        if was != now:  # other parameters, or another reference
            raise UserError(f"{workdir} is a run of the objective {was}, not {now}; choose another --workdir")
        if changes and not accept_changes:
            raise UserError(f"{workdir} is another run: {changes}; choose another --workdir or add --accept_changes")
        if self.newest > total_steps:
            raise UserError(f"{workdir} has done {self.newest} steps already, more than {total_steps}")
        notes = [f"resuming with changes: {changes}"] if changes else []
        if any(content["run"].get(key) != identity.get(key) for key in ("data", "packing", "seed")):
            content["eval_rows"] = 0  # of another sample
        if before < total_steps:
            notes.append(_effect_of_more_steps(config, before, total_steps, self.newest))
        model = ModelDescription.from_json(content["model"], where)
        fields = {key: content[key] for key in _STATUS} | {"run": identity, "model": model, "step": self.newest}
        return RunStatus(**fields), notes

    def restore(self, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The arrays of the newest checkpoint, whatever mesh wrote it. Raises: RunError, if they can't be read."""
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        with self._one_line("read"):
            return ocp.load(self._path(self.newest), wanted)

    def clear(self) -> None:
        """In the first process: removes what is newer than the newest sound checkpoint, or was never finished."""
        self._directory.mkdir(parents=True, exist_ok=True)
        newer = [self._path(step) for step in self._steps() if step > self.newest]
        unfinished = r"\.[0-9]+\.(partial|old).*"  # orbax appends to the name while it writes
        for path in [*newer, *_matching(self._directory, unfinished)]:
            _remove(path)

    def save(self, state: TrainState, status: RunStatus) -> None:
        """Starts to write; returns once the state, which may then be donated, is copied to the host.

        Raises a RunError if this checkpoint can't be written, or the one before could not.
        """
        if self.newest == status.step:
            return
        self._finish_writing()
        content = dataclasses.asdict(status) | {"format_version": FORMAT_VERSION, "model": status.model.to_json()}
        aside = self._directory / f".{status.step}.partial"
        with self._one_line("write"):
            response = ocp.save_async(aside, state, custom_metadata=content)
        self._writing = self._writer.submit(self._finish, aside, self._path(status.step), response.result)
        self.newest = status.step

    def wait(self) -> None:
        """Returns when the checkpoint is finished; called by all processes. Raises: RunError, if it failed."""
        self._finish_writing()
        distributed.barrier("checkpoint finished")  # by the first process, and the others must not be gone before

    def __exit__(self, *_: object) -> None:
        try:
            self._finish_writing()
        finally:
            self._writer.shutdown()
            if distributed.is_first():
                self.clear()

    def _finish(self, aside: Path, path: Path, wait_for_orbax: Callable[[], None]) -> None:
        """The part of writing that happens in the background."""
        wait_for_orbax()  # all processes write
        if distributed.is_first():
            files.write_manifest(aside)
            aside.rename(path)
            for old in self._steps()[: -self._keep]:
                removed = self._path(old).rename(self._directory / f".{old}.old")
                shutil.rmtree(removed, ignore_errors=True)

    def _finish_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing:
            with self._one_line("write"):
                writing.result()

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in _matching(self._directory, r"[0-9]+"))

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    @contextlib.contextmanager
    def _one_line(self, verb: str) -> Iterator[None]:
        try:
            with quiet_orbax():
                yield
        except ORBAX_ERRORS as error:
            raise RunError(f"can't {verb} {self._directory}: {reason(error)}") from None


def _effect_of_more_steps(config: ConfigDict, before: int, now: int, step: int) -> str:
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
    rate_now, rate_before = (float(warmup_cosine(peak, warmup, total)(step)) for total in (now, before))
    return (
        f"the run is longer than it was, {now:,} steps instead of {before:,}: the learning rate of step {step + 1:,} "
        f"is {rate_now:.2e} instead of {rate_before:.2e}, and falls to 0 at step {now:,}"
    )
