"""What a run minimises: objectives, pure functions of a model and a batch to sums.

A loss is a sum over the global batch divided by a normalizer, which is a sum of its own: so devices and micro-batches
add up.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32
from ml_collections import ConfigDict

from tinysft_jax.linear import product
from tinysft_jax.model import GPT
from tinysft_jax.training.loss import Softmax, supervised_nll, token_nll

Batch = dict[str, jax.Array]
# "loss", what is minimised, and further figures, each a sum that the sum "normalizer" divides; scalars, or by task.
Sums = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """What `make_train_step` and `make_eval_step` need, for rows of at most `n_segments` segments."""

    n_segments: int

    fills_all = True  # the batch; or some micro-batches are empty, and need no computing

    @abc.abstractmethod
    def values(self, model: GPT, batch: Batch) -> Sums:
        """The sums of each of a row's items, segments or pairs of them, `[B, items]`; 0 where there is none."""

    def sums(self, model: GPT, batch: Batch) -> Sums:
        """Those over the global batch, differentiable scalars."""
        return {name: jnp.sum(of) for name, of in self.values(model, batch).items()}

    def sums_by_task(self, model: GPT, batch: Batch, n_tasks: int) -> Sums:
        """Those of each task, `[n_tasks]`; `batch["tasks"]`, int32[B, n_segments], are the segments'."""
        values = self.values(model, batch)
        tasks = batch["tasks"][:, :: self.n_segments // values["loss"].shape[1]]
        is_member = tasks[..., None] == jnp.arange(n_tasks, dtype=jnp.int32)[None, None]
        return {name: jnp.sum(jnp.where(is_member, of[..., None], 0), axis=(0, 1)) for name, of in values.items()}


class SupervisedTokens(Objective):
    """Negative log-likelihood of the supervised tokens: Σ weight · −log p / Σ weight."""

    def values(self, model: GPT, batch: Batch) -> Sums:
        nll = -answer_log_likelihoods(model, batch, self.n_segments)
        return {"loss": nll, "normalizer": segment_sums(batch["weights"], batch, self.n_segments)}

    def sums(self, model: GPT, batch: Batch) -> Sums:
        nll = supervised_nll(*_head_inputs(model, batch), model.config.vocab_size)
        return {"loss": nll, "normalizer": jnp.sum(batch["weights"])}


SFT = SupervisedTokens(n_segments=1)  # for training, which adds up over all segments


class PairObjective(Objective):
    """The part that objectives of pairs share. In a row, segments 2i + 1 and 2i + 2 are a pair: chosen and rejected.

    The normalizer is the number of pairs.
    """

    @abc.abstractmethod
    def of_pairs(self, model: GPT, batch: Batch) -> Sums:
        """Each pair's "loss" and further figures, `[B, n_segments / 2]`; anything where there is no pair."""

    def values(self, model: GPT, batch: Batch) -> Sums:
        is_pair = segment_sums(is_last(batch), batch, self.n_segments)[:, 1::2]
        found = self.of_pairs(model, batch).items()
        return {name: jnp.where(is_pair > 0, of, 0) for name, of in found} | {"normalizer": is_pair}


@dataclasses.dataclass(frozen=True)
class DPO(PairObjective):
    """Direct preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7).

    Let r be the log of an answer's likelihood over that under the reference, the model at the start of the run. A
    pair's loss is −log σ(β (r_chosen − r_rejected)), plus `sft_weight` times the chosen answer's mean negative
    log-likelihood of a token (Pang et al. 2024, https://arxiv.org/abs/2404.19733). With `length_normalized`, r is the
    mean over the answer's tokens, not the sum (https://arxiv.org/abs/2405.14734 does so without a reference).

    `batch["reference"]`, float32[B, n_segments]: the reference's log-likelihood of each segment's answer.

    Figures: margin, β (r_chosen − r_rejected); accuracy, the share of pairs with a positive one; chosen and rejected:
    r, in nats an answer (with `length_normalized`, a token).
    """

    beta: int | float = 0.1
    length_normalized: bool = False
    sft_weight: int | float = 0.0

    def of_pairs(self, model: GPT, batch: Batch) -> Sums:
        log_p = answer_log_likelihoods(model, batch, self.n_segments)
        lengths = jnp.maximum(segment_sums(batch["weights"], batch, self.n_segments), 1)
        ratio = (log_p - batch["reference"]) / (lengths if self.length_normalized else 1)
        chosen, rejected = ratio[:, ::2], ratio[:, 1::2]
        margin = self.beta * (chosen - rejected)
        sft = -(log_p / lengths)[:, ::2]
        values = {"loss": jax.nn.softplus(-margin) + self.sft_weight * sft, "margin": margin, "accuracy": margin > 0}
        return values | {"chosen": chosen, "rejected": rejected}


class RewardModel(PairObjective):
    """Bradley and Terry's model of preferences: −log σ(score of the chosen one − score of the rejected one).

    As in Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1. The score is a scalar head's, at the last token.

    Figures: margin, the difference of the scores; accuracy, the share of pairs with a positive one; chosen and
    rejected: the scores.
    """

    def of_pairs(self, model: GPT, batch: Batch) -> Sums:
        scores = conversation_scores(model, batch, self.n_segments)
        chosen, rejected = scores[:, ::2], scores[:, 1::2]
        margin = chosen - rejected
        values = {"loss": jax.nn.softplus(-margin), "margin": margin, "accuracy": margin > 0}
        return values | {"chosen": chosen, "rejected": rejected}


@dataclasses.dataclass(frozen=True)
class GRPO(Objective):
    """Group relative policy optimization (Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 3).

    PPO's clipped objective for each token, with an answer's advantage over its group in place of a value network:
    −min(ratio · A, clip(ratio, 1 − `clip`, 1 + `clip`) · A), plus `kl` times (start / p − log(start / p) − 1), an
    estimate of the divergence from the model at the start (eq. 4). ratio = p / (probability with which the sampler drew
    the token), p under `softmax`.

    `batch["weights"]` are the tokens' weights in the loss, times the number of trained tokens, which is the normalizer:
    so the other figures are means over these tokens. Of each trained token, float32[B, T]: `batch["advantages"]`,
    `batch["log_probs"]`, the sampler's, and if `kl`, `batch["start"]`, that model's log-probabilities.

    Figures: clip, the share of tokens without a gradient because of the clipping; gap, the mean absolute difference of
    log p and the sampler's; kl.
    """

    softmax: Softmax
    clip: int | float = 0.2
    kl: int | float = 0.0

    fills_all = False

    def values(self, model: GPT, batch: Batch) -> Sums:
        is_trained = batch["weights"] != 0
        log_p = token_log_probs(model, batch | {"weights": is_trained}, self.softmax)
        difference, advantages = jnp.where(is_trained, log_p - batch["log_probs"], 0), batch["advantages"]
        ratio = jnp.exp(difference)
        gained, clipped = advantages * ratio, advantages * jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        loss, figures = -jnp.minimum(gained, clipped), {"clip": clipped < gained, "gap": jnp.abs(difference)}
        if self.kl:
            rest = jnp.where(is_trained, batch["start"] - log_p, 0)
            figures["kl"] = jnp.exp(rest) - rest - 1
            loss += self.kl * figures["kl"]
        values = {"loss": loss * batch["weights"], "normalizer": is_trained}
        values |= {name: jnp.where(is_trained, of, 0) for name, of in figures.items()}
        return {name: jnp.sum(of, axis=1, keepdims=True, dtype=jnp.float32) for name, of in values.items()}


def token_log_probs(model: GPT, batch: Batch, softmax: Softmax) -> Float[Array, "B T"]:
    """log p of each position's target where it has a weight, which counts 1; else 0."""
    hidden, table, targets, weights = _head_inputs(model, batch)
    return -token_nll(hidden, table, targets, (weights != 0).astype(jnp.float32), softmax)


def answer_log_likelihoods(model: GPT, batch: Batch, n_segments: int) -> Float[Array, "B segments"]:
    """Σ weight · log p of each segment's supervised tokens, in nats."""
    nll = token_nll(*_head_inputs(model, batch), Softmax(model.config.vocab_size))
    return -segment_sums(nll, batch, n_segments)


def conversation_scores(model: GPT, batch: Batch, n_segments: int) -> Float[Array, "B segments"]:
    """A reward model's score of each segment, read at its last token; 0 where there is none."""
    scores = model.scores(batch["tokens"], batch["segment_ids"], batch["positions"])
    return segment_sums(jnp.where(is_last(batch), scores, 0), batch, n_segments)


def segment_sums(values: jax.Array, batch: Batch, n_segments: int) -> Float[Array, "B segments"]:
    """The sums of `[B, T]` values over each segment's positions."""
    # Not a scatter: on a GPU it would add in an order that varies between runs.
    is_member = batch["segment_ids"][..., None] == jnp.arange(1, n_segments + 1, dtype=jnp.int32)[None, None]
    return product("bt,bts->bs", values.astype(jnp.float32), is_member.astype(jnp.float32), jnp.float32)


def is_last(batch: Batch) -> Bool[Array, "B T"]:
    """Whether a position is its segment's last."""
    segments: Int32[Array, "B T"] = batch["segment_ids"]
    return (segments > 0) & (segments != jnp.pad(segments[:, 1:], ((0, 0), (0, 1))))


def _head_inputs(model: GPT, batch: Batch) -> tuple[jax.Array, ...]:
    hidden = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
    return hidden, model.head_table(), batch["targets"], batch["weights"]


def objective_of(config: ConfigDict, n_segments: int, softmax: Softmax | None = None) -> Objective:
    """The objective of a configuration, for rows of at most `n_segments` conversations.

    `softmax`: of GRPO, the distribution that answers are drawn from.
    """
    if config.objective == "grpo":
        return GRPO(n_segments, softmax, config.grpo.clip, config.grpo.kl)
    if config.objective == "dpo":
        return DPO(n_segments, **config.dpo)
    return (RewardModel if config.objective == "reward" else SupervisedTokens)(n_segments)
