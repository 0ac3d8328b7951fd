"""The train step and the evaluation step: pure functions over plain pytrees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tinysft_jax.model import GPT
from tinysft_jax.sharding import constrain
from tinysft_jax.training.loss import supervised_nll, supervised_sums
from tinysft_jax.training.optimizer import Schedule, moving_average

# params: nested dicts of float32; opt_state: optax's; step: int32[], steps that changed it; average: of params, if one
# is kept
TrainState = dict[str, Any]
Metrics = dict[str, jax.Array]


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    accumulation: int = 1,
    ema_decay: int | float = 0.0,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """`train_step(state, batch) -> (state, metrics)`, to be jitted.

    The loss is Σ weight · nll / Σ weight over the whole batch, however it is divided: micro-batches add up sums, and
    the one division comes last.

    A step whose loss or gradient is no finite number changes nothing, Adam's and the schedule's counts included.

    Args:
      graph: the GPT's structure (`nnx.split`).
      optimizer: as `make_optimizer` makes it.
      schedule: its learning rate, for the metrics.
      accumulation: micro-batches a step; the batch's rows must be a multiple of it.
      ema_decay: of the parameters' moving average, if the state has one.
    """

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        params = state["params"]
        nll, grads = _sum_over_micro_batches(
            jax.value_and_grad(_sum_nll, argnums=1), graph, params, batch, accumulation
        )
        supervised = jnp.sum(batch["weights"])
        scale = 1 / jnp.where(supervised > 0, supervised, 1)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        loss, grad_norm = nll * scale, optax.tree.norm(grads)
        # One value that is no number makes the norm none; so does a sum of squares beyond float32.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped": ~finite,
            "lr": schedule(state["step"]),
            "supervised_tokens": supervised,
            "tokens": jnp.sum(batch["segment_ids"] > 0),
        }
        step, params = state["step"] + 1, optax.apply_updates(params, updates)
        new_state = {"params": params, "opt_state": opt_state, "step": step}
        if "average" in state:
            new_state["average"] = moving_average(state["average"], params, ema_decay, step)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state), metrics

    return train_step


def make_eval_step(graph: nnx.GraphDef, n_tasks: int) -> Callable[[Any, dict[str, jax.Array]], jax.Array]:
    """`eval_step(params, batch) -> [2, n_tasks]`, each task's Σ weight · nll and Σ weight; to be jitted.

    Args:
      graph: the GPT's structure (`nnx.split`).
      n_tasks: the batch's `tasks` are below it.
    """

    def eval_step(params, batch):
        model = nnx.merge(graph, params)
        return supervised_sums(*_head_inputs(model, batch), batch["tasks"], n_tasks, model.config.vocab_size)

    return eval_step


def _sum_nll(graph: nnx.GraphDef, params, batch: dict[str, jax.Array]) -> jax.Array:
    model = nnx.merge(graph, params)
    return supervised_nll(*_head_inputs(model, batch), model.config.vocab_size)


def _head_inputs(model: GPT, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    hidden = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
    return hidden, model.tok_emb.embedding[...], batch["targets"], batch["weights"]


def _sum_over_micro_batches(value_and_grad, graph, params, batch, accumulation: int):
    if accumulation == 1:
        return value_and_grad(graph, params, batch)

    def split(x):
        # Every k-th row, not k-th part: so each device's rows are spread over all micro-batches, and none moves.
        parts = x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts, None, "batch", None)

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, value_and_grad(graph, params, micro_batch)), None

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    sums, _ = jax.lax.scan(add, zeros, jax.tree.map(split, batch))
    return sums
