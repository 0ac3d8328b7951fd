"""How far `prepare` is: a bar in a terminal, else a line now and then."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tinysft_jax.data.sources import Source

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(source: Source) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows how far the work is, given the tokens so far."""
    console = Console(stderr=True)
    start = time.monotonic()
    if console.is_terminal:
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[tokens]}"), TimeRemainingColumn())
        with Progress("preparing", *columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=source.size, tokens="")

            def show(tokens: int) -> None:
                rate = tokens / (time.monotonic() - start)
                bar.update(task, completed=source.position, tokens=f"{tokens:,} tokens, {rate:,.0f} tokens/s")

            yield show
    else:
        last = start

        def show_line(tokens: int) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                print(describe(source.position / source.size, tokens, last - start), file=sys.stderr, flush=True)

        yield show_line


def describe(fraction: float, tokens: int, seconds: float) -> str:
    """A line such as "12% read, 5,000,000 tokens, 500,000 tokens/s, 0:01:13 left".

    Args:
      fraction: of the input that has been read, above 0.
      tokens: so far.
      seconds: so far.
    """
    left = timedelta(seconds=round(seconds / fraction * (1 - fraction)))
    return f"{fraction:.0%} read, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, {left} left"
