"""What `prepare` reads, as one stream of items: files, a data set on the Hub, or the embedded stories."""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tinysft_jax.console import UserError, reason
from tinysft_jax.corpus.stories import embedded_stories, record_text
from tinysft_jax.data.reading import TOO_LONG, Piece, holds_json, opens_json, read_json, read_records
from tinysft_jax.data.store import SPLITS
from tinysft_jax.tasks.make import RATES, Rates, balanced_rates
from tinysft_jax.tasks.records import SEPARATOR, StoryRecord, clean_record, parse_record

FORMATS = ("tinystories-instruct", "chat-jsonl", "text")
# The embedded corpus has one story for validation to this many for training.
EMBEDDED_TRAIN_PER_VALID = 20

_TRAIN_NAME = re.compile(r"(|.*[-_.])train(\.\w+)")
_STORY_HEADER = re.compile("^Story:", re.MULTILINE)
_BYTES_TO_GUESS_FROM = 1 << 16
# Records whose yes/no questions decide how often such a question is asked.
RECORDS_TO_COUNT = 4096
_LINES_OF_JSON = (".jsonl", ".ndjson", ".jsonlines", ".jl")

Found = TypeVar("Found")


class Item(NamedTuple):
    """One record, line or document, not yet looked into.

    Attributes:
      split: "train" or "valid".
      where: where it was read, for the user.
      text: its text; empty if it has a flaw.
      flaw: why there is no text, or None.
      brief: whether its maker wants it to be asked for as "a very short story".
    """

    split: str
    where: str
    text: str
    flaw: str | None = None
    brief: bool = False


@dataclass
class Source:
    """A stream of items of one format, held one at a time.

    Attributes:
      format: one of FORMATS.
      description: where the items come from, for `data.json`.
      size: of everything there is to read, in bytes or stories.
      position: how much of `size` has been read; it grows while the source is iterated over.
    """

    format: str
    description: dict[str, Any]
    size: int
    position: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Item]:
        raise NotImplementedError

    def rates(self) -> Rates:
        """How often each task is made of its stories."""
        return RATES


@dataclass
class EmbeddedSource(Source):
    """The stories that the package makes itself: whole records, or with the format "text" the stories alone.

    For training, each story's sketch follows it, and in text its verses as well; validation is on stories.
    """

    counts: dict[str, int]
    seed: int

    def __iter__(self) -> Iterator[Item]:
        for split, count in self.counts.items():
            for number, story in enumerate(embedded_stories(count, split, self.seed), 1):
                self.position += 1
                where = f"embedded {split} story {number}"
                yield Item(split, where, self._text_of(story.record))
                if split == "train":
                    yield Item(split, f"{where}, sketch", self._text_of(story.sketch), brief=True)
                    for verse in story.verses if self.format == "text" else ():
                        yield Item(split, f"{where}, verse", verse)

    def _text_of(self, record: StoryRecord) -> str:
        return record.story if self.format == "text" else record_text(record)


