"""Figures with their intervals, and the report as a function of the answers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.corpus.stories import embedded_stories
from tinysft_jax.evaluation.report import (
    COLUMNS,
    _looks,
    build_report,
    difference,
    markdown,
    mean,
    plot_report,
)
from tinysft_jax.rewards.cases import Answer, Case
from tinysft_jax.tasks.make import TASK_NAMES, make_tasks

CONSTANT = "Yes, Lily was happy. She ran to see her little friend, and they found the ball by the tree."


def test_mean_by_hand():
    """0, 1/2, 1: variance 1/4, standard error sqrt(1/4 / 3)."""
    figure, error = mean([0.0, None, 0.5, 1.0]), math.sqrt(1 / 12)
    assert (figure["value"], figure["cases"], figure["standard_error"]) == (0.5, 3, pytest.approx(error))
    assert (figure["low"], figure["high"]) == pytest.approx((0.5 - 1.96 * error, 0.5 + 1.96 * error), abs=1e-4)


def test_weighted_mean_by_hand():
    """(1·4 + 3·2) / 4 = 2.5; residuals 1·1.5 and 3·(-0.5): sqrt(2 · (2.25 + 2.25)) / 4 = 0.75."""
    figure = mean([4.0, 2.0], [1.0, 3.0])
    assert (figure["value"], figure["standard_error"]) == pytest.approx((2.5, 0.75))


def test_nothing_and_a_single_case():
    assert mean([None]) is None and mean([]) is None and difference([None], [1.0]) is None
    single = {"value": 0.5, "cases": 1, "standard_error": None, "low": None, "high": None}
    assert mean([0.5]) == difference([0.75], [0.25]) == single


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_the_intervals_that_were_published(hits, n, low, high):
    """Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3."""
    figure, wrong = mean([True] * hits + [False] * (n - hits)), mean([0.0] * hits + [1.0] * (n - hits))
    assert figure["value"] == hits / n
    assert (figure["low"], figure["high"]) == pytest.approx((low, high), abs=5e-5)
    assert (wrong["low"], wrong["high"]) == pytest.approx((1 - figure["high"], 1 - figure["low"]))
    assert figure["standard_error"] == pytest.approx((figure["high"] - figure["low"]) / 2 / 1.96, rel=1e-4)


def test_a_difference_of_shares_has_the_interval_that_was_published():
    """The example of `ci.prop.ps` in the R package statpsych, whose authors' method it is."""
    pairs = [(False, False)] * 12 + [(False, True)] * 4 + [(True, False)] * 26 + [(True, True)] * 6
    figure = difference(*zip(*pairs, strict=True))
    assert (figure["value"], figure["cases"]) == (22 / 48, 48)
    assert (figure["low"], figure["high"]) == pytest.approx((0.2548067, 0.6251933))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_intervals_hold_their_value_and_are_never_empty(pairs):
    ones, others = zip(*pairs, strict=True)
    for figure, least in ((mean(ones), 0), (difference(ones, others), -1)):
        assert least <= figure["low"] <= figure["value"] <= figure["high"] <= 1 and figure["low"] < figure["high"]


def test_differences_are_paired_and_leave_out_what_is_missing():
    """Equal fractions differ by nothing, for certain."""
    figure = difference([1.0, None, 0.5], [0.25, 1.0, None])
    assert (figure["value"], figure["cases"]) == (0.75, 1)
    assert difference([0.5, 0.25], [0.5, 0.25])["standard_error"] == 0


