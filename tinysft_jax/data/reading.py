"""Files as streams of lines or records, of which none is ever held that is longer than it may be."""

from collections.abc import Iterator
from io import BufferedIOBase
from typing import NamedTuple

# More than any book, chat or story has. What is longer lacks its separators.
MAX_BYTES = 8 << 20
TOO_LONG = f"longer than {MAX_BYTES >> 20} MiB"

_CHUNK = 1 << 20


class Piece(NamedTuple):
    """A line or record of a file.

    Attributes:
      line: the number of its first line.
      content: its bytes; None if they are too many.
    """

    line: int
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
