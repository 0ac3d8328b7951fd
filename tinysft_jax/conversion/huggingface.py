"""Hugging Face folders of a model, written and read: safetensors and JSON, no pickle."""

import dataclasses
import functools
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinysft_jax import files
from tinysft_jax.bpe import TOKENIZER_JSON
from tinysft_jax.console import RunError, UserError, explained, import_extra, named, shown
from tinysft_jax.conversion import huggingface_tokenizer, tokenizer_files
from tinysft_jax.conversion.families import read_config, write_config
from tinysft_jax.conversion.huggingface_tokenizer import PAD
from tinysft_jax.conversion.names import OWN_KEY, bare_name, huggingface_layout, own_entries
from tinysft_jax.parameters import ModelDescription, Params, describe, pad_vocabulary, trim_vocabulary
from tinysft_jax.tokenizer import KEPT, ChatTokenizer, write_files

# What a folder holds, besides the model card; the first tells it from a work directory.
CONTENT = ("model.safetensors", "config.json", *KEPT)
_safetensors = functools.partial(import_extra, "safetensors.numpy", "hf", "a Hugging Face folder")
_read_json = functools.partial(files.read_json, what="a Hugging Face folder", format_version=None)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Of what is written, and as safetensors calls what is read.
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
_READABLE = ("F64", "F32", "F16", "BF16")
# Old files hold rotary frequencies, which follow from the configuration.
_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# The defaults of `sample.py`.
_GENERATION = {"do_sample": True, "temperature": 0.7, "top_k": 50, "max_new_tokens": 200}


def write_huggingface(directory: Path, params: Params, description: ModelDescription, dtype: str = "float32") -> None:
    """Writes a model, its embedding padded or not, and its tokenizer, if it is known, into an empty directory.

    `dtype`, one of `DTYPES`, is that of the tensors. Raises: UserError, if no family of Hugging Face has this model.
    """
    safetensors, layout = _safetensors(), huggingface_layout(description.config)
    tensors = layout.export_tensors(params, description.config, DTYPES[dtype])
    if (description.tokenizer or {}).get("kind") == "gpt2":
        # The pad token's row is the mean of the others, and so is its logit. As the exponential of a mean is at most
        # the mean of the exponentials (Jensen), its probability is at most an equal share, for any input.
        for name in tensors.keys() & {layout.embedding, layout.head}:
            mean = tensors[name].mean(axis=0, keepdims=True, dtype=np.float64)
            tensors[name] = np.concatenate([tensors[name], mean.astype(DTYPES[dtype])])
    with explained(f"can't write {directory}", RunError, (OSError, safetensors.SafetensorError)):
        for name, content in _json_files(description, dtype).items():
            files.write_json(directory / name, content)
        if description.tokenizer_files:
            write_files(directory, tokenizer_files.to_write(description.make_tokenizer()))
        # The metadata tells transformers that kernels have PyTorch's layout.
        safetensors.numpy.save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / _WEIGHTS)  # safetensors lets only the owner read


