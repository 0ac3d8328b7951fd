"""A report: a pure function of the answers. Built as JSON, shown as a table and as Markdown."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from tinysft_jax.evaluation.answers import Answered
from tinysft_jax.evaluation.cases import Case
from tinysft_jax.evaluation.figures import Figure, Values, difference, mean
from tinysft_jax.evaluation.metrics import CORRECTNESS, Metric, distinct_2, repetition

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
