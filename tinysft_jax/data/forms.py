"""The forms in which people keep conversations. Each is told by its keys, and turned into the project's messages."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tinysft_jax import chat
from tinysft_jax.console import UserError, shown

Line = dict[str, Any]

# Keys of what a text speaks of and is none itself.
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
LISTS = ("messages", "conversations", "history")

_SENDERS = {"human": "user", "user": "user", "system": "system"}
_SENDERS |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "claude", "model"), "assistant")


class Form(NamedTuple):
    """How a line of one form is read."""

    needs: tuple[tuple[str, ...], ...]  # groups of keys, one of which a line must have
    also: tuple[str, ...]  # keys that may be there
    messages: Callable[[Line], list[dict[str, Any]]]  # of a line with the needed keys
    fields: tuple[str, ...] = ()  # that are read of a turn


def form_of(line: object) -> str | None:
    """The form whose keys a line has: all that it needs or, if that is so of none, some. A null is no value."""
    keys = {key for key, value in line.items() if value is not None} if isinstance(line, dict) else set()
    groups = [(name, group) for name, form in FORMS.items() for group in form.needs]
    return next((name for enough in (all, any) for name, group in groups if enough(key in keys for key in group)), None)


def parse(line: object, name: str | None) -> list[dict[str, Any]]:
    """The messages of a line in the form of a name (None: it has no form). Raises: UserError."""
    needed = list(itertools.chain(*FORMS[name].needs)) if name else []
    if not isinstance(line, dict) or not line.keys() & set(needed):
        found = form_of(line)
        hint = f"{found}, which it looks like" if found else "text, to learn the file as it is"
        raise UserError(f"a line must be an object with {_needs([name] if name else FORMS)}; or give --format {hint}")
    for key in MEDIA:
        if line.get(key):
            raise chat.Unusable(f"{key} is not empty: only text can be used")
    for key in needed if name != "chat-jsonl" else ():  # that says itself what is missing
        if line.get(key) is None:
            raise UserError(f'there is no "{key}"; the form {name} has {_needs([name])}')
    return FORMS[name].messages(line)


def _needs(names: Iterable[str]) -> str:
    groups = itertools.chain.from_iterable(FORMS[name].needs for name in names)
    return ", or ".join(" and ".join(f'"{key}"' for key in group) for group in groups)


def unread_fields(line: Line, name: str) -> Iterator[str]:
    """The fields, not null, of a line that `parse` has read, of its turns and their parts, that it ignored."""
    form = FORMS[name]
    group = next(group for group in form.needs if line.keys() >= set(group))
    yield from _others(line, (*group, *form.also, *MEDIA), "")
    for turn in line[group[0]] if group[0] in LISTS else ():
        yield from _others(turn, form.fields, f"{group[0]}[].")
        for part in turn["content"] if name == "chat-jsonl" and isinstance(turn["content"], list) else ():
            yield from _others(part, ("type", "text"), "messages[].content[].")


def _others(fields: Line, read: tuple[str, ...], prefix: str) -> Iterator[str]:
    return (prefix + field for field, value in fields.items() if field not in read and value is not None)


def _from_sharegpt(line: Line) -> list[dict[str, Any]]:
    turns, messages = line["conversations"], _system(line)
    if not isinstance(turns, list) or not turns:
        raise UserError('conversations must be a list of at least one {"from": ..., "value": ...}')
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise UserError(f'{where} must be an object with "from" and "value"')
        sender = turn["from"]
        chat.check_no_tool(sender, f"{where}.from")
        if not isinstance(sender, str) or sender not in _SENDERS:
            raise UserError(f"{where}.from is {shown(sender)}; it must be one of {', '.join(_SENDERS)}")
        if index == 0 and sender == "system" and _is_none(turn["value"]):
            continue
        chat.check_content(turn["value"], f"{where}.value")
        messages.append({"role": _SENDERS[sender], "content": turn["value"], "weight": turn.get("weight")})
    # Counted as in the file, where the system message may be elsewhere, or blank.
    chat.check_messages(messages, True, "conversations", len(turns) - len(messages))
    return [chat.without_unread(message) for message in messages]


def _from_alpaca(line: Line) -> list[dict[str, Any]]:
    earlier, question = line.get("history") or [], line["instruction"]
    if not isinstance(earlier, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        raise UserError("history must be a list of pairs: an instruction and its output")
    for text in itertools.chain(*earlier):
        chat.check_content(text, "history")
    for key in ("instruction", "output"):
        chat.check_content(line[key], key)
    if not _is_none(line.get("input")):
        chat.check_content(line["input"], "input")
        question += f"\n\n{line['input']}"
    turns = zip(itertools.cycle(("user", "assistant")), itertools.chain(*earlier, (question, line["output"])))
    return _system(line) + [{"role": role, "content": text} for role, text in turns]


def _system(line: Line) -> list[dict[str, Any]]:
    if _is_none(line.get("system")):
        return []
    chat.check_content(line["system"], "system")
    return [{"role": "system", "content": line["system"]}]


def _is_none(text: object) -> bool:
    """Whether an optional text is as good as missing."""
    return text is None or (isinstance(text, str) and chat.is_blank(text))


# In the order in which they are tried.
FORMS = {
    "chat-jsonl": Form((("messages",), ("prompt", "completion")), (), chat.parse_chat, chat.MESSAGE_FIELDS),
    "sharegpt": Form((("conversations",),), ("system",), _from_sharegpt, ("from", "value", "weight")),
    "alpaca": Form((("instruction", "output"),), ("input", "system", "history"), _from_alpaca),
}
