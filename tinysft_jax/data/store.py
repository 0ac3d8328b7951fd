"""A prepared data set: `data.json`, memory-mapped arrays and requests, written and read."""

import functools
import itertools
import json
import os
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Bool, Int, Int32, Integer, UInt8

from tinysft_jax import files
from tinysft_jax.console import UserError, explained
from tinysft_jax.data.forms import PREFERENCE
from tinysft_jax.files import COUNT, NUMBER, SIZE, TEXT, TEXT_OR_NULL, Schema, check
from tinysft_jax.tokenizer import FILES_DIRECTORY, ChatTokenizer, read_files

# Version 1 had no requests, dtype and tokenizer_hash; versions 1 and 2 only GPT-2's tokenizer; up to 3 no pairs.
FORMAT_VERSION = 4
SPLITS = ("train", "valid")
TOKENS_PER_SHARD = 50_000_000
MOST_TASKS = 256  # a task's id is a byte
# A shard's arrays. The offsets are where each conversation starts in tokens and supervised, then where the last ends.
# Tokens are of `data.json`'s dtype: the smallest that holds the vocabulary.
ARRAYS = ("tokens", "supervised", "offsets", "tasks")
TOKEN_DTYPES = ("uint16", "uint32")


def _is_task_list(value: Any) -> bool:
    is_text = isinstance(value, list) and all(isinstance(name, str) and name and name.isprintable() for name in value)
    return is_text and 0 < len(set(value)) == len(value) <= MOST_TASKS


_TOTALS = {"conversations": COUNT, "tokens": COUNT, "supervised_tokens": COUNT, "longest": SIZE, "shards": SIZE}
_DESCRIPTION: Schema = {
    "format": TEXT,
    "chat_template": ("text, an object or null", lambda value: isinstance(value, str | dict | None)),
    "tokenizer": {"kind": TEXT},
    "max_tokens": SIZE,
    "tasks": (f"a list of 1 to {MOST_TASKS} different names", _is_task_list),
    "seed": NUMBER,
    "source": {},
    "splits": dict.fromkeys(SPLITS, _TOTALS),
}
_SINCE_VERSION_2: Schema = {
    "dtype": (f"one of {', '.join(TOKEN_DTYPES)}", TOKEN_DTYPES.__contains__),
    "tokenizer_hash": TEXT,
}
_REQUEST: Schema = {"task": TEXT, "conditions": {}, "answer": TEXT_OR_NULL}


def _unusable(message: str) -> UserError:
    return UserError(f"{message}; prepare the data again")


