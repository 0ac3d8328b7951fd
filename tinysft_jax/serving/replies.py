"""Bodies of responses, in the form of OpenAI's API."""

import time
import uuid
from collections.abc import Iterable
from typing import Any

from tinysft_jax.serving.calls import Call
from tinysft_jax.serving.choices import Piece, Token

LEAST_LOG_PROB = -9999.0  # JSON has no infinity


class Reply:
    """The bodies of one response."""

    def __init__(self, call: Call, model: str):
        self._call = call
        kind, prefix = ("chat.completion", "chatcmpl") if call.is_chat else ("text_completion", "cmpl")
        self._common = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._kind, self._begun = kind, set()

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """The body of a response that is not streamed; each piece is a whole answer."""
        pieces = sorted(pieces)
        choices = [self._choice(piece, "message", {"content": piece.text, "refusal": None}) for piece in pieces]
        usage = self._usage(piece.n_generated for piece in pieces)
        return self._common | {"object": self._kind, "choices": choices, "usage": usage}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """An event of a stream."""
        return self._streamed([self._choice(piece, "delta", {"content": piece.text} if piece.text else {})], None)

    def last_chunk(self, n_generated: Iterable[int]) -> dict[str, Any]:
        """The event after the answers, which tells how many tokens there were."""
        return self._streamed([], self._usage(n_generated))

    def _streamed(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        kind = self._kind + ".chunk" * self._call.is_chat
        return self._common | {"object": kind, "choices": choices} | ({"usage": usage} if self._call.counts else {})

    def _usage(self, n_generated: Iterable[int]) -> dict[str, int]:
        n_prompt, n_new = sum(map(len, self._call.prompts)), sum(n_generated)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}

    def _choice(self, piece: Piece, name: str, message: dict[str, str | None]) -> dict[str, Any]:
        choice = {"index": piece.index, "finish_reason": piece.finish, "logprobs": None}
        if self._call.n_ranked is not None:
            choice["logprobs"] = (_of_chat if self._call.is_chat else _of_completion)(piece.tokens)
        if not self._call.is_chat:
            return choice | {"text": piece.text}
        role = {} if piece.index in self._begun else {"role": "assistant", "content": ""}
        self._begun.add(piece.index)
        return choice | {name: role | message}


def _of_chat(tokens: list[Token]) -> dict[str, Any]:
    def entry(spelled: bytes, log_prob: float | None) -> dict[str, Any]:
        text = spelled.decode(errors="replace")
        return {"token": text, "logprob": max(log_prob or 0.0, LEAST_LOG_PROB), "bytes": list(spelled)}

    content = [
        entry(token.spelled, token.log_prob) | {"top_logprobs": [entry(*each) for each in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _of_completion(tokens: list[Token]) -> dict[str, Any]:
    found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        log_prob = None if token.log_prob is None else max(token.log_prob, LEAST_LOG_PROB)
        top = {_spelling(spelled): max(value, LEAST_LOG_PROB) for spelled, value in token.top}
        found["tokens"].append(_spelling(token.spelled))
        found["token_logprobs"].append(log_prob)
        # The token itself is there, whether or not it is one of the most likely.
        found["top_logprobs"].append(None if log_prob is None else top | {_spelling(token.spelled): log_prob})
        found["text_offset"].append(token.start)
    return found


def _spelling(spelled: bytes) -> str:
    """A token's text; of part of a character, its bytes."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
