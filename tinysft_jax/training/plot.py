"""`loss.png`."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from tinysft_jax.training.metrics import ALL_TASKS, MetricLine


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
