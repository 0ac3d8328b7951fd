"""A packed row in the terminal: `python -m tinysft_jax.data.inspect --data DIR --row I`.

Shows where conversations end, who speaks, and what is supervised: in colour, or «between these» without. A run with the
same `--seq_len` and `--seed` trains on just this row. (Its validation packs the rows of each task by themselves.)
"""

import io
import itertools
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from rich.console import Console
from rich.text import Text

from tinysft_jax import console
from tinysft_jax.console import UserError
from tinysft_jax.data.batches import BatchSource
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import SPLITS, PreparedData, Split
from tinysft_jax.tokenizer import ChatTokenizer

SUPERVISED, MARKER, PROMPT, TITLE = "bold green", "bold magenta", "dim", "bold cyan"
# Around what is supervised, where there is no colour to show it.
OPEN, CLOSE = "«", "»"

# A terminal must not obey what stands in the data: a control character is shown as its picture (␛).
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


class Segment(NamedTuple):
    """One conversation as it lies in a row.

    Attributes:
      conversation: its index in the split.
      tokens: its ids.
      supervised: which of them the model learns to predict.
    """

    conversation: int
    tokens: Int[np.ndarray, " n"]
    supervised: Bool[np.ndarray, " n"]


def read_row(split: Split, packing: Packing, row: int, seed: int = 0, epoch: int = 0) -> list[Segment]:
    """The segments of a row, taken from the batch that training reads.

    Args:
      split: the conversations.
      packing: of them.
      row: its index in the epoch.
      seed: of the run.
      epoch: from 0.

    Raises:
      UserError: if the epoch has no such row.
    """
    _check_index("row", row, packing.n_rows)
    plan = packing.epoch(seed, epoch)
    batch = {key: array[0] for key, array in BatchSource(split, plan, 1, packing.seq_len)[row].items()}
    segments = []
    for number, conversation in enumerate(plan.row(row).tolist(), 1):
        here = np.flatnonzero(batch["segment_ids"] == number)
        # A weight belongs to the token before the one that is predicted.
        supervised = np.concatenate([[False], batch["weights"][here][:-1] > 0])
        segments.append(Segment(conversation, batch["tokens"][here], supervised))
    return segments


def read_conversation(split: Split, index: int) -> Segment:
    """One conversation of a split.

    Raises:
      UserError: if there is no such conversation.
    """
    _check_index("conversation", index, len(split))
    ids, supervised = split.conversation(index)
    return Segment(index, np.asarray(ids), np.asarray(supervised))


def render(segment: Segment, tokenizer: ChatTokenizer, marks: bool) -> Text:
    """A segment's text, with roles and supervision in colour.

    Args:
      segment: what to show.
      tokenizer: of its tokens.
      marks: whether to put supervised text between marks as well.
    """
    text = Text()
    for supervised, control, ids in _runs(segment, tokenizer):
        content = tokenizer.decode(ids).translate(_PICTURES)
        if marks and supervised:
            content = f"{OPEN}{content}{CLOSE}"
        if control and text and not supervised:
            content = f"\n{content}"  # a role on a line of its own
        text.append(content, SUPERVISED if supervised else MARKER if control else PROMPT)
    return text


def _runs(segment: Segment, tokenizer: ChatTokenizer) -> Iterator[tuple[bool, bool, list[int]]]:
    """Yields stretches of tokens that are shown alike: whether supervised, whether a role's marker, and their ids."""
    roles = set(tokenizer.control_ids.values())
    kinds = [(flag, id in roles) for flag, id in zip(segment.supervised.tolist(), segment.tokens.tolist(), strict=True)]
    start = 0
    for (supervised, control), group in itertools.groupby(kinds):
        end = start + len(list(group))
        yield supervised, control, segment.tokens[start:end].tolist()
        start = end


def _check_index(noun: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        there = f"from 0 to {count - 1:,}" if count else "none"
        raise UserError(f"there is no {noun} {index:,}: the {noun}s are {there}")


def _show(console: Console, segments: list[Segment], data: PreparedData, split: Split) -> None:
    tokenizer = ChatTokenizer.from_description(data.description)
    marks = console.color_system is None or console.no_color
    start = 0
    for number, segment in enumerate(segments, 1):
        end = start + segment.tokens.size
        task = data.tasks[split.tasks[segment.conversation]]
        supervised = _share(int(segment.supervised.sum()), segment.tokens.size)
        parts = (f"conversation {segment.conversation:,}", task, f"tokens {start:,} to {end - 1:,}")
        console.print(Text(" · ".join((f"── {number}", *parts, f"{supervised} supervised")), TITLE), soft_wrap=True)
        # Lines break where the data's do.
        console.print(render(segment, tokenizer, marks), soft_wrap=True)
        start = end
    console.print(Text("── end", TITLE))


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(whole, 1):.1%})"


def _parser() -> console.Parser:
    parser = console.Parser(
        prog="python -m tinysft_jax.data.inspect", description="A packed row, as training reads it."
    )
    parser.add_argument("--data", type=console.path, metavar="DIR", required=True, help="a prepared data set")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which part of it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--row", type=int, metavar="I", help="which row of the epoch, from 0 (the first)")
    what.add_argument("--conversation", type=int, metavar="I", help="show one conversation instead of a row")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens a row, as data.seq_len of the run")
    parser.add_argument("--seed", type=int, default=0, help="as seed of the run")
    parser.add_argument("--epoch", type=int, default=0, help="which epoch, from 0")
    parser.add_argument("--verify", action="store_true", help="first compare all files with the manifest's hashes")
    return parser


def _check(flags: Namespace, split: Split) -> None:
    for name in ("seed", "epoch"):
        if getattr(flags, name) < 0:
            raise UserError(f"--{name} must be 0 or more, not {getattr(flags, name)}")
    if not len(split):
        raise UserError(f"the {flags.split} split of {flags.data} is empty")
    longest = int(split.lengths.max())
    if flags.conversation is None and flags.seq_len < longest:
        raise UserError(f"--seq_len is {flags.seq_len}, but the longest conversation has {longest:,} tokens")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; `arguments` are the command line's unless given."""
    flags = _parser().parse_args(arguments)
    data = PreparedData(flags.data)
    if flags.verify:
        data.verify()
    split = data.split(flags.split)
    _check(flags, split)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal can't show
    console = Console()
    if flags.conversation is not None:
        _show(console, [read_conversation(split, flags.conversation)], data, split)
        return
    packing = Packing(split.lengths, flags.seq_len)
    row = flags.row or 0
    segments = read_row(split, packing, row, flags.seed, flags.epoch)
    _show(console, segments, data, split)
    tokens = sum(segment.tokens.size for segment in segments)
    supervised = sum(int(segment.supervised.sum()) for segment in segments)
    console.print(
        f"{flags.split} row {row:,} of {packing.n_rows:,}, seed {flags.seed}, epoch {flags.epoch}: "
        f"{len(segments)} conversations, {tokens:,} tokens, {_share(supervised, tokens)} supervised, "
        f"{_share(flags.seq_len - tokens, flags.seq_len)} padding",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    console.run(main, prints_its_product=True)
