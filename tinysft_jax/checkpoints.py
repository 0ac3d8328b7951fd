"""The model directory: `model.json`, which says what the model is, and `params/`, its parameters (orbax).

The table of embeddings is stored without its padding rows, so that a reader needs to know nothing of them.
"""

import contextlib
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from tinysft_jax import distributed, files
from tinysft_jax.console import RunError, UserError, reason
from tinysft_jax.model import GPT, GPTConfig
from tinysft_jax.parameters import (
    FORMAT_VERSION,
    ModelDescription,
    Params,
    make_model,
    model_parameter_shapes,
    pad_vocabulary,
    trim_vocabulary,
)


def save_model(path: Path, params: Params, description: ModelDescription, overwrite: bool = False) -> None:
    """Writes a model directory, whole or not at all.

    Args:
      path: the directory to make.
      params: a GPT's parameters as a pure dict, the table with or without its padding rows.
      description: what the model is.
      overwrite: replace what is at `path`.

    Raises:
      UserError: if `path` exists (without `overwrite`) or can't be written.
    """
    files.check_pattern_free(Path(path))
    with files.new_directory(Path(path), overwrite) as directory:
        write_model(directory, params, description)


def write_model(directory: Path, params: Params, description: ModelDescription) -> None:
    """Fills an existing empty directory. With several processes, all call it, and the first writes `model.json`.

    Raises:
      RunError: if the disk is full, say.
    """
    try:
        ocp.save(directory.resolve() / "params", trim_vocabulary(params, description.config))
    except (ValueError, OSError) as error:  # tensorstore's own errors are ValueErrors
        raise RunError(f"can't write {directory}: {reason(error)}") from None
    if distributed.is_first():
        files.write_json(directory / "model.json", description.to_json())


def load_description(path: Path) -> ModelDescription:
    """Reads `model.json`.

    Raises:
      UserError: if `path` is not a model directory, or one of a newer program.
    """
    where = Path(path) / "model.json"
    return ModelDescription.from_json(files.read_json(where, "a model directory", FORMAT_VERSION), where)


def load_params(path: Path, config: GPTConfig) -> Params:
    """Reads the parameters to host memory, the table padded as in memory. Each process reads for itself.

    Returns:
      Nested dicts of float32 NumPy arrays.

    Raises:
      UserError: if parameters are missing, unreadable or of other shapes than `config` says.
    """
    directory = Path(path).resolve() / "params"
    wanted = model_parameter_shapes(config)
    try:
        with quiet_orbax(), alone():
            if not ocp.is_orbax_checkpoint(directory):
                raise UserError(f"{path} has no readable params/; convert or copy the model again")
            stored = ocp.metadata(directory).metadata
            if not isinstance(stored, dict):
                raise UserError(f"{directory} holds no parameters; convert or copy the model again")
            differences = _differences(stored, trim_vocabulary(wanted, config))
            if differences:
                raise UserError(f"{directory} does not fit model.json: {'; '.join(differences[:5])}")
            params = ocp.load(directory, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored))
    except ORBAX_ERRORS as error:
        raise UserError(f"can't read {directory}: {reason(error)}") from None
    return pad_vocabulary(params, config)


def load_model(path: str | Path, **options) -> GPT:
    """Reads a model.

    Args:
      path: see `open_model`.
      **options: of `GPT`: dtype, attention, remat.

    Raises:
      UserError: if it can't be read; one line says why.
    """
    description, params = open_model(path)
    return make_model(description.config, params, trained_length=description.trained_length, **options)


def open_model(path: str | Path, n_heads: int | None = None) -> tuple[ModelDescription, Params]:
    """Reads whatever holds a model: the one place that decides what a path is.

    Args:
      path: a work directory (its best model so far), a model directory, a PyTorch checkpoint (`.pt`) or a Hugging Face
        folder.
      n_heads: the number of attention heads, for a `.pt` that doesn't tell.

    Returns:
      What the model is, and its parameters as nested dicts of float32 NumPy arrays, the embedding padded.

    Raises:
      UserError: if it can't be read; one line says why.
    """
    path = Path(path).expanduser()
    kind = model_kind(path)
    if kind == "torch":
        from tinysft_jax.conversion.torch import read_torch_checkpoint  # needs torch, an extra

        return read_torch_checkpoint(path, n_heads)
    if n_heads is not None:
        raise UserError(f"--n_heads is for .pt files that don't tell; {path} does")
    if kind == "huggingface":
        from tinysft_jax.conversion.huggingface import read_huggingface  # needs safetensors, an extra

        return read_huggingface(path)
    path = path / "model" if kind == "work" else path
    description = load_description(path)
    return description, load_params(path, description.config)


def model_kind(path: Path) -> str:
    """What holds a model at `path`: "torch", "model", "huggingface" or "work".

    Raises:
      UserError: if there is nothing, or something that no model can be read from.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a work directory, a model directory, a .pt file or a Hugging Face folder"
        )
    if not path.is_dir():
        return "torch"
    if (path / "model.json").exists() or not (path / "config.json").exists():
        return "model"
    if _is_huggingface(path):
        return "huggingface"
    if not (path / "model").exists():
        raise UserError(f"{path} has no model yet: its run has not reached its first evaluation")
    return "work"


def _is_huggingface(path: Path) -> bool:
    """Whether a directory with a config.json is a Hugging Face folder: a work directory's names no model type."""
    if any(path.glob("*.safetensors")):
        return True
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return "model_type" in json.loads(files.read_text(path / "config.json"))
    return False


def _differences(stored: Params, wanted: Params) -> list[str]:
    """What distinguishes two trees of shapes, a line each."""
    have, want = (
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
        for leaves in (jax.tree_util.tree_leaves_with_path(tree) for tree in (stored, wanted))
    )
    lines = [f"{key} is missing" for key in want.keys() - have.keys()]
    lines += [f"{key} is unknown" for key in have.keys() - want.keys()]
    for key in want.keys() & have.keys():
        if tuple(have[key].shape) != tuple(want[key].shape) or have[key].dtype != want[key].dtype:
            lines.append(
                f"{key} is {have[key].dtype}{list(have[key].shape)}, not {want[key].dtype}{list(want[key].shape)}"
            )
    return sorted(lines)


# What it raises when a file can't be written (tensorstore's own errors are ValueErrors), or is not what it wrote.
ORBAX_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


def alone() -> ocp.Context:
    """In the block, orbax reads in this process alone: by default all processes of a run must take part."""
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    return context


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """In the block, orbax tells neither of its every step nor, beside the error it raises, of what led to it.

    When one read has failed, orbax no longer waits for the others and closes its event loop. They fail later, each
    with a traceback on stderr. So if the block fails, what keeps them quiet stays in place.
    """
    orbax, tasks, heard = logging.getLogger("absl"), logging.getLogger("asyncio"), sys.unraisablehook

    def hear(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            heard(unraisable)

    orbax_level, level = orbax.level, tasks.level
    orbax.setLevel(logging.CRITICAL)
    tasks.setLevel(logging.CRITICAL)
    sys.unraisablehook = hear
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        orbax.setLevel(max(orbax_level, logging.ERROR))
    tasks.setLevel(level)
    sys.unraisablehook = heard
