"""What is asked about a story, and what should be answered."""

import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from tinysft_jax.corpus.stories import embedded_stories
from tinysft_jax.tasks.make import ABOUT_A_STORY, MAX_QUESTIONS, QUESTIONS, RATES, STORIES, TASK_NAMES, make_tasks
from tinysft_jax.tasks.records import StoryRecord, parse_records
from tinysft_jax.tasks.requests import FOLLOW_UPS, STORY_PHRASINGS

STORY = 'Sara had a red kite. One day Sara lost it. "Oh no!" said Sara.\nSara learned that kites need a long string.'
RECORD = StoryRecord(
    features=("Dialogue", "MoralValue"),
    words=("kite", "lost", "string"),
    summary="Sara loses her kite.",
    random_sentence=None,
    story=STORY,
)


def answers(record: StoryRecord, seeds: range = range(40)) -> dict[str, set[tuple[str, str]]]:
    """All (prompt, answer) of each task that some seed leads to."""
    found = {}
    for seed in seeds:
        for conversation in make_tasks(record, seed):
            user, assistant = conversation.messages
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            found.setdefault(conversation.task, set()).add((user["content"], assistant["content"]))
    return found


def changed(**fields) -> StoryRecord:
    return dataclasses.replace(RECORD, **fields)


def test_the_order_of_the_tasks():
    """Prepared data refers to tasks by their place, so it stays."""
    assert TASK_NAMES == (
        "summary",
        "moral",
        "words",
        "main_character",
        "what_happened",
        "happy_ending",
        "dialogue",
        "story",
    )


# The specification's prompts, word for word, and the answer, which is the same for every wording.
CANONICAL = {
    "summary": (f"Please provide a brief summary of the following story: {STORY}", "Sara loses her kite."),
    "moral": (f"What is the moral lesson of this story? {STORY}", "Sara learned that kites need a long string."),
    "words": ("Write a short story that uses all of these words: kite, lost, string", STORY),
    "main_character": (f"Based on this story, who is the main character? {STORY}", "The main character is Sara."),
    "what_happened": (f"What happened in this story? {STORY}", "Sara loses her kite."),
    "happy_ending": (f"Does this story have a happy ending? {STORY}", "Yes, this story has a happy ending."),
    "dialogue": (f"Is there any dialogue in this story? {STORY}", "Yes, there is dialogue in this story."),
}


@pytest.fixture(scope="module")
def found():
    """All that the record is made into with many seeds."""
    return answers(RECORD, range(400))


def test_the_canonical_prompts_and_their_answers(found):
    assert all(turn in found[task] for task, turn in CANONICAL.items())


def test_other_wordings_have_the_same_answer(found):
    for task, (_, answer) in CANONICAL.items():
        assert {said for _, said in found[task]} == {answer}
        assert len({prompt for prompt, _ in found[task]}) == 4
        if task != "words":
            assert all(STORY in prompt for prompt, _ in found[task])


def test_very_short_stories_are_asked_for_as_such():
    """Only where a story is the answer, which is not changed."""
    for seed in range(60):
        for usual, brief in zip(make_tasks(RECORD, seed), make_tasks(RECORD, seed, brief=True), strict=True):
            assert brief.request == dataclasses.replace(usual.request, brief=usual.task in STORIES)
            assert brief.messages[0]["content"] == brief.request.text() and brief.messages[1:] == usual.messages[1:]


def test_a_story_is_asked_for_from_any_subset_of_what_the_record_has():
    made = [c for seed in range(400) for c in make_tasks(RECORD, seed)]
    assert all(c.request.conditions == {"words": [*RECORD.words]} for c in made if c.task == "words")
    assert all(c.request.conditions == {} for c in made if c.task not in STORIES)
    known = {"features": [*RECORD.features], "words": [*RECORD.words], "summary": RECORD.summary}
    asked = [c for c in made if c.task == "story"]
    assert all(c.messages[1]["content"] == STORY and c.request.conditions.items() <= known.items() for c in asked)
    # Each of the three conditions or not, but never none of them, in any order.
    assert len({frozenset(c.request.conditions) for c in asked} - {frozenset()}) == 7
    assert len({tuple(c.request.conditions) for c in asked if len(c.request.conditions) == 3}) == 6
    openings = {c.messages[0]["content"].split("\n")[0] for c in asked}
    assert len(openings) == len(STORY_PHRASINGS) and "Write a short story." in openings


