"""Text → a prepared data set: `python -m tinysft_jax.data.prepare --input PATH --output DIR`.

One process reads the input as a stream of items and cuts it into blocks, workers encode the blocks, and what comes of
them is written in the order in which it was read. So the output is the same, byte by byte, for any number of workers,
and the memory that it takes does not grow with the input.
"""

import contextlib
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from tinysft_jax import chat, console, files
from tinysft_jax.console import RunError, UserError, progress
from tinysft_jax.data.encode import BAD_ITEMS, Encoder
from tinysft_jax.data.ledger import Ledger
from tinysft_jax.data.sources import FORMATS, Item, Source, download, open_embedded, open_files, open_input, rates_for
from tinysft_jax.data.store import FORMAT_VERSION, SPLITS, ShardWriter
from tinysft_jax.data.workers import map_in_order, usable_cpus
from tinysft_jax.tokenizer import GPT2_RANKS, ChatTokenizer

CONTENT = ("data.json", "ledger.json", "manifest.json", *SPLITS)

# A block ends with either.
ITEMS_PER_BLOCK = 256
CHARACTERS_PER_BLOCK = 1 << 20


class Summary(NamedTuple):
    """What `prepare` did: the ledger, and per split the totals that `data.json` holds."""

    ledger: Ledger
    totals: dict[str, dict[str, int]]


def prepare(source: Source, encoder: Encoder, output: Path, workers: int = 1, overwrite: bool = False) -> Summary:
    """Writes a prepared data set.

    Args:
      source: what to read.
      encoder: how to encode it; of the source's format.
      output: the directory to make.
      workers: processes to encode with; they don't change the output.
      overwrite: whether an existing `output` is replaced.

    Raises:
      UserError: if an item is malformed, or no conversation is left; nothing is written then.
      RunError: if a worker dies or the disk is full; nothing is written then either.
    """
    ledger = Ledger()
    try:
        with files.new_directory(output, overwrite, CONTENT) as directory:
            writers = {split: ShardWriter(directory / split) for split in SPLITS}
            blocks = map_in_order(encoder.encode, _blocks_of(source), workers)
            with contextlib.closing(blocks), progress("preparing", source.size, "tokens") as show:
                for block in blocks:
                    ledger.add(block.ledger)
                    for split, writer in writers.items():
                        writer.add(block.splits[split])
                    show(source.position, sum(writer.totals["tokens"] for writer in writers.values()))
            for writer in writers.values():
                writer.close()
            if not ledger.kept:
                reasons = (
                    ", ".join(ledger.reasons()) or f"no conversation could be made of {ledger.read.total():,} records"
                )
                raise UserError(f"nothing is left to learn from: {reasons}")
            totals = {split: writer.totals for split, writer in writers.items()}
            files.write_json(directory / "data.json", _description(source, encoder, totals))
            files.write_json(directory / "ledger.json", ledger.to_json(SPLITS, encoder.task_names))
            files.write_manifest(directory)
    except OSError as error:
        raise RunError(f"can't write {output}: {error.strerror}") from None
    return Summary(ledger, totals)


