"""GRPO's batches: the model's own answers to a data set's questions, what they are worth, and how it is watched."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64
from ml_collections import ConfigDict

from tinysft_jax.console import UserError
from tinysft_jax.data.batches import Batch, make_batch
from tinysft_jax.data.store import PreparedData
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.parameters import ModelDescription, Params
from tinysft_jax.rewards.cases import Case, choose_tasks, open_questions, read_case
from tinysft_jax.rewards.metrics import repetition, require_libraries
from tinysft_jax.rewards.registry import REWARDS, Answered, check_reward_model, parse_weights, score
from tinysft_jax.sampling.decode import Decoder, Drawn
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.text import text_options
from tinysft_jax.training.judges import Judges, log_probs_under, open_reward_model
from tinysft_jax.training.log import TRAIN, VAL, VAL_LOSS, MetricLine
from tinysft_jax.training.loss import Softmax
from tinysft_jax.training.packed import Given, PackedValues, pack, places, rows_of
from tinysft_jax.training.state import Steps, train_dtype


class Sampled(NamedTuple):
    """An answer, with what it is worth."""

    case: Case
    drawn: Drawn
    start: np.ndarray  # float32[tokens], log-probabilities under the model at the start, drawn from as `drawn`
    answered: Answered
    reward: float | None  # the weighted mean of its parts; None where none applies
    parts: dict[str, float]  # the value of each reward that applies

    def sequence(self) -> Given:
        return [*self.case.prompt, *self.drawn.ids], len(self.case.prompt)


def advantages(rewards: Sequence[float | None], group_size: int, by_deviation: bool) -> Float64[np.ndarray, " answers"]:
    """Each answer's reward minus the mean of its group, divided by the group's deviation if asked for.

    Consecutive answers are a group. One without a reward has the advantage 0, and does not count in the mean.
    """
    groups = np.ma.masked_invalid(np.array(rewards, np.float64).reshape(-1, group_size))
    found = groups - groups.mean(axis=1, keepdims=True)
    if by_deviation:
        found /= groups.std(axis=1, keepdims=True) + 1e-4
    found[np.ptp(groups, axis=1) < 1e-9] = 0  # equal but for round-off
    return found.filled(0).reshape(-1)


class Questions:
    """The questions of a split that GRPO asks, in a random order for each epoch."""

    def __init__(self, data: PreparedData, split: str, tasks: str, seed: int):
        self._data, self._split, self._seed = data, open_questions(data, split), seed
        self._members = np.flatnonzero(np.isin(self._split.tasks, choose_tasks(data, tasks or None)))
        if not len(self):
            raise UserError(f"{self._split.directory} has no question of grpo.tasks {tasks}; choose others")

    def __len__(self) -> int:
        return len(self._members)

    def numbers(self, places: range) -> list[int]:
        """The conversations at these places of the endless sequence of epochs."""
        orders = {epoch: self._order(epoch) for epoch in {place // len(self) for place in places}}
        return [int(orders[place // len(self)][place % len(self)]) for place in places]

    def read(self, numbers: Sequence[int]) -> list[Case]:
        return [read_case(self._data, self._split, number) for number in numbers]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._members)


def sampling_options(config: ConfigDict, data: PreparedData, shape: GPTConfig) -> SamplingOptions:
    """How answers are drawn: from the whole softmax, with the room that the data's conversations have."""
    room = min(data.description["max_tokens"], config.data.seq_len, shape.max_seq_len)
    options = SamplingOptions(room, config.grpo.temperature, top_k=0, max_length=room)
    return text_options(options, data.tokenizer, shape)


def sampling_softmax(config: ConfigDict, data: PreparedData, shape: GPTConfig) -> Softmax:
    """The distribution that answers are drawn from."""
    forbidden = sampling_options(config, data, shape).forbidden_ids
    return Softmax(shape.vocab_size, config.grpo.temperature, forbidden)


