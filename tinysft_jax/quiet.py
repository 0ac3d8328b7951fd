"""Keeps orbax from printing what it raises as well, and from waiting for other processes."""

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

# What it raises when a file can't be written (tensorstore's own errors are ValueErrors), or is not what it wrote.
ORBAX_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


def alone() -> ocp.Context:
    """In the block, orbax reads in this process alone: by default all processes of a run must take part."""
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    return context


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """In the block, orbax tells neither of its every step nor, beside the error it raises, of what led to it.

    When one read has failed, orbax no longer waits for the others and closes its event loop. They fail later, each
    with a traceback on stderr. So if the block fails, what keeps them quiet stays in place.
    """
    orbax, tasks, heard = logging.getLogger("absl"), logging.getLogger("asyncio"), sys.unraisablehook

    def hear(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            heard(unraisable)

    orbax_level, level = orbax.level, tasks.level
    orbax.setLevel(logging.CRITICAL)
    tasks.setLevel(logging.CRITICAL)
    sys.unraisablehook = hear
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        orbax.setLevel(max(orbax_level, logging.ERROR))
    tasks.setLevel(level)
    sys.unraisablehook = heard
