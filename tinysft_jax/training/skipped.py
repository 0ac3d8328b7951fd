"""Steps that changed nothing, because their loss or gradient was no finite number."""

import json
from pathlib import Path

from tinysft_jax import files
from tinysft_jax.errors import RunError
from tinysft_jax.training.metrics import read_lines

SHOWN = 8  # conversations in a line for people; the file has all


class SkippedSteps:
    """Counts them, and writes which conversations they saw to `skipped_steps.jsonl`.

    Attributes:
      total: of the run.
      in_a_row: up to the last step.

    Args:
      workdir: the work directory.
      most: how many in a row the run bears.
      total: up to the checkpoint that the run continues from.
      in_a_row: likewise.
    """

    def __init__(self, workdir: Path, most: int, total: int = 0, in_a_row: int = 0):
        self._path, self._most = workdir / "skipped_steps.jsonl", most
        self.total, self.in_a_row = total, in_a_row

    def forget_after(self, step: int) -> None:
        """Drops the lines of later steps, which the run will do again."""
        if self._path.exists():
            kept = [entry for entry in read_lines(self._path) if entry["step"] <= step]
            files.write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def count(self, skipped: bool) -> None:
        """A step is done."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def write(self, step: int, loss: float, grad_norm: float, conversations: list[int]) -> str:
        """Writes down a skipped step, and returns it as a line for people."""
        entry = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "conversations": conversations}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        shown = ", ".join(str(index) for index in conversations[:SHOWN])
        more = f" and {len(conversations) - SHOWN:,} more, see {self._path}" if len(conversations) > SHOWN else ""
        return (
            f"step {step:,} changed nothing: its loss is {loss}, its gradient's norm {grad_norm}; "
            f"conversations {shown}{more}"
        )

    def check(self, step: int) -> None:
        """Raises: RunError, if step `step` was one too many."""
        if self.in_a_row >= self._most:
            raise RunError(
                f"the run has diverged: the loss or gradient of {self.in_a_row} steps in a row, up to step {step:,}, "
                "was no finite number; lower optimizer.learning_rate or lengthen optimizer.warmup_steps and start "
                f"again; if it stops at the same step, look at the conversations in {self._path}"
            )
