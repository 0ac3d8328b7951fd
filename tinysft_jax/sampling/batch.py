"""`sample.py --input --output`: the requests of a file answered into another, from where that was left if need be."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tinysft_jax import chat, locks
from tinysft_jax.console import Interrupted, RunError, UserError, reason
from tinysft_jax.data.reading import TOO_LONG, read_json
from tinysft_jax.model import GPTConfig
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.text import check_prompt, encode_request, system_message, text_options
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


FORMAT_VERSION = 1


class AnswerFile:
    """JSON lines that stand in `OUTPUT.partial`, below a line that says what they are made with, until all are there.

    To be used in a `with` block.

    Args:
      output: the file to make.
      settings: what the lines are made with.
      batch_size: how many lines are made together. Of a batch that is not all there nothing is kept: made anew with
        other neighbours, its lines could differ in round-off from those of a run that was never stopped.

    Attributes:
      partial: where the lines stand until all are there.
      n_done: how many there were when the file was opened.

    Raises:
      UserError: when it is opened, if the lines that are there were made with other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], batch_size: int):
        self.partial, self.n_done = output.with_name(output.name + ".partial"), 0
        self._output, self._batch_size = output, batch_size
        settings = {"format_version": FORMAT_VERSION, **settings, "batch_size": batch_size}
        self._settings = json.loads(json.dumps(settings))  # as they will be read

    def __enter__(self) -> "AnswerFile":
        self._file = self.partial.open("r+b" if self.partial.exists() else "w+b")
        with contextlib.suppress(OSError):  # a file system without locks
            if not locks.take(self._file.fileno()):
                raise UserError(f"another run of this command is writing {self.partial}; wait for it, or stop it")
        header, found = json.dumps(self._settings).encode() + b"\n", self._file.readline()
        if found.endswith(b"\n"):
            self._check(found)
            lines = (len(line) for line in self._file if line.endswith(b"\n"))
            ends = list(itertools.accumulate(lines, initial=len(found)))
            self.n_done = (len(ends) - 1) // self._batch_size * self._batch_size
            self._file.seek(ends[self.n_done])
        else:
            if not header.startswith(found):  # new, or left while its first line was being written
                raise self._foreign()
            self._file.seek(0)
            self._file.write(header)
        self._file.truncate()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds a batch."""
        self._file.write(b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records))
        self._file.flush()

    def finish(self) -> None:
        """Makes the lines the output, now that all are there."""
        aside = self._output.with_name(f".{self._output.name}.{os.getpid()}.aside")
        try:
            self._file.seek(0)
            self._file.readline()
            with aside.open("wb") as file:
                shutil.copyfileobj(self._file, file)
            os.replace(aside, self._output)
        finally:
            aside.unlink(missing_ok=True)
        self.partial.unlink()

    def _check(self, header: bytes) -> None:
        try:
            stored = json.loads(header)
        except (ValueError, RecursionError):
            raise self._foreign() from None
        if not isinstance(stored, dict) or "format_version" not in stored:
            raise self._foreign()
        different = [name for name, value in self._settings.items() if stored.get(name) != value]
        if different:
            raise UserError(
                f"{self.partial} was begun with another {', '.join(different)}; "
                "go on with the same, or delete it to begin anew"
            )

    def _foreign(self) -> UserError:
        return UserError(f"{self.partial} is not what this command leaves there; move it or choose another --output")


# Seconds between two lines of progress where there is no terminal.
LINE_INTERVAL = 10.0


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

    A line is the conversation with its answer, as chat-jsonl has it, and besides: "line", of the input; "sample",
    from 0; "tokens", the answer's; "finish", which is "stop" where the model ended it and "length" where there was no
    more room for it.

    Args:
      decoder: the model.
      tokenizer: its tokenizer.
      options: how to draw.
      requests: what to answer.
      output: the file to make; see `AnswerFile` for what stands in its place before all is done.
      num_samples: answers to each request.
      batch_size: answers made together.

    Raises:
      UserError: if a run with other settings has begun this output.
      RunError: if the disk is full, say.
      Interrupted: by Ctrl-C or SIGTERM; what was answered is kept.
    """
    settings = {
        "model": decoder.fingerprint(),
        "input": _digest(requests),
        **dataclasses.asdict(options),
        "num_samples": num_samples,
    }
    options, total = text_options(options, tokenizer, decoder.config), len(requests) * num_samples
    file, lengths = AnswerFile(output, settings, batch_size), []
    try:
        with file, _progress(file.n_done, total) as show:
            for first in range(file.n_done, total, batch_size):
                rows = range(first, min(first + batch_size, total))
                asked = [(requests[row // num_samples], row % num_samples) for row in rows]
                answers = decoder.generate([request.ids for request, _ in asked], options, batch_size, first_row=first)
                file.append(
                    {**request.answered(tokenizer.decode(ids)), "line": request.line, "sample": sample}
                    | {"tokens": len(ids), "finish": "length" if decoder.is_full(request.ids, ids, options) else "stop"}
                    for (request, sample), ids in zip(asked, answers, strict=True)
                )
                lengths += [len(request.ids) + len(ids) for (request, _), ids in zip(asked, answers, strict=True)]
                show(rows.stop, sum(map(len, answers)))
            file.finish()
        if note := decoder.note_on_length(lengths, options):
            print(note, file=sys.stderr)
    except OSError as error:
        raise RunError(f"can't write {output}: {reason(error)}; the same command continues") from None
    except (KeyboardInterrupt, Interrupted) as stop:
        code = stop.exit_code if isinstance(stop, Interrupted) else 130
        raise Interrupted(
            f"stopped; what was answered is in {file.partial}, the same command continues", code
        ) from None


def _digest(requests: list[Request]) -> str:
    digest = hashlib.sha256()
    for request in requests:
        digest.update(json.dumps(request).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _progress(done: int, total: int) -> Iterator[Callable[[int, int], None]]:
    """Yields what takes the number of answers so far and of new tokens: a live bar in a terminal, lines elsewhere."""
    console, begin, n_tokens = Console(file=sys.stderr), time.monotonic(), 0
    if done:
        print(f"going on after {done:,} of {total:,} answers", file=sys.stderr)

    def rate(new: int) -> str:
        nonlocal n_tokens
        n_tokens += new
        return f"{n_tokens / (time.monotonic() - begin):,.0f} tokens/s"

    if console.is_terminal:
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("compiling", total=total, completed=done)
            yield lambda done, new: bar.update(task, completed=done, description=rate(new))
    else:
        shown = begin

        def show_line(done: int, new: int) -> None:
            nonlocal shown
            text = f"{done:,}/{total:,} answers, {rate(new)}"
            if done == total or time.monotonic() - shown >= LINE_INTERVAL:
                shown = time.monotonic()
                print(text, file=sys.stderr, flush=True)

        yield show_line
