"""Hugging Face folders of a model, written and read: safetensors and JSON, no pickle."""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from tinysft_jax import files
from tinysft_jax.console import RunError, UserError, reason
from tinysft_jax.conversion import huggingface_tokenizer
from tinysft_jax.conversion.huggingface_tokenizer import PAD, Recognised
from tinysft_jax.conversion.names import (
    HUGGINGFACE_EMBEDDING,
    HUGGINGFACE_HEAD,
    bare_name,
    check_names,
    collect_params,
    halves_to_pairs,
    huggingface_names,
    is_rotated,
    pairs_to_halves,
)
from tinysft_jax.conversion.torch import LANGUAGE, mlp_ratio
from tinysft_jax.model import GPTConfig
from tinysft_jax.parameters import ModelDescription, Params, pad_vocabulary, parse_trained_length, trim_vocabulary
from tinysft_jax.tokenizer import ChatTokenizer

MODEL_TYPE, ARCHITECTURE = "stablelm", "StableLmForCausalLM"

# What makes a StableLM model the GPT of this package. Key → what it must be, what it is where a file leaves it out,
# and what another value would mean.
_FIXED = {
    "tie_word_embeddings": (True, False, "an untied head"),
    "use_qkv_bias": (False, False, "biases in its attention"),
    "qk_layernorm": (False, False, "norms of queries and keys"),
    "use_parallel_residual": (False, False, "attention and MLP side by side"),
    "hidden_act": ("silu", "silu", "another activation"),
    "layer_norm_eps": (1e-5, 1e-5, "another epsilon in its norms"),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def to_huggingface_config(config: GPTConfig, special_ids: dict[str, int | None]) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
      config: the shape.
      special_ids: `bos_token_id` and so on, where the tokenizer is known.
    """
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "max_position_embeddings": config.max_seq_len,
        **{key: value for key, (value, _, _) in _FIXED.items()},
        # Said twice: the first two are what programs of before transformers 5 read.
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0},
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",
        **special_ids,
    }


def from_huggingface_config(content: dict[str, Any]) -> GPTConfig:
    """The shape that a `config.json` describes.

    Raises:
      UserError: if it is another architecture; it says what makes it one.
    """
    if content.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"it is a model of type {content.get('model_type')!r}; only {MODEL_TYPE!r} can be this program's GPT"
        )
    for key, (wanted, default, meaning) in _FIXED.items():
        if content.get(key, default) != wanted:
            raise UserError(f"its {key} is {content.get(key, default)!r}, not {wanted!r}: {meaning}")
    if content.get("quantization_config") is not None:
        raise UserError("it is quantized; convert the model that it was made from")
    sizes = {key: content.get(key) for key in _SIZES}
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"its {key} is {value!r}, not a positive integer")
    heads = sizes["num_attention_heads"]
    if (shared := content.get("num_key_value_heads", 32)) != heads:
        raise UserError(
            f"its num_key_value_heads is {shared!r}, not {heads}: heads that share keys and values (grouped)"
        )
    if content.get("head_dim") not in (None, sizes["hidden_size"] // heads):
        raise UserError(f"its head_dim is {content['head_dim']!r}, not hidden_size / num_attention_heads")
    return GPTConfig(
        vocab_size=sizes["vocab_size"],
        dim=sizes["hidden_size"],
        n_layers=sizes["num_hidden_layers"],
        n_heads=heads,
        max_seq_len=sizes["max_position_embeddings"],
        mlp_ratio=mlp_ratio(sizes["hidden_size"], sizes["intermediate_size"]),
        rope_theta=_rope_theta(content),
    )


def _rope_theta(content: dict[str, Any]) -> float:
    """Raises: UserError, if rotary positions are partial or scaled."""
    # transformers 5 writes rope_parameters; before, its entries stood by themselves, and scaling in rope_scaling.
    rope = content.get("rope_parameters") or {}
    scaling = content.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise UserError("its rope_parameters or rope_scaling is not an object")
    factor = rope.get("partial_rotary_factor", content.get("partial_rotary_factor", 0.25))
    if factor != 1:
        raise UserError(
            f"its partial_rotary_factor is {factor!r}, not 1: rotary positions turn a part of each head only"
        )
    kind = rope.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    if kind != "default":
        raise UserError(f"its rotary positions are of the type {kind!r}, not 'default': they are scaled")
    theta = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise UserError(f"its rope_theta is {theta!r}, not a number")
    return float(theta)


# What a folder holds, besides the model card; the first tells it from a work directory.
CONTENT = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
# How to speak unless told otherwise: as `sample.py` does.
_DRAWING = {"do_sample": True, "temperature": 0.7, "top_k": 50, "max_new_tokens": 200}


def write_huggingface(directory: Path, params: Params, description: ModelDescription) -> None:
    """Fills an existing empty directory with a StableLM model and, where it is known, its tokenizer.

    Args:
      directory: to fill.
      params: a GPT's parameters, the table with or without its padding rows, which are not written.
      description: what the model is.

    Raises:
      UserError: if safetensors is not installed.
      RunError: if the disk is full, say.
    """
    save_file = _safetensors().numpy.save_file
    tensors, contents = huggingface_tensors(params, description.config), _json_files(description)
    if description.tokenizer is not None:
        tensors[HUGGINGFACE_EMBEDDING] = _with_pad_row(tensors[HUGGINGFACE_EMBEDDING])
    try:
        # The metadata is how transformers tells PyTorch's layout of kernels from others.
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / WEIGHTS).chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
        for name, content in contents.items():
            files.write_json(directory / name, content)
    except (OSError, _safetensors().SafetensorError) as error:
        raise RunError(f"can't write {directory}: {reason(error)}") from None


def _json_files(description: ModelDescription) -> dict[str, dict[str, Any]]:
    """Name → content of what stands beside the tensors."""
    config = description.config
    stated = {"trained_length": description.trained_length}
    if description.tokenizer is None:
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        stated["chat_template"] = description.chat_template  # which has no other place then
        return {
            "config.json": to_huggingface_config(config, ids) | {LANGUAGE: stated},
            "generation_config.json": _DRAWING | ids,
        }
    tokenizer = ChatTokenizer.from_description(description.to_json())
    added = huggingface_tokenizer.added_tokens(tokenizer, config.vocab_size)
    ids = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id, "pad_token_id": added[PAD]}
    never_drawn = {"suppress_tokens": [id for id in added.values() if id != tokenizer.eot_id]}
    return {
        "config.json": to_huggingface_config(dataclasses.replace(config, vocab_size=config.vocab_size + 1), ids)
        | {LANGUAGE: stated},
        "generation_config.json": _DRAWING | ids | never_drawn,
        "tokenizer.json": huggingface_tokenizer.tokenizer_json(tokenizer, config.vocab_size),
        "tokenizer_config.json": huggingface_tokenizer.tokenizer_config(tokenizer, description.trained_length),
    }


def _with_pad_row(table: Float[np.ndarray, "vocab dim"]) -> Float[np.ndarray, "vocab_and_pad dim"]:
    """The table with the pad token's row: the mean of all others.

    Its logit is the mean of theirs, and the exponential of a mean is at most the mean of the exponentials (Jensen). So
    of all tokens' probability the pad token takes at most an equal share, whatever the model sees, and no first place.
    """
    return np.concatenate([table, table.mean(axis=0, keepdims=True, dtype=np.float64).astype(table.dtype)])


def huggingface_tensors(params: Params, config: GPTConfig) -> dict[str, np.ndarray]:
    """The model's tensors for `model.safetensors`, contiguous float32; the head is tied: the table is there once."""
    params = jax.tree.map(np.asarray, trim_vocabulary(params, config))
    tensors = {}
    for name, place in huggingface_names(config.n_layers).items():
        tensor = place.view(params)
        tensors[name] = np.ascontiguousarray(pairs_to_halves(tensor, config.n_heads) if is_rotated(name) else tensor)
    return tensors


def read_huggingface(path: Path) -> tuple[ModelDescription, Params]:
    """Reads a Hugging Face folder as a model of this package.

    Returns:
      What the model is, and its parameters: nested dicts of float32 NumPy arrays, the table padded. The tokenizer is
      known where `tokenizer.json` is one of this package's.

    Raises:
      UserError: if the folder can't be read, or is of another architecture; it says why.
    """
    try:
        content = _read_json(path / "config.json")
        config = from_huggingface_config(content)
        recognised = _read_tokenizer(path, config)
        params = _read_params(path, config)
        stated = content.get(LANGUAGE)
        stated = stated if isinstance(stated, dict) else {}
        length = parse_trained_length(stated, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    source = {"kind": "huggingface", "directory": path.resolve().name}
    if recognised is None:
        template = "text" if stated.get("chat_template") == "text" else None
        return ModelDescription(config, template, None, source, length), params
    if recognised.pad_id == config.vocab_size - 1:  # else rows of somebody else's stand after it
        config = dataclasses.replace(config, vocab_size=config.vocab_size - 1)
        params = pad_vocabulary(trim_vocabulary(params, config), config)
    language = recognised.tokenizer.description()
    return ModelDescription(config, **language, source=source, trained_length=length), params


def _read_tokenizer(path: Path, config: GPTConfig) -> Recognised | None:
    """Raises: UserError, if the folder's tokenizer has ids that its model lacks."""
    if not (path / "tokenizer.json").is_file():
        return None
    recognised = huggingface_tokenizer.recognise(_read_json(path / "tokenizer.json"))
    if recognised and recognised.tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"its tokenizer has {recognised.tokenizer.vocab_size} ids, its model {config.vocab_size}")
    return recognised


def _read_params(path: Path, config: GPTConfig) -> Params:
    places = huggingface_names(config.n_layers)
    with _open_weights(path) as stored:
        check_names(stored, places, optional=HUGGINGFACE_HEAD)
        slices = {name: file.get_slice(key) for name, (file, key) in stored.items()}
        for name, tensor in slices.items():
            if tensor.get_dtype() not in _DTYPES:
                raise UserError(f"{name} is of type {tensor.get_dtype()}, not a floating-point number")

        def read(name: str) -> np.ndarray:
            file, key = stored[name]
            tensor = np.asarray(file.get_tensor(key), np.float32)
            return halves_to_pairs(tensor, config.n_heads) if is_rotated(name) else tensor

        params = collect_params(config, places, {name: tuple(s.get_shape()) for name, s in slices.items()}, read)
        table = params["tok_emb"]["embedding"][: config.vocab_size]
        if HUGGINGFACE_HEAD in stored and not np.array_equal(read(HUGGINGFACE_HEAD), table):
            raise UserError(f"{HUGGINGFACE_HEAD} differs from {HUGGINGFACE_EMBEDDING}: an untied head")
    return params


@contextmanager
def _open_weights(path: Path) -> Iterator[dict[str, tuple[Any, str]]]:
    """Yields tensor name → the open safetensors file that holds it, and the key under which it does."""
    safetensors = _safetensors()
    names = [WEIGHTS]
    if not (path / WEIGHTS).is_file() and (path / WEIGHTS_INDEX).is_file():
        weight_map = _read_json(path / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(Path(str(n)).name == n for n in weight_map.values()):
            raise UserError(f"{WEIGHTS_INDEX} has no weight_map of files beside it")
        names = sorted(set(weight_map.values()))
    elif not (path / WEIGHTS).is_file():
        raise UserError(f"it has no {WEIGHTS}; pickled weights are not read: save the model again as safetensors")
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safetensors.safe_open(path / name, framework="np")) for name in names]
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"can't read {' or '.join(names)}: {reason(error)}; copy it again") from None
        stored: dict[str, tuple[Any, str]] = {}
        for file in opened:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                if (name := bare_name(key)) in stored:
                    raise UserError(f"{name} occurs twice, in two files or under different names of wrappers")
                stored[name] = file, key
        yield stored


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.read_text(path))
    except OSError as error:
        raise UserError(f"can't read {path.name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is not a JSON object")
    return content


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError("Hugging Face folders need safetensors: pip install -e '.[hf]'") from None
    return safetensors
