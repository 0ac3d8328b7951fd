"""What every command shares: errors in one line, exit codes, the parser of arguments, and the progress bar."""

import argparse
import contextlib
import io
import os
import reprlib
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TextIO


class UserError(Exception):
    """The user's input can't be worked with; the message says what is wrong and what to do.

    Commands print it as one line and leave with exit code 2.
    """


class RunError(Exception):
    """The run could not go on (disk full, diverged, no sound checkpoint).

    Commands print it as one line and leave with exit code 3.
    """


class Interrupted(BaseException):
    """The run was asked to stop, and did so in good order; the message says how to continue.

    Like KeyboardInterrupt it is no error, and not to be caught as one.

    Attributes:
      exit_code: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP (a closed terminal).
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def reason(error: Exception) -> str:
    """What a library's error says, short enough for one line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # Long ones begin with where it happened (tensorstore's paths, say) and end with what.
    return line if len(line) <= 300 else f"{line[:100]} … {line[-190:]}"


class _Short(reprlib.Repr):
    """Of what is long or deeply nested, the beginning; `repr` itself fails on deep nesting and huge numbers."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if abs(x) < 10**100 else "a number of over 100 digits"


def shown(value: object) -> str:
    """A value out of the user's input as Python writes it, short enough for one line."""
    return _Short().repr(value)


_LONGEST_MESSAGE = 4000


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run(main: Callable[[], None], prints_its_product: bool = False) -> NoReturn:
    """Runs a command's main function and leaves with the exit code that its end deserves.

    0: done; 2: a user's error; 3: the run could not go on; 129, 130 and 143: stopped by SIGHUP, Ctrl-C and SIGTERM.

    Args:
      main: the command.
      prints_its_product: whether the command is for its standard output. Then it ends, without an error, when the
        reader of its output has gone (`| head`). The files that other commands write don't depend on who reads along.
    """
    _open_standard_streams(prints_its_product)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stopped)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _leave(f"error: {error}", 2)
    except RunError as error:
        _leave(f"error: {error}", 3)
    except MemoryError as error:
        _leave(f"error: not enough memory: {reason(error)}", 3)
    except Interrupted as interruption:
        _leave(str(interruption), interruption.exit_code)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except _ReaderGone:
        pass
    sys.exit(0)


def path(text: str) -> Path:
    """A path as a flag gives it; a shell leaves the `~` of `--output=~/data` to the program."""
    return Path(os.path.expanduser(text))


def _stopped(number: int, _: object) -> NoReturn:
    """Ends like Ctrl-C does, so that what is half-written is removed on the way out."""
    raise Interrupted({signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}[signal.Signals(number)], 128 + number)


class _ReaderGone(BaseException):
    """Nobody reads the output that the command is for."""


class _StandardFile(io.FileIO):
    """Standard output or error. What nobody takes any more is dropped, and is no reason to end.

    Args:
      descriptor: 1 or 2.
      needs_reader: whether it is a reason to end all the same.
    """

    def __init__(self, descriptor: int, needs_reader: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._needs_reader = needs_reader

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:  # the reader or the terminal has gone, or the disk under a log is full
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # so that also libraries in C can go on writing to it
            os.close(nowhere)
            if not self._needs_reader:
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise _ReaderGone from None
            raise RunError(f"can't write to standard output: {error.strerror}") from None


def _open_standard_streams(needs_reader: bool) -> None:
    """Makes sure that there are standard streams, and that no command dies of writing to them without need."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would get its number, and all that is printed
            os.open(os.devnull, os.O_RDWR)
    # Tests may have put streams of their own there.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text_stream(_StandardFile(1, needs_reader), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text_stream(_StandardFile(2, needs_reader=False), sys.stderr)


def _text_stream(file: _StandardFile, before: TextIO | None) -> TextIO:
    """What takes the place of `before`, which is None where the stream was closed."""
    encoding = before.encoding if before else "utf-8"
    by_lines = file.fileno() == 2 or file.isatty()
    # A file's name may hold what is no text.
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, errors="backslashreplace", line_buffering=by_lines)


def _leave(message: str, code: int) -> NoReturn:
    # What it quotes comes from files: nothing in it may steer the terminal.
    line = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(message.split()))
    with contextlib.suppress(_ReaderGone):
        sys.stdout.flush()
    print(line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "…", file=sys.stderr)
    sys.exit(code)


class Progress:
    """How far long work is: a live bar in a terminal, elsewhere a line now and then.

    To be used in a `with` block.

    Args:
      what: is done, for a line; a bar shows it while there is nothing else to say.
      total: where the work is when all is done.
      done: where it is at the start.
      percent: show the place in percent, not as a count.
      quiet: show nothing.
    """

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, what: str, total: float, done: float = 0, percent: bool = False, quiet: bool = False):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._what, self._total, self._begun, self._percent = what, total, done, percent
        self._console = Console(file=sys.stderr, quiet=quiet)
        self._started = self._shown = time.monotonic()
        place = TaskProgressColumn() if percent else MofNCompleteColumn()
        columns = (BarColumn(), place, TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=quiet or not self._console.is_terminal)
        self._task = self._bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: float, text: str = "", always: bool = False) -> None:
        """Shows where the work is.

        Args:
          done: up to `total`.
          text: what came of it, for people.
          always: print a line where there is no terminal, however little time has passed.
        """
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, description=text or self._what)
        elif always or time.monotonic() - self._shown >= self.SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            place = f"{done / self._total:.0%}" if self._percent else f"{done:,.0f}/{self._total:,.0f}"
            self.say(f"{self._what} {place}  {text}{self._time_left(done)}")

    def restart_clock(self, done: float) -> None:
        """Estimates the time left from now on: what was done so far (compiling, say) took another time."""
        self._started, self._begun = time.monotonic(), done

    def say(self, text: str) -> None:
        """A line that stays."""
        # A path may hold brackets, and a line that someone greps should stay one line.
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _time_left(self, done: float) -> str:
        if not self._begun < done < self._total:
            return ""
        left = (time.monotonic() - self._started) / (done - self._begun) * (self._total - done)
        return f"  {timedelta(seconds=round(left))} left"
