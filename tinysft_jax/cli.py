"""What every command shares: one-line errors, exit codes, and an argument parser that keeps to them."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from tinysft_jax.errors import Interrupted, RunError, UserError, reason

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
