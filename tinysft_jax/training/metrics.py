"""What a run tells of itself: rates, `metrics.jsonl`, and wandb."""

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from tinysft_jax import files
from tinysft_jax.errors import UserError, reason
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
