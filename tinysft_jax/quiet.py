"""Keeps orbax from printing what it raises as well."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """In the block, orbax tells neither of its every step nor, beside the error it raises, of what led to it.

    When one read has failed, orbax no longer waits for the others and closes its event loop. They fail later, each
    with a traceback on stderr. So if the block fails, what keeps them quiet stays in place.
    """
    orbax, tasks, heard = logging.getLogger("absl"), logging.getLogger("asyncio"), sys.unraisablehook

    def hear(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            heard(unraisable)

    orbax.setLevel(logging.CRITICAL)
    level = tasks.level
    tasks.setLevel(logging.CRITICAL)
    sys.unraisablehook = hear
    try:
        yield
    finally:
        orbax.setLevel(logging.ERROR)
    tasks.setLevel(level)
    sys.unraisablehook = heard
