"""Rows of a parquet file, as JSON lines or plain text. It needs pyarrow."""

import itertools
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from tinysft_jax.console import UserError, import_extra, reason, shown
from tinysft_jax.data.forms import FORMS, LISTS, MEDIA
from tinysft_jax.data.reading import MAX_BYTES, TOO_LONG
from tinysft_jax.tasks.records import SEPARATOR, clean_record

# What is in memory at once: few rows, as one may have megabytes, and of a column a page or so.
_ROWS, _BUFFER = 64, 1 << 20
# The types of columns with lists and with text, as pyarrow spells them.
_LIST, _TEXT = re.compile("(large_|fixed_size_)?list"), re.compile("(dictionary<values=)?(large_)?string")


def is_parquet(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() == ".parquet"


class Rows:
    """The rows of a file, each with its place, its text and its flaw: the columns that the forms read, or "text".

    Raises: UserError, if the columns that a format needs are missing or the file is damaged.
    """

    def __init__(self, file: BufferedIOBase, path: Path, format: str):
        arrow = import_extra("pyarrow.parquet", "parquet", str(path))
        self._path, self._size, self._n_read = path, path.stat().st_size, 0
        self._errors = (arrow.ArrowException, OSError, ValueError)
        try:
            # Read ahead, a column would be in memory whole.
            settings = {"pre_buffer": False, "buffer_size": _BUFFER, "page_checksum_verification": True}
            self._file = arrow.parquet.ParquetFile(file, **settings)
            self._n_rows, schema = self._file.metadata.num_rows, self._file.schema_arrow
            types = {field.name: str(field.type) for field in schema if schema.names.count(field.name) == 1}
        except self._errors as error:
            raise self._damaged(error) from None
        forms = [form for name, form in FORMS.items() if format in ("auto", name)]
        groups = [group for form in forms for group in form.needs]
        groups += [("text",)] if format == "auto" or not forms else []
        usable = {name for name in types if (_LIST if name in LISTS else _TEXT).match(types[name])}
        found = next((group for group in groups if usable >= set(group)), None)
        if found is None:
            columns = shown([f"{name}: {type}" for name, type in types.items()])
            raise UserError(f"{path} has no column {_missing(groups, usable)}; it has {columns}")
        self.is_text = found == ("text",)
        keys = {*itertools.chain(*groups, *(form.also for form in forms)), *MEDIA} - {"text"}
        self._columns = ["text"] if self.is_text else [name for name in types if name in keys]
        self._unread = {name: 0 for name in types if name not in keys}  # which the ledger counts

    def tell(self) -> int:
        """How much of the file's size has been read."""
        return self._size * self._n_read // max(self._n_rows, 1)

    def __iter__(self) -> Iterator[tuple[str, str, str | None]]:
        for row in self._rows():
            self._n_read += 1
            where = f"{self._path}:row {self._n_read}"
            try:
                (values,) = row.to_pylist()
                text = values["text"] or "" if self.is_text else _to_json(self._unread | values)
                flaw = TOO_LONG if len(text.encode()) > MAX_BYTES else None
            except UnicodeDecodeError:
                flaw = "not UTF-8 text"
            except (ValueError, OverflowError, RecursionError):  # a date that Python has not, fields of one name, ...
                flaw = "a value that can't be read"
            # As in a file of text, where a separator ends a document.
            parts = [""] if flaw else map(clean_record, text.split(SEPARATOR)) if self.is_text else [text]
            yield from ((where, part, flaw) for part in parts if part or flaw)

    def _rows(self) -> Iterator[Any]:
        """Batches of one row."""
        batches = self._file.iter_batches(_ROWS, columns=self._columns, use_threads=False)
        try:
            for batch in batches:
                yield from map(batch.slice, range(batch.num_rows), [1] * batch.num_rows)
        except self._errors as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"can't read {self._path}: {reason(error)} (is it whole?)")


def _to_json(values: dict[str, Any]) -> str:
    # What JSON doesn't have, say the bytes of a picture, is no text either.
    values = {key: value for key, value in values.items() if value is not None}
    return json.dumps(values, ensure_ascii=False, default=lambda value: {type(value).__name__: None})


def _missing(groups: list[tuple[str, ...]], usable: set[str]) -> str:
    """What is not usable of the group of which most is; if nothing is of any, all groups."""
    closest = max(groups, key=lambda group: len(usable.intersection(group)))
    if usable.intersection(closest):
        groups = [tuple(name for name in closest if name not in usable)]
    named = (" and ".join(f'"{name}" ({"a list" if name in LISTS else "text"})' for name in group) for group in groups)
    return ", or ".join(named)
