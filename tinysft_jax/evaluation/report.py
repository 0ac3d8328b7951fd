"""The report of an evaluation: figures with their 95 % intervals, as JSON, Markdown and a plot."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Image

from tinysft_jax.evaluation.cases import Answers, Case
from tinysft_jax.evaluation.metrics import CORRECTNESS, distinct_2, repetition

FORMAT_VERSION = 2  # 1 called the ground truth "gold"
Z = NormalDist().inv_cdf(0.975)  # half of a 95 % interval, in standard errors

Values = Sequence[float | bool | None]  # by case; None where a metric doesn't apply
# value: the mean; cases: how many it is over; low, high: its 95 % interval; standard_error: the interval's half-width /
# 1.96; share: whether each case is right or wrong. A single case that is neither 0 nor 1 has None for an interval.
Figure = dict[str, Any]
Figures = dict[str, Figure]  # by column
Report = dict[str, Any]
Fluency = Mapping[str, Values]  # by column: the mean log-likelihood of a token of the text

COLUMNS = {
    "model": "the model's answers",
    "baseline": "the baseline's answers",
    "difference": "model minus baseline, case by case",
    "ground_truth": "the data's own answers: the ceiling",
    "shuffled": "the model's answers, each scored against the next case of its task: the floor, what it would score "
    "without reading the question",
}
MEANINGS = {
    "loss": "Negative log-likelihood of a token of the ground truth, in nats",
    "ranked_right": "Whether the chosen answer scores higher than the rejected one",
    "margin": "The chosen answer's score minus the rejected one's",
    "stopped": "Whether the answer ended with end-of-text, not for lack of room",
    "fluency": "Mean log-likelihood of a token of the answer under the judge, as a document of its own, in nats",
    **{
        metric.__name__: metric.__doc__.splitlines()[0].rstrip(".")
        for metric in (*CORRECTNESS.values(), distinct_2, repetition)
    },
}
LEGEND = (
    "Figures are means over cases. Where each case is right or wrong, the mean is a share, shown with its 95 % "
    "interval: Wilson's, or for a difference that of Bonett and Price (2012). Other means are shown ± their standard "
    "error; where all values are 0 or 1, it is taken from the interval that a share would have."
)


def mean(values: Values, weights: Sequence[float] | None = None) -> Figure | None:
    """The weighted mean of the cases that have a value; None if there are none.

    Values that are all 0 or 1 have the interval of Wilson, Probable inference, the law of succession, and statistical
    inference, 1927: it has a width even where all cases agree.
    """
    values = np.array(values, float)  # None becomes nan
    known = values[~np.isnan(values)]
    if weights is not None or not _is_binary(known):
        return _mean_with_error(values, weights)
    n, p = len(known), known.mean()
    centre, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return _figure(p, n, max((centre - half) / scale, 0), min((centre + half) / scale, 1))


def difference(values: Values, others: Values, weights: Sequence[float] | None = None) -> Figure | None:
    """The mean of value minus other over the cases that have both; None if there are none.

    Values that are all 0 or 1 have the interval of Bonett & Price, Adjusted Wald confidence interval for a difference
    of binomial proportions based on paired data, 2012, https://doi.org/10.3102/1076998611411915.
    """
    pairs = np.array([values, others], float)
    known = pairs[:, ~np.isnan(pairs).any(axis=0)]
    if weights is not None or not _is_binary(known):
        return _mean_with_error(pairs[0] - pairs[1], weights)
    n, first, second = known.shape[1], *known
    p, q = (np.sum(first > second) + 1) / (n + 2), (np.sum(first < second) + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return _figure(np.mean(first - second), n, max(p - q - half, -1), min(p - q + half, 1))


def _is_binary(values: np.ndarray) -> bool:
    return values.size > 0 and bool(np.isin(values, (0, 1)).all())


def _mean_with_error(values: np.ndarray, weights: Sequence[float] | None) -> Figure | None:
    """The mean ± 1.96 standard errors.

    The weights (a case's tokens) are drawn with the cases, so the error is that of a ratio estimator: Cochran, Sampling
    Techniques, 1977, section 6.4. With equal weights it is the standard error of the mean.
    """
    known = ~np.isnan(values)
    weights = (np.ones(len(values)) if weights is None else np.array(weights))[known]
    values, n = values[known], int(known.sum())
    if not n:
        return None
    value = float(np.average(values, weights=weights))
    if n == 1:
        return {"value": value, "cases": 1, "standard_error": None, "low": None, "high": None}
    error = math.sqrt(n / (n - 1)) * np.linalg.norm(weights * (values - value)) / weights.sum()
    return _figure(value, n, value - Z * error, value + Z * error)


def _figure(value: float, cases: int, low: float, high: float) -> Figure:
    value, low, high = float(value), float(min(low, value)), float(max(high, value))  # round-off excludes no value
    return {"value": value, "cases": cases, "standard_error": (high - low) / (2 * Z), "low": low, "high": high}


def build_report(
    settings: dict[str, Any], cases: Sequence[Case], answers: Answers, fluency: Fluency | None = None
) -> Report:
    """The content of `report.json`. A task's cases must be in the order in which they were drawn."""
    tasks = {}
    for task in dict.fromkeys(case.label for case in cases):
        members = [i for i, case in enumerate(cases) if case.label == task]
        of_task = {speaker: [each[i] for i in members] for speaker, each in answers.items()}
        fluency_of_task = {column: [each[i] for i in members] for column, each in (fluency or {}).items()}
        tasks[task] = task_figures([cases[i] for i in members], of_task, fluency_of_task)
    return {"format_version": FORMAT_VERSION, "settings": settings, "tasks": tasks}


def task_figures(cases: Sequence[Case], answers: Answers, fluency: Fluency) -> dict[str, Figures]:
    """One task's figures by metric and column; metrics that don't apply to the task are left out."""
    tokens = [float(len(case.target)) for case in cases]
    texts = {speaker: [answer.text for answer in each] for speaker, each in answers.items()}
    texts["ground_truth"] = [case.ground_truth for case in cases]
    # Cases were drawn in random order, so the next one is a random other one.
    shuffled = {"shuffled": texts["model"][-1:] + texts["model"][:-1]} if len(cases) > 1 else {}
    losses = {speaker: np.divide([answer.nll for answer in each], tokens) for speaker, each in answers.items()}
    figures = {
        "loss": columns_of(losses, tokens),
        "stopped": columns_of({speaker: [answer.stopped for answer in each] for speaker, each in answers.items()}),
        **{
            name: columns_of({column: list(map(metric, cases, each)) for column, each in (texts | shuffled).items()})
            for name, metric in CORRECTNESS.items()
        },
        "distinct_2": columns_of({column: distinct_2(each) for column, each in texts.items()}),
        "repetition": columns_of({column: list(map(repetition, each)) for column, each in texts.items()}),
        "fluency": columns_of(dict(fluency)),
    }
    return {name: columns for name, columns in figures.items() if columns}


def columns_of(scores: dict[str, Values], weights: list[float] | None = None) -> Figures:
    """The means, with the paired difference where there is a baseline."""
    figures = {column: mean(values, weights) for column, values in scores.items()}
    if "baseline" in scores:
        figures["difference"] = difference(scores["model"], scores["baseline"], weights)
    share = all(isinstance(value, bool) for values in scores.values() for value in values if value is not None)
    return {column: figure | {"share": share} for column in COLUMNS if (figure := figures.get(column))}


def markdown(report: Report) -> str:
    """The content of `report.md`: tables that are aligned, so that they read well in a terminal, too."""
    found = {column for metrics in report["tasks"].values() for figures in metrics.values() for column in figures}
    columns = [column for column in COLUMNS if column in found]
    header = _row("", "cases", columns)
    rule = f"|{'-' * 22}|{'-' * 6}:|" + f"{'-' * 24}:|" * len(columns)
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in report["settings"].items())]
    for task, metrics in report["tasks"].items():
        lines += ["", f"## {task}", "", header, rule]
        for metric, figures in metrics.items():
            n_cases = max(figure["cases"] for figure in figures.values())
            lines.append(_row(metric, f"{n_cases:,}", [_text(figures.get(column)) for column in columns]))
    used = {metric for metrics in report["tasks"].values() for metric in metrics}
    lines += ["", "## What the figures are", "", LEGEND, ""]
    lines += [f"- **{metric}**: {meaning}." for metric, meaning in MEANINGS.items() if metric in used]
    lines += ["", *(f"- **{column}**: {COLUMNS[column]}." for column in columns)]
    return "\n".join(lines) + "\n"


