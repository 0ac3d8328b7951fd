"""The command that asks models held-out questions and reports what their answers are worth."""

import dataclasses
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tinysft_jax import accelerator, console, distributed, files
from tinysft_jax.console import RunError, UserError
from tinysft_jax.data.mixture import Part, open_parts
from tinysft_jax.data.store import PreparedData
from tinysft_jax.evaluation import report as reports
from tinysft_jax.evaluation.likelihood import Judge, Model, score
from tinysft_jax.evaluation.ranking import rank
from tinysft_jax.rewards import metrics
from tinysft_jax.rewards.cases import Answer, Answers, Case, answer_lines, draw_cases
from tinysft_jax.rewards.registry import Answered, parse_weights
from tinysft_jax.rewards.registry import score as score_rewards
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.text import text_options
from tinysft_jax.sharding import make_mesh
from tinysft_jax.tokenizer import ChatTokenizer
from tinysft_jax.training.judges import log_probs_under
from tinysft_jax.training.loss import Softmax
from tinysft_jax.training.state import check_context, starting_model

CONTENT = ("report.json", "report.md", "report.png", "answers.jsonl")
# What no checkpoint is called: columns, settings, and what `answers.jsonl` has beside the answers.
KEYS = {
    "data",
    "tasks",
    "cases",
    "seed",
    "temperature",
    "judge",
    "rewards",
    "task",
    "question",
    "conditions",
    "tokens",
    "pair",
}


def evaluate(flags: Namespace, parts: Sequence[Part]) -> tuple[reports.Report, list[Case], Answers]:
    """Lets the models of `flags` answer: the report, the cases and the answers."""
    data, cases = [part.data for part in parts], []
    for part in parts:
        drawn = draw_cases(part.data, flags.cases, flags.seed, tasks=flags.tasks)
        cases += [dataclasses.replace(case, data=part.name) for case in drawn]
    room = max(each.description["max_tokens"] for each in data)
    options = SamplingOptions(room, flags.temperature, seed=flags.seed)
    distributed.check_devices()
    accelerator.keep_compiled()
    judge = Judge(flags.judge) if flags.judge else None
    models = {speaker: load(path, cases, *data) for speaker, path in flags.models.items()}
    answers = {
        speaker: answer(model, flags.models[speaker], data[0].tokenizer, cases, options, flags.batch_size)
        for speaker, model in models.items()
    }
    settings = flags.models | {name: getattr(flags, name) for name in ("data", "cases", "seed", "temperature")}
    settings |= {name: value for name in ("tasks", "judge", "rewards") if (value := getattr(flags, name))}
    fluency = judge_answers(judge, cases, answers, flags.batch_size) if judge else None
    reward = reward_answers(flags.weights, cases, answers) if flags.weights else None
    return reports.build_report(settings, cases, answers, fluency, reward), cases, answers


def speakers(checkpoints: Sequence[str], baseline: str | None) -> dict[str, str]:
    """The models' paths by what the report calls them.

    One of several checkpoints is called by as many of its path's last components as tell it from all others. Raises:
    UserError, if two of several are the same.
    """
    last = {"baseline": baseline} if baseline else {}
    if len(checkpoints) == 1:
        return {reports.SINGLE: checkpoints[0]} | last
    paths = [os.path.abspath(os.path.expanduser(path)) for path in (*checkpoints, *last.values())]
    if same := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"{same[0]} is given twice; give each model once")
    taken, names = KEYS | reports.COLUMNS.keys(), {}
    for checkpoint, path in zip(checkpoints, paths, strict=False):
        ends = ("/".join(path.split("/")[-n:]) for n in range(1, path.count("/") + 2))
        unique = (end for end in ends if sum(f"/{other}".endswith(f"/{end}") for other in paths) == 1)
        names[next(end for end in unique if end not in taken)] = checkpoint
    return names | last


def load(checkpoint: str, cases: Sequence[Case], *data: PreparedData) -> Model:
    """The model; one without a chat template gets the data's, as at the start of fine-tuning.

    Raises: UserError, if it can't be read, has another tokenizer or chat template, or too short a context.
    """
    description, params = starting_model(checkpoint, {}, *data)
    longest = max(len(case.prompt) + len(case.target) for case in cases)
    check_context(description, checkpoint, longest)
    # Question and answer have the room of a conversation of the data, or more if a case needs it.
    room = max(each.description["max_tokens"] for each in data)
    trained_length = max(min(description.trained_length, room), longest)
    return dataclasses.replace(description, trained_length=trained_length), params


def make_decoder(model: Model) -> Decoder:
    """A decoder on all devices."""
    description, params = model
    mesh = make_mesh() if jax.device_count() > 1 else None
    return Decoder(description.config, params, accelerator.default_dtype(), description.trained_length, mesh)


