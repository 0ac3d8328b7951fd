"""Files of answers that are written group by group: an interrupted run can be resumed, and ends with the same bytes."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tinysft_jax import files, locks
from tinysft_jax.console import Interrupted, Progress, RunError, UserError, reason

Lines = Iterable[bytes]


def write_lines(
    output: Path,
    settings: dict[str, Any],
    what: str,
    total: int,
    group: int,
    make: Callable[[range], tuple[list[dict[str, Any]], int]],
    select: Callable[[Lines], Lines] = iter,
    overwrite: bool = False,
) -> None:
    """Writes a line of JSON for each of `total` items (`what` they are, for messages).

    `make` gives the lines of up to `group` items, a range, and how many tokens were generated for them. Until all lines
    are there, they are in `OUTPUT.partial`, whose first line holds the settings; then those that `select` gives become
    the output. Raises: UserError, if a run with other settings has begun it, or another is writing it; Interrupted, by
    Ctrl-C or SIGTERM, and the lines so far are kept.
    """
    partial, n_tokens = output.with_name(output.name + ".partial"), 0
    try:
        with _open_partial(partial, settings, group) as (file, done), Progress(what, total, done) as progress:
            if done:
                progress.say(f"resuming after {done:,} of {total:,} {what}")
            start = time.monotonic()
            for first in range(done, total, group):
                items = range(first, min(first + group, total))
                records, n_new = make(items)
                file.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
                file.flush()
                n_tokens += n_new
                rate = n_tokens / (time.monotonic() - start)
                progress.update(items.stop, f"{rate:,.0f} tokens/s", always=items.stop == total)
            _finish(file, output, select, overwrite)
            partial.unlink()
    except OSError as error:
        raise RunError(f"can't write {output}: {reason(error)}; the same command resumes") from None
    except (KeyboardInterrupt, Interrupted) as stop:
        message = f"stopped; the answers so far are in {partial}, the same command resumes"
        raise Interrupted(message, getattr(stop, "exit_code", 130)) from None


@contextlib.contextmanager
def _open_partial(path: Path, settings: dict[str, Any], group: int) -> Iterator[tuple[BinaryIO, int]]:
    """Yields the partial output, at its end, and how many lines it holds.

    Of a group that is not complete nothing is kept: with other rows in its batch, an answer could differ in round-off
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
            done = (len(ends) - 1) // group * group
            file.seek(ends[done])
        file.truncate()
        yield file, done


def _check_settings(path: Path, found: bytes, header: bytes) -> None:
    """Compares the first line of a partial output with that of this run."""
    stored = None
    with contextlib.suppress(ValueError, RecursionError):
        stored = json.loads(found)
    if not isinstance(stored, dict) or "format_version" not in stored:
        raise UserError(f"{path} is not the partial output of this command; move it or choose another --output")
    if different := [name for name, value in json.loads(header).items() if stored.get(name) != value]:
        raise UserError(
            f"{path} was begun with another {', '.join(different)}; resume with the same, or delete it to start over"
        )


def _finish(file: BinaryIO, output: Path, select: Callable[[Lines], Lines], overwrite: bool) -> None:
    """Copies the lines to the output, now that they are complete."""
    file.seek(0)
    file.readline()
    with files.new_file(output, overwrite) as aside, aside.open("wb") as copy:
        copy.writelines(select(file))
