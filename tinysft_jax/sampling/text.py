"""Text in, text out: requests as ids, and answers as text while they are generated."""

import codecs
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from tinysft_jax.chat import check_not_blank
from tinysft_jax.console import UserError
from tinysft_jax.model import GPTConfig
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.tokenizer import ChatTokenizer

Messages = list[dict[str, Any]]


def text_options(options: SamplingOptions, tokenizer: ChatTokenizer, config: GPTConfig) -> SamplingOptions:
    """The options for text: end-of-text ends it; control tokens and ids that the tokenizer lacks are never drawn."""
    unknown = range(tokenizer.vocab_size, config.vocab_size)
    forbidden = (*options.forbidden_ids, *tokenizer.control_ids.values(), *unknown)
    return dataclasses.replace(options, stop_ids=(tokenizer.eot_id,), forbidden_ids=forbidden)


def system_message(system: str | None) -> Messages:
    """The beginning of a conversation: the system message, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def encode_request(tokenizer: ChatTokenizer, text: str, system: str | None = None) -> list[int]:
    """The ids that ask for an answer to `text`; for a model without a chat template, for its continuation."""
    if tokenizer.template is not None:
        return tokenizer.encode_prompt([*system_message(system), {"role": "user", "content": text}]).tolist()
    if system is not None:
        raise UserError("this model has no chat template, so it takes no system message")
    check_not_blank(text, "the text to continue")
    return tokenizer.encode_text(text)


class AnswerStream:
    """An answer's text as it is generated, in whole characters, from chunks of its ids; iterate over it once.

    Attributes:
      n_tokens: received so far.
      seconds_to_first: from the creation of this object to the first chunk; None before it.
      tokens_per_second: of the chunks after the first, which includes reading the prompt; None before them.
    """

    def __init__(self, tokenizer: ChatTokenizer, chunks: Iterator[list[int]]):
        self._tokenizer, self._chunks, self._start = tokenizer, chunks, time.perf_counter()
        self.n_tokens, self.seconds_to_first, self.tokens_per_second = 0, None, None

    def __iter__(self) -> Iterator[str]:
        utf8, n_first = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
        for ids in self._chunks:
            seconds = time.perf_counter() - self._start
            self.n_tokens += len(ids)
            if self.seconds_to_first is None:
                self.seconds_to_first, n_first = seconds, len(ids)
            else:
                self.tokens_per_second = (self.n_tokens - n_first) / max(seconds - self.seconds_to_first, 1e-9)
            if text := utf8.decode(self._tokenizer.decode_bytes(ids)):
                yield text
        if text := utf8.decode(b"", final=True):  # U+FFFD for part of a character
            yield text
