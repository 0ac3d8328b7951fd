"""Requests in a file: conversations to be answered, or texts to be continued, as JSON lines or as an array."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tinysft_jax import chat
from tinysft_jax.data.reading import TOO_LONG, read_json
from tinysft_jax.errors import UserError
from tinysft_jax.model import GPTConfig
from tinysft_jax.sampling.prompt import check_prompt
from tinysft_jax.sampling.text import encode_request, system_message
from tinysft_jax.tokenizer import ChatTokenizer


class Request(NamedTuple):
    """What one line, or element of an array, asks for.

    Attributes:
      line: its number, from 1.
      ids: the prompt.
      text: what the model continues, where it has no chat template; else None.
      messages: what it answers, where it has one.
    """

    line: int
    ids: list[int]
    text: str | None
    messages: list[dict[str, Any]]

    def answered(self, answer: str) -> dict[str, Any]:
        """The conversation with its answer, as chat-jsonl has it."""
        if self.text is not None:
            return {"prompt": self.text, "completion": answer}
        return {"messages": [*self.messages, {"role": "assistant", "content": answer}]}


def read_requests(
    path: Path, tokenizer: ChatTokenizer, config: GPTConfig, system: str | None = None, length: int | None = None
) -> list[Request]:
    """Reads lines of `{"messages": [...]}`, the last one the user's, or `{"prompt": "..."}`, or an array of them.

    Args:
      path: the file.
      tokenizer: the model's.
      config: the model's shape.
      system: the system message of requests that have none.
      length: tokens that a request and its answer may take together; None: the model's context.

    Raises:
      UserError: if the file can't be read, or a line can't be answered; names the first such line.
    """
    requests = []
    try:
        with path.open("rb") as file:
            for place, number, line in read_json(file, path):
                try:
                    request = _parse_line(number, line, tokenizer, system)
                    check_prompt(request.ids, "the request", config, length)
                    requests.append(request)
                except UserError as error:
                    raise UserError(f"{path}:{place}: {error}") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    if not requests:
        raise UserError(f"{path} holds no requests")
    return requests


def _parse_line(number: int, line: bytes | None, tokenizer: ChatTokenizer, system: str | None) -> Request:
    if line is None:
        raise UserError(TOO_LONG)
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}") from None
    has_messages = isinstance(record, dict) and "messages" in record
    if not has_messages and not (isinstance(record, dict) and isinstance(record.get("prompt"), str)):
        raise UserError('a line must be an object with "messages", or with a "prompt" that is text')
    if tokenizer.template is None:
        if has_messages:
            raise UserError('this model has no chat template: it continues a "prompt", and takes no "messages"')
        return Request(number, encode_request(tokenizer, record["prompt"], system), record["prompt"], [])
    messages = record["messages"] if has_messages else [{"role": "user", "content": record["prompt"]}]
    chat.check_messages(messages)
    messages = [chat.without_unread(message) for message in messages]
    if messages[0]["role"] != "system":
        messages = system_message(system) + messages
    return Request(number, tokenizer.encode_prompt(messages).tolist(), None, messages)
