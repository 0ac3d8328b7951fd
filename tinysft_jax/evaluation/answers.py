"""What models answered, and the file that keeps it: `answers.jsonl`, from which a report can be made again."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinysft_jax.errors import UserError
from tinysft_jax.evaluation.cases import Case

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
