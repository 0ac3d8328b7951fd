"""Conversations: which messages are valid, and the chat templates that turn them into pieces for the tokenizer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tinysft_jax.chat_template import ROLES, ChatTemplate, Messages, Piece, is_supervised
from tinysft_jax.console import UserError, shown

DEFAULT_SYSTEM = "You are a helpful assistant that answers questions about stories."
END_OF_TEXT = "<|endoftext|>"
ROLE_MARKERS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
_SYSTEM, _USER, _ASSISTANT = ROLE_MARKERS.values()
_LITERALS = {
    "begin": _SYSTEM + DEFAULT_SYSTEM + _USER,
    "begin_system": _SYSTEM,
    "after_system": _USER,
    "answer": _ASSISTANT,
    "last_answer": _ASSISTANT,
    "next_question": END_OF_TEXT + _USER,
    "end": END_OF_TEXT,
    "open_end": "",
    "stripped": (("nothing", "nothing"),) * len(ROLES),
}
# The project's own. In "text" markers of roles are plain text.
TEMPLATES = {
    "control": ChatTemplate(**_LITERALS, controls=(*ROLE_MARKERS.values(), END_OF_TEXT)),
    "text": ChatTemplate(**_LITERALS, controls=(END_OF_TEXT,)),
}
MESSAGE_FIELDS = ("role", "content", "weight")

# Not white space, nor one of the control, format and filler characters that show nothing.
_VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)

Template = Literal["control", "text"] | ChatTemplate | None


def chat_pieces(messages: Messages, template: Template) -> list[Piece]:
    """The pieces of a conversation for training: `<|system|>S<|user|>U<|assistant|>A<|endoftext|><|user|>...`.

    Answers and the end-of-text after each are supervised, unless their weight is 0. In the template "control" all
    markers are control tokens. In "text" only end-of-text is one: all between two answers is one text, and a message
    that contains a marker is refused. In a model's own template the special tokens in its literals are control tokens.
    Answers are encoded as they are generated: by themselves.
    """
    check_messages(messages, needs_answer=True)
    return _lay_out(messages, template)


def prompt_pieces(messages: Messages, template: Template) -> list[Piece]:
    """The pieces of a conversation up to where the assistant starts, a prefix of `chat_pieces` with the answer."""
    check_messages(messages)
    if messages[-1]["role"] != "user":
        raise UserError(f"a prompt ends with a user message, this one with the role '{messages[-1]['role']}'")
    return _lay_out(messages, template, answer_next=True)


def _lay_out(messages: Messages, template: Template, answer_next: bool = False) -> list[Piece]:
    if template is None:
        raise UserError("there is no chat template: this model completes plain text")
    if template == "text":
        _check_no_markers(messages)
    return TEMPLATES.get(template, template).pieces(messages, answer_next)


def _check_no_markers(messages: Messages) -> None:
    for index, message in enumerate(messages):
        for marker in (*ROLE_MARKERS.values(), END_OF_TEXT):
            if marker in message["content"]:
                raise UserError(
                    f'messages[{index}].content contains {marker}, which the template "text" can\'t tell from '
                    'its own markers; take it out or use the template "control"'
                )


def check_messages(messages: object, needs_answer: bool = False, places: Sequence[str] = ()) -> None:
    """Checks for an optional system message, then user and assistant in turn, none of them empty.

    A message may have a weight: 0 or 1 for the assistant's, 0 for others; null is none. With `needs_answer`, there must
    be an answer whose weight is not 0. An error names a message by its entry in `places`, or as "messages[0]".
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UserError('messages must be a list of at least one {"role": ..., "content": ...}')
    expected = ("system", "user")
    for index, message in enumerate(messages):
        where = places[index] if places else f"messages[{index}]"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise UserError(f'{where} must be an object with "role" and "content"')
        role = message["role"]
        if role not in expected:
            raise UserError(
                f"{where} has the role {shown(role)} where {' or '.join(map(repr, expected))} is due: "
                "an optional system message, then user and assistant in turn"
            )
        if message.get("tool_calls"):
            raise UserError(f"{where} has tool_calls: only text can be used")
        check_content(message["content"], f"{where}.content")
        weight, allowed = message.get("weight"), (0, 1) if role == "assistant" else (0,)
        if weight is not None and (type(weight) not in (int, float) or weight not in allowed):
            raise UserError(
                f"{where}.weight is {shown(weight)}; it must be {' or '.join(map(str, allowed))} "
                f"in a message of the role '{role}'"
            )
        expected = ("assistant",) if role == "user" else ("user",)
    if needs_answer and not any(map(is_supervised, messages)):
        raise UserError("there is nothing to learn: messages need at least one of the assistant whose weight is not 0")


def check_content(content: object, where: str) -> None:
    """Raises: UserError, naming `where`, if a content is not a string that says something."""
    if not isinstance(content, str):
        raise UserError(f"{where} must be a string, not {type(content).__name__}")
    check_not_blank(content, where)
    check_unicode(content, where)


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
    return _VISIBLE.search(text) is None


def check_not_blank(text: str, where: str) -> None:
    """Raises: UserError, naming `where`, if a text has no visible character."""
    if is_blank(text):
        raise UserError(f"{where} is empty: it has no character that can be seen")


def check_unicode(text: str, where: str) -> None:
    """Raises: UserError, naming `where`, if a text holds half a surrogate pair, which has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid Unicode: a lone surrogate at character {error.start}") from None


def parse_chat(line: object, needs_answer: bool = True) -> list[dict[str, Any]]:
    """The messages of a chat-jsonl line: `{"messages": [...]}` or `{"prompt": ..., "completion": ...}`."""
    if isinstance(line, dict) and "messages" in line:
        return read_messages(line["messages"], needs_answer)
    if not (isinstance(line, dict) and "prompt" in line and "completion" in line):
        raise UserError('a line must be an object with "messages", or with "prompt" and "completion"')
    check_content(line["prompt"], "prompt")
    check_content(line["completion"], "completion")
    return [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["completion"]}]


def read_messages(messages: object, needs_answer: bool = False) -> list[dict[str, Any]]:
    """Checks messages from a file; returns their known fields that aren't null, and parts of text as one text."""
    if isinstance(messages, list):
        messages = [join_parts(message, f"messages[{index}].content") for index, message in enumerate(messages)]
    check_messages(messages, needs_answer)
    return [
        {field: message[field] for field in MESSAGE_FIELDS if message.get(field) is not None} for message in messages
    ]


def join_parts(message: object, where: str) -> object:
    """The message, with a content that is a list of parts as one text: nothing comes between them."""
    if not isinstance(message, Mapping) or not isinstance(parts := message.get("content"), list):
        return message
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UserError(f'{where}[{index}] is {shown(part)}; only {{"type": "text", "text": "..."}} can be used')
    return {**message, "content": "".join(part["text"] for part in parts)}
