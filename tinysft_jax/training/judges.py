"""Models that judge answers: how likely they are under one that is not trained, and what a reward model prefers."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32

from tinysft_jax.checkpoints import open_model
from tinysft_jax.data.store import PreparedData
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.parameters import Params
from tinysft_jax.rewards.cases import Case
from tinysft_jax.rewards.registry import Answered
from tinysft_jax.sharding import state_sharding
from tinysft_jax.training.loss import Softmax
from tinysft_jax.training.objectives import Batch, token_log_probs
from tinysft_jax.training.packed import Function, Given, PackedValues
from tinysft_jax.training.state import check_context, check_tokenizer

Values = Callable[[Sequence[Given]], list[np.ndarray]]  # of each sequence, at the positions that predict


def log_probs_under(softmax: Softmax) -> Function:
    """The log-probability of each token, for `PackedValues`."""
    return lambda model, batch: token_log_probs(model, batch, softmax)


def values_of(
    function: Function, shape: GPTConfig, params: Params, mesh: Mesh, dtype, n_rows: int, seq_len: int, name: str = ""
) -> Values:
    """A function of sequences: that of the model with these parameters, for which it needs nothing else."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(shape, rngs=nnx.Rngs(0), dtype=dtype)))
    shardings = state_sharding(mesh, params, shape.n_kv_heads)
    values = PackedValues(function, graph, mesh, shardings, n_rows, seq_len, name)
    return functools.partial(values, jax.device_put(params, shardings))


def open_reward_model(path: str, data: PreparedData, mesh: Mesh, dtype, n_rows: int) -> Values:
    """A function of whole conversations, whose last value is a reward model's score.

    Raises: UserError, if it can't be read, is a language model, or does not fit the data.
    """
    description, params = open_model(path, reward=True)
    check_tokenizer(description, data.tokenizer, path)
    seq_len = data.description["max_tokens"]
    check_context(description, path, seq_len)
    return values_of(next_scores, description.config, params, mesh, dtype, n_rows, seq_len)


def next_scores(model: GPT, batch: Batch) -> jax.Array:
    """A reward model's scores, one to the left: the last position that predicts has the score of the last token."""
    return jnp.roll(model.scores(batch["tokens"], batch["segment_ids"], batch["positions"]), -1, axis=1)


class Judgement(NamedTuple):
    """What models say of an answer; None for a model that was not asked."""

    log_probs: Float32[np.ndarray, " tokens"] | None  # of its tokens, under the model at the start
    usual: float | None  # the mean log-probability of a token of the data's own answer
    lead: float | None  # the reward model's score, minus that of the data's own answer

    def answered(self, case: Case, text: str, stopped: bool) -> Answered:
        fluency = None if self.log_probs is None else float(self.log_probs.mean())
        return Answered(case, text, stopped, fluency, self.usual, self.lead)


class Judges(NamedTuple):
    """The models that rewards need."""

    log_probs: Values | None
    scores: Values | None

    def __call__(self, cases: Sequence[Case], sequences: Sequence[Given]) -> list[Judgement]:
        """Of each answer; a sequence is a question and its answer."""
        own = [((*case.prompt, *case.target), len(case.prompt)) for case in cases]
        different = list(dict.fromkeys(own))

        def ask(values: Values | None) -> tuple[list[np.ndarray | None], list[np.ndarray | None]]:
            """Of the answers, and of the data's own."""
            if values is None:
                return [None] * len(cases), [None] * len(cases)
            found = values([*different, *sequences])
            of_own = dict(zip(different, found, strict=False))
            return found[len(different) :], [of_own[sequence] for sequence in own]

        return [
            Judgement(
                log_p,
                None if own_log_p is None else float(own_log_p.mean()),
                None if scores is None else float(scores[-1] - own_scores[-1]),
            )
            for log_p, own_log_p, scores, own_scores in zip(*ask(self.log_probs), *ask(self.scores), strict=True)
        ]
