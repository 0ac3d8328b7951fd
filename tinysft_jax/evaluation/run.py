"""A few of an evaluation's cases, to be read: what was asked, what each model said, what the data says."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track

from tinysft_jax import console, files
from tinysft_jax.console import RunError, UserError, reason
from tinysft_jax.data.store import PreparedData
from tinysft_jax.evaluation import metrics
from tinysft_jax.evaluation import report as reports
from tinysft_jax.evaluation.cases import Answer, Answered, HeldOut, draw_cases, read_answers, write_answers
from tinysft_jax.evaluation.report import plot_report
from tinysft_jax.model import GPT, default_dtype
from tinysft_jax.parameters import make_model
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.text import text_options
from tinysft_jax.sharding import make_mesh
from tinysft_jax.tokenizer import ChatTokenizer
from tinysft_jax.training.state import starting_model
from tinysft_jax.training.step import supervised_sums


def examples(answered: Sequence[Answered], count: int) -> list[Answered]:
    """The first `count` cases round by round: one of each task, then a second of each."""
    rounds: dict[str, int] = {}
    places = []
    for each in answered:
        rounds[each.case.task] = rounds.get(each.case.task, -1) + 1
        places.append(rounds[each.case.task])
    order = sorted(range(len(answered)), key=places.__getitem__)  # stable: tasks stay in their order
    return [answered[i] for i in order[:count]]


def transcript(each: Answered) -> str:
    """A case as text."""
    lines = [f"--- {each.case.task}", f"Question: {each.case.question}"]
    lines += [f"{speaker.capitalize()}: {answer.text}" for speaker, answer in each.answers.items()]
    return "\n".join([*lines, f"Data: {each.case.gold}"])


SECONDS_BETWEEN_LINES = 10.0


class Respondent:
    """A checkpoint, read and found fit for the cases.

    A model without a chat template is taken as fine-tuning would start from it: its table grown by the markers' rows.

    Args:
      checkpoint: a model directory, a work directory or a `.pt` file.
      data: where the cases are from.
      held_out: the cases.

    Raises:
      UserError: if it can't be read, has another tokenizer or chat template, or too short a context.
    """

    def __init__(self, checkpoint: str, data: PreparedData, held_out: Sequence[HeldOut]):
        description, self._params = starting_model(checkpoint, {}, data)
        self._config, self._checkpoint = description.config, checkpoint
        self._trained_length = description.trained_length
        self._tokenizer, self._held_out = ChatTokenizer.from_description(data.description), held_out
        self._longest = max(len(each.ids) for each in held_out)
        if self._longest > self._config.max_seq_len:
            raise UserError(
                f"{checkpoint} has a context of {self._config.max_seq_len} tokens, and the data a conversation of "
                f"{self._longest}; prepare the data with a smaller --max_tokens"
            )

    def answers(self, options: SamplingOptions, batch_size: int) -> list[Answer]:
        """Answers each case.

        Args:
          options: how to draw.
          batch_size: cases at a time.

        Raises:
          RunError: if a loss is not finite.
        """
        trained_length = max(self._trained_length, self._longest)  # each question can be answered
        mesh = make_mesh() if jax.device_count() > 1 else None
        decoder = Decoder(self._config, self._params, default_dtype(), trained_length, mesh)
        options = text_options(options, self._tokenizer, self._config)
        weigh = _make_weigh(make_model(self._config, self._params, dtype=default_dtype()))
        length = min(-(-self._longest // 64) * 64, self._config.max_seq_len)
        # Cases of about the same length share a batch.
        order = sorted(range(len(self._held_out)), key=lambda i: len(self._held_out[i].prompt))
        answers: dict[int, Answer] = {}
        for first in _progress(range(0, len(order), batch_size), self._checkpoint):
            rows = order[first : first + batch_size]
            held_out = [self._held_out[i] for i in rows]
            prompts = [each.prompt for each in held_out]
            nll = weigh(_batch(held_out, min(batch_size, len(order)), length))[: len(rows)]
            if not np.isfinite(nll).all():
                raise RunError(f"{self._checkpoint} gives a loss that is not finite; it has diverged or is damaged")
            said = decoder.generate(prompts, options, batch_size, first_row=first)
            for i, prompt, ids, loss in zip(rows, prompts, said, nll, strict=True):
                stopped = not decoder.is_full(prompt, ids, options)
                answers[i] = Answer(self._tokenizer.decode(ids), stopped, float(loss))
        return [answers[i] for i in range(len(self._held_out))]


def _make_weigh(model: GPT) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A function of a batch: Σ weight · −log p(target) of each row."""
    graph, state = nnx.split(model)

    @jax.jit
    def weigh(state, batch):
        model = nnx.merge(graph, state)
        hidden, table = model.hidden(batch["tokens"]), model.tok_emb.embedding[...]
        rows = jax.lax.broadcasted_iota(jnp.int32, batch["tokens"].shape, 0)
        targets, weights = batch["targets"], batch["weights"]
        return supervised_sums(hidden, table, targets, weights, rows, len(rows), model.config.vocab_size)[0]

    return lambda batch: np.asarray(weigh(state, batch))


def _batch(held_out: Sequence[HeldOut], n_rows: int, length: int) -> dict[str, np.ndarray]:
    """A conversation a row, from its beginning; what is after its end, no position before it sees."""
    batch = {key: np.zeros((n_rows, length), np.int32) for key in ("tokens", "targets")}
    batch["weights"] = np.zeros((n_rows, length), np.float32)
    for row, each in enumerate(held_out):
        n = len(each.ids)
        batch["tokens"][row, :n] = each.ids
        batch["targets"][row, : n - 1] = each.ids[1:]
        batch["weights"][row, : n - 1] = each.supervised[1:]
    return batch


