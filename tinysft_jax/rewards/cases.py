"""Questions of a data set with their ground truth, and models' answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinysft_jax.console import UserError, shown
from tinysft_jax.data.store import PreparedData, Split


@dataclass(frozen=True)
class Case:
    """A question of a data set."""

    task: str  # of the conversation
    question: str  # the user's message
    ground_truth: str  # the data's answer
    # What a story was asked to have, as `Split.request` gives it; empty where no story was asked for.
    conditions: Mapping[str, Any] = field(default_factory=dict)
    prompt: Sequence[int] = ()  # token ids up to the place where the assistant speaks
    target: Sequence[int] = ()  # token ids of the ground truth, end-of-text included
    data: str = ""  # the name of its data set, where there are several

    @property
    def label(self) -> str:
        """What the report calls the task."""
        return f"{self.data}/{self.task}" if self.data else self.task


@dataclass(frozen=True)
class Answer:
    """A model's answer to a case."""

    text: str  # without end-of-text
    stopped: bool  # whether end-of-text ended it, not a lack of room
    nll: float  # negative log-likelihood of the ground truth under the model, end-of-text included, in nats


Answers = Mapping[str, Sequence[Answer]]  # by speaker ("model", "baseline"), in the order of the cases


def choose_tasks(data: PreparedData, names: str | None) -> list[int]:
    """The numbers of the tasks named, with commas between; all if None. Raises: UserError, if one is unknown."""
    chosen = data.tasks if names is None else [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in data.tasks]:
        raise UserError(f"{data.directory} has no task {shown(unknown[0])}; choose from {', '.join(data.tasks)}")
    return sorted(data.tasks.index(name) for name in set(chosen))


def draw_cases(
    data: PreparedData, per_task: int, seed: int = 0, split: str = "valid", tasks: str | None = None
) -> list[Case]:
    """Draws up to `per_task` conversations of each task (see `choose_tasks`) from a split.

    A larger `per_task` adds to the cases of a smaller one. Raises: UserError, as `open_questions`.
    """
    questions, cases = open_questions(data, split), []
    for task_id in choose_tasks(data, tasks):
        members = np.flatnonzero(questions.tasks == task_id)
        for index in np.random.default_rng((seed, task_id)).permutation(members)[:per_task]:
            cases.append(read_case(data, questions, int(index)))
    return cases


def open_questions(data: PreparedData, name: str) -> Split:
    """Opens a split. Raises: UserError, if it is empty, holds plain text, or was prepared without requests."""
    if data.tokenizer.template is None:
        raise UserError(f"{data.directory} holds plain text, no conversations; there is nothing to ask")
    if data.per_item == 2:
        raise UserError(f"{data.directory} holds pairs, which measure a reward model; give conversations")
    split = data.split(name)
    if not len(split):
        noun, change = ("validation", "a") if name == "valid" else ("training", "a smaller")
        raise UserError(f"{data.directory} has no {noun} data; prepare it with {change} --valid_fraction")
    if data.description["format"] == "tinystories-instruct" and split.request(0) is None:
        raise UserError(f"{data.directory} is of an older version, without requests; prepare it again")
    return split


def read_case(data: PreparedData, split: Split, index: int) -> Case:
    """A conversation of a split as a case, with its first supervised answer as the ground truth."""
    ids, supervised = split.conversation(index)
    start = int(np.argmax(supervised))
    length = int(np.argmin(np.append(supervised[start:], False)))
    prompt, target = ids[:start], ids[start : start + length]
    conditions = (split.request(index) or {}).get("conditions", {})
    texts = data.tokenizer.question(prompt), data.tokenizer.decode(target[:-1])
    return Case(data.tasks[split.tasks[index]], *texts, conditions, prompt.tolist(), target.tolist())


def answer_lines(cases: Sequence[Case], answers: Answers) -> list[dict[str, Any]]:
    """A line for each case, with each speaker's answer."""
    lines = []
    for i, case in enumerate(cases):
        line = {"data": case.data} if case.data else {}
        line |= {key: getattr(case, key) for key in ("task", "question", "conditions", "ground_truth")}
        lines.append(line | {"tokens": len(case.target)} | {speaker: vars(of[i]) for speaker, of in answers.items()})
    return lines
