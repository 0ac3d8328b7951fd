"""Reads the PyTorch project's checkpoints: what a file leaves unsaid is found in its tensors."""

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Complex

from tinysft_jax.errors import UserError, shown
from tinysft_jax.interop.collect import check_names, collect_params
from tinysft_jax.interop.torch_file import TorchFile, open_torch_file
from tinysft_jax.interop.torch_names import EMBEDDING, HEAD, as_numpy, torch_names
from tinysft_jax.model import LARGEST_SIZE, GPTConfig
from tinysft_jax.model_directory import ModelDescription, Params, parse_trained_length
from tinysft_jax.tokenizer import GPT2_RANKS, ChatTokenizer

if TYPE_CHECKING:
    import torch

# Where this package's own files say what the PyTorch project's leave unsaid (`ModelDescription`'s keys).
LANGUAGE = "tinysft_jax"


def read_torch_checkpoint(path: str | Path, n_heads: int | None = None) -> tuple[ModelDescription, Params]:
    """Reads a checkpoint as a model of this package.

    Args:
      path: the `.pt` file.
      n_heads: the number of attention heads, for a file that doesn't tell.

    Returns:
      What the model is, and its parameters: nested dicts of float32 NumPy arrays, the table padded.

    Raises:
      UserError: if the file is no sound checkpoint of this model, or contradicts itself or `n_heads`.
    """
    file = open_torch_file(path)
    try:
        check_names(file.parameters, torch_names(_n_layers(file)), optional=HEAD)
        config, assumed = _infer_config(file, n_heads)
        description = _describe(file, config, assumed)
        params = _convert(file, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return description, params


def _describe(file: TorchFile, config: GPTConfig, assumed: dict[str, int | float]) -> ModelDescription:
    source = {"kind": "pytorch", "file": file.path.name}
    for key in ("step", "loss", "model_type"):
        value = file.content.get(key)
        if _is_plain(value):
            source[key] = value
    if assumed:
        source["assumed"] = assumed
    language = usual_language(config, file.content.get("model_type") == "sft")
    stated = file.content.get(LANGUAGE)
    stated = stated if isinstance(stated, dict) else {}
    if "tokenizer" in stated:
        language = ChatTokenizer.from_description(stated).description()
    return ModelDescription(config, **language, source=source, trained_length=parse_trained_length(stated, config))


def _is_plain(value: object) -> bool:
    """Whether a value is one that training writes, fit for `model.json`."""
    if isinstance(value, str):
        return value.isprintable() and len(value) <= 100
    return isinstance(value, int | float) and abs(value) < 2**63  # false for NaN too


def usual_language(config: GPTConfig, is_chat: bool) -> dict[str, Any]:
    """Chat template and tokenizer of the PyTorch project's own files, which name neither.

    A vocabulary as large as GPT-2's is taken for it, another is unknown.
    """
    tokenizer = {"kind": "gpt2", "bpe_ranks": GPT2_RANKS} if config.vocab_size > GPT2_RANKS else None
    return {"chat_template": "text" if is_chat else None, "tokenizer": tokenizer}


def _n_layers(file: TorchFile) -> int:
    layers = (re.match(r"blocks\.(\d{1,4})\.", name) for name in file.parameters)
    return max((int(layer[1]) for layer in layers if layer), default=0) + 1


def _infer_config(file: TorchFile, n_heads: int | None) -> tuple[GPTConfig, dict[str, int | float]]:
    """The model's shape, and those parts of it that nothing in the file tells and so are the defaults."""
    vocab_size, dim = _matrix_shape(file, EMBEDDING)
    hidden_dim, _ = _matrix_shape(file, "blocks.0.mlp.w1.weight")
    claims = {
        "its tensors": {"vocab_size": vocab_size, "dim": dim, "n_layers": _n_layers(file)},
        "its config": _stated_config(file),
        "--n_heads": {} if n_heads is None else {"n_heads": n_heads},
    }
    if (table := file.buffer("freqs_cis")) is not None:
        claims["freqs_cis"] = {"max_seq_len": len(table), "n_heads": _n_heads(table, dim)}
        theta = rope_theta(table)
        claims["freqs_cis"] |= {} if theta is None else {"rope_theta": theta}
    if (mask := file.buffer("mask")) is not None:
        claims["mask"] = {"max_seq_len": len(mask)}

    shape = {"mlp_ratio": claims["its config"].pop("mlp_ratio", mlp_ratio(dim, hidden_dim))}
    if int(dim * shape["mlp_ratio"]) != hidden_dim:
        raise UserError(f"mlp_ratio is {shape['mlp_ratio']} in its config, but w1 has {hidden_dim} rows for dim {dim}")
    for field in ("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len", "rope_theta"):
        values = {who: claim[field] for who, claim in claims.items() if field in claim}
        tolerance = 1e-5 if field == "rope_theta" else 0.0  # the table gives theta only nearly
        if any(not math.isclose(*pair, rel_tol=tolerance) for pair in itertools.combinations(values.values(), 2)):
            raise UserError(f"{field} is {', but '.join(f'{value} by {who}' for who, value in values.items())}")
        if values:
            shape[field] = next(iter(values.values()))
    if "n_heads" not in shape:
        raise UserError("the number of attention heads can't be determined from the file; convert it with --n_heads N")
    assumed = {field: getattr(GPTConfig, field) for field in ("max_seq_len", "rope_theta") if field not in shape}
    return GPTConfig(**shape, **assumed), assumed


def _stated_config(file: TorchFile) -> dict[str, int | float]:
    """The entries of the file's `config` that say what its tensors say too."""
    config = file.content.get("config", {})
    if not isinstance(config, dict | None):
        raise UserError(f"its config is a {type(config).__name__}, not a dict")
    stated = {}
    for field in dataclasses.fields(GPTConfig):
        value = config.get(field.name) if config else None
        if value is None:
            continue
        kinds = (int, float) if field.type is float else (int,)
        if type(value) not in kinds or not 0 < value <= LARGEST_SIZE:
            raise UserError(f"{field.name} is {shown(value)} in its config, not a positive number below 2^31")
        stated[field.name] = field.type(value)
    return stated


def _matrix_shape(file: TorchFile, name: str) -> tuple[int, int]:
    shape = tuple(file.parameters[name].shape)
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{name} has shape {list(shape)}, which is no matrix")
    return shape


def mlp_ratio(dim: int, hidden_dim: int) -> float:
    """The ratio that gives exactly `hidden_dim` where a model computes int(dim * ratio)."""
    ratio = hidden_dim / dim
    while int(dim * ratio) < hidden_dim:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _n_heads(table: "torch.Tensor", dim: int) -> int:
    head_dim = 2 * table.shape[1]
    if not head_dim or dim % head_dim:
        raise UserError(f"freqs_cis has shape {list(table.shape)}, which fits no head size that divides dim {dim}")
    return dim // head_dim


def rope_theta(table: "torch.Tensor") -> float | None:
    """The base of a rotary table exp(i position theta^(-2k / head_dim)), or None if the table doesn't tell.

    Raises:
      UserError: if it is another table (of scaled positions, say).
    """
    n_positions, half = table.shape
    if not table.is_complex() or n_positions < 2 or half < 2:  # a cast to bfloat16 leaves only the cosines
        return None
    turns = table.cfloat().numpy().astype(np.complex128)
    angles = np.angle(turns[1])
    if (angles > 0).all():
        exact = float(angles[0] / angles[-1]) ** (half / (half - 1))
        # Float32 tables give theta to 2e-7: the shortest decimal in that range is what was meant.
        theta = next(short for n in range(1, 18) if math.isclose(short := float(f"{exact:.{n}g}"), exact, rel_tol=1e-6))
        if np.abs(_rotary_table(n_positions, half, theta) - turns).max() < 1e-6 * max(n_positions, 1000):
            return theta
    raise UserError("freqs_cis is no plain rotary table exp(i position theta^(-2k / head_dim))")


def _rotary_table(n_positions: int, half: int, theta: float) -> Complex[np.ndarray, "T half"]:
    return np.exp(1j * np.outer(np.arange(n_positions), theta ** -(np.arange(half) / half)))


def _convert(file: TorchFile, config: GPTConfig) -> Params:
    shapes = {name: tuple(tensor.shape) for name, tensor in file.parameters.items()}
    params = collect_params(config, torch_names(config.n_layers), shapes, lambda name: as_numpy(file.parameters[name]))
    table = params["tok_emb"]["embedding"][: config.vocab_size]
    if HEAD in file.parameters and not np.array_equal(as_numpy(file.parameters[HEAD]), table):
        raise UserError(f"{HEAD} differs from {EMBEDDING}; in this model they are one parameter")
    return params