@pytest.mark.parametrize(
    ("record", "missing"),
    [
        (changed(summary=None), {"summary", "what_happened"}),
        (changed(words=()), {"words"}),
        (
            changed(words=(), summary=None, features=None),
            {"words", "summary", "what_happened", "moral", "happy_ending"} | {"story"},
        ),
        (changed(features=None), {"moral", "happy_ending"}),
        (changed(features=("Dialogue",)), {"moral"}),
        (changed(story="Sara ran. She saw Tom. She said hello, Tom said hello."), {"moral", "main_character"}),
    ],
)
def test_what_a_record_cannot_answer_is_not_asked(record, missing):
    assert set(TASK_NAMES) - set(answers(record)) == missing


def test_both_endings_and_both_kinds_of_story_occur():
    sad_and_silent = changed(features=("BadEnding",), story="Sara lost her kite. Sara looked for it, but it was gone.")
    found = answers(sad_and_silent)
    assert {answer for _, answer in found["happy_ending"]} == {"No, this story does not have a happy ending."}
    assert {answer for _, answer in found["dialogue"]} == {"No, there is no dialogue in this story."}


def test_the_order_is_that_of_the_task_names():
    for seed in range(10):
        tasks = [conversation.task for conversation in make_tasks(RECORD, seed)]
        assert tasks == sorted(tasks, key=TASK_NAMES.index)


def test_each_story_has_one_or_two_questions():
    """Also where little can be asked, as long as there is something."""
    barely = StoryRecord(features=None, words=(), summary=None, random_sentence=None, story="It rained.")
    for seed in range(40):
        asked = [conversation.task for conversation in make_tasks(RECORD, seed) if conversation.task in QUESTIONS]
        assert 1 <= len(asked) <= MAX_QUESTIONS
        assert [conversation.task for conversation in make_tasks(barely, seed)] == ["dialogue"]


def test_seeds_and_records_decide_what_is_asked(records):
    with (records / "samples.txt").open(encoding="utf-8") as file:
        parsed = list(parse_records(file))
    asked = [[tuple(c.task for c in make_tasks(record, seed)) for record in parsed] for seed in range(10)]
    assert asked[0] == [tuple(c.task for c in make_tasks(record)) for record in parsed]
    assert len({tuple(tasks) for tasks in asked}) > 5
    same_fields = [changed(summary=f"Sara loses {number} kites.") for number in range(20)]
    assert len({tuple(c.task for c in make_tasks(record)) for record in same_fields}) > 2


