"""Writes one split of a prepared data set: plain `.npy` arrays in shards, to be memory-mapped."""

from pathlib import Path

import numpy as np

from tinysft_jax.data.encoding import Encoded

# A shard is collected in memory before it is written, at four bytes a token or so.
TOKENS_PER_SHARD = 50_000_000


class ShardWriter:
    """Collects conversations and writes a shard whenever there are enough of them.

    A shard is four files: `tokens` (uint16), `supervised` (bool), `offsets` (int64: where each conversation starts in
    them, then where the last one ends) and `tasks` (uint8). A split without conversations has no shards.

    Attributes:
      totals: what `data.json` says about the split.
    """

    def __init__(self, directory: Path, tokens_per_shard: int = TOKENS_PER_SHARD):
        self.totals = {"conversations": 0, "tokens": 0, "supervised_tokens": 0, "longest": 0, "shards": 0}
        self._directory = directory
        self._tokens_per_shard = tokens_per_shard
        self._pending: list[Encoded] = []
        self._pending_tokens = 0
        self._directory.mkdir()

    def add(self, encoded: Encoded) -> None:
        """Adds conversations."""
        if not encoded.lengths.size:
            return
        self._pending.append(encoded)
        self._pending_tokens += encoded.tokens.size
        self.totals["conversations"] += encoded.lengths.size
        self.totals["tokens"] += encoded.tokens.size
        self.totals["supervised_tokens"] += int(encoded.supervised.sum())
        self.totals["longest"] = max(self.totals["longest"], int(encoded.lengths.max()))
        if self._pending_tokens >= self._tokens_per_shard:
            self._write()

    def close(self) -> None:
        """Writes what is left."""
        if self._pending:
            self._write()

    def _write(self) -> None:
        lengths = np.concatenate([part.lengths for part in self._pending])
        offsets = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        self._save("offsets", offsets)
        for name in ("tokens", "supervised", "tasks"):
            self._save(name, np.concatenate([getattr(part, name) for part in self._pending]))
        self._pending.clear()
        self._pending_tokens = 0
        self.totals["shards"] += 1

    def _save(self, name: str, array: np.ndarray) -> None:
        np.save(self._directory / f"{name}-{self.totals['shards']:05d}.npy", array, allow_pickle=False)
