"""TinyStories-Instruct text → story records.

A record ends at `<|endoftext|>`, on a line of its own or glued to text. A line that starts with one of five headers at
its first column opens that field, which runs to the next such line or to the record's end. Fields come in any order and
any of them may be missing. Where a header occurs twice, the first field that isn't empty counts: what is usually
repeated is the instruction, and the story must not swallow it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tinysft_jax.chat import is_blank

SEPARATOR = "<|endoftext|>"

_HEADER = re.compile(r"^(Features|Words|Summary|Random sentence|Story):", re.MULTILINE)


@dataclass(frozen=True)
class StoryRecord:
    """One story with the instruction it was written for.

    Attributes:
      features: of Dialogue, BadEnding, Twist, Foreshadowing, MoralValue and Conflict those that the story has. None
        where the record has no such line: then nothing is known, also not that the ending is happy.
      words: the words that the story was asked to use; may be empty.
      summary: the summary, or None.
      random_sentence: the sentence that the story was asked to contain, or None.
      story: the story, never empty.
    """

    features: tuple[str, ...] | None
    words: tuple[str, ...]
    summary: str | None
    random_sentence: str | None
    story: str


def parse_records(lines: Iterable[str], skipped: Counter[str] | None = None) -> Iterator[StoryRecord]:
    """Yields the records of TinyStories-Instruct text in order; holds one at a time.

    Args:
      lines: an open file or any lines, each with or without its line end.
      skipped: counts the records that were left out, by reason ("no story").
    """
    for text in split_records(lines):
        record = parse_record(text)
        if record is not None:
            yield record
        elif skipped is not None:
            skipped["no story"] += 1


def split_records(lines: Iterable[str]) -> Iterator[str]:
    """Yields the text of each record, cleaned and not parsed; `lines` as for `parse_records`."""
    if isinstance(lines, str):
        raise TypeError("lines must be an iterable of lines, not one string")
    pending: list[str] = []
    for line in lines:
        *ended, rest = line.split(SEPARATOR)
        for end in ended:
            if text := clean_record("".join([*pending, end])):
                yield text
            pending.clear()
        if rest:
            pending.append(rest if rest.endswith("\n") else rest + "\n")
        elif not ended:
            pending.append("\n")  # an empty line that came without its line end
    if text := clean_record("".join(pending)):
        yield text


def clean_record(text: str) -> str:
    r"""A record without empty lines around it, its line ends as `\n`; empty if it is blank."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # A byte-order mark opens a file, and is anywhere in a record where files were put together.
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
