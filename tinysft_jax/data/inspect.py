"""A packed row in the terminal: `python -m tinysft_jax.data.inspect --data DIR --row I`.

Shows where conversations end, the roles, and what is supervised: in colour, or «between these» without. A run with the
same `--seq_len` and `--seed` trains on exactly this row.
"""

import itertools
from argparse import Namespace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from rich.console import Console
from rich.text import Text

from tinysft_jax import console
from tinysft_jax.console import UserError
from tinysft_jax.data.batches import BatchSource
from tinysft_jax.data.forms import SIDES
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import SPLITS, PreparedData, Split
from tinysft_jax.tokenizer import ChatTokenizer

SUPERVISED, MARKER, PROMPT, TITLE = "bold green", "bold magenta", "dim", "bold cyan"
OPEN, CLOSE = "«", "»"  # around supervised text, where there is no colour
# Control characters in the data must not reach the terminal: they are shown as their pictures (␛).
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


class Segment(NamedTuple):
    """One conversation of a row: its index in the split, its token ids, and which of them are supervised."""

    conversation: int
    tokens: Int[np.ndarray, " n"]
    supervised: Bool[np.ndarray, " n"]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; `arguments` are the command line's unless given."""
    flags = _parse(arguments)
    data = PreparedData(flags.data)
    if flags.verify:
        data.verify()
    split = data.split(flags.split)
    if not len(split):
        raise UserError(f"the {flags.split} split of {flags.data} is empty")
    screen = Console()
    packing = Packing(split.item_lengths, flags.seq_len, split.item_noun)
    segments = read_row(split, packing, flags.row, flags.seed, flags.epoch)
    _show(screen, segments, data, split)
    tokens = sum(segment.tokens.size for segment in segments)
    supervised = sum(int(segment.supervised.sum()) for segment in segments)
    screen.print(
        f"{flags.split} row {flags.row:,} of {packing.n_rows:,}, seed {flags.seed}, epoch {flags.epoch}: "
        f"{len(segments)} conversations, {tokens:,} tokens, {_share(supervised, tokens)} supervised, "
        f"{_share(flags.seq_len - tokens, flags.seq_len)} padding",
        soft_wrap=True,
        highlight=False,
    )


def _parse(arguments: list[str] | None = None) -> Namespace:
    parser = console.Parser(prog="python -m tinysft_jax.data.inspect", description="A packed row of a training run.")
    parser.add_argument("--data", type=console.path, metavar="DIR", required=True, help="a prepared data set")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which part of it")
    parser.add_argument("--row", type=int, metavar="I", default=0, help="which row of the epoch, from 0")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens of a row, as data.seq_len of the run")
    parser.add_argument("--seed", type=int, default=0, help="as seed of the run")
    parser.add_argument("--epoch", type=int, default=0, help="which epoch, from 0")
    parser.add_argument("--verify", action="store_true", help="first compare all files with the manifest's hashes")
    flags = parser.parse_args(arguments)
    for name in ("seed", "epoch"):
        if getattr(flags, name) < 0:
            raise UserError(f"--{name} must be 0 or more, not {getattr(flags, name)}")
    return flags


def read_row(split: Split, packing: Packing, row: int, seed: int = 0, epoch: int = 0) -> list[Segment]:
    """The segments of a row, from the batch that training reads. Raises: UserError, if the epoch has no such row."""
    if not 0 <= row < packing.n_rows:
        raise UserError(f"there is no row {row:,}: the rows are from 0 to {packing.n_rows - 1:,}")
    plan = packing.epoch(seed, epoch)
    source = BatchSource(split, plan, 1, packing.seq_len)
    batch = {key: array[0] for key, array in source[row].items()}
    segments = []
    for number, conversation in enumerate(source.segments_of(row).tolist(), 1):
        here = np.flatnonzero(batch["segment_ids"] == number)
        # A token's weight is at the token before, which predicts it.
        supervised = np.concatenate([[False], batch["weights"][here][:-1] > 0])
        segments.append(Segment(conversation, batch["tokens"][here], supervised))
    return segments


def render(segment: Segment, tokenizer: ChatTokenizer, marks: bool) -> Text:
    """A segment's text in colour; `marks`: put supervised text between marks as well."""
    roles = np.isin(segment.tokens, list(set(tokenizer.control_ids.values()).difference(tokenizer.stop_ids)))
    kinds = zip(segment.supervised.tolist(), roles.tolist(), segment.tokens.tolist(), strict=True)
    text = Text()
    for (supervised, is_role), run in itertools.groupby(kinds, lambda kind: kind[:2]):
        content = tokenizer.decode([token for *_, token in run]).translate(_PICTURES)
        if marks and supervised:
            content = f"{OPEN}{content}{CLOSE}"
        if is_role and text and not supervised and tokenizer.template == "control":
            content = f"\n{content}"  # a role begins a line
        text.append(content, SUPERVISED if supervised else MARKER if is_role else PROMPT)
    return text


def _show(screen: Console, segments: list[Segment], data: PreparedData, split: Split) -> None:
    tokenizer = data.tokenizer
    marks = screen.color_system is None or screen.no_color
    start = 0
    for number, segment in enumerate(segments, 1):
        end = start + segment.tokens.size
        title = (
            f"── {number} · {_name(segment, split)} · {data.tasks[split.tasks[segment.conversation]]} · "
            f"tokens {start:,} to {end - 1:,} · {_share(int(segment.supervised.sum()), end - start)} supervised"
        )
        screen.print(Text(title, TITLE), soft_wrap=True)
        screen.print(render(segment, tokenizer, marks), soft_wrap=True)  # lines break where the data's do
        start = end
    screen.print(Text("── end", TITLE))


def _name(segment: Segment, split: Split) -> str:
    item, place = divmod(segment.conversation, split.per_item)
    return f"{split.item_noun} {item:,}" + ("" if split.per_item == 1 else f" · {SIDES[place]}")


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(whole, 1):.1%})"


if __name__ == "__main__":
    console.run(main, needs_stdout=True)
