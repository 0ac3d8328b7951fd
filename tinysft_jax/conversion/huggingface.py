"""Hugging Face folders (StableLM) of a model, written and read: safetensors and JSON, no pickle."""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tinysft_jax import files
from tinysft_jax.bpe import TOKENIZER_JSON
from tinysft_jax.console import RunError, UserError, import_extra, reason, shown
from tinysft_jax.conversion import huggingface_tokenizer, tokenizer_files
from tinysft_jax.conversion.huggingface_tokenizer import PAD
from tinysft_jax.conversion.names import OWN_KEY, STABLELM, bare_name, mlp_ratio, own_entries
from tinysft_jax.model import LARGEST_SIZE, GPTConfig
from tinysft_jax.parameters import ModelDescription, Params, pad_vocabulary, parse_trained_length, trim_vocabulary
from tinysft_jax.tokenizer import KEPT, ChatTokenizer, write_files

# What a folder holds, besides the model card; the first tells it from a work directory.
CONTENT = ("model.safetensors", "config.json", *KEPT)
_safetensors = functools.partial(import_extra, "safetensors.numpy", "hf", "a Hugging Face folder")
_read_json = functools.partial(files.read_json, what="a Hugging Face folder", format_version=None)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("float64", "float32", "float16", "bfloat16")
# The defaults of `sample.py`.
_GENERATION = {"do_sample": True, "temperature": 0.7, "top_k": 50, "max_new_tokens": 200}

_MODEL_TYPE, _ARCHITECTURE = "stablelm", "StableLmForCausalLM"
# Shape of the model here → in config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
}
# What makes a StableLM model the GPT of this package: key → the value it must have, the default where a file leaves it
# out, and what another value means.
_FIXED = {
    "tie_word_embeddings": (True, False, "an untied head"),
    "use_qkv_bias": (False, False, "biases in its attention"),
    "qk_layernorm": (False, False, "norms of queries and keys"),
    "use_parallel_residual": (False, False, "attention and MLP in parallel"),
    "hidden_act": ("silu", "silu", "another activation"),
    "layer_norm_eps": (1e-5, 1e-5, "another epsilon in its norms"),
}


def write_huggingface(directory: Path, params: Params, description: ModelDescription) -> None:
    """Writes a model, its embedding padded or not, and its tokenizer, if it is known, into an empty directory."""
    safetensors = _safetensors()
    tensors = STABLELM.export_tensors(params, description.config)
    if description.tokenizer is not None and not description.tokenizer_files:
        # The pad token's row is the mean of the others, and so is its logit. As the exponential of a mean is at most
        # the mean of the exponentials (Jensen), its probability is at most an equal share, for any input.
        embedding = tensors[STABLELM.embedding]
        mean = embedding.mean(axis=0, keepdims=True, dtype=np.float64).astype(embedding.dtype)
        tensors[STABLELM.embedding] = np.concatenate([embedding, mean])
    try:
        for name, content in _json_files(description).items():
            files.write_json(directory / name, content)
        if description.tokenizer_files:
            write_files(directory, tokenizer_files.to_write(description.make_tokenizer()))
        # The metadata tells transformers that kernels have PyTorch's layout.
        safetensors.numpy.save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / _WEIGHTS)  # safetensors lets only the owner read
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(f"can't write {directory}: {reason(error)}") from None


def _json_files(description: ModelDescription) -> dict[str, dict[str, Any]]:
    """Name → content of everything but the tensors."""
    config, stated = description.config, {"trained_length": description.trained_length}
    if description.tokenizer is None:
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        stated["chat_template"] = description.chat_template  # elsewhere it is in the tokenizer's files
        return {
            "config.json": _to_config(config) | ids | {OWN_KEY: stated},
            "generation_config.json": _GENERATION | ids,
        }
    tokenizer = description.make_tokenizer()
    if description.tokenizer_files:
        return {"config.json": _to_config(config) | tokenizer_files.token_ids(tokenizer) | {OWN_KEY: stated}}
    added = huggingface_tokenizer.added_tokens(tokenizer, config.vocab_size)
    ids = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id, "pad_token_id": added[PAD]}
    suppressed = {"suppress_tokens": [id for id in added.values() if id != tokenizer.eot_id]}
    with_pad = dataclasses.replace(config, vocab_size=config.vocab_size + 1)
    return {
        "config.json": _to_config(with_pad) | ids | {OWN_KEY: stated},
        "generation_config.json": _GENERATION | ids | suppressed,
        "tokenizer.json": huggingface_tokenizer.tokenizer_json(tokenizer, config.vocab_size),
        "tokenizer_config.json": huggingface_tokenizer.tokenizer_config(tokenizer, description.trained_length),
    }


