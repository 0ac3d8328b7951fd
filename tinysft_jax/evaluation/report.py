"""The report of an evaluation: figures with their 95 % intervals, as JSON, Markdown and a plot."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Image

from tinysft_jax.rewards.cases import Answers, Case
from tinysft_jax.rewards.metrics import CORRECTNESS, distinct_2, length, repetition, word_list

FORMAT_VERSION = 2  # 1 called the ground truth "gold"
Z = NormalDist().inv_cdf(0.975)  # half of a 95 % interval, in standard errors

Values = Sequence[float | bool | None]  # by case; None where a metric doesn't apply
# value: the mean; cases: how many it is over; low, high: its 95 % interval; standard_error: the interval's half-width /
# 1.96; share: whether each case is right or wrong. A single case that is neither 0 nor 1 has None for an interval.
Figure = dict[str, Any]
Figures = dict[str, Figure]  # by column
Report = dict[str, Any]
Scores = Mapping[str, Values] | None  # by column

COLUMNS = {
    "model": "the model's answers",
    "baseline": "the baseline's answers",
    "difference": "model minus baseline, case by case",
    "ground_truth": "the data's own answers: the ceiling",
    "shuffled": "the model's answers, each scored against the next case of its task: the floor, what it would score "
    "without reading the question",
}
SINGLE = "model"  # the name of a checkpoint that is the only one
MEANINGS = {
    "loss": "Negative log-likelihood of a token of the ground truth, in nats",
    "ranked_right": "Whether the chosen answer scores higher than the rejected one",
    "margin": "The chosen answer's score minus the rejected one's",
    "stopped": "Whether the answer ended with end-of-text, not for lack of room",
    "fluency": "Mean log-likelihood of a token of the answer under the judge, in nats: after its question where the "
    "judge has a chat template, else as a document of its own",
    "reward": "Weighted mean of the rewards of `--rewards` that apply, from 0 to 1",
    **{
        metric.__name__: metric.__doc__.splitlines()[0].rstrip(".")
        for metric in (*CORRECTNESS.values(), distinct_2, repetition, length, word_list)
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
    settings: dict[str, Any], cases: Sequence[Case], answers: Answers, fluency: Scores = None, reward: Scores = None
) -> Report:
    """The content of `report.json`. A task's cases must be in the order in which they were drawn."""
    tasks = {}
    for task in dict.fromkeys(case.label for case in cases):
        members = [i for i, case in enumerate(cases) if case.label == task]
        of_task = {speaker: [each[i] for i in members] for speaker, each in answers.items()}
        more = {
            name: {column: [each[i] for i in members] for column, each in (scores or {}).items()}
            for name, scores in (("fluency", fluency), ("reward", reward))
        }
        tasks[task] = task_figures([cases[i] for i in members], of_task, more)
    return make_report(settings, tasks, answers)


def make_report(settings: dict[str, Any], tasks: dict[str, dict[str, Figures]], speakers: Collection[str]) -> Report:
    """The report; with several checkpoints it says what each column is."""
    report = {"format_version": FORMAT_VERSION, "settings": settings, "tasks": tasks}
    return report if SINGLE in speakers else report | {"columns": column_meanings(speakers)}


def task_figures(cases: Sequence[Case], answers: Answers, more: Mapping[str, Scores]) -> dict[str, Figures]:
    """One task's figures by metric and column; metrics that don't apply to the task are left out."""
    tokens = [float(len(case.target)) for case in cases]
    texts = {speaker: [answer.text for answer in each] for speaker, each in answers.items()}
    texts["ground_truth"] = [case.ground_truth for case in cases]
    # Cases were drawn in random order, so the next one is a random other one.
    first = texts[next(iter(answers))]
    shuffled = {"shuffled": first[-1:] + first[:-1]} if len(cases) > 1 else {}
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
        # With weights, as a length is no share even where all answers have one word.
        "length": columns_of({column: list(map(length, each)) for column, each in texts.items()}, [1.0] * len(cases)),
        "word_list": columns_of({column: list(map(word_list, cases, each)) for column, each in texts.items()}),
        **{name: columns_of(dict(scores)) for name, scores in more.items()},
    }
    return {name: columns for name, columns in figures.items() if columns}


def columns_of(scores: dict[str, Values], weights: list[float] | None = None) -> Figures:
    """The means, with paired differences where there are several speakers."""
    figures = {column: mean(values, weights) for column, values in scores.items()}
    for column, (one, other) in _compared(scores)[1].items():
        figures[column] = difference(scores[one], scores[other], weights)
    share = all(isinstance(value, bool) for values in scores.values() for value in values if value is not None)
    return {column: figure | {"share": share} for column in column_meanings(scores) if (figure := figures.get(column))}


