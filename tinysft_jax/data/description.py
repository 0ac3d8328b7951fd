"""`data.json`: what a prepared data set says of itself, checked as it is read."""

from pathlib import Path
from typing import Any

from tinysft_jax import files
from tinysft_jax.errors import UserError
from tinysft_jax.schema import COUNT, NUMBER, SIZE, TEXT, TEXT_OR_NULL, Kind, Schema, check
from tinysft_jax.tokenizer import ChatTokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "valid")

# A task's id is a byte.
MOST_TASKS = 256


def _is_task_list(value: Any) -> bool:
    is_text = isinstance(value, list) and all(isinstance(name, str) and name and name.isprintable() for name in value)
    return is_text and 0 < len(set(value)) == len(value) <= MOST_TASKS


_TASKS: Kind = (f"a list of 1 to {MOST_TASKS} different names", _is_task_list)

_TOTALS = {"conversations": COUNT, "tokens": COUNT, "supervised_tokens": COUNT, "longest": SIZE, "shards": SIZE}

_CONTENT: Schema = {
    "format": TEXT,
    "chat_template": TEXT_OR_NULL,
    "tokenizer": {"kind": TEXT, "bpe_ranks": NUMBER},
    "max_tokens": SIZE,
    "tasks": _TASKS,
    "seed": NUMBER,
    "source": {},
    "splits": dict.fromkeys(SPLITS, _TOTALS),
}


def read_description(directory: Path) -> dict[str, Any]:
    """Reads `data.json`: every key that `prepare` writes for readers is there, and of its type.

    Raises:
      UserError: if `directory` is not a prepared data set, or one of a newer program, or its description can't be.
    """
    where = directory / "data.json"
    description = files.read_json(where, "a prepared data set", FORMAT_VERSION)
    try:
        check(description, _CONTENT)
        ChatTokenizer.from_description(description)
    except UserError as error:
        raise UserError(f"{where}: {error}; prepare the data again") from None
    return description
