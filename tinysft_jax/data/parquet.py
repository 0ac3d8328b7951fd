"""The rows of a parquet file, as JSON lines. It needs pyarrow."""

import functools
import json
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from tinysft_jax.console import UserError, explained, import_extra, shown
from tinysft_jax.data.forms import format_of, forms_of, needed_keys
from tinysft_jax.data.reading import MAX_BYTES, TOO_LONG

# What is in memory at once: few rows, as one may have megabytes, and of a column a page or so.
_ROWS, _BUFFER = 64, 1 << 20


def is_parquet(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() == ".parquet"


class Rows:
    """The rows of a file, each with its place, its text and its flaw. Only the columns that the forms know are read.

    `format` is the one that was given or, of "auto", that of the columns. Raises: UserError, if the file is damaged, or
    no form of the format has all its columns.
    """

    def __init__(self, file: BufferedIOBase, path: Path, format: str):
        if format != "auto" and not forms_of(format):
            raise UserError(f"{path}: a parquet file is read as conversations, not as {format}")
        arrow = import_extra("pyarrow.parquet", "parquet", str(path))
        self._path, self._size, self._n_read = path, path.stat().st_size, 0
        errors = (arrow.ArrowException, OSError, ValueError)
        self._reading = functools.partial(explained, f"can't read {path} (is it whole?)", causes=errors)
        with self._reading():
            # Read ahead, a column would be in memory whole.
            settings = {"pre_buffer": False, "buffer_size": _BUFFER, "page_checksum_verification": True}
            self._file = arrow.parquet.ParquetFile(file, **settings)
            self._n_rows, names = self._file.metadata.num_rows, self._file.schema_arrow.names
        self.format = format_of([dict.fromkeys(names, "")]) if format == "auto" else format
        forms = forms_of(self.format)
        if not any(set(names).issuperset(form.needs) for form in forms):
            raise UserError(f"{path} has no columns {needed_keys(self.format)}, but {shown(names)}")
        known = {key for form in forms for key in (*form.needs, *form.also)}
        self._columns = [name for name in names if name in known]
        self._others = {name: 0 for name in names if name not in known}  # unread fields, which the ledger counts

    def tell(self) -> int:
        """How much of the file's size has been read."""
        return self._size * self._n_read // max(self._n_rows, 1)

    def __iter__(self) -> Iterator[tuple[str, str, str | None]]:
        with self._reading():
            for batch in self._file.iter_batches(_ROWS, columns=self._columns, use_threads=False):
                for index in range(batch.num_rows):
                    self._n_read += 1
                    yield f"{self._path}:row {self._n_read}", *self._line(batch.slice(index, 1))

    def _line(self, row: Any) -> tuple[str, str | None]:
        """The text, and the flaw, of a batch of one row."""
        try:
            (values,) = row.to_pylist()
            # What JSON doesn't have, say the bytes of a picture, is no text either.
            text = json.dumps(self._others | values, ensure_ascii=False, default=lambda value: {})
        except UnicodeDecodeError:
            return "", "not UTF-8 text"
        except (ValueError, OverflowError, RecursionError):  # a date that Python has not, two fields of one name, ...
            return "", "a value that can't be read"
        return ("", TOO_LONG) if len(text.encode()) > MAX_BYTES else (text, None)
