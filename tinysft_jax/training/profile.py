"""A window of steps in JAX's profiler, for xprof or TensorBoard."""

from pathlib import Path

import jax

from tinysft_jax.errors import UserError


class ProfileWindow:
    """Traces the steps START to STOP (the first inclusive, the last not) into `directory`.

    Args:
      window: "START:STOP", or empty for none.
      directory: where the trace goes.

    Raises:
      UserError: if `window` is neither.
    """

    def __init__(self, window: str, directory: Path):
        self._start, self._stop = parse_window(window)
        self._directory, self._running = directory, False

    def before(self, step: int) -> None:
        """Call with the number of steps done, before the next one."""
        if not self._running and self._start <= step < self._stop:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif self._running and step >= self._stop:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is under way."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def parse_window(window: str) -> tuple[int, int]:
    """START and STOP of "START:STOP"; an empty window for an empty string."""
    if not window:
        return 0, 0
    start, _, stop = window.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise UserError(f"profile is {window!r}; it must be START:STOP, two step numbers, the first below the second")
    return int(start), int(stop)
