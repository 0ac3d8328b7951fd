"""A model's own chat template, taken apart: the literal text between contents, and the special tokens in it."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tinysft_jax.console import UserError
from tinysft_jax.files import TEXT, TEXT_OR_NULL, TEXTS, Kind, Schema, check

# What a template strips from an end of a content: nothing, line breaks, or all white space.
STRIPPED = {"nothing": "", "newlines": "\n", "whitespace": None}
ROLES = ("system", "user", "assistant", "last_assistant")


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
        if not (self.controls and self._pattern.search(self.next_question) and self._pattern.search(self.end)):
            raise UserError("the chat template has no special token that ends an answer")

    @property
    def stops(self) -> set[str]:
        """The special tokens that end an answer: the first after it."""
        return {self._pattern.search(literal)[0] for literal in (self.next_question, self.end)}

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Special tokens, of two that begin at one place the longer."""
        return re.compile(f"({'|'.join(map(re.escape, sorted(self.controls, key=len, reverse=True)))})")

    def split(self, literal: str) -> list[tuple[str, bool]]:
        """The special tokens of a literal and the text between them, and whether each is a special token."""
        return [(part, part in self.controls) for part in self._pattern.split(literal) if part]

    def parts(self, messages: Sequence[Mapping[str, Any]], answer_next: bool) -> Iterable[tuple[str, str]]:
        """The rendered conversation as (kind, text): "literal", a role of `ROLES`, or "turn_end", which ends an answer.

        A prompt (`answer_next`) ends where the answer begins. Raises: UserError, if there is a system message and the
        template takes none.
        """
        roles = [message["role"] for message in messages]
        for index, (role, message) in enumerate(zip(roles, messages, strict=True)):
            is_last = index == len(messages) - 1
            before = roles[index - 1] if index else None
            if role == "system" and self.begin_system is None:
                raise UserError("the model's chat template takes no system message; put it into the first question")
            if before is None:
                yield "literal", (self.begin_system or "") if role == "system" else self.begin
            elif before == "assistant":
                yield from self._after_answer(self.next_question)
            elif before == "system":
                yield "literal", self.after_system or ""
            else:
                yield "literal", self.last_answer if is_last else self.answer
            kind = "last_assistant" if role == "assistant" and is_last else role
            left, right = (STRIPPED[name] for name in self.stripped[ROLES.index(kind)])
            yield kind, message["content"].lstrip(left).rstrip(right)
        if roles[-1] == "assistant":
            yield from self._after_answer(self.end)
        else:
            yield "literal", self.last_answer if answer_next else self.open_end

    def _after_answer(self, literal: str) -> Iterable[tuple[str, str]]:
        """Up to its first special token a literal ends the answer before it."""
        found = self._pattern.search(literal)
        yield "turn_end", literal[: found.end()]
        yield "literal", literal[found.end() :]

    def question(self, sections: Sequence[str]) -> str:
        """The last user message of a prompt that was split at its special tokens; the text between them."""
        after = self._pattern.split(self.last_answer)  # texts and special tokens in turn
        section = sections[-1 - len(after) // 2].removesuffix(after[0])
        literals = (self.begin, self.after_system or "", self.next_question)
        before = sorted({self._pattern.split(literal)[-1] for literal in literals}, key=len, reverse=True)
        first = next((text for text in before if section.startswith(text)), "")
        return section.removeprefix(first)

    def to_json(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["controls"] = list(self.controls)
        content["stripped"] = {role: list(ends) for role, ends in zip(ROLES, self.stripped, strict=True)}
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ChatTemplate":
        """Raises: UserError, if a part is missing or invalid."""
        check(content, _SCHEMA, "chat_template")
        fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
        stripped = tuple((left, right) for left, right in (content["stripped"][role] for role in ROLES))
        return cls(**fields | {"controls": tuple(content["controls"]), "stripped": stripped})


def _are_ends(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) and x in STRIPPED for x in value)


_ENDS: Kind = (f"two of {', '.join(STRIPPED)}", _are_ends)
_SCHEMA: Schema = {
    **dict.fromkeys(("begin", "answer", "last_answer", "next_question", "end", "open_end"), TEXT),
    **dict.fromkeys(("begin_system", "after_system"), TEXT_OR_NULL),
    "controls": TEXTS,
    "stripped": dict.fromkeys(ROLES, _ENDS),
}
