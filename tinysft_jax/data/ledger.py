"""The ledger of `prepare`: what became of everything that was read, so that nothing is left out silently."""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from rich.table import Table

from tinysft_jax.console import shown

# How many of the bad lines are named.
NAMED_BAD_LINES = 5
# How many of a split's fields that are not read are named, and up to what length as they are.
NAMED_FIELDS = 20
LONGEST_FIELD = 100
OTHER_FIELDS = "(others)"


@dataclass
class Ledger:
    """Counts by split and task; the ledgers of parts, added in order, make up that of the whole.

    Attributes:
      read: split -> records, lines or documents.
      skipped: (split, reason) -> records that nothing could be made of.
      bad: the first few of the skipped that are not what they should be, each with its place.
      trimmed: (split, task) -> kept conversations whose prompt was shortened.
      left_out: (split, task, reason) -> conversations that were made but are not in the data set.
      lengths: (split, task, tokens) -> kept conversations of that length.
      supervised: (split, task) -> supervised tokens of the kept.
      unread: (split, field) -> how often a field was passed over, of lines or of their messages; in the order in which
        they came up, those after the first few as OTHER_FIELDS.
    """

    read: Counter[str] = field(default_factory=Counter)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    trimmed: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    lengths: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    supervised: Counter[tuple[str, str]] = field(default_factory=Counter)
    unread: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Conversations in the data set."""
        return self.lengths.total()

    def keep(self, split: str, task: str, tokens: int, supervised: int, trimmed: bool) -> None:
        """Enters a conversation that is in the data set."""
        self.lengths[split, task, tokens] += 1
        self.supervised[split, task] += supervised
        self.trimmed[split, task] += trimmed

    def skip(self, split: str, reason: str, bad: str | None = None) -> None:
        """Enters a record that nothing could be made of; `bad` is what to say of it, if it's not what it should be."""
        self.skipped[split, reason] += 1
        if bad is not None and len(self.bad) < NAMED_BAD_LINES:
            self.bad.append(bad)

    def pass_over(self, split: str, name: str, times: int = 1) -> None:
        """Enters a field that is not read. A file may have any number of them, and of any length."""
        name = name if name.isprintable() and len(name) <= LONGEST_FIELD else shown(name)
        if (split, name) not in self.unread and sum(s == split for s, _ in self.unread) >= NAMED_FIELDS:
            name = OTHER_FIELDS
        self.unread[split, name] += times

    def add(self, part: "Ledger") -> None:
        """Adds what another ledger holds, of items that come after those of this one."""
        self.bad = (self.bad + part.bad)[:NAMED_BAD_LINES]
        for (split, name), times in part.unread.items():
            self.pass_over(split, name, times)
        for entry in fields(self):
            if entry.name not in ("bad", "unread"):
                getattr(self, entry.name).update(getattr(part, entry.name))

    def to_json(self, splits: tuple[str, ...], tasks: tuple[str, ...]) -> dict[str, Any]:
        """The content of `ledger.json`."""
        return {
            "format_version": 1,
            "splits": {
                split: {
                    "read": self.read[split],
                    "skipped": {reason: n for (s, reason), n in sorted(self.skipped.items()) if s == split},
                    "unread_fields": {name: n for (s, name), n in sorted(self.unread.items()) if s == split},
                    "tasks": {
                        task: self._conversations(split, task) | {"tokens": self._tokens(split, task)} for task in tasks
                    },
                }
                for split in splits
            },
            "first_bad": self.bad,
        }

    def tables(self, splits: tuple[str, ...], tasks: tuple[str, ...]) -> list[Table]:
        """The ledger for people: conversations, and their tokens."""
        conversations, tokens = Table("split", "task"), Table("split", "task")
        for column in ("made", "kept", "trimmed", "left out"):
            conversations.add_column(column, justify="right")
        for column in ("tokens", "supervised", "mean", "median", "max"):
            tokens.add_column(column, justify="right")
        for split in splits:
            for task in tasks:
                counts, lengths = self._conversations(split, task), self._tokens(split, task)
                if counts["made"]:
                    numbers = (counts["made"], counts["kept"], counts["trimmed"], counts["made"] - counts["kept"])
                    conversations.add_row(split, task, *(f"{number:,}" for number in numbers))
                if counts["kept"]:
                    share = lengths.pop("supervised") / lengths["total"]
                    total, *others = (f"{number:,}" for number in lengths.values())
                    tokens.add_row(split, task, total, f"{share:.1%}", *others)
        return [conversations, tokens]

    def reasons(self) -> list[str]:
        """Why records and conversations are not in the data set, one phrase a reason with the number of them."""
        skipped, left_out = Counter[str](), Counter[str]()
        for (_, reason), n in self.skipped.items():
            skipped[reason] += n
        for (_, _, reason), n in self.left_out.items():
            left_out[reason] += n
        return [
            *(f"skipped {n:,} records: {reason}" for reason, n in sorted(skipped.items())),
            *(f"left out {n:,} conversations: {reason}" for reason, n in sorted(left_out.items())),
        ]

    def unread_fields(self) -> list[str]:
        """What was not read of the records that were, one phrase a field."""
        times = Counter[str]()
        for (_, name), n in self.unread.items():
            times[name] += n
        return [f"not read, {n:,} times: the field {name}" for name, n in sorted(times.items())]

    def _conversations(self, split: str, task: str) -> dict[str, Any]:
        left_out = {reason: n for (s, t, reason), n in sorted(self.left_out.items()) if (s, t) == (split, task)}
        kept = sum(self._lengths(split, task).values())
        return {
            "made": kept + sum(left_out.values()),
            "kept": kept,
            "trimmed": self.trimmed[split, task],
            "left_out": left_out,
        }

    def _tokens(self, split: str, task: str) -> dict[str, int | float]:
        """Tokens of the kept conversations, and their lengths: the median is the lower one of two."""
        lengths = self._lengths(split, task)
        kept, tokens = sum(lengths.values()), sum(length * n for length, n in lengths.items())
        below, median = 0, 0
        for length, n in lengths.items():
            if 2 * below < kept:
                median = length
            below += n
        return {
            "total": tokens,
            "supervised": self.supervised[split, task],
            "mean": round(tokens / kept, 1) if kept else 0.0,
            "median": median,
            "longest": max(lengths, default=0),
        }

    def _lengths(self, split: str, task: str) -> dict[int, int]:
        """Length -> conversations, by rising length."""
        return {length: n for (s, t, length), n in sorted(self.lengths.items()) if (s, t) == (split, task)}
