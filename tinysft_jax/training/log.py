"""What a run reports: metrics.jsonl, wandb, the progress line, rates, skipped steps, the loss plot."""

import contextlib
import json
import math
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from tinysft_jax import distributed, files
from tinysft_jax.console import Progress, UserError, reason
from tinysft_jax.gpt_config import GPTConfig

MetricLine = dict[str, int | float]  # a line of metrics.jsonl: "step", and what was measured then

ALL_TASKS = "sft/val_loss"  # over all tasks; with "/<task>" appended, over one of them
FINAL = "sft/final_val_loss"  # of the kept model, at the end
FINAL_ROWS = "sft/final_val_rows"  # of the sample that it was evaluated on

SKIPPED = "skipped_steps.jsonl"

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
    """FLOPs of training on these tokens, without recomputation.

    6 per parameter and token outside the embedding (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, section 2.1),
    the head at supervised positions only, and attention over the half of a row that causality leaves.
    """
    attended = config.qkv_dims[0]
    block = config.dim * (sum(config.qkv_dims) + attended + 3 * config.hidden_dim)
    attention = 2 * attended * seq_len / 2
    head = config.vocab_size * config.dim
    return 6 * (tokens * config.n_layers * (block + attention) + supervised_tokens * head)


def peak_flops() -> float | None:
    """Published FLOP/s of all devices together; None for an unknown device."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return peak * jax.device_count() if peak else None


class Rates:
    """Tokens per second since the last report, over the time spent on training alone."""

    def __init__(self, config: GPTConfig, batch_size: int, seq_len: int):
        self._config, self._batch_size, self._seq_len = config, batch_size, seq_len
        self.started: float | None = None  # when the first step, which includes compilation, was done
        self._totals = np.zeros(3)  # steps, tokens, supervised tokens

    def count(self, tokens: int | float, supervised_tokens: int | float) -> None:
        """Adds a finished step; the first one starts the clock and is not counted."""
        if self.started is None:
            self.started = time.perf_counter()
        else:
            self._totals += 1, tokens, supervised_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block does not count."""
        before = time.perf_counter()
        yield
        if self.started is not None:
            self.started += time.perf_counter() - before

    def report(self) -> dict[str, float]:
        """The rates since the last report; empty if no step was counted."""
        steps, tokens, supervised = self._totals.tolist()
        if not steps or self.started is None:
            return {}
        now = time.perf_counter()
        seconds, self.started, self._totals = now - self.started, now, np.zeros(3)
        rates = {
            "sft/tokens_per_second": tokens / seconds,
            "sft/supervised_tokens_per_second": supervised / seconds,
            "sft/padding_fraction": 1 - tokens / (steps * self._batch_size * self._seq_len),
        }
        if peak := peak_flops():
            rates["sft/mfu"] = train_flops(self._config, tokens, supervised, self._seq_len) / seconds / peak
        return rates


class RunLog(contextlib.ExitStack):
    """Metrics and the progress line; processes other than the first write and show nothing."""

    def __init__(self, config: ConfigDict, workdir: Path, shape: GPTConfig, total_steps: int):
        super().__init__()
        self.rates = Rates(shape, config.train.batch_size, config.data.seq_len)
        self._workdir, self._rate, self._file, self._wandb = workdir, "", None, None
        self._progress = Progress("step", total_steps, quiet=not distributed.is_first())
        self.say = self._progress.say

    def open(self, kept: list[MetricLine], settings: dict[str, Any]) -> None:
        """Starts the log in the first process, with the lines `kept`; `settings`: the content of config.json."""
        path = self._workdir / "metrics.jsonl"
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.enter_context(path.open("a", encoding="utf-8"))
        if settings["config"]["wandb"]["mode"] != "disabled":
            self._wandb = wandb = _start_wandb(self._workdir, settings)
            self.push(lambda _, error, __: wandb.finish(exit_code=getattr(error, "exit_code", 1) if error else 0))
        self.enter_context(self._progress)

    def write(self, step: int, metrics: MetricLine) -> None:
        """Writes a line of metrics, without those that are not finite, which JSON can't hold."""
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        if self._file:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        if self._wandb:
            self._wandb.log(metrics, step=step)

    def step(self, step: int, values: dict[str, float], skipped_steps: int, is_due: bool) -> None:
        """Counts a finished step with its metrics `values`, shows it, and logs it if it is due or was skipped."""
        self.rates.count(values["tokens"], values["supervised_tokens"])
        line = {"sft/skipped_steps": skipped_steps}
        is_due = is_due and not values["skipped"]
        if is_due:
            names = {"sft/train_loss": "loss", "sft/grad_norm": "grad_norm", "sft/lr": "lr"}
            line |= {name: values[key] for name, key in names.items()} | self.rates.report()
            if rate := line.get("sft/supervised_tokens_per_second"):
                self._rate = f"  {rate:,.0f} supervised tokens/s"
        self._progress.update(step, f"loss {values['loss']:.4f}  lr {values['lr']:.2e}{self._rate}", always=is_due)
        if is_due or values["skipped"]:
            self.write(step, line)


