"""Chat templates: the literal text between contents, and the special tokens in it."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tinysft_jax.console import UserError
from tinysft_jax.files import TEXT, TEXT_OR_NULL, TEXTS, Kind, Schema, check

# What a template strips from an end of a content: nothing, line breaks, or all white space.
STRIPPED = {"nothing": "", "newlines": "\n", "whitespace": None}
ROLES = ("system", "user", "assistant", "last_assistant")

Messages = Sequence[Mapping[str, Any]]


class Piece(NamedTuple):
    """A part of a conversation that is encoded on its own; so the supervision mask is built along with the ids."""

    text: str  # to encode, or the spelling of a control token
    control: bool  # whether it is a control token
    supervised: bool
    answer: bool = False  # whether it is the text of an answer


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The literal text of a template, by its place, as it is rendered; special tokens are spelled in it.

    `begin_system` and `after_system` are None if the template takes no system message. `controls` are the special
    tokens in the literals. `stripped` has what each role of `ROLES` is stripped of, on the left and on the right.
    """

    begin: str  # before the first question, where there is no system message; with the default one, if there is one
    begin_system: str | None  # before a system message
    after_system: str | None  # between a system message and the first question
    answer: str  # between a question and its answer, where another question follows
    last_answer: str  # between a question and its answer, where nothing follows; a prompt ends with it
    next_question: str  # between an answer and the next question
    end: str  # after the last answer
    open_end: str  # after a question that is the last message
    controls: tuple[str, ...]
    stripped: tuple[tuple[str, str], ...]

    def __post_init__(self):
        if not all(any(piece.control for piece in self._literal(text)) for text in (self.next_question, self.end)):
            raise UserError("the chat template has no special token that ends an answer")

    @property
    def stops(self) -> set[str]:
        """The special tokens that end an answer: the first after it."""
        return {next(p.text for p in self._literal(text) if p.control) for text in (self.next_question, self.end)}

    def pieces(self, messages: Messages, answer_next: bool = False) -> list[Piece]:
        """The pieces of a conversation; of a prompt (`answer_next`) up to where the answer begins.

        All text between two special tokens is one piece, except answers. Raises: UserError, if there is a system
        message and the template takes none.
        """
        pieces: list[Piece] = []
        for new in self._parts(messages, answer_next):
            last = pieces[-1] if pieces else new
            if pieces and not (last.control or last.answer or new.control or new.answer):
                pieces[-1] = last._replace(text=last.text + new.text)
            else:
                pieces.append(new)
        return pieces

    def _parts(self, messages: Messages, answer_next: bool) -> Iterator[Piece]:
        before, supervised = "", False  # the role of the message before, and whether it is learned
        for number, message in enumerate(messages, start=1):
            role, is_last = message["role"], number == len(messages)
            if role == "system" and self.begin_system is None:
                raise UserError("the model's chat template takes no system message; put it into the first question")
            if before == "assistant":
                yield from self._after_answer(self.next_question, supervised)
            elif before == "user":
                yield from self._literal(self.last_answer if is_last else self.answer)
            else:
                first = self.begin_system if role == "system" else self.begin
                yield from self._literal((self.after_system if before else first) or "")
            before, supervised = role, is_supervised(message)
            kind = "last_assistant" if is_last and role == "assistant" else role
            left, right = (STRIPPED[name] for name in self.stripped[ROLES.index(kind)])
            yield Piece(message["content"].lstrip(left).rstrip(right), False, supervised, role == "assistant")
        if before == "assistant":
            yield from self._after_answer(self.end, supervised)
        else:
            yield from self._literal(self.last_answer if answer_next else self.open_end)

    def _literal(self, text: str) -> list[Piece]:
        return _split(text, self.controls)

    def _after_answer(self, text: str, supervised: bool) -> Iterator[Piece]:
        """Up to its first special token a literal ends the answer before it."""
        for piece in self._literal(text):
            yield piece._replace(supervised=supervised)
            supervised = supervised and not piece.control

    def question(self, sections: Sequence[str]) -> str:
        """The last user message of a prompt that was split at its special tokens; the text between them."""
        after = self._literal(self.last_answer)
        section = sections[-1 - sum(piece.control for piece in after)]
        section = section.removesuffix("".join(piece.text for piece in after[:1] if not piece.control))
        ends = [self._literal(text or "")[-1:] for text in (self.begin, self.after_system, self.next_question)]
        spelled = sorted({piece.text for end in ends for piece in end if not piece.control}, key=len, reverse=True)
        for before in spelled:
            if section.startswith(before):
                return section.removeprefix(before)
        return section.rpartition(spelled[-1])[2] if spelled else section  # a system message is before it

    def to_json(self) -> dict[str, Any]:
        stripped = {role: list(ends) for role, ends in zip(ROLES, self.stripped, strict=True)}
        return dataclasses.asdict(self) | {"controls": list(self.controls), "stripped": stripped}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ChatTemplate":
        """Raises: UserError, if a part is missing or invalid."""
        check(content, _SCHEMA, "chat_template")
        fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
        stripped = tuple((left, right) for left, right in (content["stripped"][role] for role in ROLES))
        return cls(**fields | {"controls": tuple(content["controls"]), "stripped": stripped})


@functools.lru_cache(maxsize=256)
def _split(literal: str, controls: tuple[str, ...]) -> list[Piece]:
    """The special tokens of a literal, of two that begin at one place the longer, and the text between them."""
    spelled = "|".join(map(re.escape, sorted(controls, key=len, reverse=True)))
    parts = re.split(f"({spelled})", literal) if controls else [literal]
    return [Piece(part, part in controls, False) for part in parts if part]


def is_supervised(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _are_ends(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) and x in STRIPPED for x in value)


_ENDS: Kind = (f"two of {', '.join(STRIPPED)}", _are_ends)
_SCHEMA: Schema = {
    **dict.fromkeys(("begin", "answer", "last_answer", "next_question", "end", "open_end"), TEXT),
    **dict.fromkeys(("begin_system", "after_system"), TEXT_OR_NULL),
    "controls": TEXTS,
    "stripped": dict.fromkeys(ROLES, _ENDS),
}