@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=50))
def test_equal_weights_give_the_usual_standard_error(values):
    figure = mean(values, [3.0] * len(values))
    assert figure["value"] == pytest.approx(np.mean(values))
    assert figure["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)


def test_the_weighted_error_is_that_of_repeated_draws():
    """Against the spread of the weighted mean over many samples of cases whose values depend on their weights."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        weights = rng.integers(1, 40, 60)
        found.append(mean((5 / weights + rng.normal(0, 0.3, 60)).tolist(), weights.astype(float).tolist()))
    spread = np.std([figure["value"] for figure in found])
    assert np.mean([figure["standard_error"] for figure in found]) == pytest.approx(spread, rel=0.05)


def test_fluency_is_over_the_texts_that_have_one():
    """The difference is over the cases that have both."""
    cases = [Case("chat", "?", "truth", target=[1])] * 3
    answers = {speaker: [Answer("a", True, 1.0)] * 3 for speaker in ("model", "baseline")}
    fluency = {"model": [-1.0, -3.0, None], "baseline": [-2.0, -4.0, -9.0], "ground_truth": [-1.0] * 3}
    figures = build_report({}, cases, answers, fluency)["tasks"]["chat"]["fluency"]
    assert {column: (figure["value"], figure["cases"]) for column, figure in figures.items()} == {
        "model": (-2.0, 2),
        "baseline": (-5.0, 3),
        "difference": (1.0, 2),
        "ground_truth": (-1.0, 3),
    }
    assert not any(figure["share"] for figure in figures.values())
    assert "fluency" not in build_report({}, cases, answers)["tasks"]["chat"]


def values_of(figures):
    return {name: {column: figure["value"] for column, figure in of.items()} for name, of in figures.items()}


def test_by_hand():
    """Four yes/no cases, the model right in three; shuffled, each answer goes to the next case."""
    truths, said = ("Yes.", "Yes.", "No.", "No."), ("Yes.", "Yes.", "No.", "Yes.")
    lengths, stopped, nll = (1, 1, 1, 5), (True, False, True, True), (1.0, 2.0, 3.0, 2.0)
    cases = [Case("dialogue", "?", truth, target=[0] * n) for truth, n in zip(truths, lengths, strict=True)]
    answers = {"model": list(map(Answer, said, stopped, nll)), "baseline": [Answer("No.", True, 2.0)] * 4}
    report = build_report({"seed": 3}, cases, answers)
    assert report["format_version"] == 2 and report["settings"] == {"seed": 3}
    figures = report["tasks"]["dialogue"]
    values = values_of(figures)
    assert values["loss"] == {"model": 1.0, "baseline": 1.0, "difference": 0.0}
    assert values["stopped"] == {"model": 0.75, "baseline": 1.0, "difference": -0.25}
    assert values["yes_no_correct"] == {
        "model": 0.75,
        "baseline": 0.5,
        "difference": 0.25,
        "ground_truth": 1.0,
        "shuffled": 0.75,  # Yes Yes Yes No
    }
    # The differences of yes_no_correct are 1, 1, 0, -1; with a case more each way: 3/6 - 2/6 ± 1.96 √(29/36 / 6).
    ends = [figures["yes_no_correct"]["difference"][end] for end in ("low", "high")]
    assert ends == pytest.approx([1 / 6 - 1.96 * (29 / 216) ** 0.5, 1 / 6 + 1.96 * (29 / 216) ** 0.5], rel=1e-4)
    assert {figure["cases"] for of in figures.values() for figure in of.values()} <= {4}


def of_several(baseline: bool) -> dict:
    """Two yes/no cases and three checkpoints, of which the first is right in one, and so on."""
    cases = [Case("dialogue", "?", "Yes.", target=[1])] * 2
    said = {"sft": ("No.", "Yes."), "runs/dpo_on_own_answers": ("Yes.", "Yes."), "a$^$b": ("No.", "No.")}
    said |= {"baseline": ("No.", "No.")} if baseline else {}
    answers = {name: [Answer(text, True, 1.0) for text in texts] for name, texts in said.items()}
    return build_report({"seed": 3}, cases, answers, {name: [-1.0, -2.0] for name in (*said, "ground_truth")})


@pytest.mark.parametrize(
    ("baseline", "differences"),
    [
        (False, {"runs/dpo_on_own_answers - sft": 0.5, "a$^$b - sft": -0.5}),
        (True, {"sft - baseline": 0.5, "runs/dpo_on_own_answers - baseline": 1.0, "a$^$b - baseline": 0.0}),
    ],
)
def test_several_checkpoints_have_a_column_each(baseline, differences):
    """Compared with the baseline, or else with the first; only the first one's answers are shuffled."""
    report = of_several(baseline)
    levels = {"sft": 0.5, "runs/dpo_on_own_answers": 1.0, "a$^$b": 0.0} | ({"baseline": 0.0} if baseline else {})
    right = values_of(report["tasks"]["dialogue"])["yes_no_correct"]
    assert list(right.items()) == list((levels | {"ground_truth": 1.0, "shuffled": 0.5} | differences).items())
    fluency = values_of(report["tasks"]["dialogue"])["fluency"]
    assert fluency == dict.fromkeys([*levels, "ground_truth"], -1.5) | dict.fromkeys(differences, 0)
    lines = markdown(report).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [cell.strip() for cell in table[0].split("|")[3:-1]] == list(right)
    assert len(set(map(len, table))) == 1  # aligned
    assert {f"- **{name}**: {report['columns'][name]}." for name in right} <= set(lines)
    assert "the answers of sft, each" in report["columns"]["shuffled"]


def test_any_number_of_columns_is_drawn(tmp_path):
    """With a marker and a colour of its own each, also where a name looks like a formula."""
    names = [f"run_{i}" for i in range(20)]
    answers = {name: [Answer("Yes.", True, 1.0)] for name in (*names, "baseline")}
    report = build_report({}, [Case("dialogue", "?", "Yes.", target=[1])], answers)
    looks = _looks(list(report["columns"]))
    assert set(looks) == {*names, "baseline", "ground_truth", "shuffled"}
    assert len({(marker, colour) for marker, _, colour, _ in looks.values()}) == 23
    places = [looks[name][3] for name in (*names, "baseline")]
    assert places == sorted(set(places)) and places[0] > -0.5
    plot_report(of_several(baseline=True), tmp_path / "several.png")
    assert (tmp_path / "several.png").stat().st_size > 10_000
    assert _looks(list(COLUMNS))["model"] == ("o", 4, "tab:blue", pytest.approx(-0.16))


def test_a_single_case_has_no_floor_and_only_a_share_an_interval():
    answers = {"model": [Answer("Be kind.", True, 1.5)]}
    figures = build_report({}, [Case("moral", "?", "Be kind.", target=[1, 2, 3])], answers)["tasks"]["moral"]
    assert figures["moral_correct"].keys() == {"model", "ground_truth"}
    assert figures["moral_correct"]["model"]["low"] == pytest.approx(0.2065, abs=5e-5)  # 1 / (1 + 1.96²)
    assert figures["loss"]["model"] == mean([0.5]) | {"share": False}


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """About stories of the embedded corpus, task by task."""
    conversations = [each for story in embedded_stories(80) for each in make_tasks(story.record)]
    drawn = []
    for task in TASK_NAMES:
        for each in (each for each in conversations if each.task == task):
            question, answer = (message["content"] for message in each.messages)
            drawn.append(Case(task, question, answer, each.request.conditions, target=[*answer.split(), "end"]))
    return drawn


def report_on(cases, **speakers):
    return build_report({"data": "stories"}, cases, {name: answers_of(cases, say) for name, say in speakers.items()})


def answers_of(cases, say):
    return [Answer(say(case), True, 0.5 * len(case.target)) for case in cases]


def truth(case):
    return case.ground_truth


def test_the_ground_truth_is_the_ceiling(cases):
    """The model's column equals that of the ground truth, which no answers change; it scores full marks."""
    report, other = report_on(cases, model=truth), report_on(cases, model=lambda case: CONSTANT)
    assert list(report["tasks"]) == list(TASK_NAMES)
    for task, metrics in report["tasks"].items():
        for name, figures in metrics.items():
            if "ground_truth" in figures:
                assert figures["model"] == figures["ground_truth"] == other["tasks"][task][name]["ground_truth"]
            if "shuffled" in figures:
                assert figures["ground_truth"]["value"] >= (
                    0.9 if "honoured" in name or name.startswith("all_") else 1
                ), (task, name)


@pytest.mark.parametrize("constant", [CONSTANT, "No.", ""])
def test_a_constant_answer_is_no_better_than_the_floor(cases, constant):
    """And the truth is, by far."""
    report, true_report = report_on(cases, model=lambda case: constant), report_on(cases, model=truth)
    compared = set()
    for task, metrics in report["tasks"].items():
        for name, figures in metrics.items():
            if "shuffled" in figures:
                compared.add(name)
                model, floor = figures["model"], figures["shuffled"]
                assert abs(model["value"] - floor["value"]) <= 2 * floor["standard_error"], (task, name)
                true_model, floor = (true_report["tasks"][task][name][column] for column in ("model", "shuffled"))
                assert true_model["value"] - 2 * true_model["standard_error"] > floor["value"]
    assert compared >= {"words_used", "character_correct", "yes_no_correct", "moral_correct", "rouge_l"}


def test_markdown_has_every_figure_in_one_form_a_row_and_says_what_it_is(cases):
    report = report_on(cases, model=lambda case: CONSTANT, baseline=truth)
    text = markdown(report)
    assert "- data: stories" in text
    for task, metrics in report["tasks"].items():
        section = text.partition(f"\n## {task}\n")[2].partition("\n## ")[0]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "|" in line]
        assert [row[0] for row in rows[2:]] == list(metrics)
        for (name, figures), (_, n_cases, *cells) in zip(metrics.items(), rows[2:], strict=True):
            assert f"- **{name}**: " in text
            assert n_cases == str(figures["model"]["cases"])
            assert cells[0].startswith(f"{figures['model']['value']:.3f} ")
            assert {"[" in cell for cell in cells if cell} == {figures["model"]["share"]}


def test_fractions_that_are_all_0_or_1_claim_no_certainty():
    """A row has one form, and where no spread tells the error, that of a share does."""
    cases = [Case("story", "?", "a b c d", target=[1]) for _ in range(60)]
    answers = {"model": [Answer("a b", True, 1.0)] * 60, "baseline": [Answer("a b a b a b", True, 1.0)] * 60}
    text = markdown(build_report({}, cases, answers))
    (row,) = (line for line in text.splitlines() if line.startswith("| repetition "))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == ["60", "0.000 ± 0.015", "0.333 ± 0.000", "-0.333 ± 0.000", "0.000 ± 0.015"]


def test_a_length_is_no_share():
    """Answers of one word each have the same length, for certain."""
    answers = {"model": [Answer("Yes.", True, 1.0)] * 9}
    figures = build_report({}, [Case("dialogue", "?", "Yes, it has.", target=[1])] * 9, answers)["tasks"]["dialogue"]
    assert (figures["length"]["model"]["value"], figures["length"]["ground_truth"]["value"]) == (1, 3)
    assert figures["length"]["model"]["standard_error"] == 0 and "word_list" not in figures
