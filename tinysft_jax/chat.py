"""Conversations: which messages are valid, and the chat templates that turn them into pieces for the tokenizer."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tinysft_jax.chat_template import ChatTemplate
from tinysft_jax.console import UserError, shown

DEFAULT_SYSTEM = "You are a helpful assistant that answers questions about stories."
END_OF_TEXT = "<|endoftext|>"
ROLE_MARKERS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
TEMPLATES = ("control", "text")
MESSAGE_FIELDS = ("role", "content", "weight")

# Not white space, nor one of the control, format and filler characters that show nothing.
_VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)

Template = Literal["control", "text"] | ChatTemplate | None
Messages = Sequence[Mapping[str, Any]]


class Piece(NamedTuple):
    """A part of a conversation that is encoded on its own; so the supervision mask is built along with the ids."""

    text: str  # to encode, or the spelling of a control token
    control: bool  # whether it is a control token
    supervised: bool
    answer: bool = False  # whether it is the text of an answer


def chat_pieces(messages: Messages, template: Template) -> list[Piece]:
    """The pieces of a conversation for training: `<|system|>S<|user|>U<|assistant|>A<|endoftext|><|user|>...`.

    Answers and the end-of-text after each are supervised, unless their weight is 0. In the template "control" all
    markers are control tokens. In "text" only end-of-text is one: all between two answers is one text, and a message
    that contains a marker is refused. In a model's own template the special tokens in its literals are control tokens,
    and all text between two of them is one, except answers, which are encoded as they are generated: by themselves.
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
    if isinstance(template, ChatTemplate):
        return _lay_out_own(messages, template, answer_next)
    if template == "text":
        _check_no_markers(messages)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    pieces: list[Piece] = []
    prompt: list[Piece] = []  # since the last answer
    for message in messages:
        prompt.append(Piece(ROLE_MARKERS[message["role"]], control=True, supervised=False))
        if message["role"] == "assistant":
            supervised = _is_supervised(message)
            answer = [Piece(message["content"], False, supervised, answer=True), Piece(END_OF_TEXT, True, supervised)]
            pieces += _joined(prompt, template) + answer
            prompt = []
        else:
            prompt.append(Piece(message["content"], control=False, supervised=False))
    if answer_next:
        prompt.append(Piece(ROLE_MARKERS["assistant"], control=True, supervised=False))
    return pieces + _joined(prompt, template)


def _lay_out_own(messages: Messages, template: ChatTemplate, answer_next: bool) -> list[Piece]:
    pieces: list[Piece] = []
    weights = iter(_is_supervised(message) for message in messages if message["role"] == "assistant")
    supervised = False  # of the answer at hand
    for kind, text in template.parts(messages, answer_next):
        is_answer = kind in ("assistant", "last_assistant")
        supervised = next(weights) if is_answer else supervised
        spelled = template.split(text) if kind in ("literal", "turn_end") else [(text, False)]
        for part, is_control in spelled:
            new = Piece(part, is_control, supervised and (is_answer or kind == "turn_end"), is_answer)
            last = pieces[-1] if pieces else new
            if pieces and not (last.control or last.answer or new.control or new.answer):
                pieces[-1] = last._replace(text=last.text + part)
            else:
                pieces.append(new)
    return pieces


def _joined(prompt: list[Piece], template: Template) -> list[Piece]:
    """In "text", one piece: the checkpoints of that template were trained on prompts encoded as a whole."""
    if template == "control" or not prompt:
        return prompt
    return [Piece("".join(piece.text for piece in prompt), control=False, supervised=False)]


def _check_no_markers(messages: Messages) -> None:
    for index, message in enumerate(messages):
        for marker in (*ROLE_MARKERS.values(), END_OF_TEXT):
            if marker in message["content"]:
                raise UserError(
                    f'messages[{index}].content contains {marker}, which the template "text" can\'t tell from '
                    'its own markers; take it out or use the template "control"'
                )


def check_messages(messages: object, needs_answer: bool = False) -> None:
    """Checks for an optional system message, then user and assistant in turn, none of them empty.

    A message may have a weight: 0 or 1 for the assistant's, 0 for others; null is none. With `needs_answer`, there must
    be an answer whose weight is not 0.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UserError('messages must be a list of at least one {"role": ..., "content": ...}')
    expected = ("system", "user")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise UserError(f'{where} must be an object with "role" and "content"')
        role = message["role"]
        if role not in expected:
            raise UserError(
                f"{where} has the role {shown(role)} where {' or '.join(map(repr, expected))} is due: "
                "an optional system message, then user and assistant in turn"
            )
        _check_content(message["content"], f"{where}.content")
        weight, allowed = message.get("weight"), (0, 1) if role == "assistant" else (0,)
        if weight is not None and (type(weight) not in (int, float) or weight not in allowed):
            raise UserError(
                f"{where}.weight is {shown(weight)}; it must be {' or '.join(map(str, allowed))} "
                f"in a message of the role '{role}'"
            )
        expected = ("assistant",) if role == "user" else ("user",)
    if needs_answer and not any(map(_is_supervised, messages)):
        raise UserError("there is nothing to learn: messages need at least one of the assistant whose weight is not 0")


def _is_supervised(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _check_content(content: object, where: str) -> None:
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
        messages = line["messages"]
    elif isinstance(line, dict) and "prompt" in line and "completion" in line:
        _check_content(line["prompt"], "prompt")
        _check_content(line["completion"], "completion")
        messages = [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["completion"]}]
    else:
        raise UserError('a line must be an object with "messages", or with "prompt" and "completion"')
    check_messages(messages, needs_answer)
    return [without_unread(message) for message in messages]


def without_unread(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message's known fields, unless they are null."""
    return {field: message[field] for field in MESSAGE_FIELDS if message.get(field) is not None}


def unread_fields(line: Mapping[str, Any]) -> Iterator[str]:
    """The fields, not null, of a valid line and of its messages that `parse_chat` ignores."""
    read = ("messages",) if "messages" in line else ("prompt", "completion")
    yield from (field for field, value in line.items() if field not in read and value is not None)
    for message in line.get("messages", ()):
        for field, value in message.items():
            if field not in MESSAGE_FIELDS and value is not None:
                yield f"messages[].{field}"
