"""Models in every form that this package writes, and reads."""

import contextlib
import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

from tinysft_jax import files
from tinysft_jax.checkpoints import open_model, write_model
from tinysft_jax.console import RunError, UserError, reason
from tinysft_jax.conversion import huggingface
from tinysft_jax.conversion.model_card import CARD_CONTENT, RunRecord, read_run, write_card
from tinysft_jax.conversion.torch import write_torch_checkpoint
from tinysft_jax.parameters import ModelDescription, Params
from tinysft_jax.training.log import ALL_TASKS, FINAL

KINDS = ("model", "torch", "huggingface")

_CONTENT = {"model": files.MODEL_CONTENT, "huggingface": (*huggingface.CONTENT, *CARD_CONTENT)}

# What a run can write at its end: kind → its name in the work directory, the package that it takes, and the extra.
_OF_A_RUN = {"huggingface": ("huggingface", "safetensors", "hf"), "torch": ("model.pt", "torch", "torch")}

# Of what a run exported, in its work directory: name → file → SHA-256.
_RECORD = "exports.json"


def check_output(kind: str, path: Path, overwrite: bool) -> None:
    """Refuses an output that must not be replaced or does not suit its kind, before any work is done.

    Raises:
      UserError: if so.
    """
    if kind == "torch":
        files.check_output_file(path, overwrite)
    else:
        if kind == "model":
            files.check_pattern_free(path)
        files.check_output(path, overwrite, _CONTENT[kind])
    if (kind == "torch") != (path.suffix == ".pt"):
        raise UserError(f"--output {path}: --to torch writes a file that ends in .pt, the others write a directory")


@contextlib.contextmanager
def new_output(kind: str, path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty directory, or where to write a file, that becomes `path` if the block ends well."""
    if kind == "torch":
        with files.new_file(path, overwrite) as aside:
            yield aside
    else:
        with files.new_directory(path, overwrite, _CONTENT[kind]) as aside:
            yield aside


def write(
    kind: str,
    path: Path,
    params: Params,
    description: ModelDescription,
    title: str,
    run: RunRecord | None = None,
    report: Path | None = None,
) -> None:
    """Writes a model where `new_output` says.

    Args:
      kind: of `KINDS`.
      path: of `new_output`.
      params: a GPT's parameters, the table with or without its padding rows.
      description: what the model is.
      title: its name, for the model card.
      run: that made it, where it is known.
      report: its evaluation, for the model card.

    Raises:
      UserError: if a package is missing, or the report can't be read.
      RunError: if the disk is full, say.
    """
    if kind == "model":
        write_model(path, params, description)
    elif kind == "torch":
        write_torch_checkpoint(path, params, _with_progress(description, run))
    else:
        huggingface.write_huggingface(path, params, description)
        try:
            write_card(path, title, description, run, report)
        except OSError as error:
            raise RunError(f"can't write {path}: {reason(error)}") from None


def _with_progress(description: ModelDescription, run: RunRecord | None) -> ModelDescription:
    """The description with the best model's step and loss as its source's, where the run is known."""
    if run is None or run.step is None:
        return description
    loss = run.losses.get(FINAL, run.losses.get(ALL_TASKS, math.nan))
    progress = {"step": run.step, "loss": loss}
    return dataclasses.replace(description, source=description.source | progress)


def parse_export(names: str) -> tuple[str, ...]:
    """The kinds that the setting `export` lists.

    Raises:
      UserError: if a name is unknown, or a package that it takes is not installed.
    """
    kinds = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for kind in kinds:
        if kind not in _OF_A_RUN:
            raise UserError(f"export is {names!r}; it lists any of {', '.join(_OF_A_RUN)}, with commas between")
        _, package, extra = _OF_A_RUN[kind]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"export={kind} needs {package}: pip install -e '.[{extra}]'")
    return kinds


def export_run(workdir: Path, names: str) -> list[str]:
    """Writes the best model of a run beside it, in the forms that its setting `export` lists.

    What is there already is replaced only if it is as it was written.

    Returns:
      What became of each, a line each.
    """
    kinds = parse_export(names)
    if not kinds:
        return []
    (description, params), run, lines = open_model(workdir), read_run(workdir), []
    for kind in kinds:
        path = workdir / _OF_A_RUN[kind][0]
        if path.exists() and (changed := _change_in(workdir, path)):
            lines.append(f"kept: {path}, {changed}; move it away, and the same command writes it anew")
            continue
        with new_output(kind, path, overwrite=True) as aside:
            write(kind, aside, params, description, workdir.resolve().name, run)
        hashes = _recorded(workdir) | {path.name: _hashes(path)}
        files.write_json(workdir / _RECORD, {"format_version": 1, "exports": hashes})
        lines.append(f"exported: {path}")
    return lines


def _change_in(workdir: Path, path: Path) -> str:
    """How an export differs from what was written; empty if it does not."""
    if (before := _recorded(workdir).get(path.name)) is None:
        return "as nothing tells how it came there"
    now = _hashes(path)
    differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return f"as it was changed since it was written ({', '.join(differing[:3])})" if differing else ""


def _hashes(path: Path) -> dict[str, str]:
    """Name → SHA-256 of an export's files."""
    if path.is_file():
        return {path.name: files.sha256(path)}
    return {each.relative_to(path).as_posix(): files.sha256(each) for each in path.rglob("*") if each.is_file()}


def _recorded(workdir: Path) -> dict[str, dict[str, str]]:
    """What was written, by export; nothing if nobody can tell."""
    try:
        exports = files.read_json(workdir / _RECORD, "a record of exports", format_version=1)["exports"]
        return {name: dict(hashes) for name, hashes in exports.items()}
    except (UserError, KeyError, AttributeError, TypeError, ValueError):
        return {}
