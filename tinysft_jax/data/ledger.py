"""The ledger of `prepare`: what became of every record, so that nothing is left out silently."""

import itertools
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from rich.table import Column, Table

from tinysft_jax.console import shown
from tinysft_jax.data.forms import PREFERENCE

# How many bad lines, and how many unread fields of a split, are named.
NAMED_BAD_LINES, NAMED_FIELDS = 5, 20
# The names of fields are abbreviated from this length on; those after the first few are counted together.
LONGEST_FIELD, OTHER_FIELDS = 100, "(others)"


@dataclass
class Ledger:
    """Counts by split and task. The ledgers of the blocks, added in order, are that of the whole."""

    read: Counter[str] = field(default_factory=Counter)  # split -> records, lines or documents
    forms: Counter[tuple[str, str]] = field(default_factory=Counter)  # (split, form) -> conversations that came in it
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)  # (split, reason) -> unusable records
    bad: list[str] = field(default_factory=list)  # the first of them that are malformed, with their place
    trimmed: Counter[tuple[str, str]] = field(default_factory=Counter)  # (split, task) -> kept, with a shorter prompt
    supervised: Counter[tuple[str, str]] = field(default_factory=Counter)  # (split, task) -> supervised tokens
    lengths: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # (split, task, tokens) -> kept
    left_out: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (split, task, reason) -> not kept
    unread: Counter[tuple[str, str]] = field(default_factory=Counter)  # (split, field) -> times it was not read

    @property
    def kept(self) -> int:
        """Conversations, or pairs, in the data set."""
        return self.lengths.total()

    @property
    def noun(self) -> str:
        """What is counted."""
        return "pairs" if any(form == PREFERENCE for _, form in self.forms) else "conversations"

    def keep(self, split: str, task: str, tokens: int, supervised: int, trimmed: bool) -> None:
        """Counts a conversation that is in the data set."""
        self.lengths[split, task, tokens] += 1
        self.supervised[split, task] += supervised
        self.trimmed[split, task] += trimmed

    def skip(self, split: str, reason: str, bad: str | None = None) -> None:
        """Counts a record that gives no conversation; `bad` is the message if it is malformed."""
        self.skipped[split, reason] += 1
        if bad is not None and len(self.bad) < NAMED_BAD_LINES:
            self.bad.append(bad)

    def pass_over(self, split: str, name: str, times: int = 1) -> None:
        """Counts a field that is not read. A file may have any number of them, with names of any length."""
        name = name if name.isprintable() and len(name) <= LONGEST_FIELD else shown(name)
        if (split, name) not in self.unread and len(_select(self.unread, split)) >= NAMED_FIELDS:
            name = OTHER_FIELDS
        self.unread[split, name] += times

    def add(self, part: "Ledger") -> None:
        """Adds another ledger, of items that come after those of this one."""
        self.bad = (self.bad + part.bad)[:NAMED_BAD_LINES]
        for (split, name), times in part.unread.items():
            self.pass_over(split, name, times)
        for entry in fields(self):
            if entry.name not in ("bad", "unread"):
                getattr(self, entry.name).update(getattr(part, entry.name))

    def to_json(self, splits: tuple[str, ...], tasks: tuple[str, ...]) -> dict[str, Any]:
        """The content of `ledger.json`."""
        entries = {
            split: {
                "read": self.read[split],
                "forms": _select(self.forms, split),
                "skipped": _select(self.skipped, split),
                "unread_fields": _select(self.unread, split),
                "tasks": {task: self._entry(split, task) for task in tasks},
            }
            for split in splits
        }
        return {"format_version": 1, "splits": entries, "first_bad": self.bad}

    def _entry(self, split: str, task: str) -> dict[str, Any]:
        lengths, left_out = _select(self.lengths, split, task), _select(self.left_out, split, task)
        kept, tokens = sum(lengths.values()), sum(length * n for length, n in lengths.items())
        up_to = zip(lengths, itertools.accumulate(lengths.values()), strict=True)
        return {
            "made": kept + sum(left_out.values()),
            "kept": kept,
            "trimmed": self.trimmed[split, task],
            "left_out": left_out,
            "tokens": {
                "total": tokens,
                "supervised": self.supervised[split, task],
                "mean": round(tokens / kept, 1) if kept else 0.0,
                "median": next((length for length, n in up_to if 2 * n >= kept), 0),  # the lower one of two
                "longest": max(lengths, default=0),
            },
        }

    def tables(self, splits: tuple[str, ...], tasks: tuple[str, ...]) -> list[Table]:
        """The ledger for the terminal: conversations, and their tokens."""

        def table(*names: str) -> Table:
            return Table("split", "task", *(Column(name, justify="right") for name in names))

        conversations = table("made", "kept", "trimmed", "left out")
        tokens = table("tokens", "supervised", "mean", "median", "max")
        for split, task in itertools.product(splits, tasks):
            entry = self._entry(split, task)
            if entry["made"]:
                numbers = (entry["made"], entry["kept"], entry["trimmed"], entry["made"] - entry["kept"])
                conversations.add_row(split, task, *(f"{number:,}" for number in numbers))
            if entry["kept"]:
                total, supervised, *others = entry["tokens"].values()
                numbers = (f"{number:,}" for number in others)
                tokens.add_row(split, task, f"{total:,}", f"{supervised / total:.1%}", *numbers)
        return [conversations, tokens]

    def reasons(self) -> list[str]:
        """Why records and conversations are not in the data set, one phrase a reason with the number of them."""
        return [
            *(f"skipped {n:,} records: {reason}" for reason, n in _totals(self.skipped)),
            *(f"left out {n:,} {self.noun}: {reason}" for reason, n in _totals(self.left_out)),
        ]

    def form_counts(self) -> list[str]:
        """How many conversations came in each form, one phrase a form."""
        return [f"{n:,} {form}" for form, n in _totals(self.forms)]

    def unread_fields(self) -> list[str]:
        """The fields that were not read, one phrase a field."""
        return [f"not read, {n:,} times: the field {name}" for name, n in _totals(self.unread)]


def _select(counts: Counter, *key: str) -> dict[Any, int]:
    """The counts whose key begins so, sorted by the last part of the key."""
    return {last: n for (*first, last), n in sorted(counts.items()) if first == [*key]}


def _totals(counts: Counter) -> list[tuple[Any, int]]:
    """The sums over all but the last part of the key, sorted by that."""
    totals = Counter()
    for (*_, last), n in counts.items():
        totals[last] += n
    return sorted(totals.items())
