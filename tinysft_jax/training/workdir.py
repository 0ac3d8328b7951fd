"""The work directory: one run at a time writes to it, and what another run left there is set aside."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinysft_jax import files, locks, processes
from tinysft_jax.errors import UserError, reason
from tinysft_jax.schema import COUNT, check
from tinysft_jax.training.resume import TOTAL_STEPS, differences

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

        processes.on_first(hold)
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
