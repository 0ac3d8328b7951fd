"""What an answer is worth: pure functions of a case and an answer's text.

Each gives a number from 0 to 1, or None where it doesn't apply. Answers are compared word by word; case and
punctuation don't count. Some metrics need a library of the extra "eval", and raise UserError without it.
"""

import functools
import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tinysft_jax.console import UserError
from tinysft_jax.evaluation.cases import Case
from tinysft_jax.tasks.answers import find_moral, has_dialogue
from tinysft_jax.tasks.make import STORIES
from tinysft_jax.tasks.requests import StoryRequest, parse_request

Metric = Callable[[Case, str], float | None]

# What may stand around the character's name: "The main character is Lily." and "It is about Lily." are one answer.
_AROUND_A_NAME = frozenset(re.findall(r"\w+", "the main character of this story is a; it was about an"))
# Words of a run that counts as repeated when it occurs again.
REPEATED_RUN = 4


def words_used(case: Case, answer: str) -> float | None:
    """The share of the requested words that the answer uses in that form."""
    said = words_of(answer)
    return _share([_contains(said, words_of(word)) for word in _request(case).words])


def words_used_inflected(case: Case, answer: str) -> float | None:
    """The share of the requested words that the answer uses in any form: jump, jumps, jumped, jumping."""
    said = lemmas_of(answer)
    return _share([_contains(said, lemmas_of(word)) for word in _request(case).words])


def all_words_used(case: Case, answer: str) -> float | None:
    """Whether the answer uses all requested words, in any form."""
    share = words_used_inflected(case, answer)
    return None if share is None else float(share == 1)


def dialogue_honoured(case: Case, answer: str) -> float | None:
    """Whether somebody clearly speaks, where dialogue was asked for."""
    return float(has_dialogue(answer) is True) if "Dialogue" in _request(case).features else None


def moral_honoured(case: Case, answer: str) -> float | None:
    """Whether a sentence says what there is to learn, where a moral was asked for."""
    return float(find_moral(answer) is not None) if "MoralValue" in _request(case).features else None


def sentence_included(case: Case, answer: str) -> float | None:
    """Whether the answer contains the requested sentence."""
    sentence = _request(case).random_sentence
    return None if sentence is None else float(_contains(words_of(answer), words_of(sentence)))


def character_correct(case: Case, answer: str) -> float | None:
    """Whether the answer names the gold answer's main character and nobody else."""
    return float(_name(answer) == _name(case.gold)) if case.task == "main_character" else None


def yes_no_correct(case: Case, answer: str) -> float | None:
    """Whether the answer begins with the gold answer's yes or no."""
    return float(words_of(answer)[:1] == words_of(case.gold)[:1]) if case.task in ("happy_ending", "dialogue") else None


def moral_correct(case: Case, answer: str) -> float | None:
    """Whether the answer is the gold answer's sentence, word by word."""
    return float(words_of(answer) == words_of(case.gold)) if case.task == "moral" else None


def rouge_l(case: Case, answer: str) -> float | None:
    """ROUGE-L (F1, with Porter's stemmer) against the gold answer, of summaries, morals and chats.

    Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, https://aclanthology.org/W04-1013.
    """
    if case.task not in ("summary", "what_happened", "moral", "chat"):
        return None
    return float(_rouge().score(case.gold, answer)["rougeL"].fmeasure)


def repetition(answer: str) -> float:
    """The share of the answer's runs of four words that occurred in it before; 0 where it is shorter."""
    runs = _runs(words_of(answer), REPEATED_RUN)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


# They need the case: the answer to another one scores lower.
CORRECTNESS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (
        words_used,
        words_used_inflected,
        all_words_used,
        dialogue_honoured,
        moral_honoured,
        sentence_included,
        character_correct,
        yes_no_correct,
        moral_correct,
        rouge_l,
    )
}


def distinct_2(answers: Sequence[str]) -> list[float | None]:
    """How new the answer's pairs of neighbouring words are: one that occurs k times in all answers counts 1/k.

    Weighted by length, the mean over the answers is the distinct-2 of Li et al., 2016,
    https://arxiv.org/abs/1510.03055: different pairs over all pairs. It falls where answers are alike.

    Args:
      answers: all of a task.

    Returns:
      A number from 0 to 1 for each answer; None where it has no two words.
    """
    pairs = [_runs(words_of(answer), 2) for answer in answers]
    counts = Counter(pair for of in pairs for pair in of)
    return [sum(1 / counts[pair] for pair in of) / len(of) if of else None for of in pairs]


def words_of(text: str) -> list[str]:
    """The text's words in lower case; an apostrophe or a hyphen parts them."""
    return re.findall(r"[^\W_]+", text.lower())


def lemmas_of(text: str) -> list[str]:
    """The text's words, each in the form in which a dictionary lists it."""
    return [_lemma(word) for word in words_of(text)]


def require_libraries() -> None:
    """Raises: UserError, if a library is missing that some metric needs."""
    _lemma("word"), _rouge()


@functools.cache
def _lemma(word: str) -> str:
    return _extra("simplemma").lemmatize(word, lang="en").lower()


@functools.cache
def _rouge() -> Any:
    return _extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this needs {name.partition('.')[0]}; pip install 'tinysft-jax[eval]'") from None


def _request(case: Case) -> StoryRequest:
    """What the story was asked to have; nothing, where no story was asked for."""
    return parse_request(case.question) if case.task in STORIES else StoryRequest()


def _share(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _contains(words: list[str], run: list[str]) -> bool:
    return tuple(run) in _runs(words, len(run))


def _runs(words: list[str], length: int) -> list[tuple[str, ...]]:
    """All stretches of so many words."""
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def _name(answer: str) -> list[str]:
    return [word for word in words_of(answer) if word not in _AROUND_A_NAME]
