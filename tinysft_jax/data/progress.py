"""How far a long piece of work is: a bar in a terminal, else a line now and then."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(what: str, size: int, unit: str, begun: int = 0) -> Iterator[Callable[[int, int | float], None]]:
    """Yields a function that shows how far the work is, given the place in the input and what came of it.

    Args:
      what: is done.
      size: of the input, where the place is when all is done; positive.
      unit: of what comes of it.
      begun: the place at the start.
    """
    console = Console(stderr=True)
    start = time.monotonic()
    if console.is_terminal:
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[made]}"), TimeRemainingColumn())
        with Progress(what, *columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=size, completed=begun, made="")

            def show(place: int, made: int | float) -> None:
                rate = made / max(time.monotonic() - start, 1e-3)
                bar.update(task, completed=place, made=f"{made:,.0f} {unit}, {rate:,.0f} {unit}/s")

            yield show
    else:
        last = start

        def show_line(place: int, made: int | float) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                line = describe(begun / size, place / size, made, unit, last - start)
                print(f"{what}: {line}", file=sys.stderr, flush=True)

        yield show_line


def describe(begun: float, done: float, made: int | float, unit: str, seconds: float) -> str:
    """A line such as "12%, 5,000,000 tokens, 500,000 tokens/s, 0:01:13 left".

    Args:
      begun: the fraction of the input that was behind at the start.
      done: the fraction that is behind now.
      made: since then, in `unit`.
      unit: the name of the unit.
      seconds: since then.
    """
    left = timedelta(seconds=round(seconds * (1 - done) / (done - begun))) if done > begun else "unknown"
    return f"{done:.0%}, {made:,.0f} {unit}, {made / seconds:,.0f} {unit}/s, {left} left"
