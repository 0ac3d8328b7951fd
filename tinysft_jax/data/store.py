"""A prepared data set: `data.json` and memory-mapped arrays, as they are written and read."""

import functools
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Integer, UInt8, UInt16

from tinysft_jax import files
from tinysft_jax.console import UserError, reason
from tinysft_jax.files import COUNT, NUMBER, SIZE, TEXT, TEXT_OR_NULL, Kind, Schema, check
from tinysft_jax.tokenizer import ChatTokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "valid")

# A task's id is a byte.
MOST_TASKS = 256


def _is_task_list(value: Any) -> bool:
    is_text = isinstance(value, list) and all(isinstance(name, str) and name and name.isprintable() for name in value)
    return is_text and 0 < len(set(value)) == len(value) <= MOST_TASKS


_TASKS: Kind = (f"a list of 1 to {MOST_TASKS} different names", _is_task_list)

_TOTALS = {"conversations": COUNT, "tokens": COUNT, "supervised_tokens": COUNT, "longest": SIZE, "shards": SIZE}

_CONTENT: Schema = {
    "format": TEXT,
    "chat_template": TEXT_OR_NULL,
    "tokenizer": {"kind": TEXT, "bpe_ranks": NUMBER},
    "max_tokens": SIZE,
    "tasks": _TASKS,
    "seed": NUMBER,
    "source": {},
    "splits": dict.fromkeys(SPLITS, _TOTALS),
}


def read_description(directory: Path) -> dict[str, Any]:
    """Reads `data.json`: every key that `prepare` writes for readers is there, and of its type.

    Raises:
      UserError: if `directory` is not a prepared data set, or one of a newer program, or its description can't be.
    """
    where = directory / "data.json"
    description = files.read_json(where, "a prepared data set", FORMAT_VERSION)
    try:
        check(description, _CONTENT)
        ChatTokenizer.from_description(description)
    except UserError as error:
        raise UserError(f"{where}: {error}; prepare the data again") from None
    return description


# A shard's arrays, each in a file.
DTYPES = {"tokens": np.uint16, "supervised": np.bool_, "offsets": np.int64, "tasks": np.uint8}


def file_name(array: str, number: int) -> str:
    """The name of the file that holds an array of a split's shard."""
    return f"{array}-{number:05d}.npy"


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
        self.directory = Path(directory).expanduser()
        self.description: dict[str, Any] = read_description(self.directory)
        self.verify(hashes=False)

    def verify(self, hashes: bool = True) -> None:
        """Compares the files with the manifest.

        Args:
          hashes: whether to read all files, compare their SHA-256, not only their sizes, and look at every token.

        Raises:
          UserError: naming a file that is not what it was, or a split that can't be.
        """
        if damage := files.find_damage(self.directory, hashes, self._file_names()):
            raise UserError(f"{self.directory} is damaged: {damage}; copy or prepare the data again")
        for name in SPLITS if hashes else ():
            self.split(name).verify()

    @property
    def tasks(self) -> list[str]:
        """Task names; a task's id is its index."""
        return self.description["tasks"]

    def split(self, name: str) -> "Split":
        """Opens a split.

        Raises:
          UserError: if there is no such split, or its arrays contradict each other or `data.json`.
        """
        if name not in SPLITS:
            raise UserError(f"there is no split {name!r}; choose one of {', '.join(SPLITS)}")
        vocab_size = ChatTokenizer.from_description(self.description).vocab_size
        split = Split(self.directory / name, self.description["splits"][name], len(self.tasks), vocab_size)
        split.check_index()
        return split

    def _file_names(self) -> Iterator[str]:
        """What will be read."""
        yield "data.json"
        for name in SPLITS:
            for number in range(self.description["splits"][name]["shards"]):
                yield from (f"{name}/{file_name(array, number)}" for array in DTYPES)


