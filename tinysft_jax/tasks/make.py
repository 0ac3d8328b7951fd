"""Story records → conversations: what the model is asked about a story, and what it should answer.

A task about a story is its answer in `_ANSWERS`, its rate in `RATES`, and its wordings in `requests.py`. No answer may
be the same for every story: that would teach a phrase and nothing about stories.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tinysft_jax.tasks.answers import find_moral, has_dialogue, sentence_ends, sentences
from tinysft_jax.tasks.characters import main_character
from tinysft_jax.tasks.records import StoryRecord
from tinysft_jax.tasks.requests import Request, conditions_of, follow_up

Rates = Mapping[str, float | Mapping[str, float]]

# How often a record that allows a task gets it. A rate of its own for each answer balances yes and no: these are for
# the embedded corpus; `balanced_rates` finds those of other records, where most stories may end well.
RATES: Rates = {
    "summary": 0.6,
    "moral": 1.0,
    "words": 1.0,
    # Questions: a record gets one or two of them. If more are drawn, those with the smallest draw / rate stay; if none
    # is, the one with the smallest is asked.
    "main_character": 0.9,
    "what_happened": 0.4,
    "happy_ending": {"yes": 0.45, "no": 0.55},
    "dialogue": {"yes": 0.5, "no": 0.5},
    # What the data set itself was made for, with a part of the conditions.
    "story": 1.0,
}
# Their order gives the task ids of prepared data: new ones come last.
TASK_NAMES = (*RATES,)
QUESTIONS = ("main_character", "what_happened", "happy_ending", "dialogue")
MAX_QUESTIONS = 2
# Their answer is the story.
STORIES = ("words", "story")
# What follow-up requests ask about the story of a conversation, at the same rates.
ABOUT_A_STORY = ("summary", "moral", *QUESTIONS, "beginning")
# How often they ask for its first sentence, which no task does: a model that can find a sentence and repeat it has
# learned most of how to use one that a story is to contain.
BEGINNING_RATE = 0.5
# How often "story" names a condition that the record has; it always names one.
CONDITION_RATES = {"features": 0.9, "words": 0.5, "summary": 0.4, "random_sentence": 0.9}
# Tasks whose answer still holds when the story lacks its last sentences. A moral and an ending would be gone, whether
# people talk may be decided by the last line, and a story that is the answer is never cut.
TRIMMABLE_TASKS = frozenset(("summary", "what_happened", "main_character"))
# Half a story with the summary of the whole would teach to make things up.
MIN_KEPT = 0.5

_ENDINGS = {True: "Yes, this story has a happy ending.", False: "No, this story does not have a happy ending."}
_DIALOGUE = {True: "Yes, there is dialogue in this story.", False: "No, there is no dialogue in this story."}


@dataclass(frozen=True)
class Conversation:
    """A task made of a record."""

    task: str  # of TASK_NAMES; follow-up requests don't change it
    messages: list[dict[str, str]]  # a user's and an assistant's in turn, each {"role": ..., "content": ...}
    request: Request  # the first message, before it is worded

    def versions(self) -> Iterator[list[dict[str, str]]]:
        """Yields the messages, then ever shorter versions: with fewer turns, then with less of the prompt's story.

        Stories end with a sentence. Answers are never cut, nor is a story whose task needs its end.
        """
        for end in range(len(self.messages), 0, -2):
            yield self.messages[:end]
        if self.task not in TRIMMABLE_TASKS:
            return
        story = self.request.story
        for end in reversed([*sentence_ends(story)]):
            if end < MIN_KEPT * len(story):
                return
            yield _turn(replace(self.request, story=story[:end]).text(), self.messages[1]["content"])

    def to_json(self) -> dict[str, Any]:
        """What `prepare` writes of the first request; the answer is None where it is the story."""
        answer = None if self.task in STORIES else self.messages[1]["content"]
        return {"task": self.task, "conditions": self.request.conditions, "answer": answer}


def _main_character(record: StoryRecord) -> str | None:
    character = main_character(record.story)
    return None if character is None else f"The main character is {character}."


def _happy_ending(record: StoryRecord) -> str | None:
    return None if record.features is None else _ENDINGS["BadEnding" not in record.features]


# How to answer; None where the record does not allow the task, or the answer is unclear.
_ANSWERS: dict[str, Callable[[StoryRecord], str | None]] = {
    "summary": lambda record: record.summary,
    "moral": lambda record: find_moral(record.story) if "MoralValue" in (record.features or ()) else None,
    "words": lambda record: record.story if record.words else None,
    "main_character": _main_character,
    "what_happened": lambda record: record.summary,
    "happy_ending": _happy_ending,
    "dialogue": lambda record: _DIALOGUE.get(has_dialogue(record.story)),
    "story": lambda record: record.story if conditions_of(record) else None,
    "beginning": lambda record: next(sentences(record.story), None),
}


def make_tasks(
    record: StoryRecord, seed: int = 0, rates: Rates = RATES, follow_ups: bool = False, brief: bool = False
) -> list[Conversation]:
    """Makes the conversations of one record, in the order of `TASK_NAMES`; a pure function of the arguments.

    The record and the seed decide which tasks are made, at the given rates, and how they are worded. With `follow_ups`,
    more requests about the story follow in each conversation. A `brief` story is asked for as "a very short story".
    """
    # Python's own `hash` of a string differs from process to process.
    digest = hashlib.blake2b(f"{seed}\n{record}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    draws = random.Random(int.from_bytes(digest))
    chosen = {name: draws.random() for name in TASK_NAMES}
    wordings = {name: draws.random() for name in TASK_NAMES}
    answers = {name: answer for name, find in _ANSWERS.items() if (answer := find(record)) is not None}
    conversations = []
    for name in _choose_tasks(answers, chosen, rates):
        request = _request(name, record, wordings[name], draws, brief)
        conversations.append(Conversation(name, _turn(request.text(), answers[name]), request))
    if follow_ups:
        for conversation in conversations:
            conversation.messages.extend(_follow_ups(answers, rates, draws, conversation.messages[1]["content"]))
    return conversations


def _choose_tasks(answers: dict[str, str], chosen: dict[str, float], rates: Rates) -> list[str]:
    """The tasks that a record gets, of those that have an answer."""
    rate_of = {name: _rate(rates, name, answers[name]) for name in TASK_NAMES if name in answers}
    ranks = {name: chosen[name] / rate for name, rate in rate_of.items() if rate}
    questions = sorted((name for name in QUESTIONS if name in ranks), key=ranks.__getitem__)
    asked = [name for place, name in enumerate(questions) if place == 0 or (place < MAX_QUESTIONS and ranks[name] < 1)]
    return [name for name, rank in ranks.items() if name in asked or (rank < 1 and name not in QUESTIONS)]


def _rate(rates: Rates, name: str, answer: str) -> float:
    """How often a task is asked for; its answer may decide."""
    rate = BEGINNING_RATE if name == "beginning" else rates[name]
    return rate[_yes_or_no(answer)] if isinstance(rate, Mapping) else rate


def _yes_or_no(answer: str) -> str:
    """The key of an answer in a question's rates."""
    return answer.partition(",")[0].lower()


