"""What a run reports: metrics.jsonl, wandb, the progress line, rates, skipped steps, the loss plot."""

import contextlib
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
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

# Names of metrics, before which metrics.jsonl has the objective's name: "sft/val_loss".
TRAIN, VAL = "train_", "val_"  # figures of a step, and of the validation sample
VAL_LOSS = f"{VAL}loss"  # over all tasks; with "/<task>" appended, over one of them
REWARD = f"{TRAIN}reward"  # of GRPO, the mean of a step's answers
FINAL = "final_"  # before the name of what is measured of the kept model, at the end
FINAL_ROWS = f"{FINAL}{VAL}rows"  # of the sample that it was evaluated on

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


def title(objective: str) -> str:
    """What is shown of a run: the loss with its unit; of GRPO, whose loss means nothing, the reward."""
    return {"sft": "loss (nats per supervised token)", "grpo": "reward"}.get(objective, "loss (nats per pair)")


class Rates:
    """Tokens per second since the last report, over the time spent on training alone."""

    def __init__(self, config: GPTConfig, seq_len: int):
        self._config, self._seq_len = config, seq_len
        self.started: float | None = None  # when the first step, which includes compilation, was done
        self._totals = np.zeros(3)  # positions, tokens, supervised tokens

    def count(self, positions: int | float, tokens: int | float, supervised_tokens: int | float) -> None:
        """Adds a finished step; the first one starts the clock and is not counted."""
        if self.started is None:
            self.started = time.perf_counter()
        else:
            self._totals += positions, tokens, supervised_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block does not count."""
        before = time.perf_counter()
        yield
        if self.started is not None:
            self.started += time.perf_counter() - before

    def report(self) -> dict[str, float]:
        """The rates since the last report; empty if no step was counted."""
        positions, tokens, supervised = self._totals.tolist()
        if not positions or self.started is None:
            return {}
        now = time.perf_counter()
        seconds, self.started, self._totals = now - self.started, now, np.zeros(3)
        rates = {
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "padding_fraction": 1 - tokens / positions,
        }
        if peak := peak_flops():
            rates["mfu"] = train_flops(self._config, tokens, supervised, self._seq_len) / seconds / peak
        return rates


class RunLog(contextlib.ExitStack):
    """Metrics and the progress line; processes other than the first write and show nothing."""

    def __init__(self, config: ConfigDict, workdir: Path, shape: GPTConfig, total_steps: int):
        super().__init__()
        self.rates = Rates(shape, config.data.seq_len)
        self._workdir, self._prefix, self._rate = workdir, f"{config.objective}/", ""
        self._file, self._wandb = None, None
        self._progress = Progress("step", total_steps, quiet=not distributed.is_first())
        self.say = self._progress.say

    def open(self, is_kept: Callable[[MetricLine], bool], settings: dict[str, Any]) -> None:
        """Starts the log in the first process, with the lines to keep; `settings`: the content of config.json."""
        path = self._workdir / "metrics.jsonl"
        kept = [line for line in self.lines() if is_kept(line)]
        files.write_text(path, "".join(json.dumps(self._named(line)) + "\n" for line in kept))
        self._file = self.enter_context(path.open("a", encoding="utf-8"))
        if settings["config"]["wandb"]["mode"] != "disabled":
            self._wandb = wandb = _start_wandb(self._workdir, settings)
            self.push(lambda _, error, __: wandb.finish(exit_code=getattr(error, "exit_code", 1) if error else 0))
        self.enter_context(self._progress)

    def write(self, step: int, metrics: MetricLine) -> None:
        """Writes a line of metrics, without those that are not finite, which JSON can't hold."""
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        named = self._named({"step": step, **metrics})
        if self._file:
            self._file.write(json.dumps(named) + "\n")
            self._file.flush()
        if self._wandb:
            self._wandb.log({key: value for key, value in named.items() if key != "step"}, step=step)

    def step(self, step: int, values: dict[str, float], more: MetricLine, skipped_steps: int, is_due: bool) -> None:
        """Counts a finished step with its metrics `values`, shows it, and logs it if it is due or was skipped.

        `more` is logged beside them.
        """
        self.rates.count(*(values[name] for name in ("positions", "tokens", "supervised_tokens")))
        line = {"skipped_steps": skipped_steps}
        is_due = is_due and not values["skipped"]
        if is_due:
            others = ("skipped", "positions", "tokens", "supervised_tokens", "grad_norm", "lr")
            line |= {TRAIN + key: value for key, value in values.items() if key not in others}
            line |= {key: values[key] for key in ("grad_norm", "lr")}
            line |= more | self.rates.report()
            if rate := line.get("supervised_tokens_per_second"):
                self._rate = f"  {rate:,.0f} supervised tokens/s"
        watched = f"reward {line[REWARD]:.3f}" if REWARD in line else f"loss {values['loss']:.4f}"
        self._progress.update(step, f"{watched}  lr {values['lr']:.2e}{self._rate}", always=is_due)
        if is_due or values["skipped"]:
            self.write(step, line)

    def lines(self) -> list[MetricLine]:
        """The lines of metrics.jsonl, under the names that metrics have here."""
        return run_metrics(self._workdir, self._prefix)

    def _named(self, line: MetricLine) -> MetricLine:
        return {key if key == "step" else self._prefix + key: value for key, value in line.items()}


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


