"""Held-out questions, each with the answer that the data gives it."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt16

from tinysft_jax import chat
from tinysft_jax.data.dataset import PreparedData
from tinysft_jax.errors import UserError
from tinysft_jax.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Case:
    """All that an answer is scored by.

    Attributes:
      task: the conversation's.
      question: what the user asks.
      gold: what the data answers.
      tokens: of the gold answer, with the end-of-text that closes it.
    """

    task: str
    question: str
    gold: str
    tokens: int


class HeldOut(NamedTuple):
    """A case with its token ids.

    Attributes:
      case: what it is scored by.
      ids: the conversation up to the end of the first answer that is supervised.
      supervised: which of them are that answer.
    """

    case: Case
    ids: UInt16[np.ndarray, " n"]
    supervised: Bool[np.ndarray, " n"]

    @property
    def prompt(self) -> list[int]:
        """The ids up to where the assistant speaks."""
        return self.ids[: len(self.ids) - self.case.tokens].tolist()


def draw_cases(data: PreparedData, tokenizer: ChatTokenizer, per_task: int, seed: int = 0) -> list[HeldOut]:
    """Draws conversations of the validation split, task by task, in an order that the seed decides.

    Args:
      data: a prepared data set of conversations.
      tokenizer: the data's.
      per_task: cases of each task, at most.
      seed: which ones. A larger `per_task` adds to the cases of a smaller one.

    Raises:
      UserError: if the split is empty, or holds plain text.
    """
    if tokenizer.template is None:
        raise UserError(f"{data.directory} holds plain text, no conversations; there is nothing to ask")
    split = data.split("valid")
    if not len(split):
        raise UserError(f"{data.directory} has no validation data; prepare it with a --valid_fraction")
    drawn = []
    for task_id, task in enumerate(data.tasks):
        members = np.flatnonzero(split.tasks == task_id)
        chosen = np.random.default_rng((seed, task_id)).permutation(members)[:per_task]
        drawn += [_first_turn(task, *split.conversation(int(index)), tokenizer) for index in chosen]
    return drawn


def _first_turn(task: str, ids: np.ndarray, supervised: np.ndarray, tokenizer: ChatTokenizer) -> HeldOut:
    start = int(np.argmax(supervised))
    rest = supervised[start:]
    end = start + (len(rest) if rest.all() else int(np.argmin(rest)))
    gold = tokenizer.decode(ids[start : end - 1])  # without end-of-text
    case = Case(task, _question(ids[:start], tokenizer), gold, end - start)
    return HeldOut(case, ids[:end], supervised[:end])


def _question(prompt: np.ndarray, tokenizer: ChatTokenizer) -> str:
    """What stands between the user's marker and the assistant's, the prompt's end."""
    user, assistant = chat.ROLE_MARKERS["user"], chat.ROLE_MARKERS["assistant"]
    if tokenizer.template == "text":  # markers are text, and no other text spells them
        return tokenizer.decode(prompt).rpartition(user)[2].removesuffix(assistant)
    begin = int(np.flatnonzero(prompt == tokenizer.control_ids[user])[-1]) + 1
    return tokenizer.decode(prompt[begin:-1])
