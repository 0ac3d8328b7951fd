"""The command that samples answers to a data set's questions and writes the best and the worst of each as a pair."""

import dataclasses
import hashlib
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from tinysft_jax import accelerator, console, distributed, files
from tinysft_jax.checkpoints import load_tokenizer
from tinysft_jax.console import UserError
from tinysft_jax.data.forms import SIDES
from tinysft_jax.data.store import SPLITS, PreparedData
from tinysft_jax.evaluation.likelihood import Model
from tinysft_jax.evaluation.run import load, make_decoder
from tinysft_jax.rewards.cases import Case, choose_tasks, open_questions, read_case
from tinysft_jax.rewards.metrics import require_libraries
from tinysft_jax.rewards.registry import DEFAULT_REWARDS, check_reward_model, parse_weights, score
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.resumable import Lines, write_lines
from tinysft_jax.sampling.text import text_options
from tinysft_jax.sharding import batch_shards, make_mesh
from tinysft_jax.tokenizer import ChatTokenizer
from tinysft_jax.training.judges import Judges, log_probs_under, open_reward_model, values_of
from tinysft_jax.training.loss import Softmax

Record = dict[str, Any]

# Why a question has no pair.
OTHER_PROMPT = "the prompt is not the question alone, as the chat template has it (a system message, earlier turns, …)"
NO_REWARD = "none of the rewards applies"
NONE_ENDED = "no answer ended by itself"
SAME_SCORE = "the best answer scores no more than the worst"
CLOSE_SCORES = "the scores differ by less than --least_difference"
UNUSABLE = "the best or the worst answer is blank, or holds a marker of the chat template"

ROUND_OFF = 1e-9  # scores that differ by less are equal


class Sample(NamedTuple):
    """A sampled answer."""

    text: str
    stopped: bool  # whether it ended by itself
    score: float | None
    reasons: Mapping[str, float]  # the value of each reward that applies


def make_pair(case: Case, samples: Sequence[Sample], tokenizer: ChatTokenizer, least_difference: float) -> Record:
    """The line of a question: its best answer that ended by itself and its worst, or why it has none, in "left_out".

    Of several with the same score, the first counts.
    """
    if samples[0].score is None:
        return _left_out(case, NO_REWARD)
    if not any(sample.stopped for sample in samples):
        return _left_out(case, NONE_ENDED)
    best = max((sample for sample in samples if sample.stopped), key=lambda sample: sample.score)
    worst = min(samples, key=lambda sample: sample.score)
    difference = best.score - worst.score
    if difference <= ROUND_OFF:
        return _left_out(case, SAME_SCORE)
    if difference < least_difference - ROUND_OFF:
        return _left_out(case, CLOSE_SCORES)
    prompt, sides = _prompt(case), dict(zip(SIDES, (best, worst), strict=True))
    answers = {side: [{"role": "assistant", "content": sample.text}] for side, sample in sides.items()}
    try:
        for answer in answers.values():
            tokenizer.encode_chat(prompt + answer)
    except UserError:
        return _left_out(case, UNUSABLE)
    pair = {"prompt": prompt, **answers, "task": case.task}
    pair |= {f"{side}_score": sample.score for side, sample in sides.items()}
    return pair | {f"{side}_reasons": sample.reasons for side, sample in sides.items()}


def _left_out(case: Case, why: str) -> Record:
    return {"task": case.task, "left_out": why}


def _prompt(case: Case) -> list[dict[str, str]]:
    return [{"role": "user", "content": case.question}]


def draw_questions(flags: Namespace, data: PreparedData) -> tuple[list[Case], list[Record]]:
    """The questions to ask, in random order, and a record of each that was drawn and can't be asked.

    Raises: UserError, as `open_questions`, or if there is no such task, or no question.
    """
    tasks, split = choose_tasks(data, flags.tasks), open_questions(data, flags.split)
    members = np.flatnonzero(np.isin(split.tasks, tasks))
    cases, left_out = [], []
    for index in np.random.default_rng(flags.seed).permutation(members)[: flags.questions or None]:
        case = read_case(data, split, int(index))
        if _is_whole_prompt(case, data.tokenizer):
            cases.append(case)
        else:
            left_out.append(_left_out(case, OTHER_PROMPT))
    if not cases:
        why = f"; of {len(left_out):,}, {OTHER_PROMPT}" if left_out else ""
        names = ", ".join(data.tasks[task] for task in tasks)
        raise UserError(f"{split.directory} has no question of {names} that can be asked{why}")
    return cases, left_out


