"""GPT-2's byte-pair encoding, from a file inside the package, with the control tokens of a chat template."""

import codecs
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

from tinysft_jax import chat, files
from tinysft_jax.console import UserError, shown

GPT2_RANKS = 50256
MERGES_FILE = Path(__file__).parent / "assets" / "vocab.bpe"
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# How GPT-2 cuts text before it merges: contractions, words, numbers, other signs, white space. Possessive
# quantifiers (`++`) keep the regular expression from backtracking over long runs; what matches is the same.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# At a million white-space characters in a row the regular expression's stack overflows, which ends the process.
LONGEST_BLANK = 500_000


class TooBlank(UserError):
    """Text with so long a run of white space that it can't be cut into words; the message is always the same."""

    def __init__(self):
        super().__init__(f"over {LONGEST_BLANK:,} white-space characters in a row")


class ChatTokenizer:
    """Text and conversations to token ids and back.

    The ids: `bpe_ranks` of GPT-2's BPE, then end-of-text, then, in the template "control", `<|system|>`, `<|user|>`
    and `<|assistant|>`. The first N ranks are a valid BPE too; they make a small vocabulary for a small model.

    Attributes:
      template: "control", "text", or None for a model without a chat template, which completes plain text.
      bpe_ranks: how many of GPT-2's 50,256 ranks.
      vocab_size: ids are below it.
      eot_id: the id of end-of-text.
      control_ids: role marker -> id; empty unless the template is "control".
    """

    def __init__(self, template: str | None = "control", bpe_ranks: int = GPT2_RANKS):
        """Builds the tokenizer; encoders are cached, so a second one of the same kind costs nothing.

        Raises:
          UserError: for a template or a number of ranks (256 to 50,256) that there isn't.
        """
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
        """Travels between processes as its description, without the ranks."""
        return ChatTokenizer, (self.template, self.bpe_ranks)

    def encode_text(self, text: str) -> list[int]:
        """Encodes text; the spelling of a control token in it is text like any other.

        Raises:
          UserError: if the text holds a lone surrogate, or over 500,000 white-space characters in a row.
        """
        chat.check_unicode(text, "the text")
        if len(text) > LONGEST_BLANK and any(len(blank[0]) > LONGEST_BLANK for blank in re.finditer(r"\s+", text)):
            raise TooBlank
        return self._bpe.encode_ordinary(text)

    def encode_document(self, text: str) -> Int32[np.ndarray, " n"]:
        """Encodes a document for pretraining: its text, closed by end-of-text.

        Raises:
          UserError: as of `encode_text`.
        """
        return np.array([*self.encode_text(text), self.eot_id], np.int32)

    def encode_chat(self, messages: chat.Messages) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Encodes a conversation for training.

        Args:
          messages: `{"role": "system" | "user" | "assistant", "content": text}`: an optional system message (without
            one, the default one is put first), then user and assistant in turn, at least one assistant. An
            assistant's message with `"weight": 0` is not supervised.

        Returns:
          The ids, and which of them are supervised: the assistant's tokens and the end-of-text that closes them.

        Raises:
          UserError: if `messages` is not such a conversation, or the tokenizer has no chat template.
        """
        return self._encode_pieces(chat.chat_pieces(messages, self._chat_template()))

    def encode_prompt(self, messages: chat.Messages) -> Int32[np.ndarray, " n"]:
        """Encodes a conversation that ends with a user message, up to where the assistant starts to speak.

        Raises:
          UserError: if `messages` is not such a conversation, or the tokenizer has no chat template.
        """
        return self._encode_pieces(chat.prompt_pieces(messages, self._chat_template()))[0]

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes of any ids; control tokens come out as their markers.

        Raises:
          UserError: if an id is outside the vocabulary.
        """
        ids = np.fromiter(ids, np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise UserError(f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}")
        return self._bpe.decode_bytes(ids.tolist())

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of any ids; bytes that are not UTF-8 (half a character) become U+FFFD.

        Raises:
          UserError: if an id is outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def marker_pieces(self) -> dict[str, list[int]]:
        """Role marker -> the BPE ids of its spelling, whose mean embedding is where a new marker's row starts."""
        return {marker: self.encode_text(marker) for marker in chat.ROLE_MARKERS.values()}

    def description(self) -> dict[str, Any]:
        """What `model.json` and `data.json` say about the tokenizer."""
        return {"chat_template": self.template, "tokenizer": {"kind": "gpt2", "bpe_ranks": self.bpe_ranks}}

    def fingerprint(self) -> str:
        """A hash of everything that decides the ids: how text is split, the BPE tokens by id, the control tokens."""
        tokens = [self._bpe.decode_single_token_bytes(id_).hex() for id_ in range(self.bpe_ranks)]
        return hashlib.sha256(json.dumps([_PATTERN, tokens, self._special_ids]).encode()).hexdigest()[:16]

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "ChatTokenizer":
        """The tokenizer that a `description()` describes; other keys are ignored.

        Raises:
          UserError: if the tokenizer is unknown or of another kind.
        """
        template, tokenizer = description.get("chat_template"), description.get("tokenizer")
        if tokenizer is None:
            raise UserError("the model's tokenizer is unknown: its description names none")
        if not isinstance(tokenizer, dict) or tokenizer.get("kind") != "gpt2":
            raise UserError(f"there is no tokenizer {shown(tokenizer)}; the kind this program knows is gpt2")
        bpe_ranks = tokenizer.get("bpe_ranks")
        if not isinstance(template, str | None) or type(bpe_ranks) is not int:
            raise UserError(f"chat_template {shown(template)} or bpe_ranks {shown(bpe_ranks)} is not what it should be")
        return cls(template, bpe_ranks)

    def _chat_template(self) -> chat.Template:
        if self.template is None:
            raise UserError("there is no chat template: this model completes plain text")
        return self.template

    def _encode_pieces(self, pieces: list[chat.Piece]) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        ids: list[int] = []
        supervised: list[bool] = []
        for piece in pieces:
            new = [self._special_ids[piece.text]] if piece.control else self.encode_text(piece.text)
            ids += new
            supervised += [piece.supervised] * len(new)
        return np.array(ids, np.int32), np.array(supervised, bool)


class StreamDecoder:
    """Decodes ids as they arrive: a character is shown once all its bytes are there."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """The characters that `ids` complete."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for half a character, otherwise nothing."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | Path) -> ChatTokenizer:
    """The tokenizer that a model directory, a work directory's model or a prepared data set was made with.

    Raises:
      UserError: if `path` is neither, or its tokenizer is unknown.
    """
    path = Path(path)
    name = next((name for name in ("model.json", "model/model.json", "data.json") if (path / name).exists()), None)
    if name is None:
        raise UserError(f"{path} is neither a model directory nor a prepared data set: no model.json, no data.json")
    newest = 2 if name == "data.json" else 1
    description = files.read_json(path / name, "a model directory or a prepared data set", format_version=newest)
    try:
        return ChatTokenizer.from_description(description)
    except UserError as error:
        raise UserError(f"{path / name}: {error}") from None


