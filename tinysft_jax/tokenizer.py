"""GPT-2's byte-pair encoding, with the control tokens of a chat template."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tiktoken
from jaxtyping import Bool, Int32

from tinysft_jax import chat
from tinysft_jax.console import UserError, shown

GPT2_RANKS = 50256
MERGES_FILE = Path(__file__).parent / "assets" / "vocab.bpe"
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# How GPT-2 splits text before merging: contractions, words, numbers, other characters, white space. The possessive
# quantifiers (`++`) keep the regular expression from backtracking over long runs; the matches are the same.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# A million white-space characters in a row overflow the stack of the regular expression, which ends the process.
LONGEST_BLANK = 500_000


class TooBlank(UserError):
    """Text with too many white-space characters in a row; the message is always the same."""


class ChatTokenizer:
    """Converts text and conversations to token ids and back. Raises a UserError for invalid arguments.

    Ids are the first `bpe_ranks` (256 to 50,256) of GPT-2's BPE, then end-of-text, then, in the template "control",
    `<|system|>`, `<|user|>` and `<|assistant|>`. Fewer ranks are a valid BPE too, with a vocabulary for a small model.

    Attributes:
      template: "control", "text", or None for a model that completes plain text.
      vocab_size: ids are below it.
      eot_id: the id of end-of-text.
      control_ids: role marker → id; empty unless the template is "control".
    """

    def __init__(self, template: str | None = "control", bpe_ranks: int = GPT2_RANKS):
        if template is not None and template not in chat.TEMPLATES:
            raise UserError(f"there is no chat template {shown(template)}; choose one of {', '.join(chat.TEMPLATES)}")
        if not 256 <= bpe_ranks <= GPT2_RANKS:
            raise UserError(f"the number of BPE ranks must be from 256 to {GPT2_RANKS}, not {shown(bpe_ranks)}")
        self.template = template
        self.bpe_ranks = bpe_ranks
        self.eot_id = bpe_ranks
        roles = chat.ROLE_MARKERS.values() if template == "control" else ()
        self.control_ids = {marker: self.eot_id + 1 + i for i, marker in enumerate(roles)}
        self.vocab_size = self.eot_id + 1 + len(self.control_ids)
        self._special_ids = {chat.END_OF_TEXT: self.eot_id, **self.control_ids}
        self._bpe = _encoding(bpe_ranks, tuple(self._special_ids.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Is sent to other processes without the ranks."""
        return ChatTokenizer, (self.template, self.bpe_ranks)

    def encode_text(self, text: str) -> list[int]:
        """Encodes text; the spelling of a control token in it is ordinary text."""
        chat.check_unicode(text, "the text")
        if len(text) > LONGEST_BLANK and any(len(blank[0]) > LONGEST_BLANK for blank in re.finditer(r"\s+", text)):
            raise TooBlank(f"over {LONGEST_BLANK:,} white-space characters in a row")
        return self._bpe.encode_ordinary(text)

    def encode_document(self, text: str) -> Int32[np.ndarray, " n"]:
        """Encodes a document for pretraining: its text, then end-of-text."""
        return np.array([*self.encode_text(text), self.eot_id], np.int32)

    def encode_chat(self, messages: chat.Messages) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """The ids of a conversation, and which are supervised: the assistant's and the end-of-text after each answer.

        Messages are `{"role": "system" | "user" | "assistant", "content": text}`: an optional system message (else the
        default one is added), then user and assistant in turn. An answer with `"weight": 0` is not supervised.
        """
        return self._encode_pieces(chat.chat_pieces(messages, self.template))

    def encode_prompt(self, messages: chat.Messages) -> Int32[np.ndarray, " n"]:
        """Encodes a conversation that ends with a user message, up to where the assistant starts."""
        return self._encode_pieces(chat.prompt_pieces(messages, self.template))[0]

    def _encode_pieces(self, pieces: list[chat.Piece]) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        ids: list[int] = []
        supervised: list[bool] = []
        for piece in pieces:
            new = [self._special_ids[piece.text]] if piece.control else self.encode_text(piece.text)
            ids += new
            supervised += [piece.supervised] * len(new)
        return np.array(ids, np.int32), np.array(supervised, bool)

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes of ids in the vocabulary; control tokens become their markers."""
        ids = np.fromiter(ids, np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise UserError(f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}")
        return self._bpe.decode_bytes(ids.tolist())

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ids in the vocabulary; bytes that are not UTF-8 (part of a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def marker_pieces(self) -> dict[str, list[int]]:
        """Role marker → the BPE ids of its spelling. A new marker's embedding starts as the mean of theirs."""
        return {marker: self.encode_text(marker) for marker in chat.ROLE_MARKERS.values()}

    def description(self) -> dict[str, Any]:
        """The tokenizer's part of `model.json` and `data.json`."""
        return {"chat_template": self.template, "tokenizer": {"kind": "gpt2", "bpe_ranks": self.bpe_ranks}}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "ChatTokenizer":
        """The tokenizer of a `description()`; other keys are ignored. Raises a UserError if it is unknown."""
        template, tokenizer = description.get("chat_template"), description.get("tokenizer")
        if tokenizer is None:
            raise UserError("the model's tokenizer is unknown: its description names none")
        if not isinstance(tokenizer, dict) or tokenizer.get("kind") != "gpt2":
            raise UserError(f"there is no tokenizer {shown(tokenizer)}; the kind this program knows is gpt2")
        bpe_ranks = tokenizer.get("bpe_ranks")
        if not isinstance(template, str | None) or type(bpe_ranks) is not int:
            raise UserError(f"chat_template {shown(template)} or bpe_ranks {shown(bpe_ranks)} is invalid")
        return cls(template, bpe_ranks)

    def fingerprint(self) -> str:
        """A hash of everything that decides the ids: how text is split, the BPE tokens by id, the control tokens."""
        tokens = [self._bpe.decode_single_token_bytes(id_).hex() for id_ in range(self.bpe_ranks)]
        return hashlib.sha256(json.dumps([_PATTERN, tokens, self._special_ids]).encode()).hexdigest()[:16]


def read_merges(path: Path = MERGES_FILE) -> tuple[list[str], list[tuple[str, str]]]:
    """GPT-2's published BPE: an alphabet of one character a byte, ranks 0 to 255, and the merges, ranks from 256 on."""
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != _MERGES_SHA256:
        raise UserError(f"{path} is missing or damaged: it is not GPT-2's vocab.bpe; install tinysft-jax again")
    merges = [tuple(line.split(" ")) for line in content.decode("utf-8").splitlines()[1:]]
    return list(_alphabet()), merges


def read_ranks(path: Path = MERGES_FILE) -> dict[bytes, int]:
    """GPT-2's BPE: token → rank, which is its id."""
    alphabet, merges = read_merges(path)
    byte_of = _alphabet()
    tokens = [*alphabet, *map("".join, merges)]
    return {bytes(byte_of[character] for character in token): rank for rank, token in enumerate(tokens)}


def _alphabet() -> dict[str, int]:
    """Character → byte: first the printable characters of Latin-1, then characters from 256 on for the other bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@functools.lru_cache
def _encoding(bpe_ranks: int, special_ids: tuple[tuple[str, int], ...]) -> tiktoken.Encoding:
    ranks = {token: rank for token, rank in read_ranks().items() if rank < bpe_ranks}
    return tiktoken.Encoding("gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=dict(special_ids))
