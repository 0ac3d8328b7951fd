"""The train step and the evaluation step: optimizer, loss, and pure functions over plain pytrees."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from tinysft_jax import accelerator
from tinysft_jax.linear import product
from tinysft_jax.model import GPT, head_logits
from tinysft_jax.sharding import batch_axes, constrain

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


# Supervised positions whose logits exist at a time: on a CPU; and elsewhere a quarter of a shard's, up to 4,096.
# Larger ones make the head's products faster, and the last one emptier.
CHUNK, LARGEST_CHUNK = 512, 4096
SCOPE = "supervised_chunks"  # name of the loop over chunks in profiles and compiled programs


def supervised_nll(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    weights: Float[Array, "B T"],
    vocab_size: int,
) -> Float[Array, ""]:
    """Σ weight · −log p(target), with p the softmax of the tied head's float32 logits.

    Each shard of the batch runs head and cross-entropy over chunks of its supervised positions (weight ≠ 0), so the
    cost follows their number. The gradients are computed beside the loss, so the backward pass needs no logits.
    `embedding` is padded from row `vocab_size` on.
    """
    return _sum_over_shards(functools.partial(_nll, vocab_size), hidden, embedding, targets, weights)


def supervised_sums(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    weights: Float[Array, "B T"],
    groups: Int32[Array, "B T"],
    n_groups: int,
    vocab_size: int,
) -> Float[Array, "2 G"]:
    """Σ weight · −log p(target) and Σ weight of each group of positions; not differentiable."""

    def sums(hidden, embedding, targets, weights, groups):
        table = embedding.astype(hidden.dtype)

        def add(sums, chunk):
            h, targets, weights, groups = chunk
            values = jnp.stack([_chunk_nll(vocab_size, table, h, targets, weights)[0], weights])
            # Not a scatter: on a GPU it would add in an order that varies between runs.
            is_member = groups[:, None] == jnp.arange(n_groups)[None, :]
            return sums + jnp.sum(jnp.where(is_member[None], values[:, :, None], 0), axis=1)

        return _over_chunks(add, jnp.zeros((2, n_groups), jnp.float32), hidden, targets, weights, groups)

    return _sum_over_shards(sums, hidden, embedding, targets, weights, groups)


def _sum_over_shards(function: Callable[..., jax.Array], hidden, embedding, *positions) -> jax.Array:
    """The sum over shards of the batch of `function(hidden, embedding, *positions)`."""
    if not (axes := batch_axes()):
        return function(hidden, embedding, *positions)

    def shard(hidden, embedding, *positions):
        # Marked as varying, so that the gradient by the embedding is summed over the shards.
        return jax.lax.psum(function(hidden, _varying(embedding), *positions), axes)

    batch, whole = PartitionSpec(axes), PartitionSpec()
    in_specs = (batch, whole, *(batch for _ in positions))
    return jax.shard_map(shard, in_specs=in_specs, out_specs=whole, axis_names=set(axes))(hidden, embedding, *positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(vocab_size: int, hidden, embedding, targets, weights):
    return _nll_forward(vocab_size, hidden, embedding, targets, weights)[0]


def _nll_forward(vocab_size: int, hidden, embedding, targets, weights):
    """The loss, and as residuals its gradients by `hidden` and `embedding`."""
    n, order, size = weights.size, _supervised_first(weights), _chunk_size(weights.size)
    table = embedding.astype(hidden.dtype)  # once, not for each chunk

    def add(carry, chunk):
        loss, d_embedding, d_hidden, start = carry
        h, _, _ = chunk
        nll, d_logits = _chunk_nll(vocab_size, table, *chunk)
        d_logits = d_logits.astype(h.dtype)
        d_embedding += product("cv,cd->vd", d_logits, h, jnp.float32)
        d_h = product("cv,vd->cd", d_logits, table)
        return loss + jnp.sum(nll), d_embedding, jax.lax.dynamic_update_slice(d_hidden, d_h, (start, 0)), start + size

    d_hidden = jnp.zeros((-(-n // size) * size, hidden.shape[-1]), hidden.dtype)  # in the order of `order`
    carry = jnp.float32(0), jnp.zeros(embedding.shape, jnp.float32), d_hidden, jnp.int32(0)
    loss, d_embedding, d_hidden, _ = _over_chunks(add, carry, hidden, targets, weights)
    inverse = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32), unique_indices=True)
    return loss, (d_hidden[inverse].reshape(hidden.shape), d_embedding.astype(embedding.dtype), weights)


def _nll_backward(vocab_size: int, residuals, g):
    d_hidden, d_embedding, weights = residuals
    return (g * d_hidden).astype(d_hidden.dtype), g * d_embedding, None, jnp.zeros_like(weights)


_nll.defvjp(_nll_forward, _nll_backward)


def _varying(tree):
    """Declares that values vary over the shards of the batch, as a loop's carry must if its result will."""
    axes = batch_axes()
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree) if axes else tree