def _start_wandb(workdir: Path, settings: dict[str, Any]):
    import wandb  # takes seconds

    id_file, options = workdir / "wandb_id", settings["config"]["wandb"]
    if not id_file.exists():
        files.write_text(id_file, uuid.uuid4().hex[:8])
    try:
        run = options | {"name": options["name"] or workdir.name, "id": id_file.read_text(encoding="utf-8")}
        return wandb.init(**run, resume="allow", dir=workdir, config=settings)
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb does not start: {reason(error)}; log in with `wandb login`, or use --config.wandb.mode=offline"
        ) from None


def read_metrics(workdir: Path, name: str = "metrics.jsonl") -> list[MetricLine]:
    """The lines of a log of steps, without one that a killed run left unfinished."""
    return [line for line in files.read_json_lines(workdir / name) if isinstance(line.get("step"), int)]


def forget_skipped(workdir: Path, step: int) -> None:
    """Drops the lines about skipped steps after `step`, which a run that resumes repeats."""
    if lines := read_metrics(workdir, SKIPPED):
        files.write_text(workdir / SKIPPED, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))


def write_skipped(workdir: Path, step: int, values: dict[str, float], conversations: list[int]) -> str:
    """Logs a skipped step with the conversations of its batch; returns a line for the user."""
    path, loss, norm = workdir / SKIPPED, str(values["loss"]), str(values["grad_norm"])
    with path.open("a", encoding="utf-8") as file:
        line = {"step": step, "loss": loss, "grad_norm": norm, "conversations": conversations}
        file.write(json.dumps(line) + "\n")
    shown = ", ".join(map(str, conversations[:8]))
    return f"step {step:,} skipped: its loss is {loss}, its gradient norm {norm}; conversations {shown}, … (see {path})"


def plot_loss(workdir: Path) -> None:
    """Draws training and validation loss over steps into `loss.png`."""
    lines, figure = read_metrics(workdir), Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = _series(lines, "sft/train_loss")
    if steps:
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(steps, _running_mean(losses), color="tab:blue", label="training (smoothed)")
    if any(ALL_TASKS in line for line in lines):
        axes.plot(*_series(lines, ALL_TASKS), color="black", marker="o", markersize=4, label="validation")
    for key in sorted({key for line in lines for key in line if key.startswith(f"{ALL_TASKS}/")}):
        axes.plot(*_series(lines, key), linewidth=1, linestyle="--", label=key.removeprefix(f"{ALL_TASKS}/"))
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend(fontsize="small")
    with files.atomic(workdir / "loss.png") as partial:
        figure.savefig(partial, dpi=120, format="png")


def _series(lines: list[MetricLine], key: str) -> tuple[list[int], list[float]]:
    return [line["step"] for line in lines if key in line], [line[key] for line in lines if key in line]


def _running_mean(values: list[float]) -> np.ndarray:
    """Over a twentieth of the curve, up to each point."""
    window, n = np.ones(max(1, len(values) // 20)), len(values)
    return np.convolve(values, window)[:n] / np.convolve(np.ones(n), window)[:n]


def print_summary(workdir: Path, best_step: int) -> None:
    """Prints the validation loss by task: before training, at the best step, and of the kept model at the end."""
    lines = read_metrics(workdir)
    evaluated = {line["step"]: line for line in lines if ALL_TASKS in line}
    if not {0, best_step} <= evaluated.keys():
        return
    final = next((line for line in lines if FINAL_ROWS in line), {})
    columns = [(evaluated[0], ALL_TASKS), (evaluated[best_step], ALL_TASKS), (final, FINAL)]
    table = Table("task", title="validation loss (nats per supervised token)", min_width=44)
    for name in ("before", f"step {best_step:,}", f"kept model, {final.get(FINAL_ROWS, 0):,} rows"):
        table.add_column(name, justify="right")
    tasks = {key.removeprefix(prefix) for line, prefix in columns for key in line if key.startswith(prefix)}
    for task in sorted(tasks, key=lambda task: (task == "", task)):
        losses = [line.get(prefix + task) for line, prefix in columns]
        table.add_row(task[1:] or "all", *("–" if loss is None else f"{loss:.3f}" for loss in losses))
    Console().print(table)
