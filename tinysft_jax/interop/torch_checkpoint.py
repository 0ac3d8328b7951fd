"""Reads the PyTorch project's checkpoints: what a file leaves unsaid is found in its tensors."""

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Complex

from tinysft_jax.errors import UserError
from tinysft_jax.interop.torch_file import TorchFile, open_torch_file
from tinysft_jax.interop.torch_names import EMBEDDING, HEAD, as_numpy, torch_names
from tinysft_jax.model import GPTConfig
from tinysft_jax.model_directory import (
    ModelDescription,
    Params,
    model_parameter_shapes,
    pad_vocabulary,
    trim_vocabulary,
)

if TYPE_CHECKING:
    import torch

GPT2_VOCAB_SIZE = 50257


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
        _check_names(file)
        config, assumed = _infer_config(file, n_heads)
        params = _convert(file, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return _describe(file, config, assumed), params


def _describe(file: TorchFile, config: GPTConfig, assumed: dict[str, int | float]) -> ModelDescription:
    """A file says nothing of its tokenizer: a vocabulary as large as GPT-2's is taken for it, another is unknown."""
    source = {"kind": "pytorch", "file": file.path.name}
    for key in ("step", "loss", "model_type"):
        value = file.content.get(key)
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            source[key] = value
    if assumed:
        source["assumed"] = assumed
    template = "text" if file.content.get("model_type") == "sft" else None
    tokenizer = {"kind": "gpt2", "bpe_ranks": GPT2_VOCAB_SIZE - 1} if config.vocab_size >= GPT2_VOCAB_SIZE else None
    return ModelDescription(config, template, tokenizer, source)


def _check_names(file: TorchFile) -> None:
    wanted = torch_names(_n_layers(file))
    faults = {
        "missing": [name for name in wanted if name not in file.parameters],
        "unexpected": [name for name in file.parameters if name not in wanted and name != HEAD],
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        raise UserError(f"its state is not this model's; {listed}")


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
    fields = [field.name for field in dataclasses.fields(GPTConfig)]
    stated = {field: config[field] for field in fields if config and config.get(field) is not None}
    for field, value in stated.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{field} is {value!r} in its config, not a positive number")
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
    """Copies tensor by tensor, so that no more than one lies in memory twice."""
    shapes = trim_vocabulary(model_parameter_shapes(config), config)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    views = {name: place.view(params) for name, place in torch_names(config.n_layers).items()}
    wrong = [
        f"{name} has shape {list(file.parameters[name].shape)}, not {list(view.shape)}"
        for name, view in views.items()
        if tuple(file.parameters[name].shape) != view.shape
    ]
    if wrong:
        raise UserError("; ".join(wrong))
    for name, view in views.items():
        view[...] = as_numpy(file.parameters[name])
        if not (finite := np.isfinite(view)).all():
            first = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise UserError(f"{name} has {(~finite).sum()} values that are not finite, the first at {list(first)}")
    if HEAD in file.parameters and not np.array_equal(as_numpy(file.parameters[HEAD]), views[EMBEDDING]):
        raise UserError(f"{HEAD} differs from {EMBEDDING}; in this model they are one parameter")
    return pad_vocabulary(params, config)
