"""TinyStories-Instruct text → story records.

A record ends at `<|endoftext|>`, on a line of its own or after other text. A line that starts with one of five headers
begins a field, which ends at the next such line. Fields come in any order and any of them may be missing. Where a
header occurs twice, the first field that isn't empty counts: what is repeated is the instruction, after the story.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tinysft_jax.chat import is_blank

SEPARATOR = "<|endoftext|>"

_HEADER = re.compile(r"^(Features|Words|Summary|Random sentence|Story):", re.MULTILINE)


@dataclass(frozen=True)
class StoryRecord:
    """One story with the instruction it was written for."""

    # Of Dialogue, BadEnding, Twist, Foreshadowing, MoralValue and Conflict those that the story has. None where the
    # record has no such line: then none is known to be missing, and the ending may be bad.
    features: tuple[str, ...] | None
    words: tuple[str, ...]  # that the story was asked to use; may be empty
    summary: str | None
    random_sentence: str | None  # that the story was asked to contain
    story: str  # never empty


def parse_records(lines: Iterable[str]) -> Iterator[StoryRecord]:
    """Yields the records of TinyStories-Instruct text that have a story, in order; holds one at a time.

    `lines` is an open file, or any lines with or without their line ends.
    """
    for text in split_records(lines):
        if (record := parse_record(text)) is not None:
            yield record


def split_records(lines: Iterable[str]) -> Iterator[str]:
    """Yields the text of each record, cleaned and not parsed; `lines` as for `parse_records`."""
    if isinstance(lines, str):
        raise TypeError("lines must be an iterable of lines, not one string")
    pending: list[str] = []
    for line in itertools.chain(lines, [SEPARATOR]):
        *ended, rest = line.split(SEPARATOR)
        for end in ended:
            if text := clean_record("".join([*pending, end])):
                yield text
            pending.clear()
        if rest:
            pending.append(rest if rest.endswith("\n") else rest + "\n")
        elif not ended:
            pending.append("\n")  # an empty line that came without its line end


def clean_record(text: str) -> str:
    r"""A record without empty lines around it, its line ends as `\n`; empty if it is blank."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Byte-order marks: at the start of a file, and inside where files were concatenated.
    text = text.replace("\ufeff", "").strip("\n")
    return "" if is_blank(text) else text


def parse_record(text: str) -> StoryRecord | None:
    """Parses one record as `split_records` yields it; None if it has no story."""
    _, *parts = _HEADER.split(text)
    fields: dict[str, str] = {}
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        fields[name] = fields.get(name) or ("" if is_blank(content) else content.strip())
    if not fields.get("Story"):
        return None
    return StoryRecord(
        features=_items(fields["Features"]) if "Features" in fields else None,
        words=_items(fields.get("Words", "")),
        summary=fields.get("Summary") or None,
        random_sentence=fields.get("Random sentence") or None,
        story=fields["Story"],
    )


def _items(field: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in field.split(",") if not is_blank(part))