def answer(
    model: Model, name: str, tokenizer: ChatTokenizer, cases: Sequence[Case], options: SamplingOptions, batch_size: int
) -> list[Answer]:
    """The model's answer to each case; `name` is for messages. Raises: RunError, if a likelihood is not finite."""
    sequences = [([*case.prompt, *case.target], len(case.prompt)) for case in cases]
    found = score(log_probs_under(Softmax(model[0].config.vocab_size)), model, name, sequences, batch_size)
    log_p = [float(values.sum()) for values in found]
    decoder, batch_size = make_decoder(model), min(batch_size, len(cases))
    options = text_options(options, tokenizer, decoder.config)
    order = sorted(range(len(cases)), key=lambda i: len(cases[i].prompt))  # a batch has cases of similar lengths
    answers: dict[int, Answer] = {}
    with console.Progress(f"{name}: answers", len(cases)) as progress:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            prompts = [cases[i].prompt for i in rows]
            continuations = decoder.generate(prompts, options, batch_size, first_row=first)
            for i, prompt, ids in zip(rows, prompts, continuations, strict=True):
                answers[i] = Answer(tokenizer.decode(ids), not decoder.is_full(prompt, ids, options), -log_p[i])
            progress.update(len(answers))
    return [answers[i] for i in range(len(cases))]


def judge_answers(judge: Judge, cases: Sequence[Case], answers: Answers, batch_size: int) -> reports.Scores:
    """The fluency of each speaker's answers, and of the ground truth."""
    texts = {speaker: [answer.text for answer in each] for speaker, each in answers.items()}
    texts["ground_truth"] = [case.ground_truth for case in cases]
    questions = [case.question for case in cases] * len(texts)
    scores = iter(judge.fluency([text for each in texts.values() for text in each], batch_size, questions))
    return {column: [next(scores) for _ in each] for column, each in texts.items()}


def reward_answers(weights: Mapping[str, float], cases: Sequence[Case], answers: Answers) -> reports.Scores:
    """The reward of each speaker's answers, and of the ground truth, which ends by itself."""
    said = {speaker: [(answer.text, answer.stopped) for answer in each] for speaker, each in answers.items()}
    said["ground_truth"] = [(case.ground_truth, True) for case in cases]
    return {
        speaker: [score_rewards(weights, Answered(case, *one))[0] for case, one in zip(cases, each, strict=True)]
        for speaker, each in said.items()
    }


def write(output: Path, report: reports.Report, lines: Sequence[dict[str, Any]], overwrite: bool) -> None:
    """Writes the output directory, whole or not at all."""
    written = files.new_directory(output, overwrite, CONTENT)
    with console.explained(f"can't write {output}", RunError), written as directory:
        files.write_json(directory / "report.json", report)
        files.write_text(directory / "report.md", reports.markdown(report))
        reports.plot_report(report, directory / "report.png")
        files.write_json_lines(directory / "answers.jsonl", lines)


def examples(cases: Sequence[Case], count: int) -> list[int]:
    """The indices of the first `count` cases round by round: one of each task, then a second of each."""
    return sorted(range(len(cases)), key=lambda i: sum(case.label == cases[i].label for case in cases[:i]))[:count]


def transcript(case: Case, answers: dict[str, Answer]) -> str:
    """A case and its answers as text."""
    lines = [f"--- {case.label}", f"Question: {case.question}"]
    lines += [f"{speaker[0].upper()}{speaker[1:]}: {answer.text}" for speaker, answer in answers.items()]
    return "\n".join([*lines, f"Data: {case.ground_truth}"])


def _parse(arguments: list[str] | None = None) -> Namespace:
    parser = console.Parser(prog="python -m tinysft_jax.evaluation.run", description="Measures what a model can do.")
    parser.add_argument("--checkpoint", action="append", metavar="PATH", required=True, help="a model; may be repeated")
    parser.add_argument("--baseline", metavar="PATH", help="another one, to compare with")
    parser.add_argument("--judge", metavar="PATH", help="a model that says how fluent the answers are")
    parser.add_argument("--rewards", metavar="WEIGHTS", help='adds their mean, as of "words:1,ends:0.3"')
    parser.add_argument("--data", metavar="DIR", required=True, help="a prepared data set, or several: A=1,B=1")
    parser.add_argument("--output", type=console.path, metavar="DIR", required=True, help="the report's directory")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--tasks", metavar="NAMES", help="of the data, with commas (default: all)")
    parser.add_argument("--cases", type=int, default=100, help="questions of each task, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cases, and of sampling")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--batch_size", type=int, default=32, help="answers sampled together; more take more memory")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N cases with their answers, too")
    flags = parser.parse_args(arguments)
    for name, least in (("cases", 1), ("batch_size", 1), ("seed", 0), ("show", 0)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name} is {getattr(flags, name)}; it must be {least} or more")
    flags.weights = {} if flags.rewards is None else parse_weights(flags.rewards)
    flags.models = speakers(flags.checkpoint, flags.baseline)
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; `arguments` are the command line's unless given."""
    flags = _parse(arguments)
    files.check_output(flags.output, flags.overwrite, CONTENT)
    metrics.require_libraries()
    parts = open_parts(flags.data)
    if parts[0].data.per_item == 2:
        if flags.judge or flags.show or flags.weights or flags.tasks is not None:
            raise UserError("--judge, --rewards, --show and --tasks are about answers to questions; pairs have none")
        report, lines = rank(flags, parts)
        write(flags.output, report, lines, flags.overwrite)
        print(reports.markdown(report))
        return
    report, cases, answers = evaluate(flags, parts)
    write(flags.output, report, answer_lines(cases, answers), flags.overwrite)
    for i in examples(cases, flags.show):
        print(transcript(cases[i], {speaker: each[i] for speaker, each in answers.items()}), end="\n\n")
    print(reports.markdown(report))
    print(f"{flags.output}: {len(cases):,} cases of {len(report['tasks'])} tasks")


if __name__ == "__main__":
    console.run(main)
