"""`sample.py --input --output`: the requests of a file answered into another, from where that was left if need be."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tinysft_jax.errors import Interrupted, RunError, reason
from tinysft_jax.sampling.answer_file import AnswerFile
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.options import SamplingOptions
from tinysft_jax.sampling.requests import Request
from tinysft_jax.sampling.text import text_options
from tinysft_jax.tokenizer import ChatTokenizer

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