def _request(task: str, record: StoryRecord, wording: float, draws: random.Random, brief: bool) -> Request:
    if task not in STORIES:
        return Request(task, wording, record.story)
    conditions = {"words": [*record.words]} if task == "words" else _some_conditions(record, draws)
    return Request(task, wording, conditions=conditions, brief=brief)


def _some_conditions(record: StoryRecord, draws: random.Random) -> dict[str, Any]:
    """Some of the record's conditions, at least one, in random order."""
    known = conditions_of(record)
    ranks = {name: draws.random() / rate for name, rate in CONDITION_RATES.items() if name in known}
    first = min(ranks, key=ranks.__getitem__)
    order = {name: draws.random() for name in CONDITION_RATES}
    chosen = (name for name, rank in ranks.items() if rank < 1 or name == first)
    return {name: known[name] for name in sorted(chosen, key=order.__getitem__)}


def _follow_ups(answers: dict[str, str], rates: Rates, draws: random.Random, first: str) -> Iterator[dict[str, str]]:
    """Messages about the story of a conversation, in random order; no answer is repeated, nor the first one."""
    given = {first}
    known = [name for name in ABOUT_A_STORY if name in answers]
    for name in sorted(known, key=lambda _: draws.random()):
        chosen, wording = draws.random(), draws.random()
        if chosen < _rate(rates, name, answers[name]) and answers[name] not in given:
            given.add(answers[name])
            yield from _turn(follow_up(name, wording), answers[name])


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def balanced_rates(records: Iterable[StoryRecord]) -> Rates:
    """Rates for records like these, some thousands: the more frequent of two answers is asked for less often.

    A question as a whole is asked as often as in `RATES`, as far as there are enough records of the rarer answer; not
    at all where all records have the same one.
    """
    rates = dict(RATES)
    counts = {name: Counter(dict.fromkeys(rate, 0)) for name, rate in RATES.items() if isinstance(rate, Mapping)}
    for record in records:
        for name, count in counts.items():
            if (answer := _ANSWERS[name](record)) is not None:
                count[_yes_or_no(answer)] += 1
    for name, count in counts.items():
        rate = sum(RATES[name].values()) / len(count)
        each = min(rate * count.total() / len(count), min(count.values()))  # records to ask, of each answer
        rates[name] = {answer: each / n if n else 0.0 for answer, n in count.items()}
    return rates