class Answerer:
    """Samples answers, and lets the model at the start and the reward model say how good they are.

    `start` are the run's first parameters, with the shardings of `steps`. Raises: UserError, if rewards can't be used.
    """

    def __init__(
        self,
        config: ConfigDict,
        data: PreparedData,
        mesh: Mesh,
        description: ModelDescription,
        steps: Steps,
        start: Params,
    ):
        self._config, self._data, self._mesh = config, data, mesh
        self._shape, self._trained_length = description.config, description.trained_length
        self._weights, self.options = parse_weights(config.rewards), sampling_options(config, data, self._shape)
        self._dtype = train_dtype(config)
        n_rows, function = config.train.batch_size, log_probs_under(sampling_softmax(config, data, self._shape))
        of_params = mesh, steps.shardings["params"]
        log_probs = PackedValues(function, steps.graph, *of_params, n_rows, config.data.seq_len)
        path = config.reward_model
        scores = open_reward_model(path, data, mesh, self._dtype, n_rows) if path else None
        self._judges = Judges(functools.partial(log_probs, start), scores)
        self.seconds = {"sampling": 0.0, "scoring": 0.0}

    def ask(self, params: Params, cases: Sequence[Case], n: int, seed: int, greedy: bool = False) -> list[Sampled]:
        """`n` answers to each question, in the questions' order."""
        begin, cases = time.perf_counter(), [case for case in cases for _ in range(n)]
        options = dataclasses.replace(self.options, seed=seed)
        if greedy:
            options = dataclasses.replace(options, temperature=0.0)
        mesh = self._mesh if self._mesh.size > 1 else None
        decoder = Decoder(self._shape, params, self._dtype, self._trained_length, mesh)
        drawn = decoder.sample([case.prompt for case in cases], options, self._config.train.eval_batch_size)
        sampled = time.perf_counter()
        found = self._score(cases, drawn)
        self.seconds = {"sampling": sampled - begin, "scoring": time.perf_counter() - sampled}
        return found

    def _score(self, cases: Sequence[Case], drawn: Sequence[Drawn]) -> list[Sampled]:
        sequences = [([*case.prompt, *of.ids], len(case.prompt)) for case, of in zip(cases, drawn, strict=True)]
        found, grpo = [], self._config.grpo
        for case, of, judgement in zip(cases, drawn, self._judges(cases, sequences), strict=True):
            stopped = of.ids[-1] in self.options.stop_ids
            text = self._data.tokenizer.decode(of.ids[:-1] if stopped else of.ids)
            answered = judgement.answered(case, text, stopped)
            reward, parts = score(self._weights, answered)
            if not stopped:
                reward = None if grpo.cut_off == "masked" else 0.0
            found.append(Sampled(case, of, judgement.log_probs, answered, reward, parts))
        return found


