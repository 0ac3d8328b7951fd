"""The forms in which people keep conversations: each is told by its keys, and turned into messages."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tinysft_jax import chat
from tinysft_jax.console import UserError, shown

Line = dict[str, Any]
Messages = list[dict[str, Any]]

# The format of a file whose lines may have any form but that of pairs.
CONVERSATIONS = "conversations"
# That of pairs: a chosen and a rejected answer to one prompt.
PREFERENCE = "preference-jsonl"

_ROLES = {"system": "system", "human": "user", "user": "user"}
_ROLES |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "claude", "model"), "assistant")


class Form(NamedTuple):
    """What is read of a line of one form."""

    name: str  # as --format has it
    needs: tuple[str, ...]  # keys that a line must have
    also: tuple[str, ...]  # keys that it may have
    fields: tuple[str, ...]  # of a turn, where the first key has a list of turns
    messages: Callable[[Line], Messages]  # of a line with the needed keys


class Parsed(NamedTuple):
    """A conversation that was read."""

    form: str
    messages: Messages
    unread: list[str]  # fields, not null, that were ignored


def parse(line: object, format: str) -> Parsed:
    """Reads a line in one form or, with the format CONVERSATIONS, in the first whose keys it has. Null is no value.

    Raises: UserError, saying what is wrong with it.
    """
    line = {key: value for key, value in line.items() if value is not None} if isinstance(line, dict) else {}
    for form in forms_of(format):
        if line.keys() >= set(form.needs):
            return Parsed(form.name, form.messages(line), [*_unread_fields(line, form)])
    known = {key for form in _FORMS for key in form.needs}
    hint = "" if line.keys() & known else "; to learn the file as it is, give --format text"
    raise UserError(f"a line must be an object with {needed_keys(format)}{hint}")


def forms_of(format: str) -> list[Form]:
    """The forms that a format allows, in the order in which they are tried; none for text."""
    return [form for form in _FORMS if format in (CONVERSATIONS, form.name)]


def needed_keys(format: str) -> str:
    """The keys of these forms, in words."""
    return ", or ".join(" and ".join(f'"{key}"' for key in form.needs) for form in forms_of(format))


def _unread_fields(line: Line, form: Form) -> Iterator[str]:
    read, turns = (*form.needs, *form.also), line[form.needs[0]]
    yield from (field for field in line if field not in read)
    for turn in turns if isinstance(turns, list) else ():
        for field, value in turn.items():
            if field not in form.fields and value is not None:
                yield f"{form.needs[0]}[].{field}"


def _from_sharegpt(line: Line) -> Messages:
    turns, messages = line["conversations"], _system(line)
    places = ["system"] * len(messages)
    if not isinstance(turns, list) or not turns:
        raise UserError('conversations must be a list of at least one {"from": ..., "value": ...}')
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise UserError(f'{where} must be an object with "from" and "value"')
        role = _ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise UserError(f"{where}.from is {shown(turn['from'])}; it must be one of {', '.join(_ROLES)}")
        chat.check_content(turn["value"], f"{where}.value")
        messages.append({"role": role, "content": turn["value"], "weight": turn.get("weight")})
        places.append(where)
    chat.check_messages(messages, needs_answer=True, places=places)
    return messages


def _from_alpaca(line: Line) -> Messages:
    for key in ("instruction", "output"):
        chat.check_content(line[key], key)
    question = "\n\n".join([line["instruction"], *_optional(line, "input")])
    return [*_system(line), {"role": "user", "content": question}, {"role": "assistant", "content": line["output"]}]


def _system(line: Line) -> Messages:
    return [{"role": "system", "content": text} for text in _optional(line, "system")]


def _optional(line: Line, key: str) -> list[str]:
    """A text, or none if it is missing or blank."""
    text = line.get(key)
    if text is None or (isinstance(text, str) and chat.is_blank(text)):
        return []
    chat.check_content(text, key)
    return [text]


_FORMS = (
    Form("chat-jsonl", ("messages",), (), chat.MESSAGE_FIELDS, chat.parse_chat),
    Form("chat-jsonl", ("prompt", "completion"), (), (), chat.parse_chat),
    Form("sharegpt", ("conversations",), ("system",), ("from", "value", "weight"), _from_sharegpt),
    Form("alpaca", ("instruction", "output"), ("input", "system"), (), _from_alpaca),
)
FORMS = tuple(dict.fromkeys(form.name for form in _FORMS))
