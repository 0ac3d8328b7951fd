"""Text → a prepared data set: `python -m tinysft_jax.data.prepare --input PATH --output DIR`.

One process reads the input as a stream of items, in blocks. Workers encode the blocks, and the results are written in
the order of the input: the output is the same, byte by byte, with any number of workers. Memory does not grow with the
input.
"""

import contextlib
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from tinysft_jax import chat, console, files
from tinysft_jax.bpe import GPT2_RANKS
from tinysft_jax.console import Progress, RunError, UserError, explained
from tinysft_jax.data.encode import BAD_ITEMS, Encoder
from tinysft_jax.data.ledger import Ledger
from tinysft_jax.data.sources import FORMATS, Item, Source, open_embedded, open_hub, open_input
from tinysft_jax.data.store import FORMAT_VERSION, SPLITS, ShardWriter, token_dtype
from tinysft_jax.data.workers import map_in_order, usable_cpus
from tinysft_jax.tokenizer import FILES_DIRECTORY, ChatTokenizer, write_files

CONTENT = ("data.json", "ledger.json", "manifest.json", FILES_DIRECTORY, *SPLITS)
# A block ends at either.
ITEMS_PER_BLOCK, CHARACTERS_PER_BLOCK = 256, 1 << 20


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; `arguments` are the command line's unless given."""
    flags = _parse(arguments)
    files.check_output(flags.output, flags.overwrite, CONTENT)
    source = _open_source(flags)
    tokenizer = _make_tokenizer(flags, is_text=source.format == "text")
    encoder = Encoder(source.format, tokenizer, flags.max_tokens, flags.seed, source.rates(), flags.bad_lines)
    start = time.monotonic()
    ledger, totals = prepare(source, encoder, flags.output, flags.workers, flags.overwrite)
    _print_summary(flags.output, encoder, ledger, totals, time.monotonic() - start)


