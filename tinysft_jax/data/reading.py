"""Streams of the records or JSON values of a file. None longer than MAX_BYTES is held in memory."""

import codecs
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

from tinysft_jax.console import UserError, named

# Longer than any book, chat or story: what exceeds it lacks separators.
MAX_BYTES = 8 << 20
TOO_LONG = f"longer than {MAX_BYTES >> 20} MiB"

# The place of a JSON value for messages (its line, and in an array its number as well), the number of its line or
# element, from 1, and its bytes (None: too long).
Value = tuple[str, int, bytes | None]

_CHUNK = 1 << 20
_DECODER = json.JSONDecoder()
# Before and between JSON values. Files that were concatenated hold byte-order marks inside.
_SPACE = re.compile("[ \t\r\n\ufeff]*")
_MARKS = re.compile(b"(?:\xef\xbb\xbf)*")


def read_records(
    file: BufferedIOBase, separator: bytes, max_bytes: int = MAX_BYTES
) -> Iterator[tuple[int, bytes | None]]:
    """Yields what is between separators, even if blank: the line where it begins, and its bytes (None: too long)."""
    lines_of_separator = separator.count(b"\n")
    line, pending, too_long, dropped_lines = 1, b"", False, 0
    while chunk := file.read(_CHUNK):
        *ended, pending = (pending + chunk).split(separator)
        for content in ended:
            yield line, None if too_long or len(content) > max_bytes else content
            line += dropped_lines + content.count(b"\n") + lines_of_separator
            too_long, dropped_lines = False, 0
        if too_long or len(pending) >= max_bytes + len(separator):
            too_long = True
            dropped = max(len(pending) - len(separator) + 1, 0)  # a separator may have begun at the end
            dropped_lines += pending.count(b"\n", 0, dropped)
            pending = pending[dropped:]
    if pending or too_long:
        yield line, None if too_long or len(pending) > max_bytes else pending


def is_json(file: BufferedIOBase, named_so: bool) -> bool:
    """Whether a file begins with a JSON object or array. With the name of one (`named_so`), a bracket is enough."""
    start = _beginning(file)
    if named_so and start.startswith(("[", "{")):
        return True
    if not start.startswith("["):
        return _object_length(start) > 0
    try:
        first, end = _DECODER.raw_decode(start, _after_space(start, 1))
        if isinstance(first, dict | list):
            return start[_after_space(start, end) :][:1] in (",", "]")
        # "[1] Once upon a time" is text, and so is "[1, 2] are numbers".
        _, end = _DECODER.raw_decode(start)
    except (ValueError, RecursionError):
        return False
    return not start[end:].partition("\n")[0].strip()


def read_json(file: BufferedIOBase, path: Path) -> Iterator[Value]:
    """Yields the lines that aren't blank or, if the file begins with an array, the array's elements.

    Raises: UserError, naming `path`, if an object outside an array spans lines, or an array is malformed.
    """
    start = _beginning(file)
    if start.startswith("["):
        yield from _read_elements(file, path)
        return
    if "\n" in start[: _object_length(start)]:
        raise UserError(
            f"{path} holds an object that spans lines; give each object a line of its own, as jq -c . does, "
            "or put all of them into an array"
        )
    for line, content in read_records(file, b"\n"):
        content = content and content[_MARKS.match(content).end() :]
        if content is None or content.strip():
            yield str(line), line, content


def _beginning(file: BufferedIOBase) -> str:
    """The start of the file's text without leading white space, up to MAX_BYTES."""
    text = file.read(MAX_BYTES).decode("utf-8", "replace")
    file.seek(0)
    return text[_after_space(text, 0) :]


def _after_space(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()


def _object_length(text: str) -> int:
    """The length of the JSON object at the start of a text; 0 if there is none, or words follow on its line."""
    try:
        _, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return 0
    return end if text.startswith("{") and text[end:].partition("\n")[0].strip()[:1] in ("", "{", ",") else 0


def _read_elements(file: BufferedIOBase, path: Path) -> Iterator[Value]:
    """Yields the elements of an array, or of several if files were concatenated."""
    text, number = _Text(file), 0
    while opening := text.take():
        if opening != "[":
            raise UserError(f"{path}:{text.line}: not valid JSON: something follows the array")
        separator = text.take() if text.peek() == "]" else ","
        while separator == ",":
            number += 1
            text.peek()
            place = f"{text.line}, element {number}"
            with named(f"{path}:{place}"):  # the start of what follows a malformed value is unknown
                content = text.take_value().encode("utf-8", "surrogateescape")
            if (separator := text.take()) not in (",", "]"):
                raise UserError(f"{path}:{place}: not valid JSON: neither a comma nor a bracket follows it")
            yield place, number, content if len(content) <= MAX_BYTES else None


class _Text:
    """A cursor in a file's text, of which only a part is in memory.

    Bytes that are not UTF-8 become lone surrogates, so that the text beside them can be read.
    """

    def __init__(self, file: BufferedIOBase):
        self.line = 1  # of the cursor
        self._file, self._text, self._place = file, "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._move(_after_space(self._text, self._place))
            if self._place < len(self._text) or not self._read_more():
                return self._text[self._place :][:1]

    def take(self) -> str:
        """Returns `peek()` and moves past it."""
        character = self.peek()
        self._move(self._place + len(character))
        return character

    def take_value(self) -> str:
        """Returns the JSON value at the cursor and moves past it. Raises: UserError, if it is malformed or too long."""
        while True:
            start = self._place
            try:
                _, end = _DECODER.raw_decode(self._text, start)
            except (ValueError, RecursionError) as error:
                too_long = len(self._text) - start > MAX_BYTES
                if too_long or isinstance(error, RecursionError) or not self._read_more():
                    problem = f"not valid JSON, or {TOO_LONG}" if too_long else "not valid JSON"
                    raise UserError(f"{problem}: {getattr(error, 'msg', error)}") from None
                continue
            if end < len(self._text) or not self._read_more():  # a number might not be complete
                self._move(end)
                return self._text[start:end]

    def _move(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def _read_more(self) -> bool:
        """Reads at least as much as is left of the text; false at the end of the file."""
        left = self._text[self._place :]
        chunk = self._file.read(max(_CHUNK, len(left)))
        self._text, self._place = left + self._decoder.decode(chunk, final=not chunk), 0
        return bool(chunk)
