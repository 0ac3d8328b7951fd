"""Files as streams of lines or records, of which none is ever held that is longer than it may be."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

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


def read_lines(file: BinaryIO, max_bytes: int = MAX_BYTES) -> Iterator[Piece]:
    """Yields each line with its line end; of a line that is too long, nothing is kept."""
    number = 0
    while content := file.readline(max_bytes + 1):
        number += 1
        too_long = len(content) > max_bytes
        while len(content) > max_bytes and not content.endswith(b"\n"):
            content = file.readline(max_bytes + 1)
        yield Piece(number, None if too_long else content)


def read_records(file: BinaryIO, separator: bytes, max_bytes: int = MAX_BYTES) -> Iterator[Piece]:
    """Yields what stands between separators, blank or not; of a record that is too long, nothing is kept."""
    line, pending, too_long = 1, b"", False
    while chunk := file.read(_CHUNK):
        *ended, pending = (pending + chunk).split(separator)
        for content in ended:
            yield Piece(line, None if too_long or len(content) > max_bytes else content)
            line += content.count(b"\n")
            too_long = False
        if too_long or len(pending) > max_bytes:
            too_long = True
            # A part of a separator may be at the end.
            dropped = max(len(pending) - len(separator) + 1, 0)
            line += pending.count(b"\n", 0, dropped)
            pending = pending[dropped:]
    if pending or too_long:
        yield Piece(line, None if too_long else pending)
