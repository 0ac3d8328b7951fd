"""Story records → conversations: what the model is asked about a story, and what it should answer.

A task is a function from a record to its answer, or to None where the record doesn't allow it; its prompts, in
`phrasings.py`; and its rates in `RATES`. No answer is the same for every story: that would teach a phrase and nothing
about stories.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from tinysft_jax.tasks.answers import find_moral, has_dialogue, sentence_ends, sentences
from tinysft_jax.tasks.characters import main_character
from tinysft_jax.tasks.records import StoryRecord
from tinysft_jax.tasks.requests import CONDITIONS, StoryRequest, conditions_of, follow_up, phrase, very_short

Rates = Mapping[str, float | Mapping[str, float]]

# How often a record that allows a task gets it. A rate of its own for each answer balances yes and no: these are for
# the embedded corpus; `balance.py` finds those of other records, where most stories may end well.
RATES: Rates = {
    "summary": 0.6,
    "moral": 1.0,
    "words": 1.0,
    # Questions: a record gets one or two of them. Where more are drawn, those with the smallest draw / rate stay;
    # where none is, the one with the smallest comes all the same.
    "main_character": 0.9,
    "what_happened": 0.4,
    "happy_ending": {"yes": 0.45, "no": 0.55},
    "dialogue": {"yes": 0.5, "no": 0.5},
    # What the data set itself was made for, with a part of the conditions.
    "story": 1.0,
}
QUESTIONS = ("main_character", "what_happened", "happy_ending", "dialogue")
MAX_QUESTIONS = 2
# Their answer is the story.
STORIES = ("words", "story")
# What may be asked about the story of a conversation that goes on, at the same rates.
ABOUT_A_STORY = ("summary", "moral", *QUESTIONS, "beginning")
# How often for its first sentence, which nothing else asks for: a model that can find a sentence and say it again has
# learned most of how to use one that a story is to contain.
BEGINNING_RATE = 0.5
# How often "story" names a condition that the record has; where none is drawn, it names one.
CONDITION_RATES = {"features": 0.9, "words": 0.5, "summary": 0.4, "random_sentence": 0.9}

# Their order gives the task ids of prepared data: new ones come last.
TASK_NAMES = (*RATES,)


@dataclass(frozen=True)
class Conversation:
    """What a record was made into.

    Attributes:
      task: one of `TASK_NAMES`; that of the first request, if others follow.
      messages: a user's and an assistant's in turn, each `{"role": ..., "content": ...}`.
    """

    task: str
    messages: list[dict[str, str]]


def _summary(record: StoryRecord) -> str | None:
    return record.summary


def _moral(record: StoryRecord) -> str | None:
    return find_moral(record.story) if "MoralValue" in (record.features or ()) else None


def _words(record: StoryRecord) -> str | None:
    return record.story if record.words else None


def _main_character(record: StoryRecord) -> str | None:
    character = main_character(record.story)
    return None if character is None else f"The main character is {character}."


def _happy_ending(record: StoryRecord) -> str | None:
    if record.features is None:
        return None
    if "BadEnding" in record.features:
        return "No, this story does not have a happy ending."
    return "Yes, this story has a happy ending."


def _dialogue(record: StoryRecord) -> str | None:
    talking = has_dialogue(record.story)
    if talking is None:
        return None
    return "Yes, there is dialogue in this story." if talking else "No, there is no dialogue in this story."


def _beginning(record: StoryRecord) -> str | None:
    return next(sentences(record.story), None)


def _story(record: StoryRecord) -> str | None:
    return record.story if any(conditions_of(record)) else None


_ANSWERS: dict[str, Callable[[StoryRecord], str | None]] = {
    "summary": _summary,
    "moral": _moral,
    "words": _words,
    "main_character": _main_character,
    "what_happened": _summary,
    "happy_ending": _happy_ending,
    "dialogue": _dialogue,
    "story": _story,
    "beginning": _beginning,
}


def make_tasks(
    record: StoryRecord, seed: int = 0, rates: Rates = RATES, follow_ups: bool = False, brief: bool = False
) -> list[Conversation]:
    """Makes the conversations of one record, in the order of `TASK_NAMES`.

    They depend on the arguments alone, not on what was made before or in which process.

    Args:
      record: the story.
      seed: decides, with the record, which tasks are made and how they are worded.
      rates: how often each is made; see `RATES`.
      follow_ups: whether each conversation goes on with requests about its story.
      brief: whether the story is one to be asked for as "a very short story".
    """
    draws = _draws(record, seed)
    chosen = {name: draws.random() for name in TASK_NAMES}
    wordings = {name: draws.random() for name in TASK_NAMES}
    answers = _answers(record, chosen, rates)
    conversations = []
    for name in TASK_NAMES:
        if name in answers:
            prompt = _prompt(name, record, wordings[name], draws, brief)
            turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answers[name]})
            conversations.append(Conversation(name, list(turns)))
    if follow_ups:
        found = {name: answers.get(name) or find_answer(name, record) for name in ABOUT_A_STORY}
        known = {name: answer for name, answer in found.items() if answer is not None}
        for conversation in conversations:
            said = {conversation.messages[1]["content"]}
            conversation.messages.extend(_follow_ups(known, {**rates, "beginning": BEGINNING_RATE}, draws, said))
    return conversations


def answer_key(answer: str) -> str:
    """What stands for an answer in the table of rates: "yes" or "no"."""
    return answer.partition(",")[0].lower()


def find_answer(task: str, record: StoryRecord) -> str | None:
    """The answer that the task has for this record; None where the record doesn't allow it."""
    return _ANSWERS[task](record)