def _parse(arguments: list[str] | None = None) -> Namespace:
    parser = console.Parser(prog="python -m tinysft_jax.data.prepare", description="Text to a prepared data set.")
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", type=console.path, metavar="PATH", help="a file, or a directory with a train and valid pair"
    )
    source.add_argument("--embedded", type=int, metavar="N", help="that many stories of the embedded corpus")
    source.add_argument("--hub", metavar="REPOSITORY", help="roneneldan/TinyStoriesInstruct from the Hugging Face Hub")
    add("--output", type=console.path, metavar="DIR", required=True, help="the data set to write")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--format", choices=("auto", *FORMATS), default="auto", help="of the input; auto tells it by the content")
    add("--template", choices=chat.TEMPLATES, help="chat template (plain text has none; default: control)")
    add("--bpe_ranks", type=int, metavar="N", help=f"size of the BPE, from 256 (default: {GPT2_RANKS})")
    add("--tokenizer", type=console.path, metavar="MODEL", help="the tokenizer and chat template of the model to train")
    add("--max_tokens", type=int, default=512, help="the longest conversation that is kept")
    add("--valid_fraction", type=float, default=0.01, help="share of a single file that is for validation")
    add("--limit", type=int, metavar="N", help="read only the first N records of each file")
    add("--bad_lines", choices=BAD_ITEMS, default="stop", help="at a malformed line or record: stop, or skip and count")
    add("--seed", type=int, default=0, help="for the tasks made of a story, and the embedded stories")
    add("--workers", type=int, default=usable_cpus(), help="processes that encode")
    flags = parser.parse_args(arguments)

    for name, least in (("max_tokens", 2), ("limit", 1), ("workers", 1)):
        value = getattr(flags, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    if not 0 <= flags.valid_fraction < 1:
        raise UserError(f"--valid_fraction must be from 0 to below 1, not {flags.valid_fraction}")
    if flags.tokenizer is not None and (flags.template is not None or flags.bpe_ranks is not None):
        raise UserError("--tokenizer takes the model's chat template and vocabulary; leave out --template, --bpe_ranks")
    if flags.limit is not None and flags.embedded is not None:
        raise UserError("--limit is for files; --embedded itself says how many stories to make")
    return flags


def _open_source(flags: Namespace) -> Source:
    if flags.embedded is not None:
        return open_embedded(flags.embedded, flags.format, flags.seed)
    if flags.hub is not None:
        return open_hub(flags.hub, flags.format, flags.valid_fraction, flags.limit)
    return open_input(flags.input, flags.format, flags.valid_fraction, flags.limit)


def _make_tokenizer(flags: Namespace, is_text: bool) -> ChatTokenizer:
    """A model without a chat template gets "control" for conversations."""
    if flags.tokenizer is None:
        ranks = GPT2_RANKS if flags.bpe_ranks is None else flags.bpe_ranks
        return ChatTokenizer(None if is_text else flags.template or "control", ranks)
    from tinysft_jax.checkpoints import load_tokenizer  # imports JAX, which takes a second

    tokenizer = load_tokenizer(flags.tokenizer)
    return tokenizer.with_template(None if is_text else tokenizer.template or "control")


def prepare(
    source: Source, encoder: Encoder, output: Path, workers: int = 1, overwrite: bool = False
) -> tuple[Ledger, dict[str, dict[str, int]]]:
    """Writes a prepared data set; returns the ledger, and the totals of each split.

    Raises: UserError, if an item is malformed or no conversation is left; RunError, if a worker dies or the disk is
    full. Then nothing is written.
    """
    ledger, start = Ledger(), time.monotonic()
    with explained(f"can't write {output}", RunError), files.new_directory(output, overwrite, CONTENT) as directory:
        dtype = token_dtype(encoder.tokenizer.vocab_size)
        writers = {split: ShardWriter(directory / split, dtype=dtype) for split in SPLITS}
        blocks = map_in_order(encoder.encode, _blocks_of(source), workers)
        with contextlib.closing(blocks), Progress("preparing", source.size, percent=True) as bar:
            for encoded, part in blocks:
                ledger.add(part)
                for split, writer in writers.items():
                    writer.add(encoded[split])
                tokens = sum(writer.totals["tokens"] for writer in writers.values())
                rate = tokens / max(time.monotonic() - start, 1e-3)
                bar.update(source.position, f"{tokens:,} tokens, {rate:,.0f} tokens/s")
        for writer in writers.values():
            writer.close()
        if not ledger.kept:
            nothing = f"no conversation could be made of {ledger.read.total():,} records"
            raise UserError(f"nothing is left to learn from: {', '.join(ledger.reasons()) or nothing}")
        totals = {split: writer.totals for split, writer in writers.items()}
        write_files(directory / FILES_DIRECTORY, encoder.tokenizer.files)
        files.write_json(directory / "data.json", _description(source, encoder, ledger, totals))
        files.write_json(directory / "ledger.json", ledger.to_json(SPLITS, encoder.task_names))
        files.write_manifest(directory)
    return ledger, totals


def _description(source: Source, encoder: Encoder, ledger: Ledger, totals: dict[str, dict]) -> dict[str, object]:
    """The content of `data.json`."""
    forms = {form for _, form in ledger.forms}
    return {
        "format_version": FORMAT_VERSION,
        "format": forms.pop() if len(forms) == 1 else encoder.format,
        "dtype": token_dtype(encoder.tokenizer.vocab_size),
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


def _print_summary(output: Path, encoder: Encoder, ledger: Ledger, totals: dict, seconds: float) -> None:
    for table in ledger.tables(SPLITS, encoder.task_names):
        Console().print(table)
    print("read", " and ".join(f"{ledger.read[split]:,} {split}" for split in SPLITS), "records")
    if ledger.forms:
        print(f"{ledger.noun} by form:", ", ".join(ledger.form_counts()))
    for line in (*ledger.reasons(), *ledger.unread_fields()):
        print(line)
    for bad in ledger.bad:
        print(f"skipped {bad}", file=sys.stderr)
    for split in SPLITS:
        if not totals[split]["conversations"]:
            print(f"note: the {split} split is empty", file=sys.stderr)
    total = {name: sum(totals[split][name] for split in SPLITS) for name in totals["train"]}
    print(
        f"{output}: {total['conversations']:,} conversations, {total['tokens']:,} tokens "
        f"({total['supervised_tokens'] / total['tokens']:.1%} supervised) in {seconds:.1f} s, "
        f"{total['tokens'] / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    console.run(main)