def _row(name: str, n_cases: str, cells: Sequence[str]) -> str:
    return " | ".join([f"| {name:<20}", f"{n_cases:>5}", *(f"{cell:>23}" for cell in cells)]) + " |"


def _text(figure: Figure | None) -> str:
    if figure is None:
        return ""
    value, error = f"{figure['value']:z.3f}", figure["standard_error"]
    if figure["share"]:
        return f"{value} [{figure['low']:z.3f}, {figure['high']:z.3f}]"
    return value if error is None else f"{value} ± {error:.3f}"


# Column: marker, its size, colour, and how far below the middle of its row it is drawn.
_LOOKS = {
    "ground_truth": ("|", 11, "tab:green", 0.0),
    "shuffled": ("|", 11, "tab:gray", 0.0),
    "baseline": ("s", 4, "tab:orange", 0.16),
    "model": ("o", 4, "tab:blue", -0.16),
}


def plot_report(report: Report, path: Path) -> None:
    """Draws loss and correctness with 95 % intervals, floor and ceiling, into a PNG file."""
    panels = {
        label: {f"{task}: {name}": of[name] for task, of in report["tasks"].items() for name in names if name in of}
        for label, names in (("loss (nats a token)", ["loss"]), ("score", ("ranked_right", *CORRECTNESS)))
    }
    heights = [len(panel) + 2 for panel in panels.values()]
    image = Image(figsize=(9, 0.27 * sum(heights) + 0.6), layout="constrained")
    all_axes = image.subplots(2, 1, height_ratios=heights)
    for axes, (label, panel) in zip(all_axes, panels.items(), strict=True):
        for column in _LOOKS:
            _plot_column(axes, column, [figures.get(column) for figures in panel.values()])
        axes.set_yticks(range(len(panel)), list(panel), fontsize="small")
        axes.set_ylim(len(panel) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    all_axes[-1].set_xlim(-0.03, 1.03)
    all_axes[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    image.savefig(path, dpi=120, format="png")


def _plot_column(axes: Axes, column: str, figures: Sequence[Figure | None]) -> None:
    marker, size, colour, below = _LOOKS[column]
    points = [(row + below, figure) for row, figure in enumerate(figures) if figure]
    values, low, high = (np.array([figure[key] for _, figure in points], float) for key in ("value", "low", "high"))
    reach = None if marker == "|" else (values - low, high - values)
    if rows := [row for row, _ in points]:
        axes.errorbar(values, rows, xerr=reach, fmt=marker, color=colour, markersize=size, label=column)
