"""Conversations: their grammar, and the chat templates that lay them out for a tokenizer.

A conversation becomes a list of pieces. Each piece is encoded on its own and knows whether it is supervised, so the
supervision mask is built beside the ids and never has to be searched for in them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tinysft_jax.console import UserError, shown

DEFAULT_SYSTEM = "You are a helpful assistant that answers questions about stories."
END_OF_TEXT = "<|endoftext|>"
ROLE_MARKERS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
TEMPLATES = ("control", "text")
MESSAGE_FIELDS = ("role", "content", "weight")

# White space, and the control, format and filling characters that show nothing.
_VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)

Template = Literal["control", "text"]
Messages = Sequence[Mapping[str, Any]]


class Piece(NamedTuple):
    """A stretch of a laid out conversation.

    Attributes:
      text: what to encode, or the spelling of a control token.
      control: whether it is one control token rather than text.
      supervised: whether the model learns to predict it.
    """

    text: str
    control: bool
    supervised: bool


def chat_pieces(messages: Messages, template: Template) -> list[Piece]:
    """Lays out a conversation for training: the answers and the end-of-text after each are supervised.

    The layout is `<|system|>S<|user|>U<|assistant|>A<|endoftext|>`, and from `<|user|>` on again for every further
    turn. In the template "control" all markers are control tokens; in "text" the role markers are plain text, one
    string with what stands between two answers, and only end-of-text is a token of its own. An answer of weight 0 is
    laid out like the others, but neither it nor its end-of-text is supervised.

    Raises:
      UserError: if `messages` is no conversation with an answer to learn, or forges a marker in the template "text".
    """
    check_messages(messages, needs_answer=True)
    return _lay_out(messages, template)


def prompt_pieces(messages: Messages, template: Template) -> list[Piece]:
    """Lays out a conversation up to the place where the assistant starts to speak.

    The pieces' ids are a prefix of those of the same conversation with its answer.

    Raises:
      UserError: if `messages` is no conversation that ends with a user message, or forges a marker in "text".
    """
    check_messages(messages)
    if messages[-1]["role"] != "user":
        raise UserError(f"a prompt ends with a user message, this one with the role '{messages[-1]['role']}'")
    return _lay_out(messages, template, answer_next=True)


def check_messages(messages: object, needs_answer: bool = False) -> None:
    """Checks the grammar: an optional system message, then user and assistant in turn, none of them empty.

    A message may have a weight: 0 or 1 for the assistant's, 0 for others, or null, which says nothing.

    Args:
      messages: anything.
      needs_answer: whether an assistant message must be there whose weight is not 0.

    Raises:
      UserError: names the first message that breaks it (counted from 0) and says what is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UserError('messages must be a list of at least one {"role": ..., "content": ...}')
    due = ("system", "user")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise UserError(f'{where} must be an object with "role" and "content"')
        role = message["role"]
        if role not in due:
            raise UserError(
                f"{where} has the role {shown(role)} where {' or '.join(map(repr, due))} is due: "
                "an optional system message, then user and assistant in turn"
            )
        _check_content(message["content"], f"{where}.content")
        _check_weight(message, where)
        due = ("assistant",) if role == "user" else ("user",)
    if needs_answer and not any(map(_is_learned, messages)):
        weighted = " whose weight is not 0" if any(message["role"] == "assistant" for message in messages) else ""
        raise UserError(f"messages must hold at least one assistant message{weighted}; there is nothing to learn")


def parse_chat(line: object, needs_answer: bool = True) -> list[dict[str, Any]]:
    """The messages of a decoded chat-jsonl line.

    Args:
      line: `{"messages": [{"role": ..., "content": ..., "weight": ...}, ...]}`, where the weight may be missing, or
        `{"prompt": ..., "completion": ...}`. Of further fields, `unread_fields` tells.
      needs_answer: as of `check_messages`.

    Raises:
      UserError: if it is neither, or its messages are no conversation.
    """
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
    """A message with the fields that mean something here."""
    return {field: message[field] for field in MESSAGE_FIELDS if message.get(field) is not None}


def unread_fields(line: Mapping[str, Any]) -> Iterator[str]:
    """The fields of a line that `parse_chat` takes and of its messages that it passes over; null is nothing."""
    read = ("messages",) if "messages" in line else ("prompt", "completion")
    yield from (field for field, value in line.items() if field not in read and value is not None)
    for message in line.get("messages", ()):
        for field, value in message.items():
            if field not in MESSAGE_FIELDS and value is not None:
                yield f"messages[].{field}"


def _is_learned(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _check_weight(message: Mapping[str, Any], where: str) -> None:
    weight = message.get("weight")
    allowed = (0, 1) if message["role"] == "assistant" else (0,)
    if weight is not None and (type(weight) not in (int, float) or weight not in allowed):
        raise UserError(
            f"{where}.weight is {shown(weight)}; it must be {' or '.join(map(str, allowed))} "
            f"in a message of the role '{message['role']}'"
        )


def _check_content(content: object, where: str) -> None:
    if not isinstance(content, str):
        raise UserError(f"{where} must be a string, not {type(content).__name__}")
    check_not_blank(content, where)
    check_unicode(content, where)


def is_blank(text: str) -> bool:
    """Whether a text looks empty: it has no character that can be seen."""
    return _VISIBLE.search(text) is None


def check_not_blank(text: str, where: str) -> None:
    """Refuses text that looks empty.

    Raises:
      UserError: names `where`.
    """
    if is_blank(text):
        raise UserError(f"{where} is empty: it has no character that can be seen")


def check_unicode(text: str, where: str) -> None:
    """Refuses text with half a surrogate pair: it has no UTF-8 form, hence no tokens.

    Raises:
      UserError: names `where` and the position.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid Unicode: a lone surrogate at character {error.start}") from None


def _lay_out(messages: Messages, template: Template, answer_next: bool = False) -> list[Piece]:
    if template == "text":
        _refuse_forgery(messages)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    pieces: list[Piece] = []
    prompt: list[Piece] = []  # since the last answer
    for message in messages:
        prompt.append(Piece(ROLE_MARKERS[message["role"]], control=True, supervised=False))
        if message["role"] != "assistant":
            prompt.append(Piece(message["content"], control=False, supervised=False))
            continue
        learned = _is_learned(message)
        answer = [Piece(message["content"], False, learned), Piece(END_OF_TEXT, True, learned)]
        pieces += [*_joined(prompt, template), *answer]
        prompt = []
    if answer_next:
        prompt.append(Piece(ROLE_MARKERS["assistant"], control=True, supervised=False))
    return pieces + _joined(prompt, template)


def _joined(prompt: list[Piece], template: Template) -> list[Piece]:
    """In the template "text", what stands between two answers as one text, as its checkpoints were trained."""
    if template == "control" or not prompt:
        return prompt
    return [Piece("".join(piece.text for piece in prompt), control=False, supervised=False)]


def _refuse_forgery(messages: Messages) -> None:
    for index, message in enumerate(messages):
        for marker in (*ROLE_MARKERS.values(), END_OF_TEXT):
            if marker in message["content"]:
                raise UserError(
                    f'messages[{index}].content contains {marker}, which the template "text" can\'t tell from '
                    'its own markers; take it out or use the template "control"'
                )
