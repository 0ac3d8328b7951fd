"""The forms that a model can be written in, and what a run exports when it ends."""

import contextlib
import dataclasses
import importlib.util
from pathlib import Path

from tinysft_jax import files
from tinysft_jax.checkpoints import open_model, write_model
from tinysft_jax.console import RunError, UserError, explained, named
from tinysft_jax.conversion import gguf, huggingface
from tinysft_jax.conversion.families import family_of
from tinysft_jax.conversion.model_card import CARD_CONTENT, RunRecord, read_run, write_card
from tinysft_jax.conversion.torch import check_architecture, write_torch_checkpoint
from tinysft_jax.parameters import ModelDescription, Params

KINDS = ("model", "torch", "huggingface", "gguf")
_SUFFIXES = {"torch": ".pt", "gguf": ".gguf"}  # of the kinds that are files; the others are directories
_CONTENT = {"model": files.MODEL_CONTENT, "huggingface": (*huggingface.CONTENT, *CARD_CONTENT)}
# The forms in which tensors can be written; the other kinds hold float32.
DTYPES = {"huggingface": tuple(huggingface.DTYPES), "gguf": tuple(gguf.ENCODINGS)}

# What a run can export: kind → name in the work directory, the package that it needs, and the extra.
_RUN_EXPORTS = {
    "huggingface": ("huggingface", "safetensors", "hf"),
    "torch": ("model.pt", "torch", "torch"),
    "gguf": ("model.gguf", "gguf", "gguf"),
}
# In the work directory, what was exported: name → file → SHA-256.
_RECORD = "exports.json"


def check_output(kind: str, path: Path, overwrite: bool) -> None:
    """Raises: UserError, before any work is done, if an output must not be replaced, or does not suit its kind."""
    files.check_output(path, overwrite, _CONTENT.get(kind, ()))
    if kind == "model":
        files.check_pattern_free(path)
    suffix = _SUFFIXES.get(kind)
    if suffix and path.suffix != suffix:
        raise UserError(f"--output {path}: --to {kind} writes a file that ends in {suffix}")
    if not suffix and path.suffix in _SUFFIXES.values():
        raise UserError(f"--output {path}: --to {kind} writes a directory, which is not called {path.suffix}")


def new_output(kind: str, path: Path, overwrite: bool) -> contextlib.AbstractContextManager[Path]:
    """Where `write` writes: an empty directory, or a file to create, that becomes `path` if the block succeeds."""
    if kind in _SUFFIXES:
        return files.new_file(path, overwrite)
    return files.new_directory(path, overwrite, _CONTENT[kind])


def write(
    kind: str,
    path: Path,
    params: Params,
    description: ModelDescription,
    title: str,
    run: RunRecord | None = None,
    report: Path | None = None,
    dtype: str = "float32",
) -> None:
    """Writes a model, its embedding padded or not, to the path that `new_output` yields.

    Title, the run that trained the model and its evaluation report are for the model card, `dtype` for the tensors, see
    `DTYPES`.
    """
    if kind == "model":
        write_model(path, params, description)
    elif kind == "torch":
        if run and run.step is not None:
            source = description.source | {"step": run.step, "loss": run.loss}
            description = dataclasses.replace(description, source=source)
        write_torch_checkpoint(path, params, description)
    elif kind == "gguf":
        gguf.write_gguf(path, params, description, title.removesuffix(".gguf"), dtype)
    else:
        huggingface.write_huggingface(path, params, description, dtype)
        with explained(f"can't write {path}", RunError):
            write_card(path, title, description, run, report)


def parse_export(names: str) -> tuple[str, ...]:
    """The kinds that the setting `export` lists, separated by commas. Raises: UserError, if one can't be written."""
    kinds = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for kind in kinds:
        if kind not in _RUN_EXPORTS:
            raise UserError(f"export is {names!r}; it lists any of {', '.join(_RUN_EXPORTS)}, with commas between")
        _, package, extra = _RUN_EXPORTS[kind]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"export={kind} needs {package}: pip install -e '.[{extra}]'")
    return kinds


def check_exports(names: str, description: ModelDescription) -> None:
    """Raises: UserError, if one of the kinds that the setting `export` lists can't hold this model."""
    for kind in parse_export(names):
        with named(f"export={kind} can't be written"):
            if description.config.scalar_head:
                raise UserError("a reward model is no language model")
            if kind == "torch":
                check_architecture(description.config)
            elif kind == "gguf":
                gguf.to_pairs(description, title="")
            else:
                family_of(description.config)


def export_run(workdir: Path, names: str) -> list[str]:
    """Exports the best model of a run into its work directory; returns a line for each kind that `names` lists.

    An earlier export is replaced only if nobody has changed it.
    """
    kinds = parse_export(names)
    if not kinds:
        return []
    (description, params), run = open_model(workdir), read_run(workdir)
    exports, lines = _read_record(workdir), []
    for kind in kinds:
        path = workdir / _RUN_EXPORTS[kind][0]
        if path.exists() and (change := _change(path, exports.get(path.name))):
            lines.append(f"kept: {path}, because {change}; move it away, and the same command exports it again")
            continue
        with new_output(kind, path, overwrite=True) as aside:
            write(kind, aside, params, description, workdir.resolve().name, run)
        exports[path.name] = _hashes(path)
        files.write_json(workdir / _RECORD, {"format_version": 1, "exports": exports})
        lines.append(f"exported: {path}")
    return lines


def _change(path: Path, recorded: dict[str, str] | None) -> str:
    """How an export differs from what was written; empty if it does not."""
    if recorded is None:
        return f"{_RECORD} does not list it"
    now = _hashes(path)
    differing = sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
    return f"it was changed after it was exported ({', '.join(differing[:3])})" if differing else ""


def _hashes(path: Path) -> dict[str, str]:
    """Name → SHA-256 of an export's files."""
    found, root = ([path], path.parent) if path.is_file() else (path.rglob("*"), path)
    return {each.relative_to(root).as_posix(): files.sha256(each) for each in found if each.is_file()}


def _read_record(workdir: Path) -> dict[str, dict[str, str]]:
    """What was exported; nothing if the record is missing or damaged."""
    try:
        exports = files.read_json(workdir / _RECORD, "a record of exports", format_version=1)["exports"]
        return {name: dict(hashes) for name, hashes in exports.items()}
    except (UserError, KeyError, AttributeError, TypeError, ValueError):
        return {}
