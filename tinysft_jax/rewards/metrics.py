"""What an answer is worth: pure functions of a case and the answer's text.

A metric gives a bool where an answer is right or wrong, else a number from 0 to 1, and None where it doesn't apply.
Texts are compared word by word; case and punctuation don't count.
"""

import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tinysft_jax.console import UserError
from tinysft_jax.rewards.cases import Case
from tinysft_jax.tasks.answers import find_moral, has_dialogue

Metric = Callable[[Case, str], float | bool | None]

# Words around the character's name: "The main character is Lily." and "It is about Lily." are the same answer.
_AROUND_A_NAME = frozenset(re.findall(r"\w+", "the main character of this story is a; it was about an"))
# Words of a chat's ground truth, at most, that any right answer contains: longer ones can be said otherwise.
FACT = 3
# The share of requested words in a mere list of them: stories of the embedded corpus have at most 0.07, and a list has
# this even as "There was a cat. There was a dog."
WORD_LIST = 0.25


def words_used(case: Case, answer: str) -> float | None:
    """The fraction of the requested words that the answer uses in that form."""
    return _fraction_used(case, answer, words_of)


def words_used_inflected(case: Case, answer: str) -> float | None:
    """The fraction of the requested words that the answer uses in any form: jump, jumps, jumped, jumping."""
    return _fraction_used(case, answer, lemmas_of)


def all_words_used(case: Case, answer: str) -> bool | None:
    """Whether the answer uses all requested words, in any form."""
    fraction = words_used_inflected(case, answer)
    return None if fraction is None else fraction == 1


def dialogue_honoured(case: Case, answer: str) -> bool | None:
    """Whether somebody clearly speaks, where dialogue was asked for."""
    return has_dialogue(answer) is True if "Dialogue" in case.conditions.get("features", ()) else None


def moral_honoured(case: Case, answer: str) -> bool | None:
    """Whether a sentence says what there is to learn, where a moral was asked for."""
    return find_moral(answer) is not None if "MoralValue" in case.conditions.get("features", ()) else None


def sentence_included(case: Case, answer: str) -> bool | None:
    """Whether the answer contains the requested sentence."""
    sentence = case.conditions.get("random_sentence")
    return None if sentence is None else _contains(words_of(answer), words_of(sentence))


def all_conditions(case: Case, answer: str) -> bool | None:
    """Whether the story honours all that it was asked for and rules can check: words, dialogue, moral, sentence."""
    return _all_honoured(case, answer, (all_words_used, dialogue_honoured, moral_honoured, sentence_included))


def all_but_sentence(case: Case, answer: str) -> bool | None:
    """Whether the story honours the words, the dialogue and the moral it was asked for; a sentence doesn't count."""
    return _all_honoured(case, answer, (all_words_used, dialogue_honoured, moral_honoured))


def character_correct(case: Case, answer: str) -> bool | None:
    """Whether the answer names the ground truth's main character and nobody else."""
    return _name(answer) == _name(case.ground_truth) if case.task == "main_character" else None


def yes_no_correct(case: Case, answer: str) -> bool | None:
    """Whether the answer begins with the ground truth's yes or no."""
    if case.task not in ("happy_ending", "dialogue"):
        return None
    return words_of(answer)[:1] == words_of(case.ground_truth)[:1]


def moral_correct(case: Case, answer: str) -> bool | None:
    """Whether the answer is the ground truth, word by word."""
    return words_of(answer) == words_of(case.ground_truth) if case.task == "moral" else None


def answer_included(case: Case, answer: str) -> bool | None:
    """Whether the answer contains the ground truth of a chat, where that is a fact of a few words."""
    fact = words_of(case.ground_truth)
    return _contains(words_of(answer), fact) if case.task == "chat" and 0 < len(fact) <= FACT else None


def rouge_l(case: Case, answer: str) -> float | None:
    """ROUGE-L (F1, with Porter's stemmer) against the ground truth, of summaries, morals and chats.

    Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, https://aclanthology.org/W04-1013.
    """
    if case.task not in ("summary", "what_happened", "moral", "chat"):
        return None
    return float(_rouge().score(case.ground_truth, answer)["rougeL"].fmeasure)


# Metrics of a single case; the answer to another case scores lower.
CORRECTNESS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (
        words_used,
        words_used_inflected,
        all_words_used,
        dialogue_honoured,
        moral_honoured,
        sentence_included,
        all_conditions,
        all_but_sentence,
        character_correct,
        yes_no_correct,
        moral_correct,
        answer_included,
        rouge_l,
    )
}


def repetition(answer: str) -> float:
    """The fraction of the answer's sequences of four words that occurred in it before; 0 where it is shorter."""
    ngrams = _ngrams(words_of(answer), 4)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def length(answer: str) -> float:
    """The number of words of the answer."""
    return float(len(words_of(answer)))


def word_list(case: Case, answer: str) -> bool | None:
    """Whether the answer merely lists the requested words: they are a quarter of its words or more, in any form."""
    requested = {lemma for word in case.conditions.get("words", ()) for lemma in lemmas_of(word)}
    found = [lemma in requested for lemma in lemmas_of(answer)]
    return sum(found) >= WORD_LIST * len(found) > 0 if requested else None


def distinct_2(answers: Sequence[str]) -> list[float | None]:
    """How new the answer's pairs of neighbouring words are: one that occurs k times in all answers counts 1/k.

    Of all answers of a task; None where an answer has no two words. Weighted by length, their mean is the distinct-2 of
    Li et al., 2016, https://arxiv.org/abs/1510.03055: different pairs over all pairs.
    """
    pairs = [_ngrams(words_of(answer), 2) for answer in answers]
    counts = Counter(pair for of in pairs for pair in of)
    return [sum(1 / counts[pair] for pair in of) / len(of) if of else None for of in pairs]


def require_libraries() -> None:
    """Raises: UserError, if a library of the extra "eval" is missing."""
    for name in ("simplemma", "rouge_score"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"this needs {name}; pip install -e '.[eval]'")


def words_of(text: str) -> list[str]:
    """The text's words in lower case; apostrophes and hyphens separate them."""
    return re.findall(r"[^\W_]+", text.lower())


def lemmas_of(text: str) -> list[str]:
    """The text's words, each in the form in which a dictionary lists it."""
    return [_lemma(word) for word in words_of(text)]


@functools.cache
def _lemma(word: str) -> str:
    import simplemma

    return simplemma.lemmatize(word, lang="en").lower()


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def _fraction_used(case: Case, answer: str, split: Callable[[str], list[str]]) -> float | None:
    used = [_contains(split(answer), split(word)) for word in case.conditions.get("words", ())]
    return sum(used) / len(used) if used else None


def _all_honoured(case: Case, answer: str, conditions: Sequence[Metric]) -> bool | None:
    """Whether a story honours all of these conditions that were asked for; None where none was."""
    honoured = [value for metric in conditions if (value := metric(case, answer)) is not None]
    return all(honoured) if honoured and case.task == "story" else None


def _contains(words: list[str], sequence: list[str]) -> bool:
    return tuple(sequence) in _ngrams(words, len(sequence))


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _name(answer: str) -> list[str]:
    return [word for word in words_of(answer) if word not in _AROUND_A_NAME]
