"""`data.json`: what a prepared data set says of itself, checked as it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinysft_jax import files
from tinysft_jax.errors import UserError, shown
from tinysft_jax.tokenizer import ChatTokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "valid")

# A task's id is a byte.
MOST_TASKS = 256

# What a value must be, in words, and whether it is that.
_Kind = tuple[str, Callable[[Any], bool]]


def _is_task_list(value: Any) -> bool:
    is_text = isinstance(value, list) and all(isinstance(name, str) and name and name.isprintable() for name in value)
    return is_text and 0 < len(set(value)) == len(value) <= MOST_TASKS


_TEXT: _Kind = ("text", lambda value: isinstance(value, str))
_TEXT_OR_NULL: _Kind = ("text or null", lambda value: isinstance(value, str | None))
_NUMBER: _Kind = ("a whole number", lambda value: type(value) is int)
_COUNT: _Kind = ("a whole number from 0 to 2^63 - 1", lambda value: type(value) is int and 0 <= value < 2**63)
_SIZE: _Kind = ("a whole number from 0 to 2^31 - 1", lambda value: type(value) is int and 0 <= value < 2**31)
_TASKS: _Kind = (f"a list of 1 to {MOST_TASKS} different names", _is_task_list)

_TOTALS = {"conversations": _COUNT, "tokens": _COUNT, "supervised_tokens": _COUNT, "longest": _SIZE, "shards": _SIZE}

# Objects hold at least these keys; there may be others.
_CONTENT = {
    "format": _TEXT,
    "chat_template": _TEXT_OR_NULL,
    "tokenizer": {"kind": _TEXT, "bpe_ranks": _NUMBER},
    "max_tokens": _SIZE,
    "tasks": _TASKS,
    "seed": _NUMBER,
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
        _check(description, _CONTENT, "")
        ChatTokenizer.from_description(description)
    except UserError as error:
        raise UserError(f"{where}: {error}; prepare the data again") from None
    return description


def _check(value: Any, wanted: dict[str, Any] | _Kind, name: str) -> None:
    if isinstance(wanted, tuple):
        kind, is_kind = wanted
        if not is_kind(value):
            raise UserError(f"{name} is {shown(value)}; it must be {kind}")
        return
    if not isinstance(value, dict):
        raise UserError(f"{name} is {shown(value)}; it must be an object")
    for key, inner in wanted.items():
        path = f"{name}.{key}" if name else key
        if key not in value:
            raise UserError(f"it lacks {path!r}")
        _check(value[key], inner, path)
