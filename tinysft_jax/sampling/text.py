"""Text in, text out: requests as ids, and answers as text while they are made."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from tinysft_jax.chat import check_not_blank
from tinysft_jax.console import UserError
from tinysft_jax.model import GPTConfig
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.tokenizer import ChatTokenizer, StreamDecoder

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


Messages = list[dict[str, Any]]


def text_options(options: SamplingOptions, tokenizer: ChatTokenizer, config: GPTConfig) -> SamplingOptions:
    """The options with which only text comes out: end-of-text ends it; no control token, no id without a meaning."""
    unknown = range(tokenizer.vocab_size, config.vocab_size)
    forbidden = (*options.forbidden_ids, *tokenizer.control_ids.values(), *unknown)
    return dataclasses.replace(options, stop_ids=(tokenizer.eot_id,), forbidden_ids=forbidden)


def system_message(system: str | None) -> Messages:
    """The system message, if there is one: the beginning of a conversation."""
    return [] if system is None else [{"role": "system", "content": system}]


def encode_request(tokenizer: ChatTokenizer, text: str, system: str | None = None) -> list[int]:
    """The ids that ask for an answer to `text`; with a model that has no chat template, for its continuation.

    Raises:
      UserError: if `text` is blank or can't be encoded, or there is a system message but no template to put it in.
    """
    if tokenizer.template is not None:
        return tokenizer.encode_prompt([*system_message(system), {"role": "user", "content": text}]).tolist()
    if system is not None:
        raise UserError("this model has no chat template, so it takes no system message; leave out --system")
    check_not_blank(text, "the text to continue")
    return tokenizer.encode_text(text)


class AnswerStream:
    """An answer's text as it is made, in whole characters; to be iterated over once.

    Args:
      tokenizer: the model's.
      chunks: the answer's ids, a few at a time.

    Attributes:
      n_tokens: how many have come so far.
      seconds_to_first: from the creation of this object to the first token; None before it.
    """

    def __init__(self, tokenizer: ChatTokenizer, chunks: Iterator[list[int]]):
        self._tokenizer, self._chunks = tokenizer, chunks
        self._asked = time.perf_counter()
        self.n_tokens, self.seconds_to_first = 0, None
        self._n_later, self._seconds_later = 0, 0.0

    def __iter__(self) -> Iterator[str]:
        characters = StreamDecoder(self._tokenizer)
        for ids in self._chunks:
            self._count(len(ids), time.perf_counter() - self._asked)
            if text := characters.push(ids):
                yield text
        if text := characters.flush():
            yield text

    @property
    def tokens_per_second(self) -> float | None:
        """Of all but the first few tokens, which came with reading the prompt; None if there are no others."""
        return self._n_later / self._seconds_later if self._n_later else None

    def _count(self, n: int, seconds: float) -> None:
        self.n_tokens += n
        if self.seconds_to_first is None:
            self.seconds_to_first = seconds
        else:
            self._n_later += n
            self._seconds_later = seconds - self.seconds_to_first