def _is_whole_prompt(case: Case, tokenizer: ChatTokenizer) -> bool:
    """Whether the question alone gives the prompt's ids."""
    try:
        return tokenizer.encode_prompt(_prompt(case)).tolist() == list(case.prompt)
    except UserError:
        return False


def open_judges(flags: Namespace, model: Model, data: PreparedData) -> Judges:
    """The model that answers, as a judge of fluency, and the reward model, where the rewards need them."""
    (description, params), mesh, dtype, log_probs = model, make_mesh(), accelerator.default_dtype(), None
    n_rows, shape = batch_shards(mesh) * -(-flags.batch_size // batch_shards(mesh)), description.config
    if "fluency" in flags.rewards:
        function = log_probs_under(Softmax(shape.vocab_size))
        log_probs = values_of(function, shape, params, mesh, dtype, n_rows, description.trained_length)
    path = flags.reward_model
    return Judges(log_probs, open_reward_model(path, data, mesh, dtype, n_rows) if path else None)


def write_pairs(
    flags: Namespace,
    cases: Sequence[Case],
    decoder: Decoder,
    judges: Judges,
    tokenizer: ChatTokenizer,
    options: SamplingOptions,
) -> list[Record]:
    """Samples answers to the questions and writes the pairs: a record of each question, without texts.

    An answer's random numbers depend on its row: the number of its question times `flags.num_samples`, plus its own.
    """
    n, outcomes = flags.num_samples, []
    digest = hashlib.sha256("".join(json.dumps(vars(case)) for case in cases).encode()).hexdigest()
    settings = {"format_version": 1, "model": decoder.fingerprint(), "questions": digest, **dataclasses.asdict(options)}
    settings |= {name: getattr(flags, name) for name in ("num_samples", "batch_size", "least_difference")}
    settings["rewards"] = list(flags.rewards.items())  # in their order, which is that of the reasons
    settings |= {"reward_model": flags.reward_model} if flags.reward_model else {}
    options = text_options(options, tokenizer, decoder.config)

    def judge(asked: list[Case], answers: list[list[int]]) -> list[Sample]:
        stopped = [not decoder.is_full(case.prompt, ids, options) for case, ids in zip(asked, answers, strict=True)]
        whole = [
            ([*case.prompt, *ids, *case.target[-1:] * ended], len(case.prompt))
            for case, ids, ended in zip(asked, answers, stopped, strict=True)
        ]
        answered = [
            judgement.answered(case, tokenizer.decode(ids), ended)
            for case, ids, ended, judgement in zip(asked, answers, stopped, judges(asked, whole), strict=True)
        ]
        return [Sample(each.text, each.stopped, *score(flags.rewards, each)) for each in answered]

    def ask(numbers: range) -> tuple[list[Record], int]:
        asked = [cases[number] for number in numbers for _ in range(n)]
        prompts = [case.prompt for case in asked]
        answers = decoder.generate(prompts, options, flags.batch_size, first_row=numbers.start * n)
        samples = judge(asked, answers)
        firsts = range(0, len(asked), n)
        pairs = [make_pair(asked[i], samples[i : i + n], tokenizer, flags.least_difference) for i in firsts]
        return pairs, sum(map(len, answers))

    def select(lines: Lines) -> Iterator[bytes]:
        for line in lines:
            record = json.loads(line)
            outcomes.append({key: value for key, value in record.items() if key not in ("prompt", *SIDES)})
            if "left_out" not in record:
                yield line

    group = max(flags.batch_size // n, 1)
    write_lines(flags.output, settings, "questions", len(cases), group, ask, select, flags.overwrite)
    return outcomes


def summary(outcomes: Sequence[Record]) -> str:
    """A table of each task's questions, pairs and mean scores, and how many questions have no pair, by reason."""
    lines = [f"{'task':<16} {'questions':>9} {'pairs':>9} {'chosen':>9} {'rejected':>9}"]
    for task in (*sorted({record["task"] for record in outcomes}), "all"):
        questions = [record for record in outcomes if task in (record["task"], "all")]
        pairs = [record for record in questions if "left_out" not in record]
        means = [f"{fmean(pair[f'{side}_score'] for pair in pairs):.3f}" if pairs else "" for side in SIDES]
        lines.append(f"{task:<16} {len(questions):>9,} {len(pairs):>9,} {means[0]:>9} {means[1]:>9}")
    reasons = Counter(record["left_out"] for record in outcomes if "left_out" in record)
    return "\n".join(lines + [f"left out, {count:,}: {reason}" for reason, count in reasons.most_common()])


def _parse(arguments: list[str] | None = None) -> Namespace:
    parser = console.Parser(prog="python -m tinysft_jax.preferences", description="Pairs of a model's own answers.")
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", required=True, help="a model with a chat template, in any form")
    add("--data", type=console.path, metavar="DIR", required=True, help="a prepared data set, with the questions")
    add("--output", type=console.path, metavar="FILE", required=True, help="the pairs, as JSON lines")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--num_samples", type=int, default=8, help="answers to each question")
    add("--rewards", type=parse_weights, default=DEFAULT_REWARDS, help="what scores them, with weights")
    add("--reward_model", metavar="PATH", help="for the reward preferred: what configs/reward.py trained")
    add("--tasks", help="of the data, with commas (default: all)")
    add("--split", choices=SPLITS, default="train", help="which part of the data")
    add("--questions", type=int, default=0, help="how many to draw; 0: all")
    add("--least_difference", type=float, default=0.0, help="of the scores of a pair, from 0 to 1")
    add("--temperature", type=float, default=1.0, help="above 0")
    add("--top_k", type=int, default=0, help="draw among the k most likely tokens; 0: off")
    add("--top_p", type=float, default=1.0, help="draw among the most likely of this probability together; 1: off")
    add("--max_new_tokens", type=int, help="length of an answer, at most (default: the room that the data give it)")
    add("--seed", type=int, default=0, help="of the choice of questions, and of sampling")
    add("--batch_size", type=int, default=32, help="answers sampled together; more take more memory")
    flags = parser.parse_args(arguments)
    for name, least in (("num_samples", 2), ("questions", 0), ("max_new_tokens", 1), ("seed", 0), ("batch_size", 1)):
        if (value := getattr(flags, name)) is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be {least} or more")
    if not 0 <= flags.least_difference <= 1:
        raise UserError(f"--least_difference is {flags.least_difference}; it must be from 0 to 1")
    if flags.temperature == 0:
        raise UserError("--temperature is 0; it must be above 0, or all answers to a question are the same")
    check_reward_model(flags.rewards, flags.reward_model)
    if not flags.output.parent.is_dir():
        raise UserError(f"there is no directory {flags.output.parent} for --output")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; `arguments` are the command line's unless given."""
    flags = _parse(arguments)
    files.check_output(flags.output, flags.overwrite, content=())
    require_libraries()
    data = PreparedData(flags.data)
    room = flags.max_new_tokens or data.description["max_tokens"]
    options = SamplingOptions(room, flags.temperature, flags.top_k, flags.top_p, seed=flags.seed)
    cases, left_out = draw_questions(flags, data)
    distributed.check_devices()
    accelerator.keep_compiled()
    if load_tokenizer(flags.checkpoint).template is None:
        raise UserError(f"{flags.checkpoint} has no chat template: it has not learned to answer; fine-tune it first")
    model = load(flags.checkpoint, cases, data)
    judges = open_judges(flags, model, data)
    outcomes = left_out + write_pairs(flags, cases, make_decoder(model), judges, data.tokenizer, options)
    n_pairs = sum("left_out" not in record for record in outcomes)
    print(summary(outcomes), f"{flags.output}: {n_pairs:,} of {len(outcomes):,} questions have a pair", sep="\n")


if __name__ == "__main__":
    console.run(main)
