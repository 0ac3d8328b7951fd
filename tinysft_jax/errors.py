"""The two ways in which a command ends early, each with one line for the user."""


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
      exit_code: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def reason(error: Exception) -> str:
    """What a library's error says, short enough for one line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # Long ones begin with where it happened (tensorstore's paths, say) and end with what.
    return line if len(line) <= 300 else f"{line[:100]} … {line[-190:]}"
