"""Held-out questions with the answers that the data gives them, and the file of what models answered."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt16

from tinysft_jax import chat
from tinysft_jax.console import UserError
from tinysft_jax.data.store import PreparedData
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


SPEAKERS = ("model", "baseline")


@dataclass(frozen=True)
class Answer:
    """A model's answer to a case.

    Attributes:
      text: what it said.
      stopped: whether it ended with end-of-text rather than for lack of room.
      nll: negative log-likelihood that the model gives the gold answer, end-of-text included, in nats.
    """

    text: str
    stopped: bool
    nll: float


@dataclass(frozen=True)
class Answered:
    """A case and what each speaker answered to it: the model and, where there is one, the baseline."""

    case: Case
    answers: dict[str, Answer]


def write_answers(path: Path, answered: Iterable[Answered]) -> None:
    """Writes a line for each case: its task, question, gold answer and tokens, and an object for each speaker."""
    with path.open("w", encoding="utf-8") as file:
        for each in answered:
            line = vars(each.case) | {speaker: vars(answer) for speaker, answer in each.answers.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_answers(path: Path) -> list[Answered]:
    """Reads what `write_answers` wrote.

    Raises:
      UserError: if the file is missing, empty, or a line is not such an object; names the line.
    """
    answered = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    answered.append(_parse(json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number} is not an answer of an evaluation: {error}") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    if not answered:
        raise UserError(f"{path} holds no answers")
    if len({tuple(each.answers) for each in answered}) > 1:
        raise UserError(f"{path}: some lines have a baseline's answer and some have none")
    return answered


def _parse(line: Any) -> Answered:
    case = Case(*(_typed(line, name, kind) for name, kind in Case.__annotations__.items()))
    if case.tokens < 1:
        raise ValueError("tokens must be 1 or more")
    answers = {
        speaker: Answer(*(_typed(line.get(speaker), name, kind) for name, kind in Answer.__annotations__.items()))
        for speaker in SPEAKERS
        if speaker == "model" or speaker in line
    }
    return Answered(case, answers)


def _typed(fields: Any, name: str, kind: type) -> Any:
    value = fields.get(name) if isinstance(fields, dict) else None
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{name} must be {kind.__name__}, not {type(value).__name__}")
    return value