def _supervised_first(weights: Float[Array, "B T"]) -> Int32[Array, " n"]:
    """Flat positions, those with a weight first."""
    return jnp.argsort(weights.reshape(-1) == 0, stable=True).astype(jnp.int32)


def _chunk_size(n: int) -> int:
    """Positions of a chunk, for `n` positions in a shard."""
    return min(max(CHUNK, n // 4), LARGEST_CHUNK) if accelerator.is_present() else CHUNK


def _over_chunks(add, carry, hidden, targets, weights, *more):
    """Folds `add` over chunks of supervised positions; the last one is padded with weight 0."""
    n, size = weights.size, _chunk_size(weights.size)
    order = jnp.pad(_supervised_first(weights), (0, -n % size))
    hidden, arrays = hidden.reshape(n, -1), [each.reshape(n) for each in (weights, targets, *more)]
    count = jnp.sum(weights != 0, dtype=jnp.int32)

    def body(i, carry):
        index = jax.lax.dynamic_slice(order, (i * size,), (size,))
        is_supervised = i * size + jnp.arange(size) < count
        weights, targets, *more = (each[index] for each in arrays)
        return add(carry, (hidden[index], targets, weights * is_supervised, *more))

    with jax.named_scope(SCOPE):
        return jax.lax.fori_loop(0, (count + size - 1) // size, body, _varying(carry))


def _chunk_nll(vocab_size: int, table, h, targets, weights) -> tuple[Float[Array, " c"], Float[Array, "c V"]]:
    """Each position's weight · −log p(target), and its gradient by the logits: weight · (softmax − one-hot)."""
    logits = head_logits(h, table, vocab_size)
    log_p = jax.nn.log_softmax(logits)
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    nll = -(weights * jnp.sum(jnp.where(is_target, log_p, 0), axis=-1))
    return nll, weights[:, None] * (jnp.exp(log_p) - is_target)


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    accumulation: int = 1,
    ema_decay: int | float = 0.0,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """`train_step(state, batch) -> (state, metrics)`, to be jitted, for a GPT's `nnx.graphdef`.

    The loss is Σ weight · nll / Σ weight over the global batch: sums are added up over `accumulation` micro-batches and
    all devices, and the one division comes last. A step whose loss or gradient is not finite changes nothing.
    """

    def sum_nll(params, batch):
        model = nnx.merge(graph, params)
        return supervised_nll(*_head_inputs(model, batch), model.config.vocab_size)

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        params = state["params"]
        nll, grads = _sum_over_micro_batches(jax.value_and_grad(sum_nll), params, batch, accumulation)
        supervised = jnp.sum(batch["weights"])
        scale = 1 / jnp.where(supervised > 0, supervised, 1)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        loss, grad_norm = nll * scale, optax.tree.norm(grads)
        # The norm is not finite if any gradient is not, or if the sum of squares exceeds float32.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,  # before clipping
            "skipped": ~finite,
            "lr": schedule(state["step"]),
            "supervised_tokens": supervised,
            "tokens": jnp.sum(batch["segment_ids"] > 0),
        }
        step, params = state["step"] + 1, optax.apply_updates(params, updates)
        new_state = {"params": params, "opt_state": opt_state, "step": step}
        if "average" in state:
            # As in TensorFlow's `ExponentialMovingAverage`: a short memory at first forgets the start.
            decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
            new_state["average"] = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state["average"], params)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state), metrics

    return train_step


def make_eval_step(graph: nnx.GraphDef, n_tasks: int) -> Callable[[Any, dict[str, jax.Array]], jax.Array]:
    """`eval_step(params, batch) -> [2, n_tasks]`, each task's Σ weight · nll and Σ weight; to be jitted."""

    def eval_step(params, batch):
        model = nnx.merge(graph, params)
        return supervised_sums(*_head_inputs(model, batch), batch["tasks"], n_tasks, model.config.vocab_size)

    return eval_step


def _head_inputs(model: GPT, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    hidden = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
    return hidden, model.head_table(), batch["targets"], batch["weights"]


def _sum_over_micro_batches(value_and_grad: Callable, params, batch, accumulation: int):
    if accumulation == 1:
        return value_and_grad(params, batch)

    def split(x):
        # Micro-batch i has rows i, i + k, i + 2k, …: each device's rows are spread over all, and none moves.
        parts = x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts, None, "batch", None)

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, value_and_grad(params, micro_batch)), None

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, jax.tree.map(split, batch))[0]
