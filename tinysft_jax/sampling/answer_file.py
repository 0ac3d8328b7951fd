"""A file of answers that is there when it is complete, and can be left and gone on with before that."""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tinysft_jax import locks
from tinysft_jax.errors import UserError

FORMAT_VERSION = 1


class AnswerFile:
    """JSON lines that stand in `OUTPUT.partial`, below a line that says what they are made with, until all are there.

    To be used in a `with` block.

    Args:
      output: the file to make.
      settings: what the lines are made with.
      batch_size: how many lines are made together. Of a batch that is not all there nothing is kept: made anew with
        other neighbours, its lines could differ in round-off from those of a run that was never stopped.

    Attributes:
      partial: where the lines stand until all are there.
      n_done: how many there were when the file was opened.

    Raises:
      UserError: when it is opened, if the lines that are there were made with other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], batch_size: int):
        self.partial, self.n_done = output.with_name(output.name + ".partial"), 0
        self._output, self._batch_size = output, batch_size
        settings = {"format_version": FORMAT_VERSION, **settings, "batch_size": batch_size}
        self._settings = json.loads(json.dumps(settings))  # as they will be read

    def __enter__(self) -> "AnswerFile":
        self._file = self.partial.open("r+b" if self.partial.exists() else "w+b")
        with contextlib.suppress(OSError):  # a file system without locks
            if not locks.take(self._file.fileno()):
                raise UserError(f"another run of this command is writing {self.partial}; wait for it, or stop it")
        header, found = json.dumps(self._settings).encode() + b"\n", self._file.readline()
        if found.endswith(b"\n"):
            self._check(found)
            lines = (len(line) for line in self._file if line.endswith(b"\n"))
            ends = list(itertools.accumulate(lines, initial=len(found)))
            self.n_done = (len(ends) - 1) // self._batch_size * self._batch_size
            self._file.seek(ends[self.n_done])
        else:
            if not header.startswith(found):  # new, or left while its first line was being written
                raise self._foreign()
            self._file.seek(0)
            self._file.write(header)
        self._file.truncate()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds a batch."""
        self._file.write(b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records))
        self._file.flush()

    def finish(self) -> None:
        """Makes the lines the output, now that all are there."""
        aside = self._output.with_name(f".{self._output.name}.{os.getpid()}.aside")
        try:
            self._file.seek(0)
            self._file.readline()
            with aside.open("wb") as file:
                shutil.copyfileobj(self._file, file)
            os.replace(aside, self._output)
        finally:
            aside.unlink(missing_ok=True)
        self.partial.unlink()

    def _check(self, header: bytes) -> None:
        try:
            stored = json.loads(header)
        except (ValueError, RecursionError):
            raise self._foreign() from None
        if not isinstance(stored, dict) or "format_version" not in stored:
            raise self._foreign()
        different = [name for name, value in self._settings.items() if stored.get(name) != value]
        if different:
            raise UserError(
                f"{self.partial} was begun with another {', '.join(different)}; "
                "go on with the same, or delete it to begin anew"
            )

    def _foreign(self) -> UserError:
        return UserError(f"{self.partial} is not what this command leaves there; move it or choose another --output")