def _compared(columns: Collection[str]) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """The checkpoints, and what each difference is of: a checkpoint and the baseline, without one the first of them."""
    checkpoints = [column for column in columns if column == SINGLE or column not in COLUMNS]
    reference = "baseline" if "baseline" in columns else next(iter(checkpoints), None)
    pairs = [(name, reference) for name in checkpoints if name != reference]
    return checkpoints, {"difference" if pair[0] == SINGLE else " - ".join(pair): pair for pair in pairs}


def column_meanings(columns: Collection[str]) -> dict[str, str]:
    """What the columns of a table can be, in their order, given the speakers and perhaps others."""
    checkpoints, pairs = _compared(columns)
    if set(checkpoints) <= {SINGLE}:
        return COLUMNS
    meanings = {name: f"the answers of {name}" for name in checkpoints}
    meanings |= {name: COLUMNS[name] for name in ("baseline", "ground_truth", "shuffled")}
    meanings["shuffled"] = meanings["shuffled"].replace("the model's answers", meanings[checkpoints[0]])
    return meanings | {name: f"{one} minus {other}, case by case" for name, (one, other) in pairs.items()}


def markdown(report: Report) -> str:
    """The content of `report.md`: tables that are aligned, so that they read well in a terminal, too."""
    found = {column for metrics in report["tasks"].values() for figures in metrics.values() for column in figures}
    meanings = report.get("columns", COLUMNS)
    columns = {column: max(23, len(column)) for column in meanings if column in found}  # and their widths
    header = _row("", "cases", [f"{column:>{width}}" for column, width in columns.items()])
    rule = f"|{'-' * 22}|{'-' * 6}:|" + "".join(f"{'-' * (width + 1)}:|" for width in columns.values())
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in report["settings"].items())]
    for task, metrics in report["tasks"].items():
        lines += ["", f"## {task}", "", header, rule]
        for metric, figures in metrics.items():
            n_cases = max(figure["cases"] for figure in figures.values())
            cells = [f"{_text(figures.get(column)):>{width}}" for column, width in columns.items()]
            lines.append(_row(metric, f"{n_cases:,}", cells))
    used = {metric for metrics in report["tasks"].values() for metric in metrics}
    lines += ["", "## What the figures are", "", LEGEND, ""]
    lines += [f"- **{metric}**: {meaning}." for metric, meaning in MEANINGS.items() if metric in used]
    lines += ["", *(f"- **{column}**: {meanings[column]}." for column in columns)]
    return "\n".join(lines) + "\n"


def _row(name: str, n_cases: str, cells: Sequence[str]) -> str:
    return " | ".join([f"| {name:<20}", f"{n_cases:>5}", *cells]) + " |"


def _text(figure: Figure | None) -> str:
    if figure is None:
        return ""
    value, error = f"{figure['value']:z.3f}", figure["standard_error"]
    if figure["share"]:
        return f"{value} [{figure['low']:z.3f}, {figure['high']:z.3f}]"
    return value if error is None else f"{value} ± {error:.3f}"


# Marker, its size, colour, and how far below the middle of its row a column is drawn.
_LOOKS = {
    "ground_truth": ("|", 11, "tab:green", 0.0),
    "shuffled": ("|", 11, "tab:gray", 0.0),
    "baseline": ("s", 4, "tab:orange", 0.16),
}
_COLOURS = ("tab:blue", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")


def _looks(columns: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """The looks of all columns but differences: of any number of checkpoints, one below the other."""
    names = columns[: columns.index("baseline")]
    return _LOOKS | {
        name: ("oD^vPX"[i % 6], 4, _COLOURS[i % 7], 0.48 * (i + 1) / (len(names) + 1) - 0.4)
        for i, name in enumerate(names)
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
        for column, look in _looks([*report.get("columns", COLUMNS)]).items():
            _plot_column(axes, column.replace("$", r"\$"), look, [figures.get(column) for figures in panel.values()])
        axes.set_yticks(range(len(panel)), list(panel), fontsize="small")
        axes.set_ylim(len(panel) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    all_axes[-1].set_xlim(-0.03, 1.03)
    all_axes[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    image.savefig(path, dpi=120, format="png")


def _plot_column(axes: Axes, label: str, look: tuple[Any, ...], figures: Sequence[Figure | None]) -> None:
    marker, size, colour, below = look
    points = [(row + below, figure) for row, figure in enumerate(figures) if figure]
    values, low, high = (np.array([figure[key] for _, figure in points], float) for key in ("value", "low", "high"))
    reach = None if marker == "|" else (values - low, high - values)
    if rows := [row for row, _ in points]:
        axes.errorbar(values, rows, xerr=reach, fmt=marker, color=colour, markersize=size, label=label)
