"""A block of items → token ids, supervision and task ids, and the ledger of what became of each item.

A block is a pure function of its items, so any process may encode it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from tinysft_jax import chat
from tinysft_jax.bpe import TooBlank
from tinysft_jax.console import UserError, explained, reason
from tinysft_jax.data.forms import CONVERSATIONS, FORMS, PREFERENCE, parse
from tinysft_jax.data.ledger import Ledger
from tinysft_jax.data.sources import Item
from tinysft_jax.data.store import SPLITS, Encoded, token_dtype
from tinysft_jax.tasks.make import MIN_KEPT, RATES, TASK_NAMES, Rates, make_tasks
from tinysft_jax.tasks.records import parse_record
from tinysft_jax.tokenizer import ChatTokenizer

TOO_LONG = "longer than max_tokens"
BAD_ITEMS = ("stop", "skip")
TASKS_OF_FORMAT = {"tinystories-instruct": TASK_NAMES, "text": ("text",)}
TASKS_OF_FORMAT |= dict.fromkeys((CONVERSATIONS, *FORMS), ("chat",)) | {PREFERENCE: ("preference",)}


class BadItem(UserError):
    """An item that can't be used; the ledger counts it under `kind`. Only one that is `malformed` is a mistake."""

    def __init__(self, kind: str, detail: str | None = None, malformed: bool = True):
        super().__init__(detail or kind)
        self.kind, self.malformed = kind, malformed


class _Example(NamedTuple):
    """A conversation, a pair of them or a piece of text. Without ids it is too long."""

    task: str
    ids: Sequence[Int32[np.ndarray, " n"]] = ()  # of each conversation
    supervised: Sequence[Bool[np.ndarray, " n"]] = ()
    trimmed: bool = False
    request: dict[str, Any] | None = None  # as `Split.request` reads it
    unread: Iterable[str] = ()  # fields of the line that are not read
    form: str | None = None  # of the line, one of FORMS


@dataclass(frozen=True)
class Encoder:
    """Encodes blocks of items; sent to each worker."""

    format: str  # of the items, one of sources.FORMATS or CONVERSATIONS
    tokenizer: ChatTokenizer  # without a chat template for the format "text", with one for the others
    max_tokens: int  # of a conversation
    seed: int  # for the tasks made of a story
    rates: Rates = field(default_factory=lambda: RATES)  # of these tasks
    bad_items: str = "stop"  # at the first malformed item, or "skip" and count them

    @property
    def task_names(self) -> tuple[str, ...]:
        """Their order gives the task ids."""
        return TASKS_OF_FORMAT[self.format]

    @property
    def _most_characters(self) -> int:
        """Longer text need not be encoded: it has more tokens than max_tokens."""
        return self.max_tokens * self.tokenizer.longest_token

    def encode(self, items: Sequence[Item]) -> tuple[dict[str, Encoded], Ledger]:
        """Encodes a block. Raises: UserError, naming the place of a malformed item, unless these are to be skipped."""
        ledger = Ledger()
        kept: dict[str, list[_Example]] = {split: [] for split in SPLITS}
        for item in items:
            ledger.read[item.split] += 1
            try:
                examples = list(self._examples(item))
            except UserError as error:
                kind = str(error) if isinstance(error, TooBlank) else "can't be laid out in the template"
                bad = error if isinstance(error, BadItem) else BadItem(kind, str(error))
                message = f"{item.where}: {reason(bad)}" if bad.malformed else None
                if message and self.bad_items == "stop":
                    raise UserError(f"{message} (--bad_lines=skip leaves such out)") from None
                ledger.skip(item.split, bad.kind, message)
                continue
            for example in examples:
                if example.form is not None:
                    ledger.forms[item.split, example.form] += 1
                for name in example.unread:
                    ledger.pass_over(item.split, name)
                if not example.ids:
                    ledger.left_out[item.split, example.task, TOO_LONG] += 1
                    continue
                tokens, supervised = sum(map(len, example.ids)), sum(map(np.count_nonzero, example.supervised))
                ledger.keep(item.split, example.task, tokens, int(supervised), example.trimmed)
                kept[item.split].append(example)
        return {split: self._join(kept[split]) for split in SPLITS}, ledger

    def _examples(self, item: Item) -> Iterator[_Example]:
        if item.flaw is not None:
            raise BadItem(item.flaw)
        if self.format == "tinystories-instruct":
            return self._story_examples(item)
        return self._text_examples(item) if self.format == "text" else self._chat_examples(item)

    def _story_examples(self, item: Item) -> Iterator[_Example]:
        record = parse_record(item.text)
        if record is None:
            raise BadItem("no story", malformed=False)
        if len(record.story) * MIN_KEPT > self._most_characters:
            raise BadItem("a story too long for any task", malformed=False)
        follow_ups = item.split == "train"  # validation losses are of one task each
        for conversation in make_tasks(record, self.seed, self.rates, follow_ups, item.brief):
            versions = ([messages] for messages in conversation.versions())
            example = self._first_that_fits(conversation.task, versions)
            yield example._replace(request=conversation.to_json())

    def _chat_examples(self, item: Item) -> Iterator[_Example]:
        kind = "not valid JSON"
        with explained(kind, lambda message: BadItem(kind, message), (ValueError, RecursionError)):
            line = json.loads(item.text)
        try:
            form, conversations, unread = parse(line, self.format)
        except UserError as error:
            raise BadItem("not a pair" if self.format == PREFERENCE else "not a conversation", str(error)) from None
        yield self._first_that_fits(self.task_names[0], [conversations])._replace(unread=unread, form=form)

    def _text_examples(self, item: Item) -> Iterator[_Example]:
        """A document, in pieces of at most max_tokens.

        A piece begins with the last token of the one before, so that every token but the first is predicted once.
        """
        ids = self.tokenizer.encode_document(item.text)
        for start in range(0, max(ids.size - 1, 1), self.max_tokens - 1):
            piece = ids[start : start + self.max_tokens]
            yield _Example("text", [piece], [np.arange(piece.size) > 0])

    def _first_that_fits(self, task: str, versions: Iterable[Sequence[chat.Messages]]) -> _Example:
        """Encodes the first version, of one conversation or a pair, of which max_tokens allows each."""
        for n_trims, conversations in enumerate(versions):
            sizes = [sum(len(message["content"]) for message in messages) for messages in conversations]
            if max(sizes) > self._most_characters:
                continue
            ids, supervised = zip(*map(self.tokenizer.encode_chat, conversations), strict=True)
            if max(map(len, ids)) <= self.max_tokens:
                return _Example(task, ids, supervised, n_trims > 0)
        return _Example(task)

    def _join(self, examples: list[_Example]) -> Encoded:
        ids = [each for example in examples for each in example.ids]
        supervised = [each for example in examples for each in example.supervised]
        tasks = [self.task_names.index(example.task) for example in examples for _ in example.ids]
        dtype = token_dtype(self.tokenizer.vocab_size)
        return Encoded(
            tokens=np.concatenate([np.zeros(0, dtype), *ids], dtype=dtype, casting="unsafe"),
            supervised=np.concatenate([np.zeros(0, bool), *supervised]),
            lengths=np.array([each.size for each in ids], np.int32),
            tasks=np.array(tasks, np.uint8),
            requests=[example.request for example in examples if example.request is not None],
        )