def _to_config(config: GPTConfig) -> dict[str, Any]:
    rope = {"rope_theta": config.rope_theta, "partial_rotary_factor": 1.0}
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": _MODEL_TYPE,
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": config.n_heads,
        **{key: value for key, (value, _, _) in _FIXED.items()},
        **rope,  # read by transformers before version 5
        "rope_parameters": {"rope_type": "default", **rope},
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def read_huggingface(path: Path) -> tuple[ModelDescription, Params]:
    """Reads a Hugging Face folder, as `checkpoints.open_model` does."""
    content = _read_json(path / "config.json")
    try:
        config, (tokenizer, pad_id) = _from_config(content), _read_tokenizer(path, content)
        if tokenizer and tokenizer.vocab_size > config.vocab_size:
            raise UserError(f"its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}")
        params, stated = STABLELM.import_tensors(_read_tensors(path), config), own_entries(content)
        length = parse_trained_length(stated, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    source = {"kind": "huggingface", "directory": path.resolve().name}
    if tokenizer is None:
        template = "text" if stated.get("chat_template") == "text" else None
        return ModelDescription(config, template, None, source, length), params
    if pad_id == config.vocab_size - 1:  # otherwise rows that were added elsewhere follow it
        config = dataclasses.replace(config, vocab_size=config.vocab_size - 1)
        params = pad_vocabulary(trim_vocabulary(params, config), config)
    model = ModelDescription(config, **tokenizer.description(), source=source, trained_length=length)
    return dataclasses.replace(model, tokenizer_files=tokenizer.files), params


def read_folder_tokenizer(path: Path) -> ChatTokenizer:
    """The tokenizer of a Hugging Face folder. Raises: UserError, if there is none, or it can't be used."""
    if tokenizer := _read_tokenizer(path, _read_json(path / "config.json"))[0]:
        return tokenizer
    raise UserError("it has no tokenizer.json, so its tokenizer is unknown")


def _read_tokenizer(path: Path, config: dict[str, Any]) -> tuple[ChatTokenizer | None, int | None]:
    """The tokenizer, and the id of the pad token that this package added; both None if there is no `tokenizer.json`."""
    if not (path / TOKENIZER_JSON).is_file():
        return None, None
    if recognised := huggingface_tokenizer.recognise(_read_json(path / TOKENIZER_JSON)):
        return recognised
    try:
        return tokenizer_files.read_tokenizer(path, config), None
    except UserError as error:
        raise UserError(f"{error} (without {TOKENIZER_JSON} the model is read alone)") from None


def _from_config(content: dict[str, Any]) -> GPTConfig:
    """Raises: UserError, saying what differs, if `config.json` is of another architecture."""
    if content.get("model_type") != _MODEL_TYPE:
        raise UserError(
            f"it is a model of type {shown(content.get('model_type'))}; only {_MODEL_TYPE!r} can be this program's GPT"
        )
    for key, (wanted, default, meaning) in _FIXED.items():
        if (value := content.get(key, default)) != wanted:
            raise UserError(f"its {key} is {shown(value)}, not {wanted!r}: {meaning}")
    if content.get("quantization_config") is not None:
        raise UserError("it is quantized; convert the model that was quantized")
    sizes = {ours: content.get(theirs) for ours, theirs in _SIZES.items()}
    for ours, value in sizes.items():
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            raise UserError(f"its {_SIZES[ours]} is {shown(value)}, not a positive integer below 2^31")
    dim, hidden_dim, n_heads = sizes["dim"], sizes.pop("hidden_dim"), sizes["n_heads"]
    if (shared := content.get("num_key_value_heads", 32)) != n_heads:
        raise UserError(f"its num_key_value_heads is {shown(shared)}, not {n_heads}: grouped-query attention")
    if content.get("head_dim") not in (None, dim // n_heads):
        raise UserError(f"its head_dim is {shown(content['head_dim'])}, not hidden_size / num_attention_heads")
    return GPTConfig(**sizes, mlp_ratio=mlp_ratio(dim, hidden_dim), rope_theta=_rope_theta(content))


def _rope_theta(content: dict[str, Any]) -> float:
    """Raises: UserError, if rotary positions are partial or scaled."""
    # transformers 5 writes rope_parameters; before, its entries were on the top level, and scaling in rope_scaling.
    rope, scaling = content.get("rope_parameters") or {}, content.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise UserError("its rope_parameters or rope_scaling is not an object")
    factor = rope.get("partial_rotary_factor", content.get("partial_rotary_factor", 0.25))
    if factor != 1:
        raise UserError(f"its partial_rotary_factor is {shown(factor)}, not 1: only a part of each head is rotated")
    kind = rope.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    if kind != "default":
        raise UserError(f"its RoPE is of the type {shown(kind)}, not 'default': scaled positions")
    theta = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    if type(theta) not in (int, float) or not 0 < theta <= LARGEST_SIZE:
        raise UserError(f"its rope_theta is {shown(theta)}, not a positive number below 2^31")
    return float(theta)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder by name, without the names of wrappers."""
    safetensors = _safetensors()
    file_names = [_WEIGHTS]
    if not (path / _WEIGHTS).is_file():
        if not (path / _INDEX).is_file():
            raise UserError(f"it has no {_WEIGHTS}; pickled weights are not read: save the model again as safetensors")
        weight_map = _read_json(path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(Path(str(n)).name == n for n in weight_map.values()):
            raise UserError(f"{_INDEX} has no weight_map of files beside it")
        file_names = sorted(set(weight_map.values()))
    tensors: dict[str, np.ndarray] = {}
    for file_name in file_names:
        try:
            loaded = safetensors.numpy.load_file(path / file_name)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"can't read {file_name}: {reason(error)}; copy it again") from None
        for key, tensor in loaded.items():
            if (name := bare_name(key)) in tensors:
                raise UserError(f"{name} occurs twice, in two files or under different names of wrappers")
            if tensor.dtype.name not in _DTYPES:
                raise UserError(f"{name} is {tensor.dtype}, not a floating-point tensor")
            tensors[name] = tensor
    return tensors
