"""`sample.py --input --output`: answers the requests of a file into another file; an interrupted run can be resumed."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tinysft_jax import chat, files, locks
from tinysft_jax.console import Interrupted, Progress, RunError, UserError, reason
from tinysft_jax.data.reading import TOO_LONG, read_json
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.sampling.decode import Decoder, check_prompt
from tinysft_jax.sampling.filters import SamplingOptions
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
    try:
        with path.open("rb") as file:
            for place, number, line in read_json(file, path):
                try:
                    request = _parse_request(number, line, tokenizer, system)
                    check_prompt(request.ids, "the request", config, length)
                    requests.append(request)
                except UserError as error:
                    raise UserError(f"{path}:{place}: {error}") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    if not requests:
        raise UserError(f"{path} holds no requests")
    return requests


def _parse_request(number: int, line: bytes | None, tokenizer: ChatTokenizer, system: str | None) -> Request:
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
    messages = chat.read_messages(messages)
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
    the answer; "finish", "stop" where the model ended it and "length" where there was no more room. Until all answers
    are there, they are in `OUTPUT.partial`, whose first line holds the settings.

    Raises:
      UserError: if a run with other settings has begun this output.
      Interrupted: by Ctrl-C or SIGTERM; the answers so far are kept.
    """
    digest = hashlib.sha256("".join(map(json.dumps, requests)).encode()).hexdigest()
    settings = {"format_version": 1, "model": decoder.fingerprint(), "input": digest}
    settings |= dataclasses.asdict(options) | {"num_samples": num_samples, "batch_size": batch_size}
    options, total = text_options(options, tokenizer, decoder.config), len(requests) * num_samples
    partial, lengths, n_tokens = output.with_name(output.name + ".partial"), [], 0
    try:
        with _open_partial(partial, settings) as (file, done), Progress("answers", total, done) as progress:
            if done:
                progress.say(f"resuming after {done:,} of {total:,} answers")
            start = time.monotonic()
            for first in range(done, total, batch_size):
                rows = range(first, min(first + batch_size, total))
                asked = [(requests[row // num_samples], row % num_samples) for row in rows]
                answers = decoder.generate([request.ids for request, _ in asked], options, batch_size, first_row=first)
                for (request, sample), ids in zip(asked, answers, strict=True):
                    finish = "length" if decoder.is_full(request.ids, ids, options) else "stop"
                    record = request.answered(tokenizer.decode(ids)) | {"line": request.line, "sample": sample}
                    record |= {"tokens": len(ids), "finish": finish}
                    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                    lengths.append(len(request.ids) + len(ids))
                    n_tokens += len(ids)
                file.flush()
                rate = n_tokens / (time.monotonic() - start)
                progress.update(rows.stop, f"{rate:,.0f} tokens/s", always=rows.stop == total)
            _finish(file, output)
            partial.unlink()
        if note := decoder.note_on_length(lengths, options):
            print(note, file=sys.stderr)
    except OSError as error:
        raise RunError(f"can't write {output}: {reason(error)}; the same command resumes") from None
    except (KeyboardInterrupt, Interrupted) as stop:
        code = stop.exit_code if isinstance(stop, Interrupted) else 130
        raise Interrupted(f"stopped; the answers so far are in {partial}, the same command resumes", code) from None


@contextlib.contextmanager
def _open_partial(path: Path, settings: dict[str, Any]) -> Iterator[tuple[BinaryIO, int]]:
    """Yields the partial output, at its end, and how many answers it holds.

    Of a batch that is not complete nothing is kept: with other rows in its batch, an answer could differ in round-off
    from that of a run that was never stopped.
    """
    header = json.dumps(settings).encode() + b"\n"
    with path.open("r+b" if path.exists() else "w+b") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            if not locks.take(file.fileno()):
                raise UserError(f"another run of this command is writing {path}; wait for it, or stop it")
        found, done = file.readline(), 0
        if header.startswith(found) and found != header:  # new, or left while its first line was being written
            file.seek(0)
            file.write(header)
        else:
            _check_settings(path, found, header)
            ends = list(itertools.accumulate((len(line) for line in file if line.endswith(b"\n")), initial=len(found)))
            done = (len(ends) - 1) // settings["batch_size"] * settings["batch_size"]
            file.seek(ends[done])
        file.truncate()
        yield file, done


def _check_settings(path: Path, found: bytes, header: bytes) -> None:
    """Compares the first line of a partial output with that of this run."""
    try:
        stored = json.loads(found)
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict) or "format_version" not in stored:
        raise UserError(f"{path} is not the partial output of this command; move it or choose another --output")
    if different := [name for name, value in json.loads(header).items() if stored.get(name) != value]:
        raise UserError(
            f"{path} was begun with another {', '.join(different)}; resume with the same, or delete it to start over"
        )


def _finish(file: BinaryIO, output: Path) -> None:
    """Copies the answers to the output, now that they are complete."""
    file.seek(0)
    file.readline()
    with files.new_file(output) as aside, aside.open("wb") as copy:
        shutil.copyfileobj(file, copy)
