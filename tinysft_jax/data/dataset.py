"""A prepared data set, as it is read: memory-mapped arrays of tokens, masks, offsets and tasks."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, UInt8, UInt16

from tinysft_jax import files
from tinysft_jax.errors import UserError

FORMAT_VERSION = 1
SPLITS = ("train", "valid")


class PreparedData:
    """What `prepare` wrote.

    Attributes:
      directory: where it lies.
      description: `data.json`.

    Raises:
      UserError: if `directory` is not a prepared data set, or one of a newer program, or a file is not as long as it
        was.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.description: dict[str, Any] = files.read_json(
            self.directory / "data.json", "a prepared data set", FORMAT_VERSION
        )
        for key in ("chat_template", "tokenizer", "tasks", "splits"):
            if key not in self.description:
                raise UserError(f"{self.directory / 'data.json'} lacks {key!r}; prepare the data again")
        self.verify(hashes=False)

    def verify(self, hashes: bool = True) -> None:
        """Compares the files with the manifest.

        Args:
          hashes: whether to read all files and compare their SHA-256, not only their sizes.

        Raises:
          UserError: naming a file that is not what it was.
        """
        if damage := files.find_damage(self.directory, hashes):
            raise UserError(f"{self.directory} is damaged: {damage}; copy or prepare the data again")

    @property
    def tasks(self) -> list[str]:
        """Task names; a task's id is its index."""
        return self.description["tasks"]

    def split(self, name: str) -> "Split":
        """Raises: UserError, if there is no such split."""
        if name not in SPLITS:
            raise UserError(f"there is no split {name!r}; choose one of {', '.join(SPLITS)}")
        return Split(self.directory / name, self.description["splits"][name])


class Split:
    """The conversations of one split, addressed by index.

    Attributes:
      directory: of the shards.
      totals: the split's entry in `data.json`.

    Raises:
      UserError: if a shard is missing or its size is not what `data.json` says.
    """

    def __init__(self, directory: Path, totals: dict[str, int]):
        self.directory, self.totals = directory, totals
        found = (len(self), sum(len(shard["tokens"]) for shard in self._shards))
        if found != (totals["conversations"], totals["tokens"]):
            raise UserError(
                f"{directory} holds {found[0]} conversations of {found[1]} tokens, data.json says "
                f"{totals['conversations']} of {totals['tokens']}; prepare the data again"
            )

    def __reduce__(self):
        # Another process maps the files itself instead of being sent their content.
        return Split, (self.directory, self.totals)

    def __len__(self) -> int:
        return int(self._first[-1])

    @functools.cached_property
    def lengths(self) -> Int32[np.ndarray, " n"]:
        """Each conversation's tokens."""
        parts = [np.diff(shard["offsets"]).astype(np.int32) for shard in self._shards]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    @functools.cached_property
    def tasks(self) -> UInt8[np.ndarray, " n"]:
        """Each conversation's task id."""
        return np.concatenate([np.zeros(0, np.uint8), *(shard["tasks"] for shard in self._shards)])

    def conversation(self, index: int) -> tuple[UInt16[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """A conversation's token ids, and which of them are to be predicted."""
        shard_index = int(np.searchsorted(self._first, index, side="right")) - 1
        shard = self._shards[shard_index]
        start, end = shard["offsets"][index - self._first[shard_index] :][:2]
        return shard["tokens"][start:end], shard["supervised"][start:end]

    @functools.cached_property
    def _shards(self) -> list[dict[str, np.ndarray]]:
        kinds = ("tokens", "supervised", "offsets", "tasks")
        shards = []
        for i in range(self.totals["shards"]):
            paths = {kind: self.directory / f"{kind}-{i:05d}.npy" for kind in kinds}
            try:
                shards.append({kind: np.load(path, mmap_mode="r") for kind, path in paths.items()})
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"can't read shard {i} of {self.directory}: {error}; prepare the data again") from None
        return shards

    @functools.cached_property
    def _first(self) -> np.ndarray:
        """The index of each shard's first conversation, and the number of all."""
        return np.cumsum([0, *(len(shard["tasks"]) for shard in self._shards)])
