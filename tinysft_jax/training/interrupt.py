"""Ctrl-C and SIGTERM: the first asks a run to stop after its step, the second ends it at once."""

import os
import signal
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopRequest:
    """Within the block, notes the first signal instead of dying of it.

    Attributes:
      exit_code: what to leave with; None as long as nobody asked.
    """

    def __init__(self):
        self.exit_code: int | None = None

    @property
    def requested(self) -> bool:
        return self.exit_code is not None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code is not None:
            os._exit(EXIT_CODES[number])  # asked twice: what is half-written is aside, and finished files stay
        self.exit_code = EXIT_CODES[number]