@dataclass
class FileSource(Source):
    """Text files. A file without a split of its own is divided by a hash of each item's text.

    So an item stays on its side whatever else the file holds, and two equal items can't end up on both sides.
    """

    files: list[tuple[Path, str | None]]
    valid_fraction: float
    limit: int | None

    def __iter__(self) -> Iterator[Item]:
        for path, split in self.files:
            texts = self._values(path) if self.format == "chat-jsonl" else self._records(path)
            for where, text, flaw in itertools.islice(texts, self.limit):
                yield Item(split or split_of(text, self.valid_fraction), where, text, flaw)

    def rates(self) -> Rates:
        """Those that balance the answers of the first records. Raises: UserError, if these can't be read."""
        if self.format != "tinystories-instruct":
            return RATES
        items = itertools.islice(replace(self), RECORDS_TO_COUNT)
        return balanced_rates(record for item in items if (record := parse_record(item.text)) is not None)

    def _values(self, path: Path) -> Iterator[tuple[str, str, str | None]]:
        for place, _, content in self._pieces(path, functools.partial(read_json, path=path)):
            text, flaw, start = _decode(content)
            where = f"{path}:{place}"
            yield where if start is None else f"{where}, byte {start + 1}", text, flaw

    def _records(self, path: Path) -> Iterator[tuple[str, str, str | None]]:
        # Documents of plain text are separated as records are.
        noun = "document" if self.format == "text" else "record"
        number = 0
        for piece in self._pieces(path, functools.partial(read_records, separator=SEPARATOR.encode())):
            text, flaw, start = _decode(piece.content)
            text = clean_record(text)
            if flaw or text:
                number += 1
                yield _place(path, piece, start) if flaw else f"{path}, {noun} {number}", text, flaw

    def _pieces(self, path: Path, read: Callable[[BufferedIOBase], Iterator[Found]]) -> Iterator[Found]:
        before = self.position
        try:
            with path.open("rb") as file:
                for piece in read(file):
                    self.position = before + file.tell()
                    yield piece
        except OSError as error:
            raise UserError(f"can't read {path}: {error.strerror}") from None
        self.position = before + path.stat().st_size


def _decode(content: bytes | None) -> tuple[str, str | None, int | None]:
    """The text; its flaw, or None; the byte at which that begins, if it is at one."""
    if content is None:
        return "", TOO_LONG, None
    try:
        return content.decode("utf-8"), None, None
    except UnicodeDecodeError as error:
        return "", "not UTF-8 text", error.start


def _place(path: Path, piece: Piece, start: int | None) -> str:
    """Where in the file a byte of a piece is; None: where the piece begins."""
    if piece.content is None or start is None:
        return f"{path}:{piece.line}"
    before = piece.content[:start]
    line, byte = piece.line + before.count(b"\n"), start - before.rfind(b"\n")
    return f"{path}:{line}, byte {byte}"


def split_of(text: str, valid_fraction: float) -> str:
    """The split of an item of an undivided file: a pure function of its text."""
    digest = hashlib.blake2b(text.strip().encode("utf-8"), digest_size=8).digest()
    return "valid" if int.from_bytes(digest) < valid_fraction * 2**64 else "train"


