"""Writes the PyTorch project's checkpoints: its keys, its buffers, its `config`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tinysft_jax.errors import RunError, UserError, reason
from tinysft_jax.interop.torch_checkpoint import LANGUAGE, usual_language
from tinysft_jax.interop.torch_names import EMBEDDING, HEAD, torch_names
from tinysft_jax.model import GPTConfig
from tinysft_jax.model_directory import ModelDescription, Params, trim_vocabulary

if TYPE_CHECKING:
    import torch

# What that project's `config` holds; the rest of a shape it has by default, or finds nowhere.
CONFIG_KEYS = ("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len")

# Its mask, float32 with a row and a column for every position, takes 1 GiB then.
LONGEST_CONTEXT = 16384


def write_torch_checkpoint(path: Path, params: Params, description: ModelDescription) -> None:
    """Writes a `.pt` that the PyTorch project loads with `weights_only=True` and a strict `load_state_dict`.

    Args:
      path: the file to write.
      params: a GPT's parameters, the table with or without its padding rows.
      description: what the model is.

    Raises:
      UserError: if torch is not installed, or the context is too long for a file that holds a mask.
      RunError: if the disk is full, say.
    """
    if description.config.max_seq_len > LONGEST_CONTEXT:
        raise UserError(
            f"a PyTorch checkpoint holds a mask of max_seq_len x max_seq_len numbers, so it can't be of a model with "
            f"max_seq_len {description.config.max_seq_len:,}, above {LONGEST_CONTEXT:,}; convert it --to huggingface"
        )
    try:
        import torch
    except ImportError:
        raise UserError("PyTorch checkpoints need torch: pip install -e '.[torch]'") from None
    content = torch_content(params, description)
    try:
        with path.open("wb") as file:  # given a path, torch.save would put its name into the file
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # its archive writer's errors are RuntimeErrors
        raise RunError(f"can't write {path}: {reason(error)}") from None


def torch_content(params: Params, description: ModelDescription) -> dict[str, Any]:
    """What a checkpoint holds.

    `step` and `loss` are those of the checkpoint that the model was read from, else 0 and NaN. A tokenizer or template
    other than that project's is named under a key of this package's, so that nothing is lost on the way back.
    """
    config, source = description.config, description.source
    is_chat = description.chat_template is not None
    language = {"chat_template": description.chat_template, "tokenizer": description.tokenizer}
    unknown = language | {"tokenizer": None}
    stated = {} if language in (usual_language(config, is_chat), unknown) else language
    if description.trained_length < config.max_seq_len:
        stated = stated | {"trained_length": description.trained_length}
    return {
        "model_state_dict": torch_state(params, config),
        "optimizer_state_dict": {},
        "step": source.get("step", 0),
        "loss": source.get("loss", math.nan),
        "config": {key: getattr(config, key) for key in CONFIG_KEYS},
        **({"model_type": "sft"} if is_chat else {}),
        **({LANGUAGE: stated} if stated else {}),
    }


def torch_state(params: Params, config: GPTConfig) -> "dict[str, torch.Tensor]":
    """The state dict, in that project's order; the buffers, alike in all blocks, lie in memory and file once."""
    import torch

    params = jax.tree.map(np.asarray, trim_vocabulary(params, config))
    buffers = {"freqs_cis": _rotary_table(config), "mask": torch.ones(config.max_seq_len, config.max_seq_len).tril()}
    state = {}
    for name, place in torch_names(config.n_layers).items():
        if name.endswith(".attn.wq.weight"):
            state |= {f"blocks.{place.layer}.attn.{buffer}": table for buffer, table in buffers.items()}
        # A copy: saved as a view, a tensor brings along all the memory that it is a view of.
        state[name] = torch.from_numpy(np.array(place.view(params), order="C"))
    return state | {HEAD: state[EMBEDDING]}


def _rotary_table(config: GPTConfig) -> "torch.Tensor":
    """exp(i position theta^(-2k / head_dim)), complex64 `[max_seq_len, head_dim / 2]`, rounded as PyTorch rounds."""
    import torch

    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angles = torch.outer(torch.arange(config.max_seq_len).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)