def rounded(params: Params, dtype: str) -> Params:
    """The float32 parameters that a folder with tensors of this dtype holds."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, DTYPES[dtype]).astype(np.float32, copy=False), params)


def _json_files(description: ModelDescription, dtype: str) -> dict[str, dict[str, Any]]:
    """Name → content of everything but the tensors."""
    config, stated = description.config, {"trained_length": description.trained_length}
    if description.tokenizer is None:
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        stated["chat_template"] = description.chat_template  # elsewhere it is in the tokenizer's files
        return {
            "config.json": write_config(config, dtype) | ids | {OWN_KEY: stated},
            "generation_config.json": _GENERATION | ids,
        }
    tokenizer = description.make_tokenizer()
    if description.tokenizer_files:
        return {"config.json": write_config(config, dtype) | tokenizer_files.token_ids(tokenizer) | {OWN_KEY: stated}}
    added = huggingface_tokenizer.added_tokens(tokenizer, config.vocab_size)
    ids = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id, "pad_token_id": added[PAD]}
    suppressed = {"suppress_tokens": [id for id in added.values() if id != tokenizer.eot_id]}
    with_pad = dataclasses.replace(config, vocab_size=config.vocab_size + 1)
    return {
        "config.json": write_config(with_pad, dtype) | ids | {OWN_KEY: stated},
        "generation_config.json": _GENERATION | ids | suppressed,
        "tokenizer.json": huggingface_tokenizer.tokenizer_json(tokenizer, config.vocab_size),
        "tokenizer_config.json": huggingface_tokenizer.tokenizer_config(tokenizer, description.trained_length),
    }


def read_huggingface(path: Path) -> tuple[ModelDescription, Params]:
    """Reads a Hugging Face folder, as `checkpoints.open_model` does."""
    content = _read_json(path / "config.json")
    with named(path):
        config, (tokenizer, pad_id) = read_config(content), read_folder_tokenizer(path)
        source = {"kind": "huggingface", "directory": path.resolve().name}
        description = describe(config, tokenizer, source, own_entries(content))
        params = huggingface_layout(config).import_tensors(_open_tensors(path), config)
    if pad_id == config.vocab_size - 1:  # otherwise rows that were added elsewhere follow it
        config = dataclasses.replace(config, vocab_size=config.vocab_size - 1)
        params = pad_vocabulary(trim_vocabulary(params, config), config)
        description = dataclasses.replace(description, config=config)
    return description, params


def read_folder_tokenizer(path: Path) -> tuple[ChatTokenizer | None, int | None]:
    """A folder's tokenizer, and the id of the pad token that this package added; both None if it has no tokenizer.json.

    Raises: UserError, if it can't be used.
    """
    if not (path / TOKENIZER_JSON).is_file():
        return None, None
    if recognised := huggingface_tokenizer.recognise(_read_json(path / TOKENIZER_JSON)):
        return recognised
    try:
        return tokenizer_files.read_tokenizer(path, _read_json(path / "config.json")), None
    except UserError as error:
        raise UserError(f"{error} (without {TOKENIZER_JSON} the model is read alone)") from None


class _Stored(NamedTuple):
    """A tensor in a file, which NumPy reads when it makes an array of it."""

    file: Any  # of safetensors
    key: str
    shape: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.file.get_tensor(self.key), dtype)


def _open_tensors(path: Path) -> dict[str, _Stored]:
    """The tensors of a folder by name, without the names of wrappers, and without buffers."""
    safetensors = _safetensors()
    tensors: dict[str, _Stored] = {}
    for file_name in _weight_files(path):
        with explained(f"can't read {file_name} (copy it again)", causes=(OSError, safetensors.SafetensorError)):
            file = safetensors.safe_open(path / file_name, framework="np")
            for key in sorted(file.keys()):
                part = file.get_slice(key)
                name = bare_name(key) if key.isprintable() else shown(key)
                if name in tensors:
                    raise UserError(f"{name} occurs twice, in two files or under different names of wrappers")
                if part.get_dtype() not in _READABLE:
                    raise UserError(f"{name} is {part.get_dtype()}; only {', '.join(_READABLE)} are read")
                if not _BUFFER.fullmatch(name):
                    tensors[name] = _Stored(file, key, tuple(part.get_shape()))
    return tensors


def _weight_files(path: Path) -> list[str]:
    """The names of the files with a folder's tensors."""
    if (path / _WEIGHTS).is_file():
        return [_WEIGHTS]
    if not (path / _INDEX).is_file():
        raise UserError(f"it has no {_WEIGHTS}; pickled weights are not read: save the model again as safetensors")
    weight_map = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(Path(str(n)).name == n for n in weight_map.values()):
        raise UserError(f"{_INDEX} has no weight_map of files beside it")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (path / name).is_file():  # reading a pipe might never end
            raise UserError(f"{_INDEX} names {shown(name)}, which is not there; copy the folder again")
    return names
