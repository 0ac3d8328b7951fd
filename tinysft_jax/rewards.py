"""Rewards: what an answer is worth to the one who asked, as numbers from 0 to 1, and their weighted mean."""

import contextlib
from collections.abc import Callable, Mapping

from tinysft_jax.console import UserError, shown
from tinysft_jax.evaluation import metrics
from tinysft_jax.evaluation.cases import Case
from tinysft_jax.evaluation.metrics import Metric

# Of the case, the answer's text, and whether the answer ended by itself; None where it doesn't apply.
Reward = Callable[[Case, str, bool], float | None]

DEFAULT_REWARDS = "words:1,sentence:1,dialogue:1,moral:1,answer:1,ends:0.3,repetition:0.3"
HIGHEST_WEIGHT = 1e6


def _first_of(*candidates: Metric) -> Reward:
    """The first of the metrics that applies; right counts 1 and wrong 0."""

    def reward(case: Case, answer: str, stopped: bool) -> float | None:
        values = (metric(case, answer) for metric in candidates)
        return next((float(value) for value in values if value is not None), None)

    return reward


REWARDS: dict[str, Reward] = {
    "words": _first_of(metrics.words_used_inflected),
    "sentence": _first_of(metrics.sentence_included),
    "dialogue": _first_of(metrics.dialogue_honoured),
    "moral": _first_of(metrics.moral_honoured),
    "answer": _first_of(
        metrics.character_correct, metrics.yes_no_correct, metrics.moral_correct, metrics.answer_included
    ),
    "ends": lambda case, answer, stopped: float(stopped),  # by itself; 0 where it was cut off
    "repetition": lambda case, answer, stopped: 1 - metrics.repetition(answer),  # the fraction that is new
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
            f"--rewards can't take {shown(part)}: give some of {', '.join(REWARDS)}, each once, with a weight above 0 "
            f'and up to {HIGHEST_WEIGHT:,.0f}, as in "words:1,ends:0.3"'
        )
    return weights


def score(
    weights: Mapping[str, float], case: Case, answer: str, stopped: bool
) -> tuple[float | None, dict[str, float]]:
    """The weighted mean of the rewards that apply, from 0 to 1 (None if none does), and the value of each of them."""
    values = {name: REWARDS[name](case, answer, stopped) for name in weights}
    parts = {name: value for name, value in values.items() if value is not None}
    total = sum(weights[name] for name in parts)
    return sum(weights[name] * value for name, value in parts.items()) / total if parts else None, parts
