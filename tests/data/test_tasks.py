"""What is asked about a story, and what should be answered."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tinysft_jax.data.records import StoryRecord, parse_records
from tinysft_jax.data.stories import embedded_stories
from tinysft_jax.data.tasks import MAX_QUESTIONS, TASK_NAMES, make_tasks

QUESTIONS = ("main_character", "what_happened", "happy_ending", "dialogue")

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
    return StoryRecord(**{**RECORD.__dict__, **fields})


def test_prompts_and_answers():
    """The specification's prompts, word for word; each task has one prompt and answer, whatever the seed."""
    assert answers(RECORD) == {
        "summary": {(f"Please provide a brief summary of the following story: {STORY}", "Sara loses her kite.")},
        "moral": {(f"What is the moral lesson of this story? {STORY}", "Sara learned that kites need a long string.")},
        "words": {("Write a short story that uses all of these words: kite, lost, string", STORY)},
        "main_character": {
            (f"Based on this story, who is the main character? {STORY}", "The main character is Sara."),
        },
        "what_happened": {(f"What happened in this story? {STORY}", "Sara loses her kite.")},
        "happy_ending": {(f"Does this story have a happy ending? {STORY}", "Yes, this story has a happy ending.")},
        "dialogue": {(f"Is there any dialogue in this story? {STORY}", "Yes, there is dialogue in this story.")},
    }


@pytest.mark.parametrize(
    ("record", "missing"),
    [
        (changed(summary=None), {"summary", "what_happened"}),
        (changed(words=()), {"words"}),
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
        "from tinysft_jax.data.records import StoryRecord\nfrom tinysft_jax.data.tasks import make_tasks\n"
        f"print([make_tasks({RECORD!r}, seed) for seed in range(20)])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == str([make_tasks(RECORD, seed) for seed in range(20)])


@pytest.fixture(scope="module")
def embedded():
    """Stories whose truth is known, each with its answers by task."""
    return [
        (story, {c.task: c.messages[1]["content"] for c in make_tasks(story.record)}) for story in embedded_stories(500)
    ]


def test_rates(embedded):
    asked = Counter(task for _, tasks in embedded for task in tasks if task in QUESTIONS)
    assert asked["main_character"] >= 0.6 * len(embedded)
    assert all(asked[question] >= 0.2 * len(embedded) for question in QUESTIONS)


def test_answers_are_true(embedded):
    """The answers about the embedded corpus agree with what its author knows."""
    right, asked = Counter(), Counter()
    for story, tasks in embedded:
        truth = {
            "main_character": f"The main character is {story.main_character}.",
            "happy_ending": "Yes, " if story.happy_ending else "No, ",
            "dialogue": "Yes, " if story.dialogue else "No, ",
        }
        for task in truth.keys() & tasks.keys():
            asked[task] += 1
            right[task] += tasks[task].lower().startswith(truth[task].lower())
    assert right["main_character"] >= 0.98 * asked["main_character"]
    assert right["happy_ending"] >= 0.99 * asked["happy_ending"]
    assert right["dialogue"] >= 0.99 * asked["dialogue"]


@pytest.mark.parametrize("question", ["happy_ending", "dialogue"])
def test_no_constant_answer_is_often_right(embedded, question):
    said = Counter(tasks[question].split(",")[0] for _, tasks in embedded if question in tasks)
    assert set(said) == {"Yes", "No"}
    assert 0.4 <= said["Yes"] / said.total() <= 0.6
