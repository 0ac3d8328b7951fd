"""A block of items → token ids, supervision and task ids, with the ledger of what became of each item.

A block is encoded without a look at any other, so the blocks may be encoded in any process.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from tinysft_jax import chat
from tinysft_jax.console import UserError, reason
from tinysft_jax.data.ledger import Ledger
from tinysft_jax.data.sources import Item
from tinysft_jax.data.store import SPLITS, Encoded
from tinysft_jax.tasks.make import MIN_KEPT, RATES, TASK_NAMES, Rates, make_tasks, shortened
from tinysft_jax.tasks.records import parse_record
from tinysft_jax.tokenizer import ChatTokenizer, TooBlank

TOO_LONG = "longer than max_tokens"
# Of GPT-2's tokens, in bytes. What has more characters than so many tokens can hold needs no tokenizer to be too long.
LONGEST_TOKEN = 128
BAD_ITEMS = ("stop", "skip")
TASKS_OF_FORMAT = {"tinystories-instruct": TASK_NAMES, "chat-jsonl": ("chat",), "text": ("text",)}


class Block(NamedTuple):
    """What a block of items becomes."""

    splits: dict[str, Encoded]
    ledger: Ledger


class BadItem(UserError):
    """A line, record or document that can't be used; `kind` says why in words that don't depend on which it is."""

    def __init__(self, kind: str, detail: str | None = None):
        super().__init__(detail or kind)
        self.kind = kind


class _Example(NamedTuple):
    task: str
    ids: Int32[np.ndarray, " n"]
    supervised: Bool[np.ndarray, " n"]
    trimmed: bool = False


class _LeftOut(NamedTuple):
    task: str
    reason: str


class _Unread(NamedTuple):
    field: str


@dataclass(frozen=True)
class Encoder:
    """Encodes blocks of items; small enough to travel to a worker with each of them.

    Attributes:
      format: of the items, one of sources.FORMATS.
      tokenizer: without a chat template for the format "text", with one for the others.
      max_tokens: no conversation is longer.
      seed: for what is drawn when tasks are made of a story.
      rates: how often each task is made of a story that allows it.
      bad_items: "stop" at the first item that can't be used, or "skip" and count them.
    """

    format: str
    tokenizer: ChatTokenizer
    max_tokens: int
    seed: int
    rates: Rates = field(default_factory=lambda: RATES)
    bad_items: str = "stop"

    @property
    def task_names(self) -> tuple[str, ...]:
        """Their order gives the task ids."""
        return TASKS_OF_FORMAT[self.format]

    def encode(self, items: Sequence[Item]) -> Block:
        """Encodes a block.

        Raises:
          UserError: if an item is not what its format says and bad items are not skipped; names the place.
        """
        examples_of = {
            "tinystories-instruct": self._story_examples,
            "chat-jsonl": self._chat_examples,
            "text": self._text_examples,
        }[self.format]
        ledger = Ledger()
        examples: dict[str, list[_Example]] = {split: [] for split in SPLITS}
        for item in items:
            ledger.read[item.split] += 1
            try:
                if item.flaw is not None:
                    raise BadItem(item.flaw)
                found = list(examples_of(item))
            except UserError as error:
                if self.bad_items == "stop" and not isinstance(error, _Unused):
                    raise UserError(f"{item.where}: {reason(error)}") from None
                kind = _kind(error)
                ledger.skip(item.split, kind, None if isinstance(error, _Unused) else f"{item.where}: {reason(error)}")
                continue
            for example in found:
                if isinstance(example, _Unread):
                    ledger.pass_over(item.split, example.field)
                elif isinstance(example, _LeftOut):
                    ledger.left_out[item.split, example.task, example.reason] += 1
                else:
                    supervised = int(np.count_nonzero(example.supervised))
                    ledger.keep(item.split, example.task, example.ids.size, supervised, example.trimmed)
                    examples[item.split].append(example)
        return Block({split: self._join(examples[split]) for split in SPLITS}, ledger)

    def _story_examples(self, item: Item) -> Iterator[_Example | _LeftOut]:
        record = parse_record(item.text)
        if record is None:
            raise _Unused("no story")
        if len(record.story) * MIN_KEPT > self.max_tokens * LONGEST_TOKEN:
            raise _Unused("a story too long for any task")
        # Validation asks one thing at a time: its figures are of one task each.
        for conversation in make_tasks(
            record, self.seed, self.rates, follow_ups=item.split == "train", brief=item.brief
        ):
            versions = itertools.chain([conversation.messages], shortened(conversation, record.story))
            yield self._first_that_fits(versions, conversation.task)

    def _chat_examples(self, item: Item) -> Iterator[_Example | _LeftOut | _Unread]:
        try:
            line = json.loads(item.text)
        except (ValueError, RecursionError) as error:
            raise BadItem("not valid JSON", f"not valid JSON: {error}") from None
        try:
            messages = chat.parse_chat(line)
        except UserError as error:
            is_other = not (isinstance(line, dict) and line.keys() & {"messages", "prompt", "completion"})
            hint = "; to learn the file as it is, give --format text" if is_other else ""
            raise BadItem("not a conversation", f"{error}{hint}") from None
        yield self._first_that_fits([messages], "chat")
        yield from map(_Unread, chat.unread_fields(line))

    def _text_examples(self, item: Item) -> Iterator[_Example | _LeftOut]:
        """A document, in consecutive pieces where it is longer than max_tokens.

        A piece begins with the token that ends the one before: there it is predicted, here predicted from.
        """
        ids = self.tokenizer.encode_document(item.text)
        for start in range(0, max(ids.size - 1, 1), self.max_tokens - 1):
            piece = ids[start : start + self.max_tokens]
            yield _Example("text", piece, np.arange(piece.size) > 0)

    def _first_that_fits(self, versions: Iterable[chat.Messages], task: str) -> _Example | _LeftOut:
        """Encodes a conversation, or the first of its shorter versions, that max_tokens allows."""
        for n_trims, messages in enumerate(versions):
            if sum(len(message["content"]) for message in messages) > self.max_tokens * LONGEST_TOKEN:
                continue
            ids, supervised = self.tokenizer.encode_chat(messages)
            if ids.size <= self.max_tokens:
                return _Example(task, ids, supervised, n_trims > 0)
        return _LeftOut(task, TOO_LONG)

    def _join(self, examples: list[_Example]) -> Encoded:
        ids = [example.ids for example in examples]
        return Encoded(
            tokens=np.concatenate([np.zeros(0, np.uint16), *ids], dtype=np.uint16, casting="unsafe"),
            supervised=np.concatenate([np.zeros(0, bool), *(example.supervised for example in examples)]),
            lengths=np.array([example.ids.size for example in examples], np.int32),
            tasks=np.array([self.task_names.index(example.task) for example in examples], np.uint8),
        )


class _Unused(BadItem):
    """An item of the right form of which nothing can be made: no reason to stop."""


def _kind(error: UserError) -> str:
    """Why an item can't be used, in words that don't depend on which it is."""
    if isinstance(error, BadItem):
        return error.kind
    return str(error) if isinstance(error, TooBlank) else "can't be laid out in the template"
