"""What every command shares: one-line errors and exit codes, the argument parser, and the progress bar."""

import argparse
import contextlib
import io
import os
import reprlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn


class UserError(Exception):
    """The input is wrong; the message says what is wrong and how to fix it."""

    exit_code = 2


class RunError(Exception):
    """The run can't continue: the disk is full, it diverged, no checkpoint is sound."""

    exit_code = 3


class Interrupted(BaseException):
    """The run was stopped by a signal (the exit code is 128 + its number); the message says how to resume."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def reason(error: Exception) -> str:
    """The first line of a library's error. Long ones start with where it happened and end with what."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:100]} … {line[-190:]}"


@contextlib.contextmanager
def named(where: object) -> Iterator[None]:
    """Begins the message of a UserError of the block with the place that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@contextlib.contextmanager
def explained(
    failure: str, kind: Callable[[str], Exception] = UserError, causes: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """In place of an error that is one of the causes, raises one that names the failure, "can't read PATH", and why."""
    try:
        yield
    except causes as error:
        raise kind(f"{failure}: {getattr(error, 'strerror', None) or reason(error)}") from None


class _ShortRepr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # `repr` raises an error above 4,300 digits.
        return super().repr_int(x, level) if abs(x) < 10**100 else "a number of over 100 digits"


# In the errors of XLA and CUDA where a device has too little free memory. The last is of the compiler's autotuner,
# which finds no configuration that it has the memory to try.
_SHORTAGES = (
    "RESOURCE_EXHAUSTED",
    "out of memory",
    "OUT_OF_MEMORY",
    "FissionBackend does not support a default config",
)


def lacks_memory(error: Exception) -> bool:
    """Whether an error of JAX says that a device has too little free memory."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORTAGES)


def shortage(error: Exception) -> str:
    """An error that `lacks_memory`, in a line."""
    import jax  # which raised it

    line = f"not enough memory: {reason(error)}"
    if jax.default_backend() == "gpu":
        line += "; if another process holds the GPU's memory (see nvidia-smi), stop it or set CUDA_VISIBLE_DEVICES"
    return line


def shown(value: object) -> str:
    """`repr` of a value from the user's input, short enough for one line."""
    short = _ShortRepr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


def path(text: str) -> Path:
    """A flag's path. A shell does not expand the `~` of `--output=~/data`."""
    return Path(os.path.expanduser(text))


def import_extra(module: str, extra: str, what: str) -> Any:
    """Imports a module of an extra; returns its top-level package. Raises: UserError, saying `what` needs it."""
    try:
        return __import__(module)
    except ImportError:
        raise UserError(f"{what} needs {module.partition('.')[0]}: pip install -e '.[{extra}]'") from None


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a UserError."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run(main: Callable[[], None], needs_stdout: bool = False) -> NoReturn:
    """Runs a command and exits: 0 done, 2 UserError, 3 RunError, 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM.

    A command that `needs_stdout` ends when the reader of its output has gone; others continue, as they write files.
    """
    _open_standard_streams(needs_stdout)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _interrupt)
    try:
        main()
        sys.stdout.flush()
    except (UserError, RunError) as error:
        _exit(f"error: {error}", error.exit_code)
    except MemoryError as error:
        _exit(f"error: not enough memory: {reason(error)}", 3)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        _exit(f"error: {shortage(error)}", 3)
    except Interrupted as interruption:
        _exit(str(interruption), interruption.exit_code)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    sys.exit(0)


def _interrupt(number: int, _: object) -> NoReturn:
    """Raises, as Ctrl-C does, so that half-written files are removed on the way out."""
    raise Interrupted("terminated" if number == signal.SIGTERM else "hung up", 128 + number)


def _exit(message: str, code: int) -> NoReturn:
    # Text quoted from files must not control the terminal.
    line = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(message.split()))
    with contextlib.suppress(SystemExit):
        sys.stdout.flush()
    print(line if len(line) <= 4000 else f"{line[:4000]}…", file=sys.stderr)
    sys.exit(code)


class _StandardFile(io.FileIO):
    """Standard output or error. What can't be written is dropped, unless it is `needed`."""

    def __init__(self, descriptor: int, needed: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._needed = needed

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:  # the reader or the terminal has gone, or the disk under a log is full
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # C libraries write to the descriptor, too
            os.close(null)
            if not self._needed:
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise SystemExit(0) from None
            raise RunError(f"can't write to standard output: {error.strerror}") from None


def _open_standard_streams(needs_stdout: bool) -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would get its number, and everything that is printed
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # tests have their own
            file = _StandardFile(descriptor, needs_stdout and name == "stdout")
            text = io.TextIOWrapper(
                io.BufferedWriter(file),
                encoding=stream.encoding if stream else "utf-8",
                errors="backslashreplace",  # file names may not be Unicode
                line_buffering=name == "stderr" or file.isatty(),
            )
            setattr(sys, name, text)


class Progress:
    """Progress of long work, used in a `with` block: a live bar in a terminal, elsewhere a line every ten seconds.

    The time left is estimated from the first update on: what precedes it (compiling, say) takes another time.

    `done` goes from its value at the start, positive where work is resumed, to `total`. It is shown as a count, or in
    `percent`. `quiet` shows nothing.
    """

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, what: str, total: float, done: float = 0, percent: bool = False, quiet: bool = False):
        # Worker processes import this module for its errors, and need no rich.
        from rich import progress
        from rich.console import Console

        self._what, self._total, self._percent = what, total, percent
        self._console = Console(file=sys.stderr, quiet=quiet)
        self._bar = progress.Progress(
            progress.BarColumn(),
            progress.TaskProgressColumn() if percent else progress.MofNCompleteColumn(),
            progress.TextColumn("{task.description}", markup=False),
            progress.TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            speed_estimate_period=float("inf"),  # a batch of answers may take minutes
        )
        self._task = self._bar.add_task(what, total=total, completed=done)
        self._printed = time.monotonic()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: float, text: str = "", always: bool = False) -> None:
        """Shows how much is done, and `text`. Without a terminal, `always` prints a line however recent the last is."""
        self._bar.update(self._task, completed=done, description=text or None)
        now = time.monotonic()
        if not self._console.is_terminal and (always or now - self._printed >= self.SECONDS_BETWEEN_LINES):
            self._printed = now
            count = f"{done / self._total:.0%}" if self._percent else f"{done:,.0f}/{self._total:,.0f}"
            seconds = self._bar.tasks[0].time_remaining
            left = f"{timedelta(seconds=seconds)} left" if seconds else ""
            self.say("  ".join(filter(None, (f"{self._what} {count}", text, left))))

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        # A path may hold brackets, and a line that is searched for should not be wrapped.
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
