"""The two ways in which a command ends early, each with one line for the user."""


class UserError(Exception):
    """The user's input can't be worked with; the message says what is wrong and what to do.

    Commands print it as one line and leave with exit code 2.
    """


class RunError(Exception):
    """The run could not go on (disk full, diverged, no sound checkpoint).

    Commands print it as one line and leave with exit code 3.
    """


class Interrupted(Exception):
    """The run was asked to stop, and did so in good order; the message says how to continue.

    Attributes:
      exit_code: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
