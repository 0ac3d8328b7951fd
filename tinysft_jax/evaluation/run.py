"""What a model can do, in figures: `python -m tinysft_jax.evaluation.run --checkpoint=PATH --data=DIR --output=DIR`.

The output directory holds `report.json`, `report.md`, `report.png`, and `answers.jsonl`: every question with the
model's and the data's answer. `--rescore=DIR` makes the report again from such a directory's answers.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console

from tinysft_jax import cli, files
from tinysft_jax.data.dataset import PreparedData
from tinysft_jax.errors import RunError, UserError, reason
from tinysft_jax.evaluation import metrics
from tinysft_jax.evaluation import report as reports
from tinysft_jax.evaluation.answers import Answered, read_answers, write_answers
from tinysft_jax.evaluation.cases import draw_cases
from tinysft_jax.evaluation.examples import examples, transcript
from tinysft_jax.evaluation.plot import plot_report
from tinysft_jax.sampling.options import SamplingOptions
from tinysft_jax.tokenizer import ChatTokenizer

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
    from tinysft_jax import processes
    from tinysft_jax.evaluation.respondent import Respondent

    processes.check_devices()
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


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m tinysft_jax.evaluation.run", description="What a model can do, in figures.")
    parser.add_argument("--checkpoint", metavar="PATH", help="a model directory, a work directory or a .pt file")
    parser.add_argument("--baseline", metavar="PATH", help="another one, to compare with")
    parser.add_argument(
        "--data", type=cli.path, metavar="DIR", help="a prepared data set; its validation split is asked"
    )
    parser.add_argument(
        "--rescore", type=cli.path, metavar="DIR", help="make the report of an earlier output's answers"
    )
    parser.add_argument("--output", type=cli.path, metavar="DIR", required=True, help="the report's directory")
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
    cli.run(main)