def _progress(steps: range, name: str) -> Iterator[int]:
    """Goes through the steps with a bar in a terminal, and a line now and then elsewhere."""
    console, shown = Console(stderr=True), time.monotonic()
    if console.is_terminal:
        yield from track(steps, name, console=console, transient=True)
        return
    for n, step in enumerate(steps):
        if time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            print(f"{name}: {n / len(steps):.0%} answered", file=sys.stderr, flush=True)
        yield step


CONTENT = ("report.json", "report.md", "report.png", "answers.jsonl")
MARKER, *_ = CONTENT


def evaluate(flags: Namespace) -> tuple[dict[str, Any], list[Answered]]:
    """Lets the model, and the baseline, answer: the report's settings, and the answers.

    Raises:
      UserError: if a checkpoint or the data can't be used.
    """
    data = PreparedData(flags.data)
    tokenizer = ChatTokenizer.from_description(data.description)
    held_out = draw_cases(data, tokenizer, flags.cases, flags.seed)
    # Room for the longest conversation of the data.
    options = SamplingOptions(data.description["max_tokens"], flags.temperature, seed=flags.seed)

    # Only now what takes seconds to import.
    from tinysft_jax import distributed

    distributed.check_devices()
    checkpoints = {"model": flags.checkpoint} | ({"baseline": flags.baseline} if flags.baseline else {})
    respondents = {name: Respondent(path, data, held_out) for name, path in checkpoints.items()}
    answers = {name: respondent.answers(options, flags.batch_size) for name, respondent in respondents.items()}
    answered = [Answered(each.case, {name: answers[name][i] for name in answers}) for i, each in enumerate(held_out)]
    settings = {"data": str(flags.data), "cases": flags.cases, "seed": flags.seed, "temperature": flags.temperature}
    return checkpoints | settings, answered


def rescore(directory: Path) -> tuple[dict[str, Any], list[Answered]]:
    """The settings and the answers of an evaluation that was written.

    Raises:
      UserError: if it can't be read.
    """
    settings = files.read_json(directory / MARKER, "an evaluation", reports.FORMAT_VERSION).get("settings")
    if not isinstance(settings, dict):
        raise UserError(f"{directory / MARKER} lacks 'settings'; evaluate again")
    return settings, read_answers(directory / "answers.jsonl")


def write(output: Path, settings: dict[str, Any], answered: list[Answered], overwrite: bool = False) -> reports.Report:
    """Writes the output directory, whole or not at all; returns what `report.json` holds.

    Raises:
      UserError: if `output` must not be replaced, or a library is missing that the scores need.
      RunError: if the disk is full, say.
    """
    report = reports.build_report(settings, answered)
    try:
        with files.new_directory(output, overwrite, CONTENT) as directory:
            files.write_json(directory / MARKER, report)
            files.write_text(directory / "report.md", reports.markdown(report))
            plot_report(report, directory / "report.png")
            write_answers(directory / "answers.jsonl", answered)
    except OSError as error:
        raise RunError(f"can't write {output}: {reason(error)}") from None
    return report


def _parser() -> console.Parser:
    parser = console.Parser(prog="python -m tinysft_jax.evaluation.run", description="What a model can do, in figures.")
    parser.add_argument("--checkpoint", metavar="PATH", help="a model directory, a work directory or a .pt file")
    parser.add_argument("--baseline", metavar="PATH", help="another one, to compare with")
    parser.add_argument(
        "--data", type=console.path, metavar="DIR", help="a prepared data set; its validation split is asked"
    )
    parser.add_argument(
        "--rescore", type=console.path, metavar="DIR", help="make the report of an earlier output's answers"
    )
    parser.add_argument("--output", type=console.path, metavar="DIR", required=True, help="the report's directory")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--cases", type=int, default=100, help="questions of each task, at most")
    parser.add_argument("--seed", type=int, default=0, help="which ones, and of drawn answers")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the most likely token")
    parser.add_argument("--batch_size", type=int, default=32, help="answers made at a time; more take more memory")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N cases with their answers, too")
    return parser


def _check(flags: Namespace) -> None:
    """Refuses what can't be evaluated."""
    if flags.rescore is None and (flags.checkpoint is None or flags.data is None):
        raise UserError("give --checkpoint and --data, or --rescore")
    if flags.rescore is not None and (flags.checkpoint or flags.baseline or flags.data):
        raise UserError("--rescore takes its answers from a directory; leave out --checkpoint, --baseline and --data")
    for name, least in (("cases", 1), ("batch_size", 1), ("seed", 0), ("show", 0)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name} is {getattr(flags, name)}; it must be {least} or more")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; `arguments` are the command line's unless given."""
    flags = _parser().parse_args(arguments)
    _check(flags)
    files.check_output(flags.output, flags.overwrite, CONTENT)
    metrics.require_libraries()
    settings, answered = evaluate(flags) if flags.rescore is None else rescore(flags.rescore)
    report = write(flags.output, settings, answered, flags.overwrite)
    for each in examples(answered, flags.show):
        print(transcript(each), end="\n\n")
    Console(width=max(Console().width, 180)).print(reports.table(report))
    print(f"{flags.output}: {len(answered):,} cases of {len(report['tasks'])} tasks")


if __name__ == "__main__":
    console.run(main)