def test_another_process_asks_the_same():
    """Python's own hash of a string differs from process to process."""
    program = (
        "from tinysft_jax.tasks.records import StoryRecord\nfrom tinysft_jax.tasks.make import make_tasks\n"
        f"print([make_tasks({RECORD!r}, seed) for seed in range(20)])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == str([make_tasks(RECORD, seed) for seed in range(20)])


def test_rates_decide_what_is_made():
    never = {name: {"yes": 0.0, "no": 1.0} if isinstance(rate, dict) else 0.0 for name, rate in RATES.items()}
    assert make_tasks(RECORD, rates=never) == []
    sad = changed(features=("BadEnding",))
    assert [c.task for c in make_tasks(sad, rates=never)] == ["happy_ending"]
    always = {name: {"yes": 1.0, "no": 1.0} if isinstance(rate, dict) else 1.0 for name, rate in RATES.items()}
    made = [c.task for c in make_tasks(RECORD, rates=always)]
    assert len(made) == 4 + MAX_QUESTIONS and {"summary", "moral", "words", "story"} < set(made)


def test_a_story_is_talked_about():
    """The beginnings of the conversations are the same with follow-ups and without."""
    asked, lengths = Counter(), Counter()
    truth = {name: {answer for _, answer in found} for name, found in answers(RECORD).items()}
    truth["beginning"] = {STORY[: STORY.index(".") + 1]}
    for seed in range(60):
        plain, longer = make_tasks(RECORD, seed), make_tasks(RECORD, seed, follow_ups=True)
        for before, after in zip(plain, longer, strict=True):
            assert after.task == before.task and after.messages[:2] == before.messages
            assert [message["role"] for message in after.messages] == ["user", "assistant"] * (len(after.messages) // 2)
            texts = [message["content"] for message in after.messages]
            for question, answer in zip(texts[2::2], texts[3::2], strict=True):
                task = next(name for name, wordings in FOLLOW_UPS.items() if question in wordings)
                assert answer in truth[task]
                asked[task] += 1
            assert len(set(texts)) == len(texts)  # so no answer comes twice, nor the first one again
            lengths[len(texts)] += 1
    assert set(asked) == set(ABOUT_A_STORY) and len(lengths) > 3


def test_follow_ups_leave_yes_and_no_balanced(records):
    told = Counter()
    for story in embedded_stories(600):
        for conversation in make_tasks(story.record, follow_ups=True):
            told.update(message["content"].partition(",")[0] for message in conversation.messages[3::2])
    assert 0.4 < told["Yes"] / (told["Yes"] + told["No"]) < 0.6


@pytest.fixture(scope="module")
def embedded():
    """Stories whose truth is known, each with its prompts and answers by task."""
    return [
        (story, {c.task: [message["content"] for message in c.messages] for c in make_tasks(story.record)})
        for story in embedded_stories(1000)
    ]


def share(found) -> float:
    found = list(found)
    return sum(found) / len(found)


def test_rates(embedded):
    asked = Counter(task for _, tasks in embedded for task in tasks)
    assert asked["main_character"] >= 0.6 * len(embedded)
    assert all(asked[question] >= 0.2 * len(embedded) for question in QUESTIONS)
    assert asked["story"] == len(embedded)
    assert asked["words"] == sum(bool(story.record.words) for story, _ in embedded)
    assert 0.5 < asked["summary"] / sum(story.record.summary is not None for story, _ in embedded) < 0.7


def test_answers_are_true(embedded):
    """The answers about the embedded corpus agree with what its author knows."""
    right = {"main_character": [], "happy_ending": [], "dialogue": []}
    for story, tasks in embedded:
        truth = {
            "main_character": f"The main character is {story.main_character}.",
            "happy_ending": "Yes, " if story.happy_ending else "No, ",
            "dialogue": "Yes, " if story.dialogue else "No, ",
        }
        for task in truth.keys() & tasks.keys():
            right[task].append(tasks[task][1].lower().startswith(truth[task].lower()))
    assert share(right["main_character"]) >= 0.98
    assert share(right["happy_ending"]) >= 0.99
    assert share(right["dialogue"]) >= 0.99


def test_the_first_capitalised_word_rarely_answers_who_it_is_about(embedded):
    asked = [story for story, tasks in embedded if "main_character" in tasks]
    first = [re.search(r"[A-Z]\w*", story.record.story)[0] for story in asked]
    # "The" is a part of "The little duck", but no answer.
    named = [story.main_character.removeprefix("the ").title().split() for story in asked]
    assert share(word in name for word, name in zip(first, named, strict=True)) < 0.6


@pytest.mark.parametrize("question", ["happy_ending", "dialogue"])
def test_no_constant_answer_is_often_right(embedded, question):
    """Nor one that is the same for each wording."""
    said = [
        (prompt, answer.split(",")[0])
        for _, tasks in embedded
        if question in tasks
        for prompt, answer in [tasks[question]]
    ]
    assert {answer for _, answer in said} == {"Yes", "No"}
    assert 0.4 <= share(answer == "Yes" for _, answer in said) <= 0.6
    canonical = CANONICAL[question][0].removesuffix(STORY)
    assert 0.35 <= share(answer == "Yes" for prompt, answer in said if prompt.startswith(canonical)) <= 0.65


def test_wordings_come_as_often_as_they_should(embedded):
    canonical = [tasks["summary"][0].startswith("Please provide") for _, tasks in embedded if "summary" in tasks]
    assert 0.35 < share(canonical) < 0.45


def test_what_a_story_is_written_from_holds_for_it():
    """So it can be learned to keep to the request."""
    for story in embedded_stories(300):
        for conditions in (c.request.conditions for c in make_tasks(story.record) if c.task == "story"):
            assert conditions
            assert set(conditions.get("features", ())) <= set(story.record.features or ())
            assert conditions.get("random_sentence", "") in " ".join(story.record.story.split())
            assert conditions.get("words", [*story.record.words]) == [*story.record.words]
