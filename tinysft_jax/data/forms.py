"""The forms in which people keep conversations: each is told by its keys, and turned into messages."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tinysft_jax import chat
from tinysft_jax.console import UserError, shown

Line = dict[str, Any]
Messages = list[dict[str, Any]]

# The format of a file whose lines may have any form but that of pairs.
CONVERSATIONS = "conversations"
# That of pairs: answers to one prompt, whose names are the keys of a line.
PREFERENCE, SIDES = "preference-jsonl", ("chosen", "rejected")

_ROLES = {"system": "system", "human": "user", "user": "user"}
_ROLES |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "claude", "model"), "assistant")


class Form(NamedTuple):
    """What is read of a line of one form."""

    name: str  # as --format has it
    needs: tuple[str, ...]  # keys that a line must have
    also: tuple[str, ...]  # keys that it may have
    fields: tuple[str, ...]  # of a turn, where a key has a list of turns
    conversations: Callable[[Line], list[Messages]]  # of a line with the needed keys


class Parsed(NamedTuple):
    """A line that was read."""

    form: str
    conversations: list[Messages]  # one; of a pair the chosen one, then the rejected one
    unread: list[str]  # fields, not null, that were ignored


def parse(line: object, format: str) -> Parsed:
    """Reads a line in one form or, with the format CONVERSATIONS, in the first whose keys it has. Null is no value.

    Raises: UserError, saying what is wrong with it.
    """
    line = _without_null(line)
    for form in forms_of(format):
        if line.keys() >= set(form.needs):
            return Parsed(form.name, form.conversations(line), [*_unread_fields(line, form)])
    if format == CONVERSATIONS and line.keys() & SIDES:
        raise UserError('a pair of answers needs both "chosen" and "rejected", and a file without other conversations')
    known = {key for form in _FORMS for key in form.needs}
    hint = "" if line.keys() & known else "; to learn the file as it is, give --format text"
    raise UserError(f"a line must be an object with {needed_keys(format)}{hint}")


def forms_of(format: str) -> list[Form]:
    """The forms that a format allows, in the order in which they are tried; none for text."""
    return [form for form in _FORMS if format == form.name or (format == CONVERSATIONS and form.name != PREFERENCE)]


def format_of(lines: Iterable[object]) -> str:
    """CONVERSATIONS or PREFERENCE: by the first line that has the keys of a form."""
    forms = (form for line in lines for form in _FORMS if _without_null(line).keys() >= set(form.needs))
    return PREFERENCE if (first := next(forms, None)) and first.name == PREFERENCE else CONVERSATIONS


def prompt_of(text: str) -> str:
    """The prompt of a pair in JSON, the same for each way to write it; of a line that is no pair, the line."""
    try:
        prompt, *_ = _read_pair(_without_null(json.loads(text)))
    except (ValueError, RecursionError, KeyError, UserError):
        return text
    return json.dumps(_said(prompt))


def needed_keys(format: str) -> str:
    """The keys of these forms, in words."""
    return ", or ".join(" and ".join(f'"{key}"' for key in form.needs) for form in forms_of(format))


def _without_null(line: object) -> Line:
    return {key: value for key, value in line.items() if value is not None} if isinstance(line, dict) else {}


def _unread_fields(line: Line, form: Form) -> Iterator[str]:
    read = (*form.needs, *form.also)
    yield from (field for field in line if field not in read)
    for key in read:
        for turn in turns if isinstance(turns := line.get(key), list) else ():
            for field, value in turn.items():
                if field not in form.fields and value is not None:
                    yield f"{key}[].{field}"


def _from_chat(line: Line) -> list[Messages]:
    return [chat.parse_chat(line)]


def _from_sharegpt(line: Line) -> list[Messages]:
    turns, messages = line["conversations"], dict(zip(["system"], _system(line), strict=False))  # by place
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
        messages[where] = {"role": role, "content": turn["value"], "weight": turn.get("weight")}
    return [_checked(messages, needs_answer=True)]


def _checked(turns: dict[str, Any], needs_answer: bool = False) -> Messages:
    """The messages of a conversation, given by their places. Raises: UserError, as `chat.check_messages`."""
    messages = [*turns.values()]
    chat.check_messages(messages, needs_answer, [*turns])
    return messages


def _from_alpaca(line: Line) -> list[Messages]:
    for key in ("instruction", "output"):
        chat.check_content(line[key], key)
    question = "\n\n".join([line["instruction"], *_optional(line, "input")])
    return [[*_system(line), {"role": "user", "content": question}, {"role": "assistant", "content": line["output"]}]]


def _system(line: Line) -> Messages:
    return [{"role": "system", "content": text} for text in _optional(line, "system")]


def _optional(line: Line, key: str) -> list[str]:
    """A text, or none if it is missing or blank."""
    text = line.get(key)
    if text is None or (isinstance(text, str) and chat.is_blank(text)):
        return []
    chat.check_content(text, key)
    return [text]


def _from_preference(line: Line) -> list[Messages]:
    """The chosen and the rejected conversation. Of the prompt, with which both begin, nothing is learned."""
    prompt, *answers = _read_pair(line)
    pair = [[*({**message, "weight": 0} for message in prompt), *answer] for answer in answers]
    for conversation in pair:
        chat.check_messages(conversation, needs_answer=True)
    return pair


def _read_pair(line: Line) -> tuple[Messages, ...]:
    """The prompt, and what the chosen and the rejected conversation add to it. Raises: UserError."""
    given = _turns(line, "prompt", "user") if "prompt" in line else {}
    prompt = _checked(given) if given else []
    if prompt and prompt[-1]["role"] != "user":
        raise UserError(f"prompt must end with a user message, not with the role '{prompt[-1]['role']}'")
    if not prompt and not all(isinstance(line[key], list) for key in SIDES):
        raise UserError('a pair needs a "prompt", or in "chosen" and "rejected" lists of messages that begin with it')
    pair = [_whole(line, key, given) for key in SIDES]
    prompt = prompt or _shared_prompt(*pair)
    if not prompt:
        raise UserError("a prompt that differs: chosen and rejected share no beginning that ends with a user message")
    for key, conversation in zip(SIDES, pair, strict=True):
        if _said(conversation[: len(prompt)]) != _said(prompt):
            raise UserError(f'a prompt that differs: {key} does not begin with the messages of "prompt"')
        if conversation[-1]["role"] != "assistant":
            raise UserError(f"{key} must end with an answer of the assistant")
    chosen, rejected = (conversation[len(prompt) :] for conversation in pair)
    if _said(chosen) == _said(rejected):
        raise UserError("a pair without a difference: chosen and rejected have the same answer")
    return prompt, chosen, rejected


def _turns(line: Line, key: str, role: str) -> dict[str, Any]:
    """Place -> message: those of a list, or a text as the one message of a role."""
    if not isinstance(line[key], list):
        chat.check_content(line[key], key)
        return {key: {"role": role, "content": line[key]}}
    if not line[key]:
        raise UserError(f"{key} is empty: it has no message")
    return {f"{key}[{i}]": chat.join_parts(turn, f"{key}[{i}].content") for i, turn in enumerate(line[key])}


def _whole(line: Line, key: str, prompt: dict[str, Any]) -> Messages:
    """A conversation of a pair, with the prompt if that is not in it."""
    turns = _turns(line, key, "assistant")
    first = next(iter(turns.values()))
    if not (isinstance(first, dict) and first.get("role") in ("system", "user")):
        turns = prompt | turns
    return _checked(turns)


def _shared_prompt(chosen: Messages, rejected: Messages) -> Messages:
    """The longest beginning of both that ends with a user message."""
    alike = itertools.takewhile(lambda two: two[0] == two[1], zip(_said(chosen), _said(rejected), strict=False))
    return chosen[: max((end for end, ((role, _), _) in enumerate(alike, 1) if role == "user"), default=0)]


def _said(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


_FORMS = (
    Form("chat-jsonl", ("messages",), (), chat.MESSAGE_FIELDS, _from_chat),
    Form("chat-jsonl", ("prompt", "completion"), (), (), _from_chat),
    Form("sharegpt", ("conversations",), ("system",), ("from", "value", "weight"), _from_sharegpt),
    Form("alpaca", ("instruction", "output"), ("input", "system"), (), _from_alpaca),
    Form(PREFERENCE, SIDES, ("prompt",), chat.MESSAGE_FIELDS, _from_preference),
)
FORMS = tuple(dict.fromkeys(form.name for form in _FORMS))
