"""What a run tells of itself: rates, `metrics.jsonl`, wandb, skipped steps, the plot and the progress line."""

import contextlib
import json
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tinysft_jax import files
from tinysft_jax.console import RunError, UserError, reason
from tinysft_jax.model import GPTConfig

# Validation losses: over all tasks; "/<task>" is appended for one of them.
ALL_TASKS = "sft/val_loss"
FINAL = "sft/final_val_loss"  # of the kept model, at the end
FINAL_ROWS = "sft/final_val_rows"  # of the sample that it was evaluated on

# Dense bfloat16 FLOP/s of one device, as its maker publishes them.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
}


def train_flops(config: GPTConfig, tokens: int | float, supervised_tokens: int | float, seq_len: int) -> float:
    """FLOPs that training on these tokens needs, recomputation not counted.

    6 a parameter and token outside the embedding (forward 2, backward 4; Kaplan et al. 2020,
    https://arxiv.org/abs/2001.08361, section 2.1), the head at supervised positions only, and attention over the half
    of a row that causality leaves.
    """
    block = 4 * config.dim**2 + 3 * config.dim * config.hidden_dim
    attention = 2 * config.dim * seq_len / 2
    head = config.vocab_size * config.dim
    return 6 * (tokens * config.n_layers * (block + attention) + supervised_tokens * head)


def peak_flops() -> float | None:
    """Published FLOP/s of all devices together; None where the device is not in the table."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return peak * jax.device_count() if peak else None


MetricLine = dict[str, int | float]  # of metrics.jsonl: "step" and what was measured then


class Rates:
    """Tokens per second since the last report, over the time spent on training alone."""

    def __init__(self, config: GPTConfig, batch_positions: int, seq_len: int):
        self._config, self._batch_positions, self._seq_len = config, batch_positions, seq_len
        self._started: float | None = None  # not before the first step has been compiled and run
        self._reset()

    def count(self, tokens: int | float, supervised_tokens: int | float) -> None:
        """Adds a finished step. The first starts the clock and is not counted: it was compiled."""
        if self._started is None:
            self._started = time.perf_counter()
            return
        self._steps += 1
        self._tokens += tokens
        self._supervised += supervised_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block is not training's."""
        before = time.perf_counter()
        yield
        if self._started is not None:
            self._started += time.perf_counter() - before

    def report(self) -> dict[str, float]:
        """The metrics since the last report; empty if no step was counted."""
        if not self._steps or self._started is None:
            return {}
        now = time.perf_counter()
        seconds = now - self._started
        rates = {
            "sft/tokens_per_second": self._tokens / seconds,
            "sft/supervised_tokens_per_second": self._supervised / seconds,
            "sft/padding_fraction": 1 - self._tokens / (self._steps * self._batch_positions),
        }
        if peak := peak_flops():
            flops = train_flops(self._config, self._tokens, self._supervised, self._seq_len)
            rates["sft/mfu"] = flops / seconds / peak
        self._reset()
        self._started = now
        return rates

    def _reset(self) -> None:
        self._steps, self._tokens, self._supervised = 0, 0.0, 0.0


class MetricLog:
    """`metrics.jsonl`, a line each time, and wandb if asked for.

    Args:
      workdir: the work directory.
      kept: the lines that stand already; the run will write all others (again).
      wandb_settings: mode ("disabled", "offline" or "online"), project and name.
      config: the resolved configuration, for wandb.
    """

    def __init__(self, workdir: Path, kept: list[MetricLine], wandb_settings: dict[str, Any], config: dict[str, Any]):
        self._path = workdir / "metrics.jsonl"
        files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(workdir, wandb_settings, config)

    def write(self, step: int, metrics: MetricLine) -> None:
        self._file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb:
            self._wandb.log(metrics, step=step)

    def close(self, exit_code: int) -> None:
        """Ends the log; `exit_code` tells wandb how the run ended."""
        self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=exit_code)


def read_metrics(workdir: Path) -> list[MetricLine]:
    """The lines of `metrics.jsonl`; one that a killed run left unfinished is left out."""
    return read_lines(workdir / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects with a step of a log, an object a line; whatever else stands there is left out."""
    objects = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            entry = json.loads(text)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                objects.append(entry)
    return objects


def _start_wandb(workdir: Path, settings: dict[str, Any], config: dict[str, Any]):
    if settings["mode"] == "disabled":
        return None
    import wandb  # seconds to import, and a thing that runs offline by default should not talk to anyone

    id_file = workdir / "wandb_id"
    if not id_file.exists():
        files.write_text(id_file, uuid.uuid4().hex[:8])
    try:
        return wandb.init(
            mode=settings["mode"],
            project=settings["project"],
            name=settings["name"] or workdir.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=workdir,
            config=config,
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb does not start: {reason(error)}; log in with `wandb login`, or use --config.wandb.mode=offline"
        ) from None


SHOWN = 8  # conversations in a line for people; the file has all


class SkippedSteps:
    """Counts them, and writes which conversations they saw to `skipped_steps.jsonl`.

    Attributes:
      total: of the run.
      in_a_row: up to the last step.

    Args:
      workdir: the work directory.
      most: how many in a row the run bears.
      total: up to the checkpoint that the run continues from.
      in_a_row: likewise.
    """

    def __init__(self, workdir: Path, most: int, total: int = 0, in_a_row: int = 0):
        self._path, self._most = workdir / "skipped_steps.jsonl", most
        self.total, self.in_a_row = total, in_a_row

    def forget_after(self, step: int) -> None:
        """Drops the lines of later steps, which the run will do again."""
        if self._path.exists():
            kept = [entry for entry in read_lines(self._path) if entry["step"] <= step]
            files.write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def count(self, skipped: bool) -> None:
        """A step is done."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def write(self, step: int, loss: float, grad_norm: float, conversations: list[int]) -> str:
        """Writes down a skipped step, and returns it as a line for people."""
        entry = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "conversations": conversations}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        shown = ", ".join(str(index) for index in conversations[:SHOWN])
        more = f" and {len(conversations) - SHOWN:,} more, see {self._path}" if len(conversations) > SHOWN else ""
        return (
            f"step {step:,} changed nothing: its loss is {loss}, its gradient's norm {grad_norm}; "
            f"conversations {shown}{more}"
        )

    def check(self, step: int) -> None:
        """Raises: RunError, if step `step` was one too many."""
        if self.in_a_row >= self._most:
            raise RunError(
                f"the run has diverged: the loss or gradient of {self.in_a_row} steps in a row, up to step {step:,}, "
                "was no finite number; lower optimizer.learning_rate or lengthen optimizer.warmup_steps and start "
                f"again; if it stops at the same step, look at the conversations in {self._path}"
            )


def plot_loss(lines: list[MetricLine], path: Path) -> None:
    """Draws training and validation loss over steps.

    Args:
      lines: of `metrics.jsonl`.
      path: the image to write.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = _series(lines, "sft/train_loss")
    if len(steps):
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(losses), color="tab:blue", label="training (smoothed)")
    steps, losses = _series(lines, ALL_TASKS)
    if len(steps):
        axes.plot(steps, losses, color="black", marker="o", markersize=4, label="validation")
    for key in sorted({key for line in lines for key in line if key.startswith(f"{ALL_TASKS}/")}):
        axes.plot(*_series(lines, key), linewidth=1, linestyle="--", label=key.removeprefix(f"{ALL_TASKS}/"))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a supervised token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, dpi=120, format="png")
    aside.replace(path)


def _series(lines: list[MetricLine], key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float]) -> np.ndarray:
    """A running mean over a twentieth of the curve, up to each point."""
    width = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


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
