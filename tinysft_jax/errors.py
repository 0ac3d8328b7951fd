"""The two ways in which a command ends early, each with one line for the user."""

import reprlib


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
