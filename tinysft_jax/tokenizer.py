"""Conversations and text to token ids, and back."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32

from tinysft_jax import chat, files
from tinysft_jax.bpe import GPT2_RANKS, TOKENIZER_JSON, FileBpe, Gpt2Bpe, make_bpe
from tinysft_jax.chat_template import ChatTemplate
from tinysft_jax.console import UserError, explained, shown

# A tokenizer that was read from files lies beside `model.json` or `data.json`, in this directory: what is kept of a
# Hugging Face folder, and written again.
FILES_DIRECTORY = "tokenizer"
KEPT = (
    *(TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)


class ChatTokenizer:
    """Converts text and conversations to token ids and back. Raises a UserError for invalid arguments.

    By default, ids are the first `bpe_ranks` (256 to 50,256) of GPT-2's BPE, then end-of-text. `bpe` is that of a
    model's own file instead. The template "control" adds `<|system|>`, `<|user|>` and `<|assistant|>` at the end of
    the vocabulary.

    Attributes:
      template: "control", "text", a model's own, or None for a model that completes plain text.
      vocab_size: ids are below it.
      eot_id: the id of end-of-text, which ends a document.
      stop_ids: all ids that end an answer.
      control_ids: spelling → id of the template's special tokens; of `<|system|>`, …, if the template is "control".
      files: name → content of the files that the tokenizer was read from.
    """

    def __init__(
        self,
        template: str | ChatTemplate | None = "control",
        bpe_ranks: int = GPT2_RANKS,
        bpe: Gpt2Bpe | FileBpe | None = None,
    ):
        if isinstance(template, str) and template not in chat.TEMPLATES:
            raise UserError(f"there is no chat template {shown(template)}; choose one of {', '.join(chat.TEMPLATES)}")
        self.template, self.bpe = template, bpe or Gpt2Bpe(bpe_ranks)
        size = len(self.bpe.token_bytes)
        markers = list(chat.ROLE_MARKERS.values()) if template == "control" else []
        self._token_bytes = self.bpe.token_bytes + [marker.encode() for marker in markers]
        self.vocab_size = len(self._token_bytes)
        self.longest_token = max(128, *map(len, self._token_bytes))  # in bytes; at least as of GPT-2's vocabulary
        self.control_ids = {marker: size + i for i, marker in enumerate(markers)}
        self.eot_id = self.bpe.special_ids[self.bpe.eot]
        if isinstance(template, ChatTemplate):
            self.control_ids = {control: self.bpe.special_ids[control] for control in template.controls}
            self._special_ids = self.bpe.special_ids
        else:  # spells the end of a text as GPT-2 does
            self._special_ids = self.bpe.special_ids | {chat.END_OF_TEXT: self.eot_id} | self.control_ids
        ends = [self._special_ids[stop] for stop in chat.TEMPLATES.get(template, template).stops] if template else []
        self.stop_ids = tuple(sorted({*ends, *(self.bpe.special_ids[stop] for stop in self.bpe.stops)}))
        self._bos = [self.bpe.special_ids[token] for token in self.bpe.bos]
        self.files = self.bpe.files

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTokenizer, (self.template, 0, self.bpe)

    def with_template(self, template: str | ChatTemplate | None) -> "ChatTokenizer":
        """The same vocabulary with another template."""
        return ChatTokenizer(template, bpe=self.bpe)

    def encode_text(self, text: str) -> list[int]:
        """Encodes text; the spelling of a special token in it is ordinary text."""
        chat.check_unicode(text, "the text")
        return self.bpe.encode(text)

    def encode_opening(self, text: str) -> list[int]:
        """Encodes the beginning of a document: text, with what this tokenizer puts before it, if anything."""
        return self._bos + self.encode_text(text)

    def encode_document(self, text: str) -> Int32[np.ndarray, " n"]:
        """Encodes a document for pretraining: its text, then end-of-text."""
        return np.array([*self.encode_opening(text), self.eot_id], np.int32)

    def encode_chat(self, messages: chat.Messages) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """The ids of a conversation, and which are supervised: the assistant's, and what ends each answer.

        Messages are `{"role": "system" | "user" | "assistant", "content": text}`: an optional system message (else the
        template's default one, if it has one), then user and assistant in turn. An answer with `"weight": 0` is not
        supervised.
        """
        return self._encode_pieces(chat.chat_pieces(messages, self.template))

    def encode_prompt(self, messages: chat.Messages) -> Int32[np.ndarray, " n"]:
        """Encodes a conversation that ends with a user message, up to where the assistant starts."""
        return self._encode_pieces(chat.prompt_pieces(messages, self.template))[0]

    def _encode_pieces(self, pieces: list[chat.Piece]) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        ids = [] if isinstance(self.template, ChatTemplate) else list(self._bos)  # a model's own template has it
        supervised, after_control = [False] * len(ids), True
        for piece in pieces:
            if piece.control:
                new = [self._special_ids[piece.text]]
            else:  # an answer continues the prompt, whatever that ends with
                begins = not ids or (after_control and self.bpe.prefixes_sections)
                new = self.bpe.encode(piece.text, continues=piece.answer or not begins)
            after_control = piece.control
            ids += new
            supervised += [piece.supervised] * len(new)
        return np.array(ids, np.int32), np.array(supervised, bool)

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes of ids in the vocabulary; special tokens become their spelling."""
        ids = np.fromiter(ids, np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise UserError(f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}")
        return b"".join(map(self._token_bytes.__getitem__, ids.tolist()))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ids in the vocabulary; bytes that are not UTF-8 (part of a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def question(self, prompt: Int32[np.ndarray, " n"]) -> str:
        """The last user message of a prompt, as the template has it."""
        template = chat.TEMPLATES.get(self.template, self.template)
        ends = np.flatnonzero(np.isin(prompt, [self._special_ids[control] for control in template.controls])).tolist()
        bounds = zip([0, *(end + 1 for end in ends)], [*ends, len(prompt)], strict=True)
        return template.question([self.decode(prompt[a:b]).removeprefix(self.bpe.prefix) for a, b in bounds])

    def marker_pieces(self) -> dict[str, list[int]]:
        """Role marker → the BPE ids of its spelling. A new marker's embedding starts as the mean of theirs."""
        return {marker: self.encode_text(marker) for marker in chat.ROLE_MARKERS.values()}

    def description(self) -> dict[str, Any]:
        """The tokenizer's part of `model.json` and `data.json`; `files` go beside it."""
        template = self.template.to_json() if isinstance(self.template, ChatTemplate) else self.template
        return {"chat_template": template, "tokenizer": self.bpe.description()}

    @classmethod
    def from_description(
        cls, description: Mapping[str, Any], files: Mapping[str, bytes] | None = None
    ) -> "ChatTokenizer":
        """The tokenizer of a `description()` and its `files`; other keys are ignored. Raises a UserError if unknown."""
        template = parse_template(description.get("chat_template"))
        controls = template.controls if isinstance(template, ChatTemplate) else ()
        return cls(template, bpe=make_bpe(description.get("tokenizer"), files or {}, controls))

    def fingerprint(self) -> str:
        """A hash of everything that decides the ids: how text is split, the BPE tokens by id, the special tokens."""
        special: dict[str, Any] = {self.bpe.eot: self.eot_id, **self.control_ids}
        if isinstance(self.template, ChatTemplate):
            special |= {"template": self.template.to_json()}
        return hashlib.sha256(json.dumps([*self.bpe.identity(), special]).encode()).hexdigest()[:16]


def read_files(directory: Path) -> dict[str, bytes]:
    """Name → content of a tokenizer's files; empty if there are none."""
    with explained(f"can't read {directory}"):
        found = [directory / name for name in KEPT if (directory / name).is_file()]
        if large := [path for path in found if path.stat().st_size > files.MAX_TEXT_BYTES]:
            raise UserError(f"{large[0]} is too large for a tokenizer's file")
        return {path.name: path.read_bytes() for path in found}


def write_files(directory: Path, content: Mapping[str, bytes]) -> None:
    """Writes what `read_files` has read; no directory if there is nothing."""
    if content:
        directory.mkdir(exist_ok=True)
    for name, data in content.items():
        with files.atomic(directory / name) as partial:
            partial.write_bytes(data)


def parse_template(template: Any) -> str | ChatTemplate | None:
    """The `chat_template` of a description. Raises: UserError, if it is invalid."""
    if isinstance(template, Mapping):
        return ChatTemplate.from_json(template)
    if template is not None and not (isinstance(template, str) and template in chat.TEMPLATES):
        raise UserError(f"chat_template is {shown(template)}; it must be 'control', 'text', an object or null")
    return template
