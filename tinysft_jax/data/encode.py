"""A block of items → token ids, supervision and task ids, with the ledger of what became of each item.

A block is encoded without a look at any other, so blocks may be encoded in any process.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from tinysft_jax import chat
from tinysft_jax.console import UserError, reason
from tinysft_jax.data.ledger import Ledger
from tinysft_jax.data.sources import Item
from tinysft_jax.data.store import SPLITS, Encoded
from tinysft_jax.tasks.make import MIN_KEPT, RATES, STORIES, TASK_NAMES, Conversation, Rates, make_tasks
from tinysft_jax.tasks.records import parse_record
from tinysft_jax.tokenizer import ChatTokenizer, TooBlank

TOO_LONG = "longer than max_tokens"
# Of GPT-2's tokens, in bytes. Text of more characters than max_tokens such tokens is too long without being encoded.
LONGEST_TOKEN = 128
BAD_ITEMS = ("stop", "skip")
TASKS_OF_FORMAT = {"tinystories-instruct": TASK_NAMES, "chat-jsonl": ("chat",), "text": ("text",)}


class Block(NamedTuple):
    """What a block of items becomes."""

    splits: dict[str, Encoded]
    ledger: Ledger


class BadItem(UserError):
    """A line, record or document that can't be used; `kind` says why, in the same words for all of the kind."""

    def __init__(self, kind: str, detail: str | None = None):
        super().__init__(detail or kind)
        self.kind = kind


class _Unused(BadItem):
    """An item of the right form from which nothing can be made: no reason to stop."""


class _Example(NamedTuple):
    """What is learned from: a conversation or a piece of text. Without ids it is too long, and left out."""

    task: str
    ids: Int32[np.ndarray, " n"] | None = None
    supervised: Bool[np.ndarray, " n"] | None = None
    trimmed: bool = False
    request: dict[str, Any] | None = None  # as `Split.request` reads it
    unread: Sequence[str] = ()  # fields of the line that were not read


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
        kept: dict[str, list[_Example]] = {split: [] for split in SPLITS}
        for item in items:
            ledger.read[item.split] += 1
            try:
                if item.flaw is not None:
                    raise BadItem(item.flaw)
                examples = list(examples_of(item))
            except _Unused as error:
                ledger.skip(item.split, error.kind)
                continue
            except UserError as error:
                said = f"{item.where}: {reason(error)}"
                if self.bad_items == "stop":
                    raise UserError(said) from None
                ledger.skip(item.split, _kind(error), said)
                continue
            for example in examples:
                for name in example.unread:
                    ledger.pass_over(item.split, name)
                if example.ids is None:
                    ledger.left_out[item.split, example.task, TOO_LONG] += 1
                    continue
                supervised = int(np.count_nonzero(example.supervised))
                ledger.keep(item.split, example.task, example.ids.size, supervised, example.trimmed)
                kept[item.split].append(example)
        return Block({split: self._join(kept[split]) for split in SPLITS}, ledger)

    def _story_examples(self, item: Item) -> Iterator[_Example]:
        record = parse_record(item.text)
        if record is None:
            raise _Unused("no story")
        if len(record.story) * MIN_KEPT > self.max_tokens * LONGEST_TOKEN:
            raise _Unused("a story too long for any task")
        # Validation asks one thing at a time: its figures are of one task each.
        follow_ups = item.split == "train"
        for conversation in make_tasks(record, self.seed, self.rates, follow_ups, brief=item.brief):
            request = _request(conversation)
            yield self._first_that_fits(conversation.versions(), conversation.task)._replace(request=request)

    def _chat_examples(self, item: Item) -> Iterator[_Example]:
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
        yield self._first_that_fits([messages], "chat")._replace(unread=chat.unread_fields(line))

    def _text_examples(self, item: Item) -> Iterator[_Example]:
        """A document, in consecutive pieces where it is longer than max_tokens.

        A piece begins with the token that ends the one before: there it is predicted, here predicted from.
        """
        ids = self.tokenizer.encode_document(item.text)
        for start in range(0, max(ids.size - 1, 1), self.max_tokens - 1):
            piece = ids[start : start + self.max_tokens]
            yield _Example("text", piece, np.arange(piece.size) > 0)

    def _first_that_fits(self, versions: Iterable[chat.Messages], task: str) -> _Example:
        """Encodes the first version of a conversation that max_tokens allows."""
        for n_trims, messages in enumerate(versions):
            if sum(len(message["content"]) for message in messages) > self.max_tokens * LONGEST_TOKEN:
                continue
            ids, supervised = self.tokenizer.encode_chat(messages)
            if ids.size <= self.max_tokens:
                return _Example(task, ids, supervised, n_trims > 0)
        return _Example(task)

    def _join(self, examples: list[_Example]) -> Encoded:
        ids = [example.ids for example in examples]
        return Encoded(
            tokens=np.concatenate([np.zeros(0, np.uint16), *ids], dtype=np.uint16, casting="unsafe"),
            supervised=np.concatenate([np.zeros(0, bool), *(example.supervised for example in examples)]),
            lengths=np.array([example.ids.size for example in examples], np.int32),
            tasks=np.array([self.task_names.index(example.task) for example in examples], np.uint8),
            requests=[example.request for example in examples] if self.format == "tinystories-instruct" else None,
        )


def _request(conversation: Conversation) -> dict[str, Any]:
    """A conversation's first request and answer, without a copy of its story."""
    answer = None if conversation.task in STORIES else conversation.messages[1]["content"]
    return {"task": conversation.task, "conditions": conversation.conditions, "answer": answer}


def _kind(error: UserError) -> str:
    if isinstance(error, BadItem):
        return error.kind
    return str(error) if isinstance(error, TooBlank) else "can't be laid out in the template"
