"""Conversations: their grammar, and the chat templates that lay them out for a tokenizer.

A conversation becomes a list of pieces. Each piece is encoded on its own and knows whether it is supervised, so the
supervision mask is built beside the ids and never has to be searched for in them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from tinysft_jax.errors import UserError, shown

DEFAULT_SYSTEM = "You are a helpful assistant that answers questions about stories."
END_OF_TEXT = "<|endoftext|>"
ROLE_MARKERS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
TEMPLATES = ("control", "text")

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
    string with what stands between two answers, and only end-of-text is a token of its own.

    Raises:
      UserError: if `messages` is no conversation with an answer, or forges a marker in the template "text".
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

    Args:
      messages: anything.
      needs_answer: whether at least one assistant message must be there.

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
        due = ("assistant",) if role == "user" else ("user",)
    if needs_answer and all(message["role"] != "assistant" for message in messages):
        raise UserError("messages must hold at least one assistant message; there is nothing to learn")


def parse_chat(line: object) -> list[dict[str, str]]:
    """The messages of a decoded chat-jsonl line.

    Args:
      line: `{"messages": [{"role": ..., "content": ...}, ...]}` or `{"prompt": ..., "completion": ...}`. Further keys
        are ignored.

    Raises:
      UserError: if it is neither, or its messages are no conversation with an answer.
    """
    if isinstance(line, dict) and "messages" in line:
        messages = line["messages"]
    elif isinstance(line, dict) and "prompt" in line and "completion" in line:
        _check_content(line["prompt"], "prompt")
        _check_content(line["completion"], "completion")
        messages = [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["completion"]}]
    else:
        raise UserError('a line must be an object with "messages", or with "prompt" and "completion"')
    check_messages(messages, needs_answer=True)
    return [{"role": message["role"], "content": message["content"]} for message in messages]


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
    pieces = []
    for message in messages:
        answer = message["role"] == "assistant"
        pieces.append(Piece(ROLE_MARKERS[message["role"]], control=True, supervised=False))
        pieces.append(Piece(message["content"], control=False, supervised=answer))
        if answer:
            pieces.append(Piece(END_OF_TEXT, control=True, supervised=True))
    if answer_next:
        pieces.append(Piece(ROLE_MARKERS["assistant"], control=True, supervised=False))
    return pieces if template == "control" else list(_join_prompts(pieces))


def _join_prompts(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Makes one text of everything between two answers, as checkpoints with markers in plain text were trained."""
    for supervised, group in groupby(pieces, key=lambda piece: piece.supervised):
        if supervised:
            yield from group
        else:
            yield Piece("".join(piece.text for piece in group), control=False, supervised=False)


def _refuse_forgery(messages: Messages) -> None:
    for index, message in enumerate(messages):
        for marker in (*ROLE_MARKERS.values(), END_OF_TEXT):
            if marker in message["content"]:
                raise UserError(
                    f'messages[{index}].content contains {marker}, which the template "text" can\'t tell from '
                    'its own markers; take it out or use the template "control"'
                )
