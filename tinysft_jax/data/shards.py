"""Writes one split of a prepared data set: plain `.npy` arrays in shards, to be memory-mapped."""

from pathlib import Path

import numpy as np

from tinysft_jax.data.dataset import DTYPES, file_name
from tinysft_jax.data.encoding import Encoded

TOKENS_PER_SHARD = 50_000_000


class _ArrayFile:
    """A one-dimensional array in a `.npy` file that grows at its end, so that none is collected in memory."""

    def __init__(self, path: Path, dtype: type):
        self._dtype = np.dtype(dtype)
        self._size = 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, array: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(array, self._dtype).data)
        self._size += array.size

    def close(self) -> None:
        # NumPy leaves room for the length to grow: the header stays as long as it was.
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._size,)}
        np.lib.format.write_array_header_1_0(self._file, description)


class _Shard:
    """The four files of a shard that is being written."""

    def __init__(self, directory: Path, number: int):
        self._files = {name: _ArrayFile(directory / file_name(name, number), DTYPES[name]) for name in DTYPES}
        self._files["offsets"].append(np.zeros(1, np.int64))
        self.tokens = 0

    def add(self, encoded: Encoded) -> None:
        for name in ("tokens", "supervised", "tasks"):
            self._files[name].append(getattr(encoded, name))
        self._files["offsets"].append(self.tokens + np.cumsum(encoded.lengths, dtype=np.int64))
        self.tokens += encoded.tokens.size

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class ShardWriter:
    """Writes conversations as they come, into a new shard whenever one is full.

    A shard is four files: `tokens` (uint16), `supervised` (bool), `offsets` (int64: where each conversation starts in
    them, then where the last one ends) and `tasks` (uint8). A split without conversations has no shards.

    Attributes:
      totals: what `data.json` says about the split.
    """

    def __init__(self, directory: Path, tokens_per_shard: int = TOKENS_PER_SHARD):
        self.totals = {"conversations": 0, "tokens": 0, "supervised_tokens": 0, "longest": 0, "shards": 0}
        self._directory = directory
        self._tokens_per_shard = tokens_per_shard
        self._shard: _Shard | None = None
        self._directory.mkdir()

    def add(self, encoded: Encoded) -> None:
        """Adds conversations."""
        if not encoded.lengths.size:
            return
        if self._shard is None:
            self._shard = _Shard(self._directory, self.totals["shards"])
            self.totals["shards"] += 1
        self._shard.add(encoded)
        self.totals["conversations"] += encoded.lengths.size
        self.totals["tokens"] += encoded.tokens.size
        self.totals["supervised_tokens"] += int(encoded.supervised.sum())
        self.totals["longest"] = max(self.totals["longest"], int(encoded.lengths.max()))
        if self._shard.tokens >= self._tokens_per_shard:
            self.close()

    def close(self) -> None:
        """Finishes the last shard."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None
