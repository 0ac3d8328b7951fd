"""Rewards: what an answer is worth to the one who asked, as numbers from 0 to 1, and their weighted mean."""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tinysft_jax.console import UserError, shown
from tinysft_jax.rewards import metrics
from tinysft_jax.rewards.cases import Case
from tinysft_jax.rewards.metrics import Metric, words_of


class Answered(NamedTuple):
    """An answer to a question, and what models say of it, where they were asked."""

    case: Case
    text: str
    stopped: bool  # whether it ended by itself, not for lack of room
    fluency: float | None = None  # mean log-likelihood of a token under a model that is not trained, in nats
    usual: float | None = None  # that of the data's own answer
    lead: float | None = None  # a reward model's score, minus that of the data's own answer


Reward = Callable[[Answered], float | None]  # None where it doesn't apply

DEFAULT_REWARDS = "words:1,sentence:1,dialogue:1,moral:1,answer:1,ends:0.3,repetition:0.3"
HIGHEST_WEIGHT = 1e6
LEAST_LENGTH, GREATEST_LENGTH = 0.75, 1.5  # of the data's own answer, between which a length is right


def _first_of(*candidates: Metric) -> Reward:
    """The first of the metrics that applies; right counts 1 and wrong 0."""

    def reward(answered: Answered) -> float | None:
        values = (metric(answered.case, answered.text) for metric in candidates)
        return next((float(value) for value in values if value is not None), None)

    return reward


def _length(answered: Answered) -> float:
    """1 for as many words as the data's own answer has, or nearly so; the less, the more it is too short or long."""
    words, usual = (max(len(words_of(text)), 1) for text in (answered.text, answered.case.ground_truth))
    return min(1, words / (LEAST_LENGTH * usual), GREATEST_LENGTH * usual / words)


def _fluency(answered: Answered) -> float | None:
    """1 where a token is as likely as in the data's own answer, or likelier, else the ratio of the probabilities.

    More would be won by what is likeliest: stories that are all the same.
    """
    return None if answered.fluency is None else math.exp(min(answered.fluency - answered.usual, 0))


REWARDS: dict[str, Reward] = {
    "words": _first_of(metrics.words_used_inflected),
    "sentence": _first_of(metrics.sentence_included),
    "dialogue": _first_of(metrics.dialogue_honoured),
    "moral": _first_of(metrics.moral_honoured),
    "answer": _first_of(
        metrics.character_correct, metrics.yes_no_correct, metrics.moral_correct, metrics.answer_included
    ),
    "ends": lambda answered: float(answered.stopped),
    "repetition": lambda answered: 1 - metrics.repetition(answered.text),  # the fraction that is new
    "length": _length,
    "fluency": _fluency,
    # By Bradley and Terry's model, the probability that it is preferred to the data's own answer.
    "preferred": lambda answered: None if answered.lead is None else 1 / (1 + math.exp(min(-answered.lead, 700))),
}


def parse_weights(text: str) -> dict[str, float]:
    """The weight of each reward, from text such as "words:1,ends:0.3". Raises: UserError, if it is anything else."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition(":"))
        with contextlib.suppress(ValueError):
            if name in REWARDS and name not in weights and 0 < float(number) <= HIGHEST_WEIGHT:
                weights[name] = float(number)
                continue
        raise UserError(
            f"rewards can't be {shown(part)}: give some of {', '.join(REWARDS)}, each once, with a weight above 0 and "
            f'up to {HIGHEST_WEIGHT:,.0f}, as in "words:1,ends:0.3"'
        )
    return weights


def check_reward_model(weights: Mapping[str, float], path: str | None) -> None:
    """Raises: UserError, if a reward lacks its model, or a model its reward."""
    if ("preferred" in weights) != bool(path):
        raise UserError("the reward preferred and reward_model=PATH need each other; give both or none")


def score(weights: Mapping[str, float], answered: Answered) -> tuple[float | None, dict[str, float]]:
    """The weighted mean of the rewards that apply, from 0 to 1 (None if none does), and the value of each of them."""
    values = {name: REWARDS[name](answered) for name in weights}
    parts = {name: value for name, value in values.items() if value is not None}
    total = sum(weights[name] for name in parts)
    return sum(weights[name] * value for name, value in parts.items()) / total if parts else None, parts
