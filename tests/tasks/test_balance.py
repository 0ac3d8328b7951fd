"""Rates that balance yes and no on records where one of them is rare."""

import dataclasses
from collections import Counter

import pytest

from tinysft_jax.corpus.stories import embedded_stories, record_text
from tinysft_jax.data.sources import open_embedded, open_input, rates_for
from tinysft_jax.tasks.make import RATES, balanced_rates, make_tasks
from tinysft_jax.tasks.records import StoryRecord

EMBEDDED = [story.record for story in embedded_stories(2000)]


def mostly(records: list[StoryRecord], happy: int) -> list[StoryRecord]:
    """Records of which there is one with a bad ending to so many with a happy one."""
    good = [record for record in records if "BadEnding" not in (record.features or ())]
    bad = [record for record in records if "BadEnding" in (record.features or ())]
    return good + bad[: len(good) // happy]


def shares_of_yes(records: list[StoryRecord], rates) -> tuple[dict[str, float], dict[str, float]]:
    """For each yes/no question, the share of yes, and how many of the records are asked it."""
    yes, asked = Counter(), Counter()
    for record in records:
        for conversation in make_tasks(record, rates=rates):
            answer = conversation.messages[1]["content"]
            if conversation.task in ("happy_ending", "dialogue"):
                asked[conversation.task] += 1
                yes[conversation.task] += answer.startswith("Yes,")
    return {task: yes[task] / asked[task] for task in asked}, {task: asked[task] / len(records) for task in asked}


@pytest.mark.parametrize("happy", [4, 9])
def test_both_answers_come_about_equally_often_however_most_stories_end(happy):
    records = mostly(EMBEDDED, happy)
    yes, asked = shares_of_yes(records, balanced_rates(records))
    assert all(0.4 < share < 0.6 for share in yes.values()), yes
    assert asked["happy_ending"] > 0.12 and asked["dialogue"] > 0.25


def test_without_it_they_do_not():
    yes, _ = shares_of_yes(mostly(EMBEDDED, 9), RATES)
    assert yes["happy_ending"] > 0.8


def test_the_rates_of_the_table_are_those_of_the_embedded_corpus():
    found = balanced_rates(EMBEDDED)
    for question in ("happy_ending", "dialogue"):
        assert found[question] == pytest.approx(RATES[question], abs=0.06)
    assert {name: found[name] for name in found if name not in ("happy_ending", "dialogue")} == {
        name: rate for name, rate in RATES.items() if name not in ("happy_ending", "dialogue")
    }


def test_a_question_with_one_answer_is_not_asked():
    happy = [dataclasses.replace(record, features=("Twist",)) for record in EMBEDDED[:50]]
    rates = balanced_rates(happy)
    assert set(rates["happy_ending"].values()) == {0.0}
    assert not any(c.task == "happy_ending" for record in happy for c in make_tasks(record, rates=rates))


def test_a_file_is_judged_by_its_records_and_read_from_its_beginning_afterwards(tmp_path):
    records = mostly(EMBEDDED, 9)[-100:]
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>\n".join(map(record_text, records)), encoding="utf-8")
    source = open_input(path, "auto", 0.1, None)
    assert rates_for(source) == balanced_rates(records) != RATES
    assert source.position == 0 and len(list(source)) == 100
    assert rates_for(open_embedded(5, "auto", 0)) == RATES
    assert rates_for(open_input(path, "text", 0.1, None)) == RATES
