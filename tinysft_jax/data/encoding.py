"""A block of items → token ids, supervision and task ids, with the ledger of what became of each item.

A block is encoded without a look at any other, so the blocks may be encoded in any process.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8, UInt16

from tinysft_jax import chat
from tinysft_jax.data.dataset import SPLITS
from tinysft_jax.data.ledger import Ledger
from tinysft_jax.data.records import parse_record
from tinysft_jax.data.sources import Item
from tinysft_jax.data.tasks import RATES, TASK_NAMES, Rates, make_tasks
from tinysft_jax.data.trimming import shortened
from tinysft_jax.errors import UserError
from tinysft_jax.tokenizer import ChatTokenizer

TOO_LONG = "longer than max_tokens"
TASKS_OF_FORMAT = {"tinystories-instruct": TASK_NAMES, "chat-jsonl": ("chat",), "text": ("text",)}


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


class Block(NamedTuple):
    """What a block of items becomes."""

    splits: dict[str, Encoded]
    ledger: Ledger


class _Example(NamedTuple):
    task: str
    ids: Int32[np.ndarray, " n"]
    supervised: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Encoder:
    """Encodes blocks of items; small enough to travel to a worker with each of them.

    Attributes:
      format: of the items, one of sources.FORMATS.
      tokenizer: without a chat template for the format "text", with one for the others.
      max_tokens: no conversation is longer.
      seed: for what is drawn when tasks are made of a story.
      rates: how often each task is made of a story that allows it.
    """

    format: str
    tokenizer: ChatTokenizer
    max_tokens: int
    seed: int
    rates: Rates = field(default_factory=lambda: RATES)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Their order gives the task ids."""
        return TASKS_OF_FORMAT[self.format]

    def encode(self, items: Sequence[Item]) -> Block:
        """Encodes a block.

        Raises:
          UserError: if an item is not what its format says; names the place.
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
                examples[item.split].extend(examples_of(item, ledger))
            except UserError as error:
                raise UserError(f"{item.where}: {error}") from None
        return Block({split: self._join(examples[split]) for split in SPLITS}, ledger)

    def _story_examples(self, item: Item, ledger: Ledger) -> Iterator[_Example]:
        record = parse_record(item.text)
        if record is None:
            ledger.skipped[item.split, "no story"] += 1
            return
        for conversation in make_tasks(record, self.seed, self.rates):
            versions = itertools.chain([conversation.messages], shortened(conversation, record.story))
            yield from self._first_that_fits(versions, item.split, conversation.task, ledger)

    def _chat_examples(self, item: Item, ledger: Ledger) -> Iterator[_Example]:
        try:
            line = json.loads(item.text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not valid JSON: {error}") from None
        yield from self._first_that_fits([chat.parse_chat(line)], item.split, "chat", ledger)

    def _text_examples(self, item: Item, ledger: Ledger) -> Iterator[_Example]:
        """A document, in consecutive pieces where it is longer than max_tokens.

        A piece begins with the token that ends the one before: there it is predicted, here predicted from.
        """
        ids = self.tokenizer.encode_document(item.text)
        for start in range(0, max(ids.size - 1, 1), self.max_tokens - 1):
            piece = ids[start : start + self.max_tokens]
            ledger.kept[item.split, "text"] += 1
            yield _Example("text", piece, np.arange(piece.size) > 0)

    def _first_that_fits(
        self, versions: Iterable[chat.Messages], split: str, task: str, ledger: Ledger
    ) -> Iterator[_Example]:
        """Encodes a conversation, or the first of its shorter versions, that max_tokens allows."""
        for n_trims, messages in enumerate(versions):
            ids, supervised = self.tokenizer.encode_chat(messages)
            if ids.size <= self.max_tokens:
                ledger.kept[split, task] += 1
                ledger.trimmed[split, task] += n_trims > 0
                yield _Example(task, ids, supervised)
                return
        ledger.left_out[split, task, TOO_LONG] += 1

    def _join(self, examples: list[_Example]) -> Encoded:
        ids = [example.ids for example in examples]
        return Encoded(
            tokens=np.concatenate([np.zeros(0, np.uint16), *ids], dtype=np.uint16, casting="unsafe"),
            supervised=np.concatenate([np.zeros(0, bool), *(example.supervised for example in examples)]),
            lengths=np.array([example.ids.size for example in examples], np.int32),
            tasks=np.array([self.task_names.index(example.task) for example in examples], np.uint8),
        )
