"""The report as a function of the answers."""

import json

import pytest

from tinysft_jax.console import UserError
from tinysft_jax.corpus.stories import embedded_stories
from tinysft_jax.evaluation.cases import Answer, Answered, Case, read_answers, write_answers
from tinysft_jax.evaluation.report import build_report, markdown
from tinysft_jax.tasks.make import TASK_NAMES, make_tasks

CONSTANT = "Yes, Lily was happy. She ran to see her little friend, and they found the ball by the tree."


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """About stories of the embedded corpus, task by task."""
    conversations = [each for story in embedded_stories(80) for each in make_tasks(story.record)]
    asked = {
        task: [[m["content"] for m in each.messages] for each in conversations if each.task == task]
        for task in TASK_NAMES
    }
    return [Case(task, *turns, len(turns[1].split()) + 1) for task, of in asked.items() for turns in of]


def answered(cases: list[Case], say, **others) -> list[Answered]:
    speakers = {"model": say, **others}
    return [
        Answered(case, {name: Answer(speak(case), True, 0.5 * case.tokens) for name, speak in speakers.items()})
        for case in cases
    ]


def test_by_hand():
    """Four yes/no cases, the model right in three; shuffled, each answer goes to the next case."""
    gold, said = ("Yes.", "Yes.", "No.", "No."), ("Yes.", "Yes.", "No.", "Yes.")
    rows = [
        Answered(
            Case("dialogue", "?", right, tokens),
            {"model": Answer(text, stopped, nll), "baseline": Answer("No.", True, 2.0)},
        )
        for right, text, tokens, stopped, nll in zip(
            gold, said, (1, 1, 1, 5), (True, False, True, True), (1.0, 2.0, 3.0, 2.0), strict=True
        )
    ]
    report = build_report({"seed": 3}, rows)
    assert report["format_version"] == 1 and report["settings"] == {"seed": 3}
    figures = report["tasks"]["dialogue"]
    values = {name: {column: figure["value"] for column, figure in of.items()} for name, of in figures.items()}
    assert values["loss"] == {"model": 1.0, "baseline": 1.0, "difference": 0.0}
    assert values["stopped"] == {"model": 0.75, "baseline": 1.0, "difference": -0.25}
    assert values["yes_no_correct"] == {
        "model": 0.75,
        "baseline": 0.5,
        "difference": 0.25,
        "gold": 1.0,
        "shuffled": 0.75,  # Yes Yes Yes No
    }
    # The differences of yes_no_correct are 1, 1, 0, -1; with a case more each way: 3/6 - 2/6 ± 1.96 √(29/36 / 6).
    ends = [figures["yes_no_correct"]["difference"][end] for end in ("low", "high")]
    assert ends == pytest.approx([1 / 6 - 1.96 * (29 / 216) ** 0.5, 1 / 6 + 1.96 * (29 / 216) ** 0.5], rel=1e-4)
    assert {figure["cases"] for of in figures.values() for figure in of.values()} <= {4}


def test_a_single_case_has_no_floor_and_only_a_share_an_interval():
    figures = build_report({}, answered([Case("moral", "?", "Be kind.", 3)], lambda case: "Be kind."))["tasks"]["moral"]
    assert figures["moral_correct"].keys() == {"model", "gold"}
    assert figures["moral_correct"]["model"]["low"] == pytest.approx(0.2065, abs=5e-5)  # 1 / (1 + 1.96²)
    assert figures["loss"]["model"] == {
        **{"value": 0.5, "cases": 1, "share": False},
        **{"standard_error": None, "low": None, "high": None},
    }


def test_gold_answers_from_disk_give_the_ceiling(cases, tmp_path):
    """Both ways: the model's column equals the gold one, and the gold one of a report on other answers."""
    write_answers(tmp_path / "answers.jsonl", answered(cases, lambda case: case.gold))
    report = build_report({}, read_answers(tmp_path / "answers.jsonl"))
    other = build_report({}, answered(cases, lambda case: CONSTANT))
    assert list(report["tasks"]) == list(TASK_NAMES)
    for task, metrics in report["tasks"].items():
        for name, figures in metrics.items():
            if name not in ("loss", "stopped"):
                assert figures["model"] == figures["gold"] == other["tasks"][task][name]["gold"]


@pytest.mark.parametrize("constant", [CONSTANT, "No.", ""])
def test_a_constant_answer_is_no_better_than_the_floor(cases, constant):
    """And the truth is, by far."""
    constant, truth = (
        build_report({}, answered(cases, say)) for say in (lambda case: constant, lambda case: case.gold)
    )
    compared = set()
    for task, metrics in constant["tasks"].items():
        for name, figures in metrics.items():
            if "shuffled" in figures:
                compared.add(name)
                model, floor = figures["model"], figures["shuffled"]
                assert abs(model["value"] - floor["value"]) <= 2 * floor["standard_error"], (task, name)
                truly = truth["tasks"][task][name]
                assert truly["gold"]["value"] - 2 * truly["gold"]["standard_error"] > truly["shuffled"]["value"]
    assert compared >= {"words_used", "character_correct", "yes_no_correct", "moral_correct", "rouge_l"}


def test_markdown_has_every_figure_and_says_what_it_is(cases):
    report = build_report({"data": "stories"}, answered(cases, lambda case: CONSTANT))
    text = markdown(report)
    assert "- data: stories" in text
    for task, metrics in report["tasks"].items():
        assert f"\n## {task}\n" in text
        for name, figures in metrics.items():
            sign = "[" if figures["model"]["share"] else "± "
            assert f"| {name} | {figures['model']['cases']} | {figures['model']['value']:.3f} {sign}" in text
            assert f"- **{name}**: " in text


def test_answers_survive_the_file(cases, tmp_path):
    rows = answered(cases, lambda case: 'a\n"\u2028ü', baseline=lambda case: "")
    write_answers(tmp_path / "answers.jsonl", rows)
    assert read_answers(tmp_path / "answers.jsonl") == rows


LINE = {
    "task": "chat",
    "question": "a",
    "gold": "b",
    "tokens": 2,
    "model": {"text": "c", "stopped": True, "nll": 1.5},
}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no answers"),
        ([LINE, "{"], ":2 is not an answer"),
        ([LINE, []], ":2 is not an answer"),
        ([{**LINE, "tokens": 0}], ":1 is not an answer of an evaluation: tokens must be 1 or more"),
        ([{**LINE, "tokens": True}], ":1 .* tokens must be int, not bool"),
        ([{**LINE, "gold": 3}], ":1 .* gold must be str"),
        ([{**LINE, "model": {"text": "c", "stopped": True}}], ":1 .*nll must be float, not NoneType"),
        ([{key: value for key, value in LINE.items() if key != "model"}], ":1 .*text must be str"),
        ([LINE, {**LINE, "baseline": LINE["model"]}], "some lines have a baseline"),
    ],
)
def test_a_damaged_file_is_one_line(lines, message, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        read_answers(path)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="can't read"):
        read_answers(tmp_path / "answers.jsonl")
