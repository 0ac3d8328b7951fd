"""The model directory, and `open_model`, which reads a model in any form.

A model directory has `model.json`, the description, and `params/`, which orbax writes, without the padding rows of the
embedding.
"""

import contextlib
import dataclasses
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from tinysft_jax import distributed, files, parameters
from tinysft_jax.console import RunError, UserError, explained, named
from tinysft_jax.conversion.gguf import read_gguf, read_gguf_tokenizer
from tinysft_jax.conversion.gguf_file import MAGIC
from tinysft_jax.conversion.huggingface import read_folder_tokenizer, read_huggingface
from tinysft_jax.conversion.torch import read_torch_checkpoint
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription, Params
from tinysft_jax.tokenizer import FILES_DIRECTORY, ChatTokenizer, read_files, write_files

# Of orbax, if a file can't be written or is damaged; tensorstore's errors are ValueErrors.
ORBAX_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


def load_model(path: str | Path, reward: bool = False, **options) -> GPT:
    """Reads a model from any path that `open_model` takes; `options` are GPT's: dtype, attention, remat."""
    description, params = open_model(path, reward=reward)
    return parameters.make_model(description.config, params, trained_length=description.trained_length, **options)


def open_model(path: str | Path, n_heads: int | None = None, reward: bool = False) -> tuple[ModelDescription, Params]:
    """Reads a work directory (its best model so far), a model directory, a `.pt` or GGUF file or a Hugging Face folder.

    `n_heads`, the number of attention heads, is for a `.pt` file that does not say. With `reward`, it must be a reward
    model, else a language model. Returns the description, and the parameters as float32 NumPy arrays in host memory,
    the embedding padded.
    """
    path = Path(path).expanduser()
    kind = model_kind(path)
    if n_heads is not None and kind != "torch":
        raise UserError(f"--n_heads is for .pt files that don't say; {path} does")
    if kind == "torch":
        description, params = read_torch_checkpoint(path, n_heads)
    else:
        readers = {"huggingface": read_huggingface, "gguf": read_gguf}
        description, params = readers.get(kind, _read_model_directory)(path / "model" if kind == "work" else path)
    if reward and not description.config.scalar_head:
        raise UserError(f"{path} is a language model; give a reward model")
    if description.config.scalar_head and not reward:
        raise UserError(f"{path} is a reward model: it scores answers, and gives none")
    return description, params


def load_tokenizer(path: str | Path) -> ChatTokenizer:
    """The tokenizer of a prepared data set, or of a model at any path that `open_model` takes."""
    path = Path(path).expanduser()
    kind = "data" if (path / "data.json").exists() else model_kind(path)
    if kind in ("huggingface", "gguf"):
        with named(path):
            tokenizer = read_folder_tokenizer(path)[0] if kind == "huggingface" else read_gguf_tokenizer(path)
            if tokenizer is None:
                raise UserError("it has no tokenizer")
            return tokenizer
    if kind == "data":
        content = files.read_json(path / "data.json", "a prepared data set", format_version=4)
        kept = read_files(path / FILES_DIRECTORY)
    else:
        place = path / "model" if kind == "work" else path
        description = open_model(path)[0] if kind == "torch" else load_description(place)
        content, kept = description.to_json(), description.tokenizer_files
    with named(path):
        return ChatTokenizer.from_description(content, kept)


def model_kind(path: Path) -> str:
    """The form of the model at `path`: "torch", "gguf", "model", "huggingface" or "work" (directory)."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a work directory, a model directory, a .pt or .gguf file or a Hugging Face "
            "folder"
        )
    if path.suffix == ".gguf" and not path.is_dir():
        return "gguf"
    if not path.is_dir():
        with contextlib.suppress(OSError), path.open("rb") as file:
            return "gguf" if file.read(len(MAGIC)) == MAGIC else "torch"  # Ollama's GGUF files have no suffix
        return "torch"
    if (path / "model.json").exists():
        return "model"
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):  # pickled weights are refused when they are read
        return "huggingface"
    if not (path / "config.json").exists():
        return "model"  # without its model.json, as the error says
    with contextlib.suppress(UserError):
        if "model_type" in files.read_json(path / "config.json", "a model", format_version=None):
            return "huggingface"
    if not (path / "model").exists():
        raise UserError(f"{path} has no model yet: its run has not reached its first evaluation")
    return "work"


def write_model(directory: Path, params: Params, description: ModelDescription) -> None:
    """Writes a model directory into an empty one. With several processes, all call it."""
    with explained(f"can't write {directory}", RunError, (ValueError, OSError)):
        ocp.save(directory.resolve() / "params", parameters.trim_vocabulary(params, description.config))
    if distributed.is_first():
        write_files(directory / FILES_DIRECTORY, description.tokenizer_files)
        files.write_json(directory / "model.json", description.to_json())


def load_description(path: Path) -> ModelDescription:
    return _read_model_json(path)[0]


def _read_model_json(path: Path) -> tuple[ModelDescription, int]:
    """The description, and the format version."""
    where = Path(path) / "model.json"
    content = files.read_json(where, "a model directory", parameters.FORMAT_VERSION)
    description = ModelDescription.from_json(content, where)
    kept = read_files(Path(path) / FILES_DIRECTORY)
    return dataclasses.replace(description, tokenizer_files=kept), content["format_version"]


def _read_model_directory(path: Path) -> tuple[ModelDescription, Params]:
    """Each process reads for itself."""
    description, format_version = _read_model_json(path)
    params = _read_params(path, description.config)
    if format_version == 1:
        params = parameters.reorder_heads(params, description.config, interleave=False)
    return description, parameters.pad_vocabulary(params, description.config)


def _read_params(path: Path, config: GPTConfig) -> Params:
    """What is in `params/`, as it is stored."""
    directory = path.resolve() / "params"
    wanted = parameters.trim_vocabulary(parameters.model_parameter_shapes(config), config)
    with explained(f"can't read {directory}", causes=ORBAX_ERRORS), quiet_orbax(), alone():
        if not ocp.is_orbax_checkpoint(directory):
            raise UserError(f"{path} has no readable params/; convert or copy the model again")
        stored = ocp.metadata(directory).metadata
        have, want = _shapes(stored), _shapes(wanted)
        if differing := [key for key in sorted(have | want) if have.get(key) != want.get(key)]:
            parts = [f"{key} is {have.get(key, 'missing')}, not {want.get(key, 'expected')}" for key in differing]
            raise UserError(f"{directory} does not fit model.json: {'; '.join(parts[:5])}")
        return ocp.load(directory, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored))


def _shapes(tree: Params) -> dict[str, str]:
    """Dotted name → dtype and shape, such as "float32[2, 16]"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def alone() -> ocp.Context:
    """In the block, orbax reads in this process alone; by default all processes must take part."""
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    return context


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """In the block, orbax logs nothing, and prints nothing beside the error that it raises.

    After an error it closes its event loop, and pending reads fail later, each with a traceback on stderr. So then the
    filters stay in place.
    """
    absl, asyncio, hook = logging.getLogger("absl"), logging.getLogger("asyncio"), sys.unraisablehook
    absl_level, asyncio_level = absl.level, asyncio.level

    def filtered_hook(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    absl.setLevel(logging.CRITICAL)
    asyncio.setLevel(logging.CRITICAL)
    sys.unraisablehook = filtered_hook
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        absl.setLevel(max(absl_level, logging.ERROR))
    asyncio.setLevel(asyncio_level)
    sys.unraisablehook = hook