def token_dtype(vocab_size: int) -> str:
    """The dtype of a data set's tokens."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def dtypes(description: dict[str, Any]) -> dict[str, np.dtype]:
    """Array → dtype of a shard."""
    names = (description.get("dtype", "uint16"), "bool", "int64", "uint8")
    return {array: np.dtype(name) for array, name in zip(ARRAYS, names, strict=True)}


def file_name(content: str, number: int) -> str:
    """The file of a shard that holds an array, or the "requests"."""
    return f"{content}-{number:05d}.{'npy' if content in ARRAYS else 'jsonl'}"


def _per_item(description: dict[str, Any]) -> int:
    return 2 if description["format"] == PREFERENCE else 1


def _has_requests(description: dict[str, Any]) -> bool:
    return description["format_version"] > 1 and description["format"] == "tinystories-instruct"


class PreparedData:
    """What `prepare` wrote; `description` is its `data.json`, `tokenizer` what encoded it.

    Raises: UserError, if there is none or its format is newer, a key of the description is missing or of another type,
    the tokenizer has another hash than the one that encoded the data, or the size of a file has changed.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(os.path.expanduser(directory))  # unlike Path's own, it leaves an unknown user alone
        where = self.directory / "data.json"
        self.description = files.read_json(where, "a prepared data set", FORMAT_VERSION)
        has_hash = self.description["format_version"] > 1
        with explained(str(where), _unusable, (UserError,)):
            check(self.description, _DESCRIPTION | _SINCE_VERSION_2 if has_hash else _DESCRIPTION)
            kept = read_files(self.directory / FILES_DIRECTORY)
            self.tokenizer = ChatTokenizer.from_description(self.description, kept)
            if has_hash:
                found = self.tokenizer.fingerprint()
                check(
                    self.description, {"tokenizer_hash": (f"{found!r}, that of the tokenizer it names", found.__eq__)}
                )
        self.tasks: list[str] = self.description["tasks"]  # their names; a task's id is its index
        self.per_item = _per_item(self.description)  # conversations, see `Split`
        self.verify(hashes=False)

    def verify(self, hashes: bool = True) -> None:
        """Raises: UserError, if the size of a file has changed, or with `hashes`, its SHA-256 or a token is wrong."""
        if damage := files.find_damage(self.directory, hashes, self._file_names()):
            raise UserError(f"{self.directory} is damaged: {damage}; copy or prepare the data again")
        for name in SPLITS if hashes else ():
            self.split(name).verify()

    def split(self, name: str) -> "Split":
        """Opens a split. Raises: UserError, if there is none, or its arrays contradict each other or `data.json`."""
        if name not in SPLITS:
            raise UserError(f"there is no split {name!r}; choose one of {', '.join(SPLITS)}")
        split = Split(self.directory / name, self.description, self.tokenizer.vocab_size)
        _ = split.lengths, split.tasks  # which checks them
        return split

    def _file_names(self) -> Iterator[str]:
        yield "data.json"
        yield from (f"{FILES_DIRECTORY}/{name}" for name in self.tokenizer.files)
        contents = (*ARRAYS, "requests") if _has_requests(self.description) else ARRAYS
        for name in SPLITS:
            for number in range(self.description["splits"][name]["shards"]):
                yield from (f"{name}/{file_name(content, number)}" for content in contents)


