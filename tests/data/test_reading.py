"""Records and JSON values of a file, never held when they are too long."""

import io
import json
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.data import reading
from tinysft_jax.data.reading import read_json, read_records

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


@given(PARTS, st.integers(1, 8), st.integers(1, 12))
def test_lines_are_records_too(content, chunk, max_bytes):
    lines = content.splitlines()
    expected = [(i, line if len(line) <= max_bytes else None) for i, line in enumerate(lines, 1)]
    with mock.patch.object(reading, "_CHUNK", chunk):
        assert list(read_records(io.BytesIO(content), b"\n", max_bytes)) == expected


@given(
    st.lists(st.recursive(st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)), max_size=6),
    st.sampled_from([None, 0, 2]),
    st.integers(1, 8),
)
def test_elements_are_those_of_the_array(elements, indent, chunk):
    """However it is laid out and cut into chunks, also where two files were put together; with their lines."""
    whole = json.dumps(elements, indent=indent, ensure_ascii=False).encode()
    with mock.patch.object(reading, "_CHUNK", chunk):
        found = list(read_json(io.BytesIO(b"\xef\xbb\xbf" + whole + b"\n\xef\xbb\xbf" + whole), Path("a.json")))
    assert [json.loads(content) for *_, content in found] == elements * 2
    assert [number for _, number, _ in found] == [*range(1, 2 * len(elements) + 1)]
    if indent is None:
        assert [place.split(",")[0] for place, *_ in found] == ["1"] * len(elements) + ["2"] * len(elements)


@pytest.mark.parametrize("separator", [b"\n", SEPARATOR])
def test_a_file_without_a_separator_takes_no_more_memory_than_a_record_may(tmp_path: Path, separator):
    with (tmp_path / "a").open("w+b") as file:
        file.truncate(64 << 20)
        tracemalloc.start()
        assert list(read_records(file, separator, 1 << 20)) == [(1, None)]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20
