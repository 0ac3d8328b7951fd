"""Answers as they are generated: their text up to a stop string, and what their tokens' log-probabilities are."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tinysft_jax.sampling.engine import News, Request
from tinysft_jax.sampling.steps import Ranked
from tinysft_jax.sampling.text import AnswerText
from tinysft_jax.serving.calls import Call
from tinysft_jax.tokenizer import ChatTokenizer


class Token(NamedTuple):
    spelled: bytes
    log_prob: float | None  # None of a prompt's first
    top: list[tuple[bytes, float]]  # the most likely ones, with their log-probabilities
    start: int  # where it begins, in characters of the choice's text


class Piece(NamedTuple):
    """What is new of a choice."""

    index: int
    text: str
    tokens: list[Token]  # those that begin in the text; empty if log-probabilities are not wanted
    finish: str | None
    n_generated: int  # tokens so far
    seconds: float  # from the request to the first token


class Choice:
    """An answer that is generated; `post` gets its pieces, as they come or one when it has ended.

    Choices are numbered prompt by prompt; the random numbers depend on the place among those of the same prompt.
    """

    def __init__(self, call: Call, tokenizer: ChatTokenizer, number: int, post: Callable[[Piece], None]):
        prompt, row = divmod(number, call.n)
        self._call, self._tokenizer, self._number, self._post = call, tokenizer, number, post
        self._answer, self._start, self._seconds = AnswerText(tokenizer, call.stops), time.perf_counter(), None
        self._prompt = call.texts[prompt] if call.texts else ""
        self._new, self._tokens = "", []  # not posted yet
        ranks, is_echo = call.n_ranked is not None, bool(call.texts)
        self.request = Request(call.prompts[prompt], call.options, self._receive, row, ranks, ranks and is_echo)

    def _receive(self, news: News) -> bool:
        """Called in the engine's thread."""
        if self._seconds is None:
            self._seconds = time.perf_counter() - self._start
            self._repeat_prompt()
        n_before = len(self._answer.starts)
        self._new += self._answer.add(news.ids, is_last=news.finish is not None)
        if news.ranked is not None:
            starts = [len(self._prompt) + start for start in self._answer.starts[n_before:]]
            self._tokens += self._described(news.ids, news.ranked, starts)
        finish = "stop" if self._answer.is_stopped else news.finish
        if finish or (self._call.streams and self._new):
            end = len(self._prompt) + self._answer.n_released
            ready = [token for token in self._tokens if token.start < end]
            self._tokens = self._tokens[len(ready) :]
            n_generated = len(self._answer.starts)
            self._post(Piece(self._number, self._new, ready, finish, n_generated, self._seconds))
            self._new = ""
        return finish is None

    def _repeat_prompt(self) -> None:
        """Begins with the prompt, if that is wanted."""
        self._new = self._prompt
        if self.request.ranks_prompt:
            whole, ids = AnswerText(self._tokenizer), self.request.prompt
            # The ids may spell more than the text: what a tokenizer puts before it.
            n_more = len(whole.add(ids, is_last=True)) - len(self._prompt)
            starts = [max(start - n_more, 0) for start in whole.starts]
            self._tokens.append(Token(self._spell(ids[0]), None, [], starts[0]))
            for ranked in self.request.prompt_ranked:  # not of all, if the request ends while its prompt is read
                n = len(self._tokens)
                self._tokens += self._described(ids[n : n + len(ranked.log_prob)], ranked, starts[n:])

    def _described(self, ids: Sequence[int], ranked: Ranked, starts: Sequence[int]) -> list[Token]:
        tokens, n = [], self._call.n_ranked
        for i, (id_, start) in enumerate(zip(ids, starts, strict=False)):
            top = zip(ranked.top_ids[i, :n].tolist(), ranked.top_log_probs[i, :n].tolist(), strict=True)
            top = [(self._spell(other), log_prob) for other, log_prob in top if other < self._tokenizer.vocab_size]
            tokens.append(Token(self._spell(id_), float(ranked.log_prob[i]), top, start))
        return tokens

    def _spell(self, id_: int) -> bytes:
        return self._tokenizer.decode_bytes([id_])