class Split:
    """The conversations of one split, addressed by index; `totals` is the split's entry in `data.json`.

    An item is what a row holds whole: `per_item` conversations that follow each other. Pair i is the conversations 2i,
    with the chosen answer, and 2i + 1, with the rejected one; else an item is a conversation.

    Raises: UserError, if a shard is missing, or its size is not as `data.json` (the description) says.
    """

    def __init__(self, directory: Path, description: dict[str, Any], vocab_size: int):
        self.directory, self.totals = directory, description["splits"][directory.name]
        self._description, self._vocab_size = description, vocab_size
        self.per_item = _per_item(description)
        self.item_noun = "conversation" if self.per_item == 1 else "pair"
        kinds = dtypes(description)
        self._shards = [_map_shard(directory, number, kinds) for number in range(self.totals["shards"])]
        # The index of each shard's first conversation, then the number of conversations.
        self._first = np.cumsum([0, *(len(shard["tasks"]) for shard in self._shards)])
        self._line_starts: dict[int, np.ndarray] = {}  # of the requests of a shard, when the first has been read
        self._check_total("conversations", len(self))
        self._check_total("tokens", sum(len(shard["tokens"]) for shard in self._shards))
        if len(self) % self.per_item:
            raise _unusable(f"{directory} holds {len(self)} conversations, which make no whole pairs")

    def __reduce__(self):
        # Another process maps the files itself.
        return Split, (self.directory, self._description, self._vocab_size)

    def __len__(self) -> int:
        return int(self._first[-1])

    @functools.cached_property
    def lengths(self) -> Int32[np.ndarray, " n"]:
        """The number of tokens of each conversation. Raises: UserError, if one has none or more than the longest."""
        lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(shard["offsets"]) for shard in self._shards)])
        # Checked as int64: in an int32, a wrong length may look right.
        if lengths.min(initial=1) < 1 or lengths.max(initial=0) > self.totals["longest"]:
            raise _unusable(
                f"{self.directory}: offsets give a conversation {lengths.min()} or {lengths.max()} tokens, "
                f"data.json says 1 to {self.totals['longest']}"
            )
        return lengths.astype(np.int32)

    @functools.cached_property
    def item_lengths(self) -> Int32[np.ndarray, " items"]:
        """The number of tokens of each item. Raises: UserError, as `lengths`."""
        return self.lengths.reshape(-1, self.per_item).sum(axis=1, dtype=np.int32)

    @functools.cached_property
    def tasks(self) -> UInt8[np.ndarray, " n"]:
        """Each conversation's task id. Raises: UserError, if there is no such task."""
        tasks = np.concatenate([np.zeros(0, np.uint8), *(shard["tasks"] for shard in self._shards)])
        if (highest := tasks.max(initial=0)) >= (n_tasks := len(self._description["tasks"])):
            raise _unusable(f"{self.directory} holds the task id {highest}, data.json names {n_tasks} tasks")
        return tasks

    def conversations_of(self, items: Integer[np.ndarray, " items"]) -> Int[np.ndarray, " conversations"]:
        """The conversations of items, those of an item side by side."""
        first = self.per_item * items.astype(np.int64)
        return (first[:, None] + np.arange(self.per_item)).reshape(-1)

    def conversation(self, index: int) -> tuple[Integer[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """A conversation's token ids, and which of them are supervised."""
        number, place = self._locate(index)
        start, end = self._shards[number]["offsets"][place : place + 2]
        return self._shards[number]["tokens"][start:end], self._shards[number]["supervised"][start:end]

    def request(self, index: int) -> dict[str, Any] | None:
        """The first request of a conversation; None if the data set has no requests.

        It is `{"task": ..., "conditions": {...}, "answer": ...}`, with the conditions of `tasks.requests.Request`. The
        answer is None where it is the story: that is in the tokens. Raises: UserError, if the request can't be read.
        """
        if not _has_requests(self._description):
            return None
        number, place = self._locate(index)
        path = self.directory / file_name("requests", number)
        causes = (OSError, ValueError, RecursionError, UserError)
        with explained(f"can't read {path}, line {place + 1}", _unusable, causes), path.open("rb") as file:
            if number not in self._line_starts:
                self._line_starts[number] = np.fromiter(itertools.accumulate(map(len, file), initial=0), np.int64)
            starts, conversations = self._line_starts[number], len(self._shards[number]["tasks"])
            if len(starts) != conversations + 1:
                raise UserError(f"the shard has {len(starts) - 1} requests and {conversations} conversations")
            file.seek(starts[place])
            request = json.loads(file.readline())
            check(request, _REQUEST)
            return request

    def check_ids(self, ids: Integer[np.ndarray, "..."]) -> None:
        """Raises: UserError, if a token id is not below the size of the vocabulary."""
        if (highest := ids.max(initial=0)) >= self._vocab_size:
            raise _unusable(f"{self.directory} holds the token id {highest}, its vocabulary has {self._vocab_size}")

    def verify(self) -> None:
        """Checks every token id, and how many tokens are supervised. Raises: UserError."""
        for shard in self._shards:
            self.check_ids(shard["tokens"])
        # As bytes: one that is neither 0 nor 1 counts as 1 in a sum of booleans, but weighs more in a loss.
        supervised = sum(int(shard["supervised"].view(np.uint8).sum(dtype=np.int64)) for shard in self._shards)
        self._check_total("supervised_tokens", supervised)

    def _check_total(self, name: str, found: int) -> None:
        if found != self.totals[name]:
            noun = name.replace("_", " ")
            raise _unusable(f"{self.directory} holds {found} {noun}, data.json says {self.totals[name]}")

    def _locate(self, index: int) -> tuple[int, int]:
        """The shard that holds a conversation, and its index there."""
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return number, int(index - self._first[number])


def _map_shard(directory: Path, number: int, kinds: dict[str, np.dtype]) -> dict[str, np.ndarray]:
    """Maps a shard's arrays, and checks their types and that their sizes match."""
    shard = {name: _map_array(directory / file_name(name, number), dtype) for name, dtype in kinds.items()}
    offsets, n_tokens = shard["offsets"], len(shard["tokens"])
    fits = len(offsets) == len(shard["tasks"]) + 1 and n_tokens == len(shard["supervised"])
    if not (fits and offsets[0] == 0 and offsets[-1] == n_tokens):
        raise _unusable(f"{directory}: the arrays of shard {number} contradict each other")
    return shard


def _map_array(path: Path, dtype: np.dtype) -> np.ndarray:
    # The header is a Python literal; each of these is raised for some malformed one.
    causes = (OSError, ValueError, TypeError, ArithmeticError, MemoryError, SyntaxError, tokenize.TokenError)
    with explained(f"can't read {path}", _unusable, causes), np.errstate(over="raise"):
        array = np.lib.format.open_memmap(path, mode="r")  # unlike np.load, it opens no archive
    if array.dtype != dtype or array.ndim != 1:
        raise _unusable(f"{path} holds {array.dtype}{list(array.shape)}, not a vector of {dtype}")
    return array


@dataclass(frozen=True)
class Encoded:
    """Conversations of one split, concatenated."""

    tokens: Integer[np.ndarray, " tokens"]
    supervised: Bool[np.ndarray, " tokens"]
    lengths: Int32[np.ndarray, " conversations"]
    tasks: UInt8[np.ndarray, " conversations"]
    requests: Sequence[dict[str, Any]] = ()  # as `Split.request` reads them; empty where the format has none


class ShardWriter:
    """Writes conversations, with tokens of a dtype, to shards as they come; a split without any has no shards.

    `totals` is the split's entry in `data.json`.
    """

    def __init__(self, directory: Path, tokens_per_shard: int = TOKENS_PER_SHARD, dtype: str = "uint16"):
        self._dtypes = dtypes({"dtype": dtype})
        self.totals = dict.fromkeys(_TOTALS, 0)
        self._directory, self._tokens_per_shard = directory, tokens_per_shard
        self._files: dict[str, BinaryIO] = {}  # of the shard that is being written, by content
        self._sizes: Counter[str] = Counter()  # of its arrays
        directory.mkdir()

    def add(self, encoded: Encoded) -> None:
        """Adds conversations."""
        if not encoded.lengths.size:
            return
        if not self._files:
            self._open(has_requests=bool(encoded.requests))
        self._append("offsets", self._sizes["tokens"] + np.cumsum(encoded.lengths, dtype=np.int64))
        for name in ("tokens", "supervised", "tasks"):
            self._append(name, getattr(encoded, name))
        for request in encoded.requests:
            self._files["requests"].write(json.dumps(request, ensure_ascii=False).encode() + b"\n")
        self.totals["conversations"] += encoded.lengths.size
        self.totals["tokens"] += encoded.tokens.size
        self.totals["supervised_tokens"] += int(encoded.supervised.sum())
        self.totals["longest"] = max(self.totals["longest"], int(encoded.lengths.max()))
        if self._sizes["tokens"] >= self._tokens_per_shard:
            self.close()

    def close(self) -> None:
        """Finishes the last shard."""
        for name, file in self._files.items():
            if name in ARRAYS:
                file.seek(0)
                self._write_header(name)
            file.close()
        self._files, self._sizes = {}, Counter()

    def _open(self, has_requests: bool) -> None:
        for name in (*ARRAYS, "requests") if has_requests else ARRAYS:
            self._files[name] = (self._directory / file_name(name, self.totals["shards"])).open("wb")
        self.totals["shards"] += 1
        for name in ARRAYS:
            self._write_header(name)
        self._append("offsets", np.zeros(1, np.int64))

    def _append(self, name: str, array: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(array, self._dtypes[name]).data)
        self._sizes[name] += array.size

    def _write_header(self, name: str) -> None:
        """Writes the array's current size. NumPy pads headers, so the last one is as long as the first."""
        description = {"descr": self._dtypes[name].str, "fortran_order": False, "shape": (self._sizes[name],)}
        np.lib.format.write_array_header_1_0(self._files[name], description)
