"""Held-out conversations, a few of each task, with the model's answer beside the data's.

`python -m tinysft_jax.evaluation.samples --checkpoint=PATH --data=DIR [--count 4]`
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinysft_jax import chat, cli
from tinysft_jax.data.dataset import PreparedData
from tinysft_jax.errors import UserError
from tinysft_jax.tokenizer import ChatTokenizer


class Case(NamedTuple):
    """A conversation that can be asked again.

    Attributes:
      task: its task.
      prompt: token ids up to where the assistant speaks first.
      answer: what it said there, as ids.
    """

    task: str
    prompt: list[int]
    answer: list[int]


def held_out_cases(data: PreparedData, count: int, seed: int = 0) -> list[Case]:
    """Draws `count` conversations of the validation split, of as many tasks as possible.

    Raises:
      UserError: if the split is empty.
    """
    split = data.split("valid")
    if not len(split):
        raise UserError(f"{data.directory} has no validation data")
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(split))
    # Round by round, one conversation of each task: the n-th of its task comes in round n.
    tasks = split.tasks[shuffled]
    rounds = np.array([np.sum(tasks[:i] == task) for i, task in enumerate(tasks)])
    chosen = shuffled[np.lexsort((tasks, rounds))[:count]]
    return [_case(data.tasks[split.tasks[index]], *split.conversation(int(index))) for index in chosen]


def _case(task: str, ids: np.ndarray, supervised: np.ndarray) -> Case:
    start = int(np.argmax(supervised))
    rest = supervised[start:]
    end = start + (int(np.argmin(rest)) if not rest.all() else len(rest))
    return Case(task, ids[:start].tolist(), ids[start : end - 1].tolist())  # without the end-of-text that closes it


def show(cases: Sequence[Case], answers: Sequence[list[int]], tokenizer: ChatTokenizer) -> None:
    """Prints each case: what was asked, what the model answers, what the data says."""
    for case, answer in zip(cases, answers, strict=True):
        asked = tokenizer.decode(case.prompt).partition(chat.ROLE_MARKERS["user"])[2]
        print(f"--- {case.task}")
        print(f"User: {asked.removesuffix(chat.ROLE_MARKERS['assistant'])}")
        print(f"Model: {tokenizer.decode(answer)}")
        print(f"Data: {tokenizer.decode(case.answer)}\n")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; `arguments` are the command line's unless given."""
    parser = cli.Parser(prog="python -m tinysft_jax.evaluation.samples", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="a model directory, a work directory or a .pt file")
    parser.add_argument("--data", type=Path, required=True, help="a prepared data set")
    parser.add_argument("--count", type=int, default=4, help="conversations to show")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    flags = parser.parse_args(arguments)
    if flags.count < 1:
        raise UserError(f"--count is {flags.count}; it must be at least 1")
    data = PreparedData(flags.data)
    tokenizer = ChatTokenizer.from_description(data.description)
    if tokenizer.template is None:
        raise UserError(f"{flags.data} holds plain text, no conversations")
    cases = held_out_cases(data, flags.count, flags.seed)

    # Only now what takes seconds to import.
    from tinysft_jax.model import default_dtype
    from tinysft_jax.model_directory import make_model, read_model
    from tinysft_jax.sampling.decode import Decoder
    from tinysft_jax.sampling.options import SamplingOptions
    from tinysft_jax.sampling.session import text_options

    description, params = read_model(flags.checkpoint)
    language = tokenizer.description()
    if (description.chat_template, description.tokenizer) != (language["chat_template"], language["tokenizer"]):
        raise UserError(f"{flags.checkpoint} and {flags.data} were made with different tokenizers or chat templates")
    decoder = Decoder(make_model(description.config, params, dtype=default_dtype()))
    options = text_options(SamplingOptions(temperature=0), tokenizer, decoder.config)
    show(cases, decoder.generate([case.prompt for case in cases], options), tokenizer)


if __name__ == "__main__":
    cli.run(main)