def read_merges(path: Path = MERGES_FILE) -> tuple[list[str], list[tuple[str, str]]]:
    """Reads GPT-2's BPE as it is published: spelled in an alphabet that stands for the 256 bytes.

    Returns:
      The alphabet, whose order is that of ranks 0 to 255, and the merges, best first, which are the ranks from 256 on.

    Raises:
      UserError: if the file is missing or not GPT-2's.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; install tinysft-jax again") from None
    if hashlib.sha256(content).hexdigest() != _MERGES_SHA256:
        raise UserError(f"{path} is damaged: its SHA-256 is not that of GPT-2's vocab.bpe; install tinysft-jax again")
    merges = [tuple(line.split(" ")) for line in content.decode("utf-8").splitlines()[1:]]
    return list(_alphabet()), merges


def read_ranks(path: Path = MERGES_FILE) -> dict[bytes, int]:
    """Reads GPT-2's BPE: token -> rank, which is its id.

    Raises:
      UserError: if the file is missing or not GPT-2's.
    """
    alphabet, merges = read_merges(path)
    spelled = _alphabet()
    tokens = [*alphabet, *map("".join, merges)]
    return {bytes(spelled[character] for character in token): rank for rank, token in enumerate(tokens)}


def _alphabet() -> dict[str, int]:
    """Character -> the byte that it stands for.

    Bytes that print as themselves in Latin-1 come first; the others are spelled with characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@functools.lru_cache
def _encoding(bpe_ranks: int, special_ids: tuple[tuple[str, int], ...]) -> tiktoken.Encoding:
    ranks = {token: rank for token, rank in read_ranks().items() if rank < bpe_ranks}
    return tiktoken.Encoding("gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=dict(special_ids))