def micro_batches(config: ConfigDict) -> int:
    """How many have room for all answers, even if none shares a row."""
    return -(-config.grpo.prompts * config.grpo.group_size // config.train.batch_size)


def make_training_batch(
    config: ConfigDict, answers: Sequence[Sampled], worth: Float64[np.ndarray, " answers"], longest: int
) -> Batch:
    """The packed rows of the answers that have a gradient, with what `GRPO` needs; `worth` are the advantages.

    With `grpo.kl` these are all that have a reward. `longest` is the greatest length of an answer.
    """
    seq_len, has_kl, n_rows = config.data.seq_len, config.grpo.kl > 0, micro_batches(config) * config.train.batch_size
    has_reward = [each.reward is not None for each in answers]
    kept = [i for i in range(len(answers)) if (has_reward[i] if has_kl else worth[i] != 0)]
    sequences = [answers[i].sequence() for i in kept]
    plan = pack(sequences, seq_len)
    rows = rows_of(sequences, plan)
    batch = make_batch(rows + [[]] * (n_rows - len(rows)), seq_len)
    names = ("advantages", "log_probs", *(("start",) if has_kl else ()))
    batch |= {name: np.zeros((n_rows, seq_len), np.float32) for name in names}
    for item, row, where in places(sequences, plan):
        answer = answers[kept[item]]
        batch["advantages"][row, where] = worth[kept[item]]
        batch["log_probs"][row, where] = answer.drawn.log_probs
        if has_kl:
            batch["start"][row, where] = answer.start
    normalizer = len(answers) * longest
    if config.grpo.normalizer == "tokens":
        normalizer = sum(len(answer.drawn.ids) for answer, has in zip(answers, has_reward, strict=True) if has)
    batch["weights"] *= batch["weights"].sum() / max(normalizer, 1)
    # Micro-batch i gets the rows i, i + k, …, and the full ones come first.
    order = np.arange(n_rows).reshape(micro_batches(config), -1).T.reshape(-1)
    return {name: of[order] for name, of in batch.items()}


class Rollouts(contextlib.AbstractContextManager):
    """A run's batches, as `TrainingBatches` gives them: here of answers, sampled from the parameters.

    `per_sample` steps train on the same answers. A batch has room for all of them, in `accumulation` micro-batches of
    `train.batch_size` packed rows; answers without an advantage are not trained on, and empty micro-batches come last.
    Random numbers belong to a step and a row, so a run that resumes samples the same answers.

    Raises: UserError, if the data hold no questions, rewards can't be used, or there are several processes.
    """

    is_ahead = False  # of the devices: the next batch waits for the parameters

    def __init__(self, config: ConfigDict, data: PreparedData):
        if jax.process_count() > 1:
            raise UserError("objective grpo runs in one process, which may have several devices")
        require_libraries()
        check_reward_model(parse_weights(config.rewards), config.reward_model)
        self._config, grpo = config, config.grpo
        self._questions = Questions(data, "train", grpo.tasks, config.seed)
        self.packings, self.per_sample = [], grpo.updates  # there is nothing to plan
        self.accumulation = micro_batches(config)
        epochs, per_epoch = config.train.num_epochs, -(-len(self._questions) // grpo.prompts) * grpo.updates
        self.total_steps = config.train.max_steps if epochs is None else epochs * per_epoch
        self.answerer: Answerer | None = None  # before the first batch
        self._sample, self._batch, self._metrics = -1, {}, {}

    def __call__(self, params: Params, step: int) -> Batch:
        """The batch of a step, counted from 0; a sample's first one must be asked for first."""
        begin = time.perf_counter()
        jax.block_until_ready(params)
        self._metrics.get(step, {})["seconds_training"] = time.perf_counter() - begin
        sample, update = divmod(step, self.per_sample)
        if sample != self._sample:
            assert update == 0, "a run resumes at a sample's first step"
            seed = np.random.SeedSequence((self._config.seed, sample)).generate_state(1)[0]
            cases, n = self._questions.read(self.numbers(step)), self._config.grpo.group_size
            answers = self.answerer.ask(params, cases, n, int(seed))
            worth = advantages([each.reward for each in answers], n, self._config.grpo.by_deviation)
            self._batch = make_training_batch(self._config, answers, worth, self.answerer.options.max_length)
            self._metrics = {key: of for key, of in self._metrics.items() if key >= step - 1}
            metrics = {TRAIN + name: value for name, value in figures(answers, worth, n).items()}
            metrics |= {f"seconds_{name}": value for name, value in self.answerer.seconds.items()}
            self._metrics |= {step + 1 + i: dict(metrics) for i in range(self.per_sample)}
            self._sample = sample
        return self._batch

    def numbers(self, step: int) -> list[int]:
        """The questions that a step's answers are to."""
        first = step // self.per_sample * self._config.grpo.prompts
        return self._questions.numbers(range(first, first + self._config.grpo.prompts))

    def conversations(self, step: int) -> list[int]:
        """Those of a step that is counted from 1, for messages."""
        return self.numbers(step - 1)

    def metrics(self, step: int) -> MetricLine:
        """Of a step counted from 1: the figures of its answers, and where the time went."""
        return self._metrics[step]

    def close(self) -> None:
        """Nothing is built in the background."""

    def __exit__(self, *_: object) -> None:
        self.close()


def figures(answers: Sequence[Sampled], worth: np.ndarray, group_size: int) -> dict[str, float]:
    """What is watched of a step's answers, besides the objective's figures.

    reward and its parts: means of the answers that they apply to. no_spread: the share of groups whose answers are all
    worth the same. length: in tokens. cut_off: the share of answers that lacked room. fluency: mean log-likelihood of a
    token under the model at the start, in nats; kl: the divergence from it, an estimate in nats a token.
    """
    rewards = [each.reward for each in answers if each.reward is not None]
    parts = {name: [each.parts[name] for each in answers if name in each.parts] for name in REWARDS}
    differences = [np.subtract(each.drawn.log_probs, each.start) for each in answers if each.drawn.log_probs]
    return {
        "reward": fmean(rewards) if rewards else 0.0,
        **{f"reward/{name}": fmean(values) for name, values in parts.items() if values},
        "no_spread": float(np.mean(~(worth.reshape(-1, group_size) != 0).any(axis=1))),
        "length": fmean(len(each.drawn.ids) for each in answers),
        "cut_off": fmean(not each.answered.stopped for each in answers),
        "repetition": fmean(repetition(each.answered.text) for each in answers),
        "fluency": fmean(each.answered.fluency for each in answers),
        **({"kl": float(np.mean(np.concatenate(differences)))} if differences else {}),  # greedy answers have none
    }


class HeldOut:
    """Evaluates greedy answers to the first of the validation split's questions, in place of `Evaluator`'s rows."""

    n_tasks, n_segments, noun = 1, 1, "questions"

    def __init__(self, config: ConfigDict, data: PreparedData):
        self._batch_size, self._questions, self.n_rows = config.train.eval_batch_size, None, 0
        self.answerer: Answerer | None = None
        if len(data.split("valid")):
            self._questions = Questions(data, "valid", config.grpo.tasks, config.seed)
            self.n_rows = len(self._questions)

    def losses(
        self, eval_step: Callable, params: Params, n_rows: int, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """The mean reward and its parts as metrics, and minus the reward as the loss; empty if `should_stop`."""
        answers = []
        for first in range(0, min(n_rows, self.n_rows), self._batch_size):
            if should_stop():
                return {}
            numbers = self._questions.numbers(range(first, min(first + self._batch_size, n_rows, self.n_rows)))
            answers += self.answerer.ask(params, self._questions.read(numbers), 1, seed=0, greedy=True)
        if not answers:
            return {}
        found = figures(answers, np.zeros(len(answers)), 1)
        del found["no_spread"]
        return {VAL_LOSS: -found["reward"], **{VAL + name: value for name, value in found.items()}}
