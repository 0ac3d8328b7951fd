"""Byte-pair encodings: GPT-2's, whole or its first ranks, and that of any `tokenizer.json`."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from tinysft_jax import chat
from tinysft_jax.console import UserError, import_extra, reason, shown
from tinysft_jax.files import NUMBER, TEXT, TEXTS, check

GPT2_RANKS = 50256
MERGES_FILE = Path(__file__).parent / "assets" / "vocab.bpe"
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# How GPT-2 splits text before merging: contractions, words, numbers, other characters, white space. The possessive
# quantifiers (`++`) keep the regular expression from backtracking over long runs; the matches are the same.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# A million white-space characters in a row overflow the stack of the regular expression, which ends the process.
LONGEST_BLANK = 500_000

TOKENIZER_JSON = "tokenizer.json"
SPACE = "\u2581"  # stands for a space in the tokens of SentencePiece
# Without one of these a vocabulary can't spell text. Others may have no token: control characters, and first bytes of
# characters that don't exist. The library leaves those out.
_NEEDED_BYTES = {0x0A, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}
_MOST_IDS = 1 << 22
_MARKS = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
# What a tokenizer must give back unchanged.
_SAMPLES = ("".join(map(chr, range(0x20, 0x7F))), "  a  cat's 1,234 ", "\n\n a\n", "Été à Łódź, 日本 🐱")


class TooBlank(UserError):
    """Text with too many white-space characters in a row; the message is always the same."""


class Gpt2Bpe:
    """The first `ranks` (256 to 50,256) tokens of GPT-2, then end-of-text: a vocabulary of any size up to GPT-2's.

    Attributes, which `FileBpe` has as well:
      token_bytes: the bytes of each id.
      special_ids: spelling → id of the tokens that no text gives.
      eot: the spelling of end-of-text, which ends a document; `stops`: the spellings of what ends an answer.
      bos: spellings of what begins a document.
      prefix: what is put before a text: nothing or a space; with `prefixes_sections`, after a special token as well.
    """

    eot, stops, bos, prefix, prefixes_sections = chat.END_OF_TEXT, (chat.END_OF_TEXT,), (), "", False
    files: Mapping[str, bytes] = {}

    def __init__(self, ranks: int):
        if not 256 <= ranks <= GPT2_RANKS:
            raise UserError(f"the number of BPE ranks must be from 256 to {GPT2_RANKS}, not {shown(ranks)}")
        self.ranks = ranks
        self._encoding = _encoding(ranks)
        self.token_bytes = [*gpt2_tokens()[:ranks], chat.END_OF_TEXT.encode()]
        self.special_ids = {chat.END_OF_TEXT: ranks}

    def __reduce__(self) -> tuple[Any, ...]:
        """Is sent to other processes without the ranks."""
        return Gpt2Bpe, (self.ranks,)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Encodes text; nothing in it becomes a special token. What it continues makes no difference."""
        if len(text) > LONGEST_BLANK and any(len(blank[0]) > LONGEST_BLANK for blank in re.finditer(r"\s+", text)):
            raise TooBlank(f"over {LONGEST_BLANK:,} white-space characters in a row")
        return self._encoding.encode_ordinary(text)

    def description(self) -> dict[str, Any]:
        """The tokenizer's entry in `model.json` and `data.json`."""
        return {"kind": "gpt2", "bpe_ranks": self.ranks}

    def identity(self) -> list[Any]:
        """What decides the ids of text, in JSON."""
        return [_PATTERN, [token.hex() for token in gpt2_tokens()[: self.ranks]]]