def run_metrics(workdir: Path, prefix: str) -> list[MetricLine]:
    """The lines of a run's metrics without the objective's name before each; a foreign metric keeps its name."""
    lines = read_metrics(workdir)
    return [{key.removeprefix(prefix): value for key, value in line.items()} for line in lines]


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


def plot_loss(workdir: Path, lines: list[MetricLine], objective: str) -> None:
    """Draws training and validation loss, or of GRPO the reward, over steps into `loss.png`."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, name = figure.subplots(), "reward" if objective == "grpo" else "loss"
    steps, losses = _series(lines, TRAIN + name)
    if steps:
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(steps, _running_mean(losses), color="tab:blue", label="training (smoothed)")
    if any(VAL + name in line for line in lines):
        axes.plot(*_series(lines, VAL + name), color="black", marker="o", markersize=4, label="validation")
    for key in sorted({key for line in lines for key in line if key.startswith(f"{VAL}{name}/")}):
        axes.plot(*_series(lines, key), linewidth=1, linestyle="--", label=key.removeprefix(f"{VAL}{name}/"))
    axes.set(xlabel="step", ylabel=title(objective))
    if name == "loss":
        axes.set_yscale("log")
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


def print_summary(lines: list[MetricLine], best_step: int, objective: str) -> None:
    """Prints the validation loss by task, or the reward by its parts, and other figures.

    Before training, at the best step, and of the kept model.
    """
    evaluated = {line["step"]: line for line in lines if VAL_LOSS in line}
    if not {0, best_step} <= evaluated.keys():
        return
    final = next((line for line in lines if FINAL_ROWS in line), {})
    columns = [(evaluated[0], VAL), (evaluated[best_step], VAL), (final, FINAL + VAL)]
    table = Table("task", title=f"validation {title(objective)}", min_width=44)
    for name in ("before", f"step {best_step:,}", f"kept model, {final.get(FINAL_ROWS, 0):,} rows"):
        table.add_column(name, justify="right")
    names = {key.removeprefix(prefix) for line, prefix in columns for key in line if key.startswith(prefix)} - {"rows"}
    for name in sorted(names, key=lambda name: (not name.startswith("loss/"), name != "loss", name)):
        values = [line.get(prefix + name) for line, prefix in columns]
        label = "all" if name == "loss" else name.removeprefix("loss/")
        table.add_row(label, *("–" if value is None else f"{value:.3f}" for value in values))
    Console().print(table)
