"""Lines and records of a file, never held when they are too long."""

import io
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.data import reading
from tinysft_jax.data.reading import read_lines, read_records

SEPARATOR = b"<|>"
PARTS = st.lists(st.sampled_from([b"a", b"\n", b"<", b"|", SEPARATOR, b"bbb"]), max_size=40).map(b"".join)


@given(PARTS, st.integers(1, 8), st.integers(1, 12))
def test_records_are_what_splitting_the_whole_gives(content, chunk, max_bytes):
    """However the file is cut into chunks; with the number of the line on which each begins."""
    expected, line = [], 1
    for record in content.split(SEPARATOR):
        expected.append((line, record if len(record) <= max_bytes else None))
        line += record.count(b"\n")
    if not content.split(SEPARATOR)[-1]:
        expected.pop()
    with mock.patch.object(reading, "_CHUNK", chunk):
        assert list(read_records(io.BytesIO(content), SEPARATOR, max_bytes)) == expected


@given(PARTS, st.integers(1, 12))
def test_lines_are_what_splitting_the_whole_gives(content, max_bytes):
    lines = content.splitlines(keepends=True)
    expected = [(i, line if len(line) <= max_bytes else None) for i, line in enumerate(lines, 1)]
    assert list(read_lines(io.BytesIO(content), max_bytes)) == expected


@pytest.mark.parametrize("read", [read_lines, lambda file, n: read_records(file, SEPARATOR, n)])
def test_a_file_without_an_end_of_line_takes_no_more_memory_than_a_line_may(tmp_path: Path, read):
    with (tmp_path / "a").open("w+b") as file:
        file.truncate(64 << 20)
        tracemalloc.start()
        assert [piece.content for piece in read(file, 1 << 20)] == [None]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20