class FileBpe:
    """The BPE of a `tokenizer.json`, byte-level or SentencePiece's with byte fallback; attributes as of `Gpt2Bpe`.

    Args:
      files: name → content of the model's tokenizer files, which are kept as they came.
      eot, stops: as of `Gpt2Bpe`.
      controls: more tokens that no text gives: those of the model's chat template.
    Raises: UserError, if the file is damaged, or of a kind that can't spell any text.
    """

    def __init__(self, files: Mapping[str, bytes], eot: str, stops: Sequence[str], controls: Collection[str] = ()):
        self.files, self.eot, self.stops, self._controls = dict(files), eot, tuple(stops), tuple(controls)
        content = _read_tokenizer_json(files[TOKENIZER_JSON])
        added = content.pop("added")
        for token in content["added_tokens"]:
            token["special"] = token.get("special") is True or token["content"] in controls
        self._first = _tokenizer(content)
        content = json.loads(self._first.to_str())  # as the library understands it
        vocabulary = self._first.get_vocab()
        for token in (eot, *stops, *controls, *added):
            if token not in added or vocabulary.get(token) != added[token]:
                raise UserError(f"{TOKENIZER_JSON} has no added token {shown(token)}, or with an id that it can't have")
        self.token_bytes = _token_bytes(vocabulary, added, _is_byte_level(content))
        rest = _without_prefix(content)
        self._rest, self.prefix = (self._first, "") if rest == content else (_tokenizer(rest), " ")
        steps = _steps(content, "pre_tokenizer", "pretokenizers")
        self.prefixes_sections = all(step.get("prepend_scheme") != "first" for step in steps)
        special = {eot, *stops, *(token["content"] for token in content["added_tokens"] if token["special"])}
        self.special_ids = {token: vocabulary[token] for token in sorted(special)}
        self._check()
        # What the file's post-processor puts before a text.
        plain, whole = (self._first.encode("a", add_special_tokens=flag).ids for flag in (False, True))
        spelled = {id: token for token, id in self.special_ids.items()}
        self.bos = tuple(spelled[id] for id in itertools.takewhile(lambda id: id != plain[0], whole) if id in spelled)

    def _check(self) -> None:
        """Raises: UserError, if text comes back changed, or gives a special token."""
        for text in (*_SAMPLES, *self.special_ids):
            ids = self.encode(text, continues=True)
            if b"".join(map(self.token_bytes.__getitem__, ids)) != text.encode():
                raise UserError(f"its tokenizer changes the text {shown(text)}; it can't be used here")
            if not set(ids + self.encode(text)).isdisjoint(self.special_ids.values()):
                raise UserError(f"its tokenizer makes a special token of the text {shown(text)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return FileBpe, (self.files, self.eot, self.stops, self._controls)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Encodes text; nothing in it becomes a special token.

        SentencePiece puts a space before a text; not before one that `continues` another.
        """
        try:
            return (self._rest if continues else self._first).encode(text, add_special_tokens=False).ids
        except BaseException as error:
            raise _failure(error, "can't encode this text") from None

    def encode_whole(self, text: str) -> list[int]:
        """Encodes a text in which special tokens are spelled: what transformers does with a rendered template."""
        self._first.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._first.encode_special_tokens = True

    def description(self) -> dict[str, Any]:
        """The tokenizer's entry in `model.json` and `data.json`."""
        sha256 = hashlib.sha256(self.files[TOKENIZER_JSON]).hexdigest()
        return {"kind": TOKENIZER_JSON, "sha256": sha256, "eot": self.eot, "stops": list(self.stops)}

    def identity(self) -> list[Any]:
        """What decides the ids of text, in JSON."""
        return [self.description()]


def make_bpe(
    description: Mapping[str, Any] | None, files: Mapping[str, bytes], controls: Collection[str] = ()
) -> Gpt2Bpe | FileBpe:
    """The BPE of a `description()`; `files` and `controls` are for those of a file.

    Raises: UserError, if it is unknown, or the file is missing or another one.
    """
    if description is None:
        raise UserError("the model's tokenizer is unknown: its description names none")
    kind = description.get("kind") if isinstance(description, Mapping) else None
    if kind == "gpt2":
        check(description, {"bpe_ranks": NUMBER}, "tokenizer")
        return Gpt2Bpe(description["bpe_ranks"])
    if kind != TOKENIZER_JSON:
        raise UserError(f"there is no tokenizer {shown(description)}; the kinds are gpt2 and {TOKENIZER_JSON}")
    check(description, {"sha256": TEXT, "eot": TEXT, "stops": TEXTS}, "tokenizer")
    if TOKENIZER_JSON not in files:
        raise UserError(f"its tokenizer/{TOKENIZER_JSON} is missing; copy it again")
    if hashlib.sha256(files[TOKENIZER_JSON]).hexdigest() != description["sha256"]:
        raise UserError(f"its tokenizer/{TOKENIZER_JSON} is another one, or damaged")
    return FileBpe(files, description["eot"], description["stops"], controls)


def _read_tokenizer_json(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        kind, *marks = (content["model"].get(key) for key in ("type", *_MARKS))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{TOKENIZER_JSON} is damaged or cut short; copy it again") from None
    if kind not in ("BPE", None) or any(marks):
        raise UserError(f"its tokenizer is of the type {shown(kind)}; only BPE is read, without {', '.join(_MARKS)}")
    return content | {"added": added}


def _tokenizer(content: dict[str, Any]) -> Any:
    tokenizers = import_extra("tokenizers", "hf", f"a model with a {TOKENIZER_JSON}")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # in text they are text
        return tokenizer
    except BaseException as error:
        raise _failure(error, "can't be read") from None


def _failure(error: BaseException, what: str) -> BaseException:
    """A UserError for what the library raises: nothing more special, and where it panics no Exception."""
    is_its = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    return UserError(f"{TOKENIZER_JSON} {what}: {reason(error)}") if is_its else error


def _steps(content: dict[str, Any], part: str, members: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, which may be one or a sequence."""
    part = content.get(part) or {}
    return part.get(members, []) if part.get("type") == "Sequence" else [part]


def _is_byte_level(content: dict[str, Any]) -> bool:
    """Whether tokens are spelled in GPT-2's alphabet; else in SentencePiece's. Raises: UserError, if in neither."""
    if any(step.get("type") == "ByteLevel" for step in _steps(content, "pre_tokenizer", "pretokenizers")):
        return True
    if content["model"].get("byte_fallback") is not True:
        raise UserError("its tokenizer is neither byte-level nor has byte fallback, so it can't spell every text")
    return False


def _without_prefix(content: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer without the space that it puts before a text."""
    content = json.loads(json.dumps(content))
    steps = _steps(content, "normalizer", "normalizers")
    if any(step.get("type") == "Prepend" for step in steps):
        kept = [step for step in steps if step.get("type") != "Prepend"]
        content["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for step in _steps(content, "pre_tokenizer", "pretokenizers"):
        if step.get("type") == "ByteLevel":
            step["add_prefix_space"] = False
        elif step.get("type") == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
    return content


def _token_bytes(vocabulary: dict[str, int], added: Collection[str], byte_level: bool) -> list[bytes]:
    """The bytes of each id; ids that no token has are empty. Raises: UserError, if bytes can't be spelled."""
    if (size := max(vocabulary.values(), default=-1) + 1) > _MOST_IDS:
        raise UserError(f"{TOKENIZER_JSON} has the id {size - 1:,}; a vocabulary of over {_MOST_IDS:,} is not read")
    byte_of, table = _alphabet(), [b""] * size
    single = byte_of if byte_level else {f"<0x{byte:02X}>": byte for byte in range(256)}
    if absent := [byte for token, byte in single.items() if byte in _NEEDED_BYTES and token not in vocabulary]:
        raise UserError(f"its tokenizer can't spell every text: the byte 0x{absent[0]:02X} has no token")
    for token, id in vocabulary.items():
        if token in added or (byte_level and not byte_of.keys() >= set(token)):
            table[id] = token.encode()
        elif byte_level:
            table[id] = bytes(byte_of[character] for character in token)
        else:
            table[id] = bytes([single[token]]) if token in single else token.replace(SPACE, " ").encode()
    return table


def read_merges(path: Path = MERGES_FILE) -> tuple[list[str], list[tuple[str, str]]]:
    """GPT-2's published BPE: an alphabet of one character a byte, ranks 0 to 255, and the merges, ranks from 256 on."""
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != _MERGES_SHA256:
        raise UserError(f"{path} is missing or damaged: it is not GPT-2's vocab.bpe; install tinysft-jax again")
    merges = [tuple(line.split(" ")) for line in content.decode("utf-8").splitlines()[1:]]
    return list(_alphabet()), merges


@functools.lru_cache
def gpt2_tokens(path: Path = MERGES_FILE) -> list[bytes]:
    """GPT-2's tokens in the order of their ranks, which are their ids."""
    alphabet, merges = read_merges(path)
    byte_of = _alphabet()
    return [bytes(byte_of[character] for character in token) for token in (*alphabet, *map("".join, merges))]


def _alphabet() -> dict[str, int]:
    """Character → byte: first the printable characters of Latin-1, then characters from 256 on for the other bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@functools.lru_cache
def _encoding(ranks: int) -> tiktoken.Encoding:
    tokens = {token: rank for rank, token in enumerate(gpt2_tokens()[:ranks])}
    return tiktoken.Encoding("gpt2", pat_str=_PATTERN, mergeable_ranks=tokens, special_tokens={})
