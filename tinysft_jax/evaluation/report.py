"""The report of an evaluation: figures with their intervals, tables and plot."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from matplotlib import figure as plots
from rich.table import Table

from tinysft_jax.evaluation.cases import Answered, Case
from tinysft_jax.evaluation.metrics import CORRECTNESS, Metric, distinct_2, repetition

Values = Sequence[float | None]  # by case; None where a metric doesn't apply

Z = NormalDist().inv_cdf(0.975)  # standard errors to each side of a 95 % interval


class Figure(NamedTuple):
    """A mean over cases.

    Attributes:
      value: the mean.
      cases: how many it is over.
      standard_error: of the mean, from the cases' differences; of a share, its interval's half-width / 1.96. None for a
        single case that is no share, and so are the next two.
      low: the lower end of the mean's 95 % interval.
      high: the upper end.
      share: whether all cases are 0 or 1, so that the mean is a share, or a difference of two shares.
    """

    value: float
    cases: int
    standard_error: float | None
    low: float | None
    high: float | None
    share: bool


def mean(values: Values, weights: Sequence[float] | None = None) -> Figure | None:
    """The weighted mean of the cases that have a value; None if there are none.

    Without weights, values that are all 0 or 1 are a share, with the interval of Wilson, Probable inference, the law of
    succession, and statistical inference, 1927: it says something about 100 of 100, too, where the cases' spread is 0.
    """
    known = [value for value in values if value is not None]
    if weights is not None or not known or not _are_shares(known):
        return _weighted_mean(values, weights)
    n, share = len(known), sum(known) / len(known)
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return _share(share, n, centre - half, centre + half, least=0)


def difference(values: Values, others: Values, weights: Sequence[float] | None = None) -> Figure | None:
    """The mean of value minus other, case by case, over the cases that have both; None if there are none.

    Of shares, with the adjusted Wald interval of Bonett & Price, Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data, 2012, https://doi.org/10.3102/1076998611411915. It adds a case to those
    that only the first is right in, and one to those that only the second is.
    """
    pairs = list(zip(values, others, strict=True))
    known = [pair for pair in pairs if None not in pair]
    if weights is not None or not known or not all(map(_are_shares, known)):
        return _weighted_mean([None if None in pair else pair[0] - pair[1] for pair in pairs], weights)
    n, only_first, only_second = len(known), known.count((1, 0)), known.count((0, 1))
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = Z * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    return _share((only_first - only_second) / n, n, first - second - half, first - second + half, least=-1)


def _are_shares(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _share(value: float, n: int, low: float, high: float, least: int) -> Figure:
    """A figure from `least` to 1; round-off at the ends must not put it outside its interval."""
    low, high = min(max(low, least), value), max(min(high, 1.0), value)
    return Figure(value, n, (high - low) / (2 * Z), low, high, share=True)


def _weighted_mean(values: Values, weights: Sequence[float] | None) -> Figure | None:
    """The mean with its standard error.

    The weights, a case's tokens, are drawn with the cases. So the mean is a ratio of two sums, and its error that of a
    ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4): s.e.² = n/(n − 1) Σ w²(v − mean)² / (Σ w)². With
    equal weights that is the standard error of the mean.
    """
    weights = [1.0] * len(values) if weights is None else weights
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    n, total = len(pairs), math.fsum(weight for _, weight in pairs)
    if not n:
        return None
    centre = math.fsum(weight * value for value, weight in pairs) / total
    if n == 1:
        return Figure(centre, n, None, None, None, share=False)
    error = math.sqrt(math.fsum((weight * (value - centre)) ** 2 for value, weight in pairs) * n / (n - 1)) / total
    return Figure(centre, n, error, centre - Z * error, centre + Z * error, share=False)


FORMAT_VERSION = 1

Figures = dict[str, Figure]  # by column
Report = dict[str, Any]

# Every column that a report can have, and what it says.
COLUMNS = {
    "model": "the model's answers",
    "baseline": "the baseline's answers",
    "difference": "the model's minus the baseline's, case by case",
    "gold": "the data's own answers: what the rules can give at most",
    "shuffled": "the model's answers, each scored as the answer to the next case of its task: what it would score "
    "without reading the question",
}
MEANINGS = {
    "loss": "Negative log-likelihood of a token of the gold answer, in nats",
    "stopped": "Answers that ended with end-of-text, not for lack of room",
    **{
        metric.__name__: metric.__doc__.splitlines()[0].rstrip(".")
        for metric in (*CORRECTNESS.values(), distinct_2, repetition)
    },
}

LEGEND = (
    "Each is a mean over cases. Where all cases are 0 or 1, as for right and wrong, it is a share and stands with its "
    "95 % interval: Wilson's, or of a difference of shares that of Bonett and Price (2012). Other means stand ± their "
    "standard error."
)


def build_report(settings: dict[str, Any], answered: Sequence[Answered]) -> Report:
    """The content of `report.json`.

    Args:
      settings: what the answers were made with; stands in the report as it is.
      answered: the cases, those of a task in the order in which they were drawn.
    """
    tasks: dict[str, list[Answered]] = {}
    for each in answered:
        tasks.setdefault(each.case.task, []).append(each)
    return {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "tasks": {
            task: {
                metric: {column: figure._asdict() for column, figure in figures.items()}
                for metric, figures in task_figures(members).items()
            }
            for task, members in tasks.items()
        },
    }


def task_figures(answered: Sequence[Answered]) -> dict[str, Figures]:
    """The figures of one task's cases, by metric and column; metrics that don't apply to the task are left out."""
    cases = [each.case for each in answered]
    by_speaker = {name: [each.answers[name] for each in answered] for name in answered[0].answers}
    tokens = [float(case.tokens) for case in cases]
    nll = {
        name: [answer.nll / case.tokens for case, answer in zip(cases, of, strict=True)]
        for name, of in by_speaker.items()
    }
    texts = {name: [answer.text for answer in of] for name, of in by_speaker.items()}
    texts["gold"] = [case.gold for case in cases]
    figures = {
        "loss": _columns(nll, tokens),
        "stopped": _columns({name: [float(answer.stopped) for answer in of] for name, of in by_speaker.items()}),
        **{name: _columns(_scores(metric, cases, texts)) for name, metric in CORRECTNESS.items()},
        "distinct_2": _columns({column: distinct_2(of) for column, of in texts.items()}),
        "repetition": _columns({column: [repetition(text) for text in of] for column, of in texts.items()}),
    }
    return {name: columns for name, columns in figures.items() if columns}


def _scores(metric: Metric, cases: Sequence[Case], texts: dict[str, list[str]]) -> dict[str, Values]:
    """Each case's score, by column."""
    if len(cases) > 1:
        # They were drawn in random order: the neighbour is a case at random, and never the same one.
        texts = texts | {"shuffled": texts["model"][-1:] + texts["model"][:-1]}
    return {column: [metric(*pair) for pair in zip(cases, of, strict=True)] for column, of in texts.items()}


