"""The ledger of `prepare`: what became of everything that was read, so that nothing is left out silently."""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from rich.table import Table


@dataclass
class Ledger:
    """Counts by split and task; the ledgers of parts add up to that of the whole.

    Attributes:
      read: split -> records, lines or documents.
      skipped: (split, reason) -> records that nothing could be made of.
      kept: (split, task) -> conversations in the data set.
      trimmed: (split, task) -> those of the kept whose prompt was shortened.
      left_out: (split, task, reason) -> conversations that were made but are not in the data set.
    """

    read: Counter[str] = field(default_factory=Counter)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    trimmed: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, part: "Ledger") -> None:
        """Adds the counts of another ledger."""
        for counter in fields(self):
            getattr(self, counter.name).update(getattr(part, counter.name))

    def to_json(self, splits: tuple[str, ...], tasks: tuple[str, ...]) -> dict[str, Any]:
        """The content of `ledger.json`."""
        return {
            "format_version": 1,
            "splits": {
                split: {
                    "read": self.read[split],
                    "skipped": {reason: n for (s, reason), n in sorted(self.skipped.items()) if s == split},
                    "tasks": {task: self._task(split, task) for task in tasks},
                }
                for split in splits
            },
        }

    def table(self, splits: tuple[str, ...], tasks: tuple[str, ...]) -> Table:
        """The ledger for people."""
        read = f"read {self.read.total():,} records"
        table = Table("split", "task", caption="; ".join([read, *self.reasons()]))
        for column in ("made", "kept", "trimmed", "left out"):
            table.add_column(column, justify="right")
        for split in splits:
            for task in tasks:
                counts = self._task(split, task)
                if counts["made"]:
                    numbers = (counts["made"], counts["kept"], counts["trimmed"], counts["made"] - counts["kept"])
                    table.add_row(split, task, *(f"{number:,}" for number in numbers))
        return table

    def reasons(self) -> list[str]:
        """Why things are not in the data set, one phrase a reason with the number of them."""
        skipped, left_out = Counter[str](), Counter[str]()
        for (_, reason), n in self.skipped.items():
            skipped[reason] += n
        for (_, _, reason), n in self.left_out.items():
            left_out[reason] += n
        return [
            *(f"skipped {n:,} records: {reason}" for reason, n in sorted(skipped.items())),
            *(f"left out {n:,} conversations: {reason}" for reason, n in sorted(left_out.items())),
        ]

    def _task(self, split: str, task: str) -> dict[str, Any]:
        left_out = {reason: n for (s, t, reason), n in sorted(self.left_out.items()) if (s, t) == (split, task)}
        kept = self.kept[split, task]
        return {
            "made": kept + sum(left_out.values()),
            "kept": kept,
            "trimmed": self.trimmed[split, task],
            "left_out": left_out,
        }
