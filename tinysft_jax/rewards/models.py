"""Models that judge answers: how likely they are under one that is not trained, and what a reward model prefers."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tinysft_jax.checkpoints import open_model
from tinysft_jax.data.store import PreparedData
from tinysft_jax.evaluation.cases import Case
from tinysft_jax.evaluation.likelihood import check_context
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.parameters import Params
from tinysft_jax.rewards.packed import Function, Given, PackedValues
from tinysft_jax.sharding import state_sharding
from tinysft_jax.training.loss import Softmax
from tinysft_jax.training.objectives import Batch, token_log_probs
from tinysft_jax.training.state import check_tokenizer


def log_probs_under(softmax: Softmax) -> Function:
    """The log-probability of each token, for `PackedValues`."""
    return lambda model, batch: token_log_probs(model, batch, softmax)


def placed(
    function: Function, shape: GPTConfig, params: Params, mesh: Mesh, dtype, n_rows: int, seq_len: int
) -> tuple[PackedValues, Params]:
    """The function of a model of its own, and the parameters on the mesh."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(shape, rngs=nnx.Rngs(0), dtype=dtype)))
    shardings = state_sharding(mesh, params, shape.n_kv_heads)
    return PackedValues(function, graph, mesh, shardings, n_rows, seq_len), jax.device_put(params, shardings)


class Judges:
    """What models say of answers, as far as the rewards of a run need it: lists of None for what they don't."""

    def __init__(
        self, log_probs: Callable[[Sequence[Given]], list[np.ndarray]] | None, preference: "Preference | None"
    ):
        self._log_probs, self._preference = log_probs, preference

    def __call__(
        self, cases: Sequence[Case], sequences: Sequence[Given]
    ) -> tuple[list[np.ndarray | None], list[float | None]]:
        """Of each answer its tokens' log-probabilities, and its lead; a sequence is a question and its answer."""
        nothing = [None] * len(cases)
        log_probs = self._log_probs(sequences) if self._log_probs else nothing
        return log_probs, self._preference.leads(cases, sequences) if self._preference else nothing


class Preference:
    """A reward model, asked which answers it prefers to the data's own.

    Raises: UserError, if it can't be read, is a language model, or does not fit the data.
    """

    def __init__(self, path: str, data: PreparedData, mesh: Mesh, dtype, n_rows: int):
        description, params = open_model(path, reward=True)
        check_tokenizer(description, data.tokenizer, path)
        seq_len = data.description["max_tokens"]
        check_context(description, path, seq_len)
        self._values, self._params = placed(_next_scores, description.config, params, mesh, dtype, n_rows, seq_len)

    def leads(self, cases: Sequence[Case], sequences: Sequence[Given]) -> list[float]:
        """The answers' scores, minus those of the data's own answers; a sequence is a question and its answer."""
        own = list(dict.fromkeys(((*case.prompt, *case.target), len(case.prompt)) for case in cases))
        scores = [float(of[-1]) for of in self._values(self._params, [*own, *sequences])]
        of_own = dict(zip(own, scores[: len(own)], strict=True))
        others = [of_own[(*case.prompt, *case.target), len(case.prompt)] for case in cases]
        return [score - other for score, other in zip(scores[len(own) :], others, strict=True)]


def _next_scores(model: GPT, batch: Batch) -> jax.Array:
    """One to the left: the last position that predicts has the score of the last token."""
    return jnp.roll(model.scores(batch["tokens"], batch["segment_ids"], batch["positions"]), -1, axis=1)