def _answers(record: StoryRecord, chosen: dict[str, float], rates: Rates) -> dict[str, str]:
    """The tasks that the record gets, with their answers."""
    answers = {
        name: answer
        for name in TASK_NAMES
        if name not in QUESTIONS and chosen[name] < rates[name] and (answer := find_answer(name, record)) is not None
    }
    return answers | _asked(record, chosen, rates)


def _asked(record: StoryRecord, chosen: dict[str, float], rates: Rates) -> dict[str, str]:
    """The questions that the record gets, with their answers."""
    answers: dict[str, str | None] = {}
    ranks = {}
    for name in QUESTIONS:
        if isinstance(rates[name], Mapping):
            answers[name] = find_answer(name, record)
        if rate := _rate(rates, name, answers.get(name)):
            ranks[name] = chosen[name] / rate
    asked: dict[str, str] = {}
    for name in sorted(ranks, key=ranks.__getitem__):
        if len(asked) == MAX_QUESTIONS or (asked and ranks[name] >= 1):
            break
        # To find a main character takes time, so it's looked for only where it's asked for.
        answer = answers[name] if name in answers else find_answer(name, record)
        if answer is not None:
            asked[name] = answer
    return asked


def _rate(rates: Rates, name: str, answer: str | None) -> float:
    """How often a task is asked for, where its answer may decide."""
    rate = rates[name]
    if isinstance(rate, Mapping):
        return 0.0 if answer is None else rate[answer_key(answer)]
    return rate


def _follow_ups(known: dict[str, str], rates: Rates, draws: random.Random, said: set[str]) -> Iterator[dict[str, str]]:
    """Turns about the story of a conversation, in an order that is drawn; what was said is not asked for again."""
    for name, answer in sorted(known.items(), key=lambda _: draws.random()):
        chosen, wording = draws.random(), draws.random()
        if chosen < _rate(rates, name, answer) and answer not in said:
            said.add(answer)
            yield {"role": "user", "content": follow_up(name, wording)}
            yield {"role": "assistant", "content": answer}


def _prompt(task: str, record: StoryRecord, wording: float, draws: random.Random, brief: bool) -> str:
    if task == "story":
        prompt = _story_request(record, draws).prompt(wording, {name: draws.random() for name in CONDITIONS})
    else:
        prompt = phrase(task, ", ".join(record.words) if task == "words" else record.story, wording)
    return very_short(prompt) if brief and task in STORIES else prompt


def _story_request(record: StoryRecord, draws: random.Random) -> StoryRequest:
    """Some of the record's conditions, at least one."""
    known = conditions_of(record)._asdict()
    ranks = {name: draws.random() / rate for name, rate in CONDITION_RATES.items() if known[name]}
    first = min(ranks, key=ranks.__getitem__)
    return StoryRequest(**{name: known[name] for name, rank in ranks.items() if rank < 1 or name == first})


def _draws(record: StoryRecord, seed: int) -> random.Random:
    """Numbers in [0, 1) drawn for this record: the same in every process and on every machine."""
    digest = hashlib.blake2b(f"{seed}\n{record}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return random.Random(int.from_bytes(digest))


def balanced_rates(records: Iterable[StoryRecord], rates: Rates = RATES) -> Rates:
    """Rates for records like these: an answer that is more frequent than the others is asked for less often.

    The question as a whole is asked as often as before, as far as there are enough of the rarest answer. Where the
    answer is the same for all of the records, it's not asked at all.

    Args:
      records: a sample, some thousands; read to its end.
      rates: what to start from.
    """
    balanced = {name: rate for name, rate in rates.items() if isinstance(rate, Mapping)}
    counts = {name: Counter(dict.fromkeys(rate, 0)) for name, rate in balanced.items()}
    for record in records:
        for name, count in counts.items():
            if (answer := find_answer(name, record)) is not None:
                count[answer_key(answer)] += 1
    for name, count in counts.items():
        rate = sum(balanced[name].values()) / len(count)
        each = min(rate * count.total() / len(count), min(count.values()))  # records to ask, of each answer
        balanced[name] = {answer: each / n if n else 0.0 for answer, n in count.items()}
    return {**rates, **balanced}


# What these ask for is still there when a story lacks its last sentences. A moral and an ending are not, whether
# people talk may be decided by the last line, and a story that is the answer is never cut.
TRIMMABLE_TASKS = frozenset(("summary", "what_happened", "main_character"))
# Half a story and the summary of the whole would teach to make things up.
MIN_KEPT = 0.5


def shortened(conversation: Conversation, story: str) -> Iterator[list[dict[str, str]]]:
    """Yields the conversation's messages with ever fewer of the last turns, then of the last sentences of the story.

    The question, before the story or after it, and the answer stay as they are. No sentence goes where the task can't
    spare the end of its story, nor once too much of it would be gone.
    """
    for end in range(len(conversation.messages) - 2, 0, -2):
        yield conversation.messages[:end]
    question, answer, *_ = conversation.messages
    before, found, after = question["content"].partition(story)
    if conversation.task not in TRIMMABLE_TASKS or not found:
        return
    for end in reversed([*sentence_ends(story)]):
        if end < MIN_KEPT * len(story):
            return
        yield [{**question, "content": before + story[:end] + after}, answer]