def _description(source: Source, encoder: Encoder, totals: dict[str, dict[str, int]]) -> dict[str, object]:
    """The content of `data.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "format": encoder.format,
        "dtype": "uint16",
        **encoder.tokenizer.description(),
        "tokenizer_hash": encoder.tokenizer.fingerprint(),
        "max_tokens": encoder.max_tokens,
        "tasks": list(encoder.task_names),
        "seed": encoder.seed,
        **({"rates": encoder.rates} if encoder.format == "tinystories-instruct" else {}),
        "source": source.description,
        "splits": totals,
    }


def _blocks_of(items: Iterable[Item]) -> Iterator[list[Item]]:
    block: list[Item] = []
    characters = 0
    for item in items:
        block.append(item)
        characters += len(item.text)
        if len(block) == ITEMS_PER_BLOCK or characters >= CHARACTERS_PER_BLOCK:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _parser() -> console.Parser:
    parser = console.Parser(prog="python -m tinysft_jax.data.prepare", description="Text to a prepared data set.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", type=console.path, metavar="PATH", help="a file, or a directory with a train and valid pair"
    )
    source.add_argument("--embedded", type=int, metavar="N", help="that many stories of the embedded corpus")
    source.add_argument("--hub", metavar="REPOSITORY", help="roneneldan/TinyStoriesInstruct from the Hugging Face Hub")
    parser.add_argument("--revision", help="commit, branch or tag of the --hub repository instead of a known commit")
    parser.add_argument("--output", type=console.path, metavar="DIR", required=True, help="the data set to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="of the input")
    parser.add_argument(
        "--template", choices=chat.TEMPLATES, default="control", help="chat template (plain text has none)"
    )
    parser.add_argument("--bpe_ranks", type=int, default=GPT2_RANKS, help="size of the BPE, from 256")
    parser.add_argument("--max_tokens", type=int, default=512, help="the longest conversation that is kept")
    parser.add_argument("--valid_fraction", type=float, default=0.01, help="share of a single file that validates")
    parser.add_argument("--limit", type=int, metavar="N", help="read only the first N records of each file")
    parser.add_argument(
        "--bad_lines",
        choices=BAD_ITEMS,
        default="stop",
        help="what to do at a line or record that is malformed: name it and stop, or leave it out and count it",
    )
    parser.add_argument("--seed", type=int, default=0, help="for the tasks made of a story, and the embedded stories")
    parser.add_argument("--workers", type=int, default=usable_cpus(), help="processes that encode")
    return parser


def _check(flags: Namespace) -> None:
    """Refuses what no input could make sense of."""
    if flags.max_tokens < 2:
        raise UserError(f"--max_tokens must be at least 2, not {flags.max_tokens}")
    if not 0 <= flags.valid_fraction < 1:
        raise UserError(f"--valid_fraction must be from 0 to below 1, not {flags.valid_fraction}")
    if flags.limit is not None and flags.limit < 1:
        raise UserError(f"--limit must be at least 1, not {flags.limit}")
    if flags.limit is not None and flags.embedded is not None:
        raise UserError("--limit is for files; --embedded itself says how many stories to make")
    if flags.revision is not None and flags.hub is None:
        raise UserError("--revision is for --hub")
    if flags.workers < 1:
        raise UserError(f"--workers must be at least 1, not {flags.workers}")


def _open_source(flags: Namespace) -> Source:
    if flags.embedded is not None:
        return open_embedded(flags.embedded, flags.format, flags.seed)
    if flags.hub is not None:
        found = download(flags.hub, flags.revision)
        origin = {"repository": flags.hub, "commit": found.commit}
        return open_files(found.files, flags.format, flags.valid_fraction, flags.limit, hub=origin)
    return open_input(flags.input, flags.format, flags.valid_fraction, flags.limit)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; `arguments` are the command line's unless given."""
    flags = _parser().parse_args(arguments)
    _check(flags)
    files.check_output(flags.output, flags.overwrite, CONTENT)
    source = _open_source(flags)
    template = None if source.format == "text" else flags.template
    tokenizer = ChatTokenizer(template, flags.bpe_ranks)
    encoder = Encoder(source.format, tokenizer, flags.max_tokens, flags.seed, rates_for(source), flags.bad_lines)

    start = time.monotonic()
    ledger, totals = prepare(source, encoder, flags.output, flags.workers, flags.overwrite)
    seconds = time.monotonic() - start

    for table in ledger.tables(SPLITS, encoder.task_names):
        Console().print(table)
    print("read", " and ".join(f"{ledger.read[split]:,} {split}" for split in SPLITS), "records")
    for line in (*ledger.reasons(), *ledger.unread_fields()):
        print(line)
    for bad in ledger.bad:
        print(f"skipped {bad}", file=sys.stderr)
    for split in SPLITS:
        if not totals[split]["conversations"]:
            print(f"note: the {split} split is empty", file=sys.stderr)
    total = {name: sum(totals[split][name] for split in SPLITS) for name in totals["train"]}
    print(
        f"{flags.output}: {total['conversations']:,} conversations, {total['tokens']:,} tokens "
        f"({total['supervised_tokens'] / total['tokens']:.1%} supervised) in {seconds:.1f} s, "
        f"{total['tokens'] / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    console.run(main)
