"""A prompt's ids, and the sets of ids that decide what may follow them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from tinysft_jax.errors import UserError
from tinysft_jax.model import GPTConfig
from tinysft_jax.sampling.options import SamplingOptions

Prompt = Sequence[int] | np.ndarray


def check_prompt(prompt: Prompt, name: str, config: GPTConfig, length: int | None = None) -> Int32[np.ndarray, " n"]:
    """The ids of a prompt that can be continued.

    Args:
      prompt: token ids.
      name: what to call it.
      config: the model's shape.
      length: positions that prompt and answer may take together; None: the context.

    Raises:
      UserError: if it is empty, holds no token ids or leaves no room for an answer.
    """
    ids, vocab_size, length = np.asarray(prompt), config.vocab_size, length or config.max_seq_len
    if not ids.size:
        raise UserError(f"{name} is empty; give at least one token")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{name} is not a list of token ids, which are whole numbers")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise UserError(f"{name} holds the id {outside[0]}; the model's ids are 0 to {vocab_size - 1}")
    if len(ids) >= length:
        limit = f"the model's context is {length}"
        if length < config.max_seq_len:
            limit = f"it may end at {length} (see --max_length; the model's context is {config.max_seq_len})"
        raise UserError(f"{name} has {len(ids)} tokens, and {limit}: no room for an answer; shorten it")
    return ids.astype(np.int32)


def seen_ids(
    prompts: Sequence[Int32[np.ndarray, " _"]], options: SamplingOptions, config: GPTConfig
) -> Bool[np.ndarray, "B padded_vocab"]:
    """Which ids occur in each prompt, stop ids left out: those that the repetition penalty is for."""
    seen = np.zeros((len(prompts), config.padded_vocab_size), bool)
    for row, ids in zip(seen, prompts, strict=True):
        row[ids] = True
    seen[:, [id_ for id_ in options.stop_ids if 0 <= id_ < config.vocab_size]] = False
    return seen


def forbidden_ids(options: SamplingOptions, config: GPTConfig) -> Bool[np.ndarray, " padded_vocab"]:
    """Which ids are never drawn.

    Raises:
      UserError: if that leaves none.
    """
    forbidden = np.isin(np.arange(config.padded_vocab_size), options.forbidden_ids)
    if forbidden[: config.vocab_size].all():
        raise UserError("forbidden_ids holds the whole vocabulary: nothing is left to draw")
    return forbidden
