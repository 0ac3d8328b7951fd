"""What every command shares: one-line errors, exit codes, and an argument parser that keeps to them."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

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


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a command's main function and leaves with the exit code that its end deserves.

    0: done; 2: a user's error; 3: the run could not go on; 130 and 143:
    interrupted by Ctrl-C and SIGTERM.
    """
    signal.signal(signal.SIGTERM, _terminated)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold what is no text
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
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing left to say, and no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _terminated(*_) -> NoReturn:
    """Ends like Ctrl-C does, so that what is half-written is removed on the way out."""
    raise Interrupted("terminated", 143)


def _leave(message: str, code: int) -> NoReturn:
    # What it quotes comes from files: nothing in it may steer the terminal.
    line = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(message.split()))
    print(line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "…", file=sys.stderr)
    sys.exit(code)
