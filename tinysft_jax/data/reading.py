"""Files as streams of lines, records or JSON values, of which none is ever held that is longer than it may be."""

import codecs
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

from tinysft_jax.console import UserError

# More than any book, chat or story has. What is longer lacks its separators.
MAX_BYTES = 8 << 20
TOO_LONG = f"longer than {MAX_BYTES >> 20} MiB"

_CHUNK = 1 << 20

_DECODER = json.JSONDecoder()
# Between JSON values, and before one. Byte-order marks stand in the middle of files that were put together.
_SPACE = re.compile("[ \t\r\n\ufeff]*")
_MARKS = re.compile(b"(?:\xef\xbb\xbf)*")


class Piece(NamedTuple):
    """A line or record of a file.

    Attributes:
      line: the number of its first line.
      content: its bytes; None if they are too many.
    """

    line: int
    content: bytes | None


class Value(NamedTuple):
    """The text of a JSON value of a file.

    Attributes:
      place: where it stands, for the user: its line, and in an array its number too.
      number: that of its line, or in an array its own, from 1.
      content: its bytes; None if they are too many.
    """

    place: str
    number: int
    content: bytes | None


def read_lines(file: BufferedIOBase, max_bytes: int = MAX_BYTES) -> Iterator[Piece]:
    """Yields each line with its line end; of a line that is too long, nothing is kept."""
    number = 0
    while content := file.readline(max_bytes + 1):
        number += 1
        too_long = len(content) > max_bytes
        while len(content) > max_bytes and not content.endswith(b"\n"):
            content = file.readline(max_bytes + 1)
        yield Piece(number, None if too_long else content)


def read_records(file: BufferedIOBase, separator: bytes, max_bytes: int = MAX_BYTES) -> Iterator[Piece]:
    """Yields what stands between separators, blank or not; of a record that is too long, nothing is kept."""
    line, pending, too_long, dropped_lines = 1, b"", False, 0
    while chunk := file.read(_CHUNK):
        *ended, pending = (pending + chunk).split(separator)
        for content in ended:
            yield Piece(line, None if too_long or len(content) > max_bytes else content)
            line += dropped_lines + content.count(b"\n")
            too_long, dropped_lines = False, 0
        # A part of a separator may be at the end.
        if too_long or len(pending) >= max_bytes + len(separator):
            too_long = True
            dropped = max(len(pending) - len(separator) + 1, 0)
            dropped_lines += pending.count(b"\n", 0, dropped)
            pending = pending[dropped:]
    if pending or too_long:
        yield Piece(line, None if too_long or len(pending) > max_bytes else pending)


def holds_json(file: BufferedIOBase) -> bool:
    """Whether a file begins with a JSON object or an array, and not just with a bracket, as text may."""
    start = _beginning(file)
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


def opens_json(file: BufferedIOBase) -> bool:
    """Whether a file begins with a bracket as JSON does."""
    return _beginning(file).startswith(("[", "{"))


def read_json(file: BufferedIOBase, path: Path) -> Iterator[Value]:
    """Yields the lines that aren't blank or, where the file begins with an array, the array's elements.

    Args:
      file: to read from its start.
      path: its name, for the user.

    Raises:
      UserError: if an object spans lines and is in no array, or if an array can't be read on.
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
    for line, content in read_lines(file):
        content = content and content[_MARKS.match(content).end() :]
        if content is None or content.strip():
            yield Value(str(line), line, content)


def _beginning(file: BufferedIOBase) -> str:
    """The file's text from its first character on that isn't blank; as much of it as a line may have."""
    text = file.read(MAX_BYTES).decode("utf-8", "replace")
    file.seek(0)
    return text[_after_space(text, 0) :]


def _after_space(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()


def _object_length(text: str) -> int:
    """Of the JSON object that the text begins with; 0 if it begins with none, or words follow on the same line."""
    if not text.startswith("{"):
        return 0
    try:
        _, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return 0
    return end if text[end:].partition("\n")[0].strip()[:1] in ("", "{", ",") else 0


def _read_elements(file: BufferedIOBase, path: Path) -> Iterator[Value]:
    """Yields the elements of an array; of several arrays, one after the other, if files were put together."""
    text, number = _Window(file), 0
    while opening := text.take_sign():
        if opening != "[":
            raise UserError(f"{path}:{text.line}: not valid JSON: something follows the array")
        sign = "," if text.next_sign() != "]" else text.take_sign()
        while sign == ",":
            number += 1
            text.next_sign()
            place = f"{text.line}, element {number}"
            try:
                content = text.take_value().encode("utf-8", "surrogateescape")
            except UserError as error:
                raise UserError(f"{path}:{place}: {error}") from None  # where the next one begins is unknown
            if (sign := text.take_sign()) not in (",", "]"):
                raise UserError(f"{path}:{place}: not valid JSON: neither a comma nor a bracket follows it")
            yield Value(place, number, content if len(content) <= MAX_BYTES else None)


class _Window:
    """The text of a file around the place where it is read.

    Bytes that are not UTF-8 become lone surrogates, so that what stands beside them can be read.

    Attributes:
      line: the number of the line at that place.
    """

    def __init__(self, file: BufferedIOBase):
        self.line = 1
        self._file, self._text, self._place = file, "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def next_sign(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._move(_after_space(self._text, self._place))
            if self._place < len(self._text) or not self._read_on():
                return self._text[self._place :][:1]

    def take_sign(self) -> str:
        """Moves behind `next_sign()`, and returns it."""
        sign = self.next_sign()
        self._move(self._place + len(sign))
        return sign

    def take_value(self) -> str:
        """Moves behind the JSON value that begins here, and returns its text.

        Raises:
          UserError: if none does, or it is too long.
        """
        while True:
            start = self._place
            try:
                _, end = _DECODER.raw_decode(self._text, start)
            except (ValueError, RecursionError) as error:
                too_long = len(self._text) - start > MAX_BYTES
                if too_long or isinstance(error, RecursionError) or not self._read_on():
                    problem = f"not valid JSON, or {TOO_LONG}" if too_long else "not valid JSON"
                    raise UserError(f"{problem}: {getattr(error, 'msg', error)}") from None
                continue
            if end < len(self._text) or not self._read_on():  # a number might go on
                self._move(end)
                return self._text[start:end]

    def _move(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def _read_on(self) -> bool:
        """Reads as much again as is left; false at the file's end."""
        left = self._text[self._place :]
        chunk = self._file.read(max(_CHUNK, len(left)))
        self._text, self._place = left + self._decoder.decode(chunk, final=not chunk), 0
        return bool(chunk)
