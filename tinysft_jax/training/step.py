"""The train step and the evaluation step: optimizer, and pure functions over plain pytrees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tinysft_jax.sharding import constrain
from tinysft_jax.training.objectives import SFT, Objective, Sums, answer_log_likelihoods

Schedule = Callable[[jnp.ndarray], jnp.ndarray]

# params: nested dicts of float32; opt_state: optax's; step: int32[], steps that changed the parameters; average: their
# moving average, if there is one
TrainState = dict[str, Any]
Metrics = dict[str, jax.Array]


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int) -> Schedule:
    """Linear warm-up to `peak`, then half a cosine down to 0 at `total_steps`; step 0 has peak / warmup_steps."""

    def schedule(step):
        warming = (step + 1) / max(warmup_steps, 1)
        progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0, 1)
        return peak * jnp.where(step < warmup_steps, warming, 0.5 * (1 + jnp.cos(jnp.pi * progress)))

    return schedule


def make_optimizer(
    learning_rate: float | Schedule,
    weight_decay: float,
    beta1: float,
    beta2: float,
    grad_clip: float,
    decayed: str = "all",
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) after clipping by global norm (0: none).

    Weight decay applies to "all" parameters, or to "matrices" only: kernels and the embedding, not the norms.
    """

    def is_matrix(params):
        # By name, because a norm's scale, stacked over layers, has two axes as well.
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)

    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    mask = is_matrix if decayed == "matrices" else None
    adamw = optax.adamw(learning_rate, b1=beta1, b2=beta2, eps=1e-8, weight_decay=weight_decay, mask=mask)
    return optax.chain(clip, adamw)


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    accumulation: int = 1,
    ema_decay: int | float = 0.0,
    objective: Objective = SFT,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """`train_step(state, batch) -> (state, metrics)`, to be jitted, for a GPT's `nnx.graphdef`.

    The loss is the objective's over the global batch: its sums are added up over `accumulation` micro-batches and all
    devices, and the one division comes last. A step whose loss or gradient is not finite changes nothing.
    """

    def loss_and_sums(params, batch) -> tuple[jax.Array, Sums]:
        sums = objective.sums(nnx.merge(graph, params), batch)
        return sums["loss"], sums

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        params = state["params"]
        (_, sums), grads = _sum_over_micro_batches(
            jax.value_and_grad(loss_and_sums, has_aux=True), params, batch, accumulation, objective.fills_all
        )
        normalizer = sums.pop("normalizer")
        scale = 1 / jnp.where(normalizer > 0, normalizer, 1)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        means, grad_norm = {name: total * scale for name, total in sums.items()}, optax.tree.norm(grads)
        # The norm is not finite if any gradient is not, or if the sum of squares exceeds float32.
        finite = jnp.isfinite(means["loss"]) & jnp.isfinite(grad_norm)
        metrics = means | {
            "grad_norm": grad_norm,  # before clipping
            "skipped": ~finite,
            "lr": schedule(state["step"]),
            "supervised_tokens": jnp.sum(batch["weights"] != 0),
            "tokens": jnp.sum(batch["segment_ids"] > 0),
            "positions": _n_computed(batch["segment_ids"], accumulation, objective.fills_all),
        }
        step, params = state["step"] + 1, optax.apply_updates(params, updates)
        new_state = {"params": params, "opt_state": opt_state, "step": step}
        if "average" in state:
            # As in TensorFlow's `ExponentialMovingAverage`: a short memory at first forgets the start.
            decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
            new_state["average"] = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state["average"], params)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state), metrics

    return train_step


def make_eval_step(
    graph: nnx.GraphDef, n_tasks: int, objective: Objective
) -> Callable[[Any, dict[str, jax.Array]], Sums]:
    """`eval_step(params, batch)`: the objective's sums for each task, `[n_tasks]`; to be jitted."""

    def eval_step(params, batch):
        return objective.sums_by_task(nnx.merge(graph, params), batch, n_tasks)

    return eval_step


def make_likelihood_step(graph: nnx.GraphDef, n_segments: int) -> Callable[[Any, dict[str, jax.Array]], jax.Array]:
    """`likelihood_step(params, batch) -> float32[B, n_segments]`, each answer's log-likelihood; to be jitted."""

    def likelihood_step(params, batch):
        return answer_log_likelihoods(nnx.merge(graph, params), batch, n_segments)

    return likelihood_step


def _n_computed(segment_ids: jax.Array, accumulation: int, fills_all: bool) -> jax.Array:
    """The positions of all micro-batches; unless the objective `fills_all`, of those that are not empty."""
    is_filled = (segment_ids > 0).reshape(-1, accumulation, segment_ids.shape[1]).any(axis=(0, 2))
    return jnp.sum(is_filled | fills_all) * (segment_ids.size // accumulation)


def _sum_over_micro_batches(value_and_grad: Callable, params, batch, accumulation: int, fills_all: bool):
    if accumulation == 1:
        return value_and_grad(params, batch)

    def split(x):
        # Micro-batch i has rows i, i + k, i + 2k, …: each device's rows are spread over all, and none moves.
        parts = x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts, None, "batch", None)

    def add(sums, micro_batch):
        def larger():
            return jax.tree.map(jnp.add, sums, value_and_grad(params, micro_batch))

        return larger() if fills_all else jax.lax.cond(micro_batch["weights"].any(), larger, lambda: sums), None

    micro_batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    totals, _ = jax.eval_shape(value_and_grad, params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros((), x.dtype), totals), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, zeros, micro_batches)[0]
