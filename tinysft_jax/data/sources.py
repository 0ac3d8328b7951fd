"""What `prepare` reads, as a stream of items: files, a data set on the Hub, or the embedded stories."""

import contextlib
import hashlib
import itertools
import json
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from tinysft_jax.console import UserError, explained, reason
from tinysft_jax.corpus.stories import embedded_stories, record_text
from tinysft_jax.data.forms import FORMS, PREFERENCE, format_of, forms_of, prompt_of
from tinysft_jax.data.parquet import Rows, is_parquet
from tinysft_jax.data.reading import TOO_LONG, is_json, read_json, read_records
from tinysft_jax.data.store import SPLITS
from tinysft_jax.tasks.make import RATES, Rates, balanced_rates
from tinysft_jax.tasks.records import SEPARATOR, clean_record, parse_record

FORMATS = ("tinystories-instruct", "text", *FORMS)
# The embedded corpus has one story for validation to this many for training.
EMBEDDED_TRAIN_PER_VALID = 20
# Data sets on the Hub: the names of their files, and the commit.
HUB_DATA_SETS = {
    "roneneldan/TinyStoriesInstruct": ("TinyStories-Instruct-{}.txt", "ee050ed1f8720795be342921335e821856a2b42e"),
    "roneneldan/TinyStories": ("TinyStoriesV2-GPT4-{}.txt", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"),
}
# The first records, whose answers decide how often a yes/no question is asked.
RECORDS_TO_COUNT = 4096

_TRAIN_NAME = re.compile(r"(|.*[-_.])train(\.\w+)")
_STORY_HEADER = re.compile("^Story:", re.MULTILINE)
_BYTES_TO_GUESS_FROM, _LINES_TO_GUESS_FROM = 1 << 16, 100
_LINES_OF_JSON = (".jsonl", ".ndjson", ".jsonlines", ".jl")


class Item(NamedTuple):
    """One record, line or document, not yet parsed."""

    split: str  # "train" or "valid"
    where: str  # its place in the input, for messages
    text: str  # empty if it has a flaw
    flaw: str | None = None  # why there is no text
    brief: bool = False  # whether its story is to be asked for as "a very short story"


@dataclass
class Source(Iterable[Item]):
    """A stream of items of one format."""

    format: str  # one of FORMATS or CONVERSATIONS
    description: dict[str, Any]  # of the origin, for `data.json`
    size: int  # of the whole input, in bytes or stories
    position: int = field(default=0, init=False)  # how much of `size` has been read

    def rates(self) -> Rates:
        """How often each task is made of a story."""
        return RATES


@dataclass
class EmbeddedSource(Source):
    """The embedded corpus: records, or with the format "text" stories alone.

    In the training split, each story is followed by its sketch, and in text by its verses as well.
    """

    counts: dict[str, int]
    seed: int

    def __iter__(self) -> Iterator[Item]:
        text_of = operator.attrgetter("story") if self.format == "text" else record_text
        for split, count in self.counts.items():
            for number, story in enumerate(embedded_stories(count, split, self.seed), 1):
                self.position += 1
                where = f"embedded {split} story {number}"
                yield Item(split, where, text_of(story.record))
                if split == "train":
                    yield Item(split, f"{where}, sketch", text_of(story.sketch), brief=True)
                    for verse in story.verses if self.format == "text" else ():
                        yield Item(split, f"{where}, verse", verse)


@dataclass
class FileSource(Source):
    """Files. One without a split of its own is divided by a hash of each item's text, or prompt; see `split_of`."""

    files: list[tuple[Path, str | None]]
    valid_fraction: float
    limit: int | None

    def __iter__(self) -> Iterator[Item]:
        before, what_decides = 0, prompt_of if self.format == PREFERENCE else str  # pairs of one prompt stay together
        for path, split in self.files:
            with explained(f"can't read {path}"), path.open("rb") as file:
                rows = Rows(file, path, self.format) if is_parquet(path) else None
                texts = rows or (self._values if forms_of(self.format) else self._records)(file, path)
                for where, text, flaw in itertools.islice(texts, self.limit):
                    self.position = before + (rows or file).tell()
                    yield Item(split or split_of(what_decides(text), self.valid_fraction), where, text, flaw)
            self.position = before = before + path.stat().st_size

    def rates(self) -> Rates:
        """Those that balance the answers of the first records. Raises: UserError, if these can't be read."""
        if self.format != "tinystories-instruct":
            return RATES
        items = itertools.islice(replace(self), RECORDS_TO_COUNT)
        return balanced_rates(record for item in items if (record := parse_record(item.text)) is not None)

    def _values(self, file: BufferedIOBase, path: Path) -> Iterator[tuple[str, str, str | None]]:
        for place, _, content in read_json(file, path):
            text, flaw, start = _decode(content)
            yield f"{path}:{place}" if start is None else f"{path}:{place}, byte {start + 1}", text, flaw

    def _records(self, file: BufferedIOBase, path: Path) -> Iterator[tuple[str, str, str | None]]:
        noun, number = "document" if self.format == "text" else "record", 0
        for line, content in read_records(file, SEPARATOR.encode()):
            text, flaw, start = _decode(content)
            where = f"{path}:{line}"
            if start is not None:
                line, byte = line + content.count(b"\n", 0, start), start - content.rfind(b"\n", 0, start)
                where = f"{path}:{line}, byte {byte}"
            if flaw or (text := clean_record(text)):
                number += 1
                yield where if flaw else f"{path}, {noun} {number}", text, flaw


def _decode(content: bytes | None) -> tuple[str, str | None, int | None]:
    """The text, its flaw, and the index of the byte where the flaw is."""
    if content is None:
        return "", TOO_LONG, None
    try:
        return content.decode("utf-8"), None, None
    except UnicodeDecodeError as error:
        return "", "not UTF-8 text", error.start


def split_of(text: str, valid_fraction: float) -> str:
    """The split of an item: a pure function of its text, so two equal items are never in different splits."""
    digest = hashlib.blake2b(text.strip().encode("utf-8"), digest_size=8).digest()
    return "valid" if int.from_bytes(digest) < valid_fraction * 2**64 else "train"


def open_embedded(n_stories: int, format: str, seed: int) -> EmbeddedSource:
    """The embedded corpus: `n_stories` for training, and a twentieth of that, at least one, for validation."""
    if n_stories < 1:
        raise UserError(f"--embedded takes a positive number of stories, not {n_stories}")
    format = "tinystories-instruct" if format == "auto" else format
    if format in FORMS:
        raise UserError(f"the embedded stories come as --format tinystories-instruct or text, not {format}")
    counts = {"train": n_stories, "valid": max(n_stories // EMBEDDED_TRAIN_PER_VALID, 1)}
    return EmbeddedSource(format, {"embedded": counts}, sum(counts.values()), counts, seed)


def open_input(path: Path, format: str, valid_fraction: float, limit: int | None) -> FileSource:
    """A file, or the train and valid pair of a directory; see `open_files`."""
    if not path.exists():
        raise UserError(f"there is no {path}; --input takes a file or a directory with a train and valid pair")
    return open_files(_pair_in(path) if path.is_dir() else [(path, None)], format, valid_fraction, limit)


def open_files(
    files: list[tuple[Path, str | None]], format: str, valid_fraction: float, limit: int | None, **description: Any
) -> FileSource:
    """Files, each with its split, or None to divide it; of each, at most `limit` items are read.

    The format "auto" is guessed from the name and the beginning of each file. Raises: UserError, if a file is empty, a
    parquet file lacks the columns of the format, or the files have several formats.
    """
    sizes = {path.name: path.stat().st_size for path, _ in files}
    for path, _ in files:
        if not sizes[path.name]:
            raise UserError(f"{path} is empty")
    description |= {"files": sizes, "limit": limit}
    formats = {_find_format(path, format): path.name for path, _ in files}
    if len(formats) > 1:
        found = " and ".join(f"{name} looks like {format}" for format, name in formats.items())
        raise UserError(f"{found}; give the --format of both")
    (format,) = formats
    if any(split is None for _, split in files):
        description["valid_fraction"] = valid_fraction
    return FileSource(format, description, sum(sizes.values()), files, valid_fraction, limit)


def _pair_in(directory: Path) -> list[tuple[Path, str]]:
    """The one train and valid pair in a directory."""
    trains = [path for path in sorted(directory.iterdir()) if _TRAIN_NAME.fullmatch(path.name)]
    valids = [path.with_name(_TRAIN_NAME.sub(r"\1valid\2", path.name)) for path in trains]
    pairs = [(train, valid) for train, valid in zip(trains, valids, strict=True) if valid.is_file()]
    if len(pairs) == 1:
        return list(zip(pairs[0], SPLITS, strict=True))
    if pairs:
        raise UserError(f"{directory} has several pairs: {', '.join(path.name for path, _ in pairs)}; keep one in it")
    if trains:
        raise UserError(f"{directory} has {trains[0].name} but no {valids[0].name}; give --input the file")
    raise UserError(f"{directory} has no pair like TinyStories-Instruct-train.txt and TinyStories-Instruct-valid.txt")


def _find_format(path: Path, format: str) -> str:
    """The format, guessed where it is "auto". Raises: UserError, if a parquet file lacks the columns of it."""
    ending = path.suffix.lower()
    with explained(f"can't read {path}"), path.open("rb") as file:
        if is_parquet(path):
            return Rows(file, path, format).format
        if format != "auto":
            return format
        if ending in _LINES_OF_JSON or is_json(file, named_so=ending == ".json"):
            return format_of(_first_lines(file, path))
        start = clean_record(file.read(_BYTES_TO_GUESS_FROM).decode("utf-8", "ignore"))
    return "tinystories-instruct" if _STORY_HEADER.search(start) else "text"


def _first_lines(file: BufferedIOBase, path: Path) -> Iterator[Any]:
    """The first lines or elements that are JSON, up to what can't be read: that is named later, with its place."""
    with contextlib.suppress(UserError):
        for _, _, content in itertools.islice(read_json(file, path), _LINES_TO_GUESS_FROM):
            with contextlib.suppress(ValueError, RecursionError):
                yield json.loads(content or b"")


def open_hub(repository: str, format: str, valid_fraction: float, limit: int | None) -> FileSource:
    """One of HUB_DATA_SETS; see `open_files`. Raises: UserError, if the download fails."""
    if repository not in HUB_DATA_SETS:
        raise UserError(
            f"--hub knows {' and '.join(HUB_DATA_SETS)}, not {repository}; download its files and give them to --input"
        )
    name, revision = HUB_DATA_SETS[repository]
    names = [name.format(split) for split in SPLITS]
    url = f"https://huggingface.co/datasets/{repository}/tree/{revision}"
    by_hand = f"download {' and '.join(names)} from {url} into a directory and give it to --input"
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HTTPError
    except ImportError:
        raise UserError(f"--hub needs the package huggingface-hub; install it, or {by_hand}") from None
    try:
        paths = [hf_hub_download(repository, name, repo_type="dataset", revision=revision) for name in names]
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(f"the download failed ({reason(error)}); try again, or {by_hand}") from None
    files = list(zip(map(Path, paths), SPLITS, strict=True))
    return open_files(files, format, valid_fraction, limit, hub={"repository": repository, "commit": revision})