def open_embedded(n_stories: int, format: str, seed: int) -> EmbeddedSource:
    """The embedded corpus: `n_stories` for training and a twentieth of that, at least one, for validation.

    Raises:
      UserError: if `n_stories` is not positive or `format` is not one that stories come in.
    """
    if n_stories < 1:
        raise UserError(f"--embedded takes a positive number of stories, not {n_stories}")
    format = "tinystories-instruct" if format == "auto" else format
    if format == "chat-jsonl":
        raise UserError("the embedded stories come as --format tinystories-instruct or text, not chat-jsonl")
    counts = {"train": n_stories, "valid": max(n_stories // EMBEDDED_TRAIN_PER_VALID, 1)}
    return EmbeddedSource(format, {"embedded": counts}, sum(counts.values()), counts, seed)


def open_input(path: Path, format: str, valid_fraction: float, limit: int | None) -> FileSource:
    """A file, or the train and valid pair of a directory.

    Args:
      path: the file or directory.
      format: one of FORMATS, or "auto" to tell it from how the file begins, and from its name.
      valid_fraction: share of a single file's items that are for validation.
      limit: read at most so many items of each file.

    Raises:
      UserError: if there is no such file or pair, or it is empty.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; --input takes a file or a directory with a train and valid pair")
    if path.is_dir():
        train = _pair_in(path)
        files = [(train, "train"), (_valid_of(train), "valid")]
    else:
        files = [(path, None)]
    return open_files(files, format, valid_fraction, limit)


def open_files(
    files: list[tuple[Path, str | None]], format: str, valid_fraction: float, limit: int | None, **description: Any
) -> FileSource:
    """Files, each with its split or None; see `open_input`. `description` is kept in the source's."""
    sizes = {path.name: path.stat().st_size for path, _ in files}
    for path, _ in files:
        if not sizes[path.name]:
            raise UserError(f"{path} is empty")
    if format == "auto":
        formats = {_guess_format(path): path.name for path, _ in files}
        if len(formats) > 1:
            found = " and ".join(f"{name} looks like {format}" for format, name in formats.items())
            raise UserError(f"{found}; give the --format of both")
        (format,) = formats
    description |= {"files": sizes, "limit": limit}
    if any(split is None for _, split in files):
        description["valid_fraction"] = valid_fraction
    return FileSource(format, description, sum(sizes.values()), files, valid_fraction, limit)


def _pair_in(directory: Path) -> Path:
    """The train file of the one pair in a directory."""
    trains = [path for path in sorted(directory.iterdir()) if _TRAIN_NAME.fullmatch(path.name)]
    pairs = [path for path in trains if _valid_of(path).is_file()]
    if len(pairs) == 1:
        return pairs[0]
    if pairs:
        raise UserError(f"{directory} has several pairs: {', '.join(path.name for path in pairs)}; keep one in it")
    if trains:
        raise UserError(f"{directory} has {trains[0].name} but no {_valid_of(trains[0]).name}; give --input the file")
    raise UserError(f"{directory} has no pair like TinyStories-Instruct-train.txt and TinyStories-Instruct-valid.txt")


def _valid_of(train: Path) -> Path:
    return train.with_name(_TRAIN_NAME.sub(r"\1valid\2", train.name))


def _guess_format(path: Path) -> str:
    ending = path.suffix.lower()
    try:
        with path.open("rb") as file:
            # JSON that is malformed, under the name of JSON, is not text.
            if ending in _LINES_OF_JSON or holds_json(file) or (ending == ".json" and opens_json(file)):
                return "chat-jsonl"
            start = clean_record(file.read(_BYTES_TO_GUESS_FROM).decode("utf-8", "ignore"))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    return "tinystories-instruct" if _STORY_HEADER.search(start) else "text"


class _DataSet(NamedTuple):
    name: str  # of the files, with a place for the split
    revision: str  # the commit that is taken unless another one is asked for


_DATA_SETS = {
    "roneneldan/TinyStoriesInstruct": _DataSet(
        "TinyStories-Instruct-{split}.txt", "ee050ed1f8720795be342921335e821856a2b42e"
    ),
    "roneneldan/TinyStories": _DataSet("TinyStoriesV2-GPT4-{split}.txt", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"),
}


class Download(NamedTuple):
    """What was downloaded.

    Attributes:
      files: each with its split.
      commit: of the repository.
    """

    files: list[tuple[Path, str | None]]
    commit: str


def download(repository: str, revision: str | None = None) -> Download:
    """Downloads the train and valid file of a data set, or finds them where they were downloaded before.

    Args:
      repository: one of those that this program knows the files of.
      revision: a commit, branch or tag; None for the commit that this program was made with.

    Raises:
      UserError: if they can't be had; says how to do without.
    """
    if repository not in _DATA_SETS:
        raise UserError(
            f"--hub knows {' and '.join(_DATA_SETS)}, not {repository}; download its files and give them to --input"
        )
    name, pinned = _DATA_SETS[repository]
    revision = revision or pinned
    names = [name.format(split=split) for split in SPLITS]
    url = f"https://huggingface.co/datasets/{repository}/tree/{revision}"
    by_hand = f"download {' and '.join(names)} from {url} into a directory and give it to --input"
    try:
        from tinysft_jax.data import hub_file
    except ImportError:
        raise UserError(f"--hub needs the package huggingface-hub; install it, or {by_hand}") from None
    try:
        found = [hub_file.fetch(repository, name, revision) for name in names]
    except hub_file.FAILURES as error:
        raise UserError(f"the download failed ({reason(error)}); try again, or {by_hand}") from None
    return Download([(path, split) for (path, _), split in zip(found, SPLITS, strict=True)], found[0][1])
