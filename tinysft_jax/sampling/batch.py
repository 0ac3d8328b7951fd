"""`sample.py --input --output`: answers the requests of a file into another file; an interrupted run can be resumed."""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tinysft_jax import chat
from tinysft_jax.console import UserError, explained, named
from tinysft_jax.data.reading import TOO_LONG, read_json
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.sampling.decode import Decoder, check_prompt
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.resumable import write_lines
from tinysft_jax.sampling.text import encode_request, system_message, text_options
from tinysft_jax.tokenizer import ChatTokenizer


class Request(NamedTuple):
    """A line, or an element of an array, of the input."""

    line: int  # its number, from 1
    ids: list[int]  # the prompt
    text: str | None  # what the model continues, if it has no chat template
    messages: list[dict[str, Any]]  # what it answers, if it has one

    def answered(self, answer: str) -> dict[str, Any]:
        """The conversation with its answer, in chat-jsonl."""
        if self.text is not None:
            return {"prompt": self.text, "completion": answer}
        return {"messages": [*self.messages, {"role": "assistant", "content": answer}]}


def read_requests(
    path: Path, tokenizer: ChatTokenizer, config: GPTConfig, system: str | None = None, length: int | None = None
) -> list[Request]:
    """Reads lines of `{"messages": [...]}`, the last one the user's, or `{"prompt": "..."}`, or an array of them.

    `system` is the system message of requests that have none; `length` is as of `check_prompt`. Raises a UserError if
    the file can't be read, or a line can't be answered, and names the first such line.
    """
    requests = []
    with explained(f"can't read {path}"), path.open("rb") as file:
        for place, number, line in read_json(file, path):
            with named(f"{path}:{place}"):
                request = _parse_request(number, line, tokenizer, system)
                check_prompt(request.ids, "the request", config, length)
                requests.append(request)
    if not requests:
        raise UserError(f"{path} holds no requests")
    return requests


def _parse_request(number: int, line: bytes | None, tokenizer: ChatTokenizer, system: str | None) -> Request:
    if line is None:
        raise UserError(TOO_LONG)
    with explained("not valid JSON", causes=(ValueError, RecursionError)):
        record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict) or not ("messages" in record or isinstance(record.get("prompt"), str)):
        raise UserError('a line must be an object with "messages", or with a "prompt" that is text')
    if tokenizer.template is None:
        if "messages" in record:
            raise UserError('this model has no chat template: it continues a "prompt", and takes no "messages"')
        return Request(number, encode_request(tokenizer, record["prompt"], system), record["prompt"], [])
    messages = chat.read_messages(record.get("messages", [{"role": "user", "content": record.get("prompt")}]))
    if messages[0]["role"] != "system":
        messages = system_message(system) + messages
    return Request(number, tokenizer.encode_prompt(messages).tolist(), None, messages)


def answer_file(
    decoder: Decoder,
    tokenizer: ChatTokenizer,
    options: SamplingOptions,
    requests: list[Request],
    output: Path,
    num_samples: int = 1,
    batch_size: int = 32,
) -> None:
    """Answers requests into a file, in their order, each request's samples one after another.

    A line is the conversation with its answer, in chat-jsonl, and: "line", of the input; "sample", from 0; "tokens", of
    the answer; "finish", "stop" where the model ended it and "length" where there was no more room. An interrupted run
    can be resumed, see `write_lines`.
    """
    digest = hashlib.sha256("".join(map(json.dumps, requests)).encode()).hexdigest()
    settings = {"format_version": 1, "model": decoder.fingerprint(), "input": digest}
    settings |= dataclasses.asdict(options) | {"num_samples": num_samples, "batch_size": batch_size}
    options, lengths = text_options(options, tokenizer, decoder.config), []

    def answer(rows: range) -> tuple[list[dict[str, Any]], int]:
        asked = [(requests[row // num_samples], row % num_samples) for row in rows]
        answers = decoder.generate([request.ids for request, _ in asked], options, batch_size, first_row=rows.start)
        records = []
        for (request, sample), ids in zip(asked, answers, strict=True):
            finish = "length" if decoder.is_full(request.ids, ids, options) else "stop"
            record = request.answered(tokenizer.decode(ids)) | {"line": request.line, "sample": sample}
            records.append(record | {"tokens": len(ids), "finish": finish})
            lengths.append(len(request.ids) + len(ids))
        return records, sum(map(len, answers))

    write_lines(output, settings, "answers", len(requests) * num_samples, batch_size, answer)
    if note := decoder.note_on_length(lengths, options):
        print(note, file=sys.stderr)
