"""Story records → conversations: what the model is asked about a story, and what it should answer.

A task is a function from a record to its prompt and answer, or to None where the record doesn't allow it, and a line in
`_TASKS` or `_QUESTIONS`. No answer is the same for every story: that would teach a phrase and nothing about stories.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from tinysft_jax.data.characters import main_character
from tinysft_jax.data.dialogue import has_dialogue
from tinysft_jax.data.morals import find_moral
from tinysft_jax.data.records import StoryRecord

Task = Callable[[StoryRecord], tuple[str, str] | None]


@dataclass(frozen=True)
class Conversation:
    """What a record was made into.

    Attributes:
      task: one of `TASK_NAMES`.
      messages: a user's and an assistant's, each `{"role": ..., "content": ...}`.
    """

    task: str
    messages: list[dict[str, str]]


def _summary(record: StoryRecord) -> tuple[str, str] | None:
    if record.summary is None:
        return None
    return f"Please provide a brief summary of the following story: {record.story}", record.summary


def _moral(record: StoryRecord) -> tuple[str, str] | None:
    moral = find_moral(record.story) if "MoralValue" in (record.features or ()) else None
    if moral is None:
        return None
    return f"What is the moral lesson of this story? {record.story}", moral


def _words(record: StoryRecord) -> tuple[str, str] | None:
    if not record.words:
        return None
    return f"Write a short story that uses all of these words: {', '.join(record.words)}", record.story


def _main_character(record: StoryRecord) -> tuple[str, str] | None:
    character = main_character(record.story)
    if character is None:
        return None
    return f"Based on this story, who is the main character? {record.story}", f"The main character is {character}."


def _what_happened(record: StoryRecord) -> tuple[str, str] | None:
    if record.summary is None:
        return None
    return f"What happened in this story? {record.story}", record.summary


def _happy_ending(record: StoryRecord) -> tuple[str, str] | None:
    if record.features is None:
        return None
    happy = "BadEnding" not in record.features
    answer = "Yes, this story has a happy ending." if happy else "No, this story does not have a happy ending."
    return f"Does this story have a happy ending? {record.story}", answer


def _dialogue(record: StoryRecord) -> tuple[str, str] | None:
    talking = has_dialogue(record.story)
    if talking is None:
        return None
    answer = "Yes, there is dialogue in this story." if talking else "No, there is no dialogue in this story."
    return f"Is there any dialogue in this story? {record.story}", answer


# Every record that allows them gets these.
_TASKS: dict[str, Task] = {
    "summary": _summary,
    "moral": _moral,
    "words": _words,
}
# A record is asked one or two of these. Where all can be asked, the higher its rate, the more often one is drawn.
MAX_QUESTIONS = 2
_QUESTIONS: dict[str, tuple[Task, float]] = {
    "main_character": (_main_character, 0.9),
    "what_happened": (_what_happened, 0.4),
    "happy_ending": (_happy_ending, 0.5),
    "dialogue": (_dialogue, 0.5),
}

TASK_NAMES = (*_TASKS, *_QUESTIONS)


def make_tasks(record: StoryRecord, seed: int = 0) -> list[Conversation]:
    """Makes the conversations of one record, in the order of `TASK_NAMES`.

    They depend on the record and the seed alone, not on what was made before or in which process.
    """
    made = {name: task(record) for name, task in _TASKS.items()}
    ranks = {name: draw / _QUESTIONS[name][1] for name, draw in _draws(record, seed).items()}
    asked = 0
    for name in sorted(ranks, key=ranks.__getitem__):
        if asked == MAX_QUESTIONS or (asked and ranks[name] >= 1):
            break
        made[name] = _QUESTIONS[name][0](record)
        asked += made[name] is not None
    return [
        Conversation(name, [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}])
        for name in TASK_NAMES
        if (turn := made.get(name)) is not None
    ]


def _draws(record: StoryRecord, seed: int) -> dict[str, float]:
    """A number in [0, 1) for each question, drawn for this record; the same in every process and on every machine."""
    drawn_for = hashlib.blake2b(f"{seed}\n{record}".encode("utf-8", "surrogatepass"), digest_size=8)
    draws = {}
    for name in _QUESTIONS:
        digest = drawn_for.copy()
        digest.update(name.encode())
        draws[name] = int.from_bytes(digest.digest()) / 2**64
    return draws
