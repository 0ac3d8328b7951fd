"""`report.png`."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tinysft_jax.evaluation.metrics import CORRECTNESS

# Column: marker, colour, and how far below the middle of its line it is drawn.
_LOOKS = {
    "gold": ("|", "tab:green", 0.0),
    "shuffled": ("|", "tab:gray", 0.0),
    "baseline": ("s", "tab:orange", 0.16),
    "model": ("o", "tab:blue", -0.16),
}


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Draws loss and correctness with 95 % intervals, floor and ceiling.

    Args:
      report: the content of `report.json`.
      path: the image to write.
    """
    lines = {
        f"{task}: {metric}": of
        for task, metrics in report["tasks"].items()
        for metric, of in metrics.items()
        if metric in ("loss", *CORRECTNESS)
    }
    panels = {
        "loss (nats a token)": {name: of for name, of in lines.items() if name.endswith(": loss")},
        "score": {name: of for name, of in lines.items() if not name.endswith(": loss")},
    }
    heights = [len(panel) + 2 for panel in panels.values()]
    figure = Figure(figsize=(9, 0.27 * sum(heights) + 0.6), layout="constrained")
    all_axes = figure.subplots(2, 1, height_ratios=heights)
    for axes, (label, panel) in zip(all_axes, panels.items(), strict=True):
        for column, (marker, colour, below) in _LOOKS.items():
            points = [(row + below, of[column]) for row, of in enumerate(panel.values()) if column in of]
            if points:
                axes.errorbar(
                    [point["value"] for _, point in points],
                    [row for row, _ in points],
                    xerr=[*zip(*(_reach(point) for _, point in points), strict=True)] if marker != "|" else None,
                    fmt=marker,
                    color=colour,
                    markersize=4 if marker != "|" else 11,
                    label=column,
                )
        axes.set_yticks(range(len(panel)), list(panel), fontsize="small")
        axes.set_ylim(len(panel) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    all_axes[-1].set_xlim(-0.03, 1.03)
    all_axes[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, format="png")


def _reach(point: dict[str, Any]) -> tuple[float, float]:
    """How far the interval goes down and up from the value."""
    if point["low"] is None:
        return 0.0, 0.0
    return point["value"] - point["low"], point["high"] - point["value"]
