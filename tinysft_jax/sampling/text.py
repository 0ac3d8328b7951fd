"""Text in, text out: requests as ids, answers as text while they are generated, and their printing."""

import codecs
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tinysft_jax.chat import check_not_blank
from tinysft_jax.console import UserError
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.tokenizer import ChatTokenizer

Messages = list[dict[str, Any]]

STORY = (
    "Tim saw a jar of cookies on the table. Mom said he could have one after dinner, but Tim did not want to wait. He "
    "ate five cookies, and then he told Mom that the dog did it. Soon his tummy hurt. Tim cried and told the truth. "
    'Mom hugged him and said, "Thank you for telling me." After that day Tim did not lie again.'
)
# Sample requests of what the model should have learned.
CAPABILITIES = {
    "summary": f"Please provide a brief summary of the following story: {STORY}",
    "moral": f"What is the moral lesson of this story? {STORY}",
    "use the words": "Write a short story that uses all of these words: boat, sing, brave",
    "main character": f"Based on this story, who is the main character? {STORY}",
    "happy ending": f"Does this story have a happy ending? {STORY}",
}


def text_options(options: SamplingOptions, tokenizer: ChatTokenizer, config: GPTConfig) -> SamplingOptions:
    """The options for text: stop ids end it; other special tokens and ids that the tokenizer lacks are never drawn."""
    unknown = range(tokenizer.vocab_size, config.vocab_size)
    special = {*tokenizer.control_ids.values(), *tokenizer.bpe.special_ids.values()}.difference(tokenizer.stop_ids)
    forbidden = (*options.forbidden_ids, *sorted(special), *unknown)
    return dataclasses.replace(options, stop_ids=tokenizer.stop_ids, forbidden_ids=forbidden)


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
    return tokenizer.encode_opening(text)


class AnswerText:
    """The text of an answer, from its ids: whole characters, up to the first of the stop strings."""

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops, self._longest = tokenizer, stops, max(map(len, stops), default=0)
        self._utf8, self._text = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
        self.starts: list[int] = []  # of each token, in characters
        self.n_released = 0  # characters
        self.is_stopped = False

    def add(self, ids: Sequence[int], is_last: bool) -> str:
        """The text that is certain after these ids, and was not before; ids after a stop string are not looked at."""
        parts = [self._tokenizer.decode_bytes([id_]) for id_ in ids]
        for part in [*parts, None] if is_last else parts:  # in the end U+FFFD for part of a character
            searched = max(0, len(self._text) - self._longest + 1)
            self.starts += [] if part is None else [len(self._text)]
            self._text += self._utf8.decode(part or b"", final=part is None)
            found = [place for stop in self._stops if (place := self._text.find(stop, searched)) >= 0]
            if found:
                self._text, self.is_stopped = self._text[: min(found)], True
                break
        start = self.n_released
        self.n_released = len(self._text) - (0 if is_last or self.is_stopped else self._n_uncertain())
        return self._text[start : self.n_released]

    def _n_uncertain(self) -> int:
        """Characters at the end with which a stop string may begin."""
        lengths = range(min(self._longest - 1, len(self._text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._text[-n:]) for stop in self._stops)), 0)


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
        answer, n_first = AnswerText(self._tokenizer), 0
        for ids in self._chunks:
            seconds = time.perf_counter() - self._start
            self.n_tokens += len(ids)
            if self.seconds_to_first is None:
                self.seconds_to_first, n_first = seconds, len(ids)
            else:
                self.tokens_per_second = (self.n_tokens - n_first) / max(seconds - self.seconds_to_first, 1e-9)
            if text := answer.add(ids, is_last=False):
                yield text
        if text := answer.add((), is_last=True):
            yield text


def print_answers(
    decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, prompt: str, system: str | None, n: int
) -> None:
    """Prints an answer as it is generated, or `n` answers, which are generated together, with numbers.

    A model without a chat template continues the prompt, which is printed before its continuation.
    """
    options = text_options(options, tokenizer, decoder.config)
    ids = encode_request(tokenizer, prompt, system)
    opening = prompt if tokenizer.template is None else ""
    if n == 1:
        answer = AnswerStream(tokenizer, decoder.stream(ids, options))
        print(opening, end="")
        for text in answer:
            print(text, end="", flush=True)
        print(flush=True)
        lengths = [len(ids) + answer.n_tokens]
    else:
        answers = decoder.generate([ids] * n, options)
        for number, answer in enumerate(answers, start=1):
            print(f"[{number}] {opening}{tokenizer.decode(answer)}")
        lengths = [len(ids) + len(answer) for answer in answers]
    if note := decoder.note_on_length(lengths, options):
        print(note, file=sys.stderr)


def print_capabilities(
    decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, system: str | None
) -> None:
    """Prints a request of each kind, and its answer."""
    options = text_options(options, tokenizer, decoder.config)
    requests = {kind: encode_request(tokenizer, text, system) for kind, text in CAPABILITIES.items()}
    length = decoder.max_length(options)
    fitting = [kind for kind, ids in requests.items() if len(ids) < length]
    answers = dict(zip(fitting, decoder.generate([requests[kind] for kind in fitting], options), strict=True))
    for kind, text in CAPABILITIES.items():
        answer = f"({len(requests[kind])} tokens leave no room for an answer: {length} are the most)"
        if kind in answers:
            answer = tokenizer.decode(answers[kind])
        print(f"--- {kind}\nUser: {text}\nAssistant: {answer}\n")
    lengths = [len(requests[kind]) + len(answer) for kind, answer in answers.items()]
    if note := decoder.note_on_length(lengths, options):
        print(note, file=sys.stderr)