def _columns(scores: dict[str, Values], weights: list[float] | None = None) -> Figures:
    """The means, with the paired difference where there is a baseline."""
    figures = {column: mean(values, weights) for column, values in scores.items()}
    if "baseline" in scores:
        figures["difference"] = difference(scores["model"], scores["baseline"], weights)
    return {column: figure for column in COLUMNS if (figure := figures.get(column)) is not None}


def table(report: Report) -> Table:
    """The report for a terminal."""
    columns = _columns_in(report)
    shown = Table(title="share [95 % interval] or mean ± standard error", title_justify="left")
    shown.add_column("", no_wrap=True)
    for column in ("cases", *columns):
        shown.add_column(column, justify="right", no_wrap=True)
    for task, metrics in report["tasks"].items():
        shown.add_section()
        shown.add_row(f"[bold]{task}")
        for metric, figures in metrics.items():
            shown.add_row(f"  {metric}", _cases(figures), *(_text(figures.get(column)) for column in columns))
    return shown


def markdown(report: Report) -> str:
    """The content of `report.md`."""
    columns = _columns_in(report)
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in report["settings"].items())]
    for task, metrics in report["tasks"].items():
        lines += ["", f"## {task}", "", f"| | cases | {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) + 1)]
        for metric, figures in metrics.items():
            cells = [metric, _cases(figures), *(_text(figures.get(column)) for column in columns)]
            lines.append(f"| {' | '.join(cells)} |")
    used = {metric for metrics in report["tasks"].values() for metric in metrics}
    lines += ["", "## What the figures are", "", LEGEND, ""]
    lines += [f"- **{metric}**: {meaning}." for metric, meaning in MEANINGS.items() if metric in used]
    lines += ["", *(f"- **{column}**: {COLUMNS[column]}." for column in columns)]
    return "\n".join(lines) + "\n"


def _columns_in(report: Report) -> list[str]:
    used = {column for metrics in report["tasks"].values() for figures in metrics.values() for column in figures}
    return [column for column in COLUMNS if column in used]


def _cases(figures: dict[str, dict[str, Any]]) -> str:
    return f"{max(figure['cases'] for figure in figures.values()):,}"


def _text(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    value, error = figure["value"], figure["standard_error"]
    if figure["share"]:
        return f"{value:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


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
    figure = plots.Figure(figsize=(9, 0.27 * sum(heights) + 0.6), layout="constrained")
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