class Split:
    """The conversations of one split, addressed by index.

    Attributes:
      directory: of the shards.
      totals: the split's entry in `data.json`.
      n_tasks: task ids are below it.
      vocab_size: token ids are below it.

    Raises:
      UserError: if a shard is missing or its size is not what `data.json` says.
    """

    def __init__(self, directory: Path, totals: dict[str, int], n_tasks: int, vocab_size: int):
        self.directory, self.totals, self.n_tasks, self.vocab_size = directory, totals, n_tasks, vocab_size
        self._check_total("conversations", len(self))
        self._check_total("tokens", sum(len(shard["tokens"]) for shard in self._shards))

    def __reduce__(self):
        # Another process maps the files itself instead of being sent their content.
        return Split, (self.directory, self.totals, self.n_tasks, self.vocab_size)

    def __len__(self) -> int:
        return int(self._first[-1])

    @functools.cached_property
    def lengths(self) -> Int32[np.ndarray, " n"]:
        """Each conversation's tokens, at least one.

        Raises:
          UserError: if there are others.
        """
        parts = [np.zeros(0, np.int32)]
        for shard in self._shards:
            lengths = np.diff(shard["offsets"])
            # Also of numbers that no int32 holds.
            if lengths.min(initial=1) < 1 or lengths.max(initial=0) > self.totals["longest"]:
                raise UserError(
                    f"{self.directory}: offsets give a conversation {lengths.min()} or {lengths.max()} tokens, "
                    f"data.json says 1 to {self.totals['longest']}; prepare the data again"
                )
            parts.append(lengths.astype(np.int32))
        return np.concatenate(parts)

    @functools.cached_property
    def tasks(self) -> UInt8[np.ndarray, " n"]:
        """Each conversation's task id.

        Raises:
          UserError: if there is no such task.
        """
        tasks = np.concatenate([np.zeros(0, np.uint8), *(shard["tasks"] for shard in self._shards)])
        if (highest := tasks.max(initial=0)) >= self.n_tasks:
            raise UserError(
                f"{self.directory} holds the task id {highest}, data.json names {self.n_tasks} tasks; prepare the "
                "data again"
            )
        return tasks

    def conversation(self, index: int) -> tuple[UInt16[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """A conversation's token ids, and which of them are to be predicted."""
        shard_index = int(np.searchsorted(self._first, index, side="right")) - 1
        shard = self._shards[shard_index]
        start, end = shard["offsets"][index - self._first[shard_index] :][:2]
        return shard["tokens"][start:end], shard["supervised"][start:end]

    def check_index(self) -> None:
        """Looks at all but the tokens. Raises: UserError, as of `lengths` and `tasks`."""
        _ = self.lengths, self.tasks

    def check_ids(self, ids: Integer[np.ndarray, "..."]) -> None:
        """Raises: UserError, if a token id is not below the size of the vocabulary."""
        if (highest := ids.max(initial=0)) >= self.vocab_size:
            raise UserError(
                f"{self.directory} holds the token id {highest}, its vocabulary has {self.vocab_size}; prepare the "
                "data again"
            )

    def verify(self) -> None:
        """Looks at every token.

        Raises:
          UserError: if an id is not below the size of the vocabulary, or not as many are supervised as there were.
        """
        for shard in self._shards:
            self.check_ids(shard["tokens"])
        # As bytes: what is neither 0 nor 1 would count as 1, and then weigh more.
        supervised = sum(int(shard["supervised"].view(np.uint8).sum(dtype=np.int64)) for shard in self._shards)
        self._check_total("supervised_tokens", supervised)

    def _check_total(self, name: str, found: int) -> None:
        if found != self.totals[name]:
            raise UserError(
                f"{self.directory} holds {found} {name.replace('_', ' ')}, data.json says {self.totals[name]}; "
                "prepare the data again"
            )

    @functools.cached_property
    def _shards(self) -> list[dict[str, np.ndarray]]:
        return [_map_shard(self.directory, number) for number in range(self.totals["shards"])]

    @functools.cached_property
    def _first(self) -> np.ndarray:
        """The index of each shard's first conversation, and the number of all."""
        return np.cumsum([0, *(len(shard["tasks"]) for shard in self._shards)])


def _map_shard(directory: Path, number: int) -> dict[str, np.ndarray]:
    """Maps a shard's arrays; what costs nothing to see is checked.

    Raises:
      UserError: if a file is missing or holds something else, or the arrays' lengths contradict each other.
    """
    shard = {name: _map_array(directory / file_name(name, number), dtype) for name, dtype in DTYPES.items()}
    offsets, n_tokens = shard["offsets"], len(shard["tokens"])
    fits = len(offsets) == len(shard["tasks"]) + 1 and n_tokens == len(shard["supervised"])
    if not (fits and offsets[0] == 0 and offsets[-1] == n_tokens):
        raise UserError(f"{directory}: the arrays of shard {number} contradict each other; prepare the data again")
    return shard


def _map_array(path: Path, dtype: type) -> np.ndarray:
    try:
        with np.errstate(over="raise"):
            array = np.lib.format.open_memmap(path, mode="r")  # unlike np.load, it opens no archive
    # A header is read as Python, and multiplied; what is none fails in as many ways.
    except (OSError, ValueError, TypeError, ArithmeticError, MemoryError, SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"can't read {path}: {reason(error)}; prepare the data again") from None
    if array.dtype != dtype or array.ndim != 1:
        raise UserError(
            f"{path} is no row of {np.dtype(dtype)} but {array.dtype}{list(array.shape)}; prepare the data again"
        )
    return array


TOKENS_PER_SHARD = 50_000_000


@dataclass(frozen=True)
class Encoded:
    """Conversations of one split, one after the other.

    Attributes:
      tokens: the ids of all.
      supervised: which of them are to be predicted.
      lengths: tokens of each conversation.
      tasks: task id of each conversation.
    """

    tokens: UInt16[np.ndarray, " tokens"]
    supervised: Bool[np.ndarray, " tokens"]
    lengths: Int32[np.ndarray, " conversations"]
    tasks: UInt8[np.ndarray, " conversations"]


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
