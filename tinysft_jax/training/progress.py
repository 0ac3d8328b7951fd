"""What a run shows while it works: a live line in a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tinysft_jax.training.metrics import ALL_TASKS, FINAL, FINAL_ROWS, MetricLine

# A path may hold brackets, and a line that someone greps should stay one line.
_PLAIN = {"highlight": False, "markup": False, "soft_wrap": True}


class TrainingProgress:
    """Steps done, loss, learning rate, supervised tokens a second, time left.

    Args:
      total: steps of the run.
      quiet: show nothing (processes that aren't the first).
    """

    def __init__(self, total: int, quiet: bool = False):
        self._console = Console(file=sys.stderr, quiet=quiet)
        self._total, self._first_step = total, None
        self._live = None
        if self._console.is_terminal and not quiet:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task("compiling", total=total)
            self._live.start()

    def step(self, step: int) -> None:
        """A step is done."""
        if self._first_step is None:  # compiled and run: time is estimated from here on
            self._first_step, self._began = step, time.perf_counter()
        if self._live:
            self._live.update(self._task, completed=step)

    def log(self, step: int, metrics: MetricLine) -> None:
        """Shows the metrics of a logged step."""
        text = f"loss {metrics['sft/train_loss']:.4f}  lr {metrics['sft/lr']:.2e}"
        if (rate := metrics.get("sft/supervised_tokens_per_second")) is not None:
            text += f"  {rate:,.0f} supervised tokens/s"
        if self._live:
            self._live.update(self._task, description=text)
        else:
            self._console.print(f"step {step:,}/{self._total:,}  {text}{self._time_left(step)}", **_PLAIN)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, **_PLAIN)

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _time_left(self, step: int) -> str:
        done = step - (self._first_step or step)
        if not done or step >= self._total:
            return ""
        seconds = int((time.perf_counter() - self._began) / done * (self._total - step))
        return f"  {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"


def print_summary(lines: list[MetricLine], best_step: int) -> None:
    """A table of the validation loss, for each task: before training, at the best step, of the kept model at the end.

    Args:
      lines: of `metrics.jsonl`.
      best_step: whose model was kept.
    """
    evaluated = {line["step"]: line for line in lines if ALL_TASKS in line}
    before, best = evaluated.get(0), evaluated.get(best_step)
    if before is None or best is None:
        return
    final = next((line for line in lines if FINAL_ROWS in line), {})
    columns = {
        "before": (before, ALL_TASKS),
        f"step {best_step:,}": (best, ALL_TASKS),
        f"kept model, {final.get(FINAL_ROWS, 0):,} rows": (final, FINAL),
    }
    table = Table("task", title="validation loss (nats a supervised token)", min_width=44)
    for name in columns:
        table.add_column(name, justify="right")
    tasks = {key.removeprefix(prefix) for line, prefix in columns.values() for key in line if key.startswith(prefix)}
    for task in sorted(tasks, key=lambda task: (task == "", task)):
        losses = [line.get(prefix + task) for line, prefix in columns.values()]
        table.add_row(task[1:] or "all", *("–" if loss is None else f"{loss:.3f}" for loss in losses))
    Console().print(table)
