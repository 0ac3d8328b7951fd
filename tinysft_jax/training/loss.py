"""Cross-entropy at the supervised positions, without ever computing the other positions' logits."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from tinysft_jax.model import head_logits
from tinysft_jax.sharding import batch_axes

# Supervised positions whose logits exist at a time.
CHUNK = 512

SCOPE = "supervised_chunks"  # names the loop whose number of turns depends on the batch, for profiles and counts

Axes = tuple[str, ...]  # the mesh axes over which a shard's values vary; () on one device


def supervised_nll(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    weights: Float[Array, "B T"],
    vocab_size: int,
) -> Float[Array, ""]:
    """Σ weight · −log p(target), p the softmax of the tied head.

    Each shard of the batch brings its supervised positions to the front and runs head and cross-entropy over as many
    chunks of them as there are: the cost follows the number of supervised tokens. Logits are float32. Gradients are
    computed beside the loss, chunk by chunk, so that no logits are kept or computed a second time.

    Args:
      hidden: what the head reads.
      embedding: the padded table.
      targets: the token to predict at each position.
      weights: of each position; 0 where nothing is supervised. Constants to differentiation.
      vocab_size: rows of `embedding` that are tokens.
    """
    axes = batch_axes()
    return _sum_over_shards(functools.partial(_nll, vocab_size, axes), axes, hidden, embedding, targets, weights)


def supervised_sums(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    weights: Float[Array, "B T"],
    groups: Int32[Array, "B T"],
    n_groups: int,
    vocab_size: int,
) -> Float[Array, "2 G"]:
    """`supervised_nll` of each of several groups of positions, at the same cost; not to be differentiated.

    Args:
      hidden: as there, like all but the groups.
      embedding: the padded table.
      targets: the token to predict at each position.
      weights: of each position.
      groups: which group each position belongs to.
      n_groups: how many groups there are.
      vocab_size: rows of `embedding` that are tokens.

    Returns:
      Each group's Σ weight · −log p(target), and each group's Σ weight.
    """
    axes = batch_axes()

    def sums(hidden, embedding, targets, weights, groups):
        def add(sums, chunk_inputs):
            h, targets, weights, groups = chunk_inputs
            values = jnp.stack([_chunk_nll(vocab_size, embedding, h, targets, weights)[0], weights])
            # No scatter: on a GPU it would add in an order that changes from run to run.
            is_member = groups[:, None] == jnp.arange(n_groups)[None, :]
            return sums + jnp.sum(jnp.where(is_member[None], values[:, :, None], 0), axis=1)

        return _over_chunks(add, _zeros((2, n_groups), jnp.float32, axes), hidden, targets, weights, groups)

    return _sum_over_shards(sums, axes, hidden, embedding, targets, weights, groups)


def _sum_over_shards(function: Callable[..., jax.Array], axes: Axes, hidden, embedding, *positions) -> jax.Array:
    """`function` of the table and each shard's positions, summed; of all positions where nothing divides them."""
    if not axes:
        return function(hidden, embedding, *positions)

    def shard(hidden, embedding, *positions):
        # The table is the same on every shard; saying that its use varies sums its gradient over the shards.
        return jax.lax.psum(function(hidden, _varying(embedding, axes), *positions), axes)

    batch, whole = PartitionSpec(axes), PartitionSpec()
    in_specs = (batch, whole, *(batch for _ in positions))
    return jax.shard_map(shard, in_specs=in_specs, out_specs=whole, axis_names=set(axes))(hidden, embedding, *positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nll(vocab_size: int, axes: Axes, hidden, embedding, targets, weights):
    def add(loss, chunk_inputs):
        return loss + jnp.sum(_chunk_nll(vocab_size, embedding, *chunk_inputs)[0])

    return _over_chunks(add, _zeros((), jnp.float32, axes), hidden, targets, weights)


def _nll_forward(vocab_size: int, axes: Axes, hidden, embedding, targets, weights):
    """The loss, and its gradients by `hidden` and `embedding`."""
    n = weights.size
    order = _supervised_first(weights)

    def add(carry, chunk_inputs):
        loss, d_embedding, d_hidden, start = carry
        h, _, _ = chunk_inputs
        nll, d_logits = _chunk_nll(vocab_size, embedding, *chunk_inputs)
        d_logits = d_logits.astype(h.dtype)
        d_embedding += jnp.einsum("cv,cd->vd", d_logits, h, preferred_element_type=jnp.float32)
        d_h = jnp.einsum("cv,vd->cd", d_logits, embedding.astype(h.dtype))
        return loss + jnp.sum(nll), d_embedding, jax.lax.dynamic_update_slice(d_hidden, d_h, (start, 0)), start + CHUNK

    rows = -(-n // CHUNK) * CHUNK
    empty = (
        _zeros((), jnp.float32, axes),
        _zeros(embedding.shape, jnp.float32, axes),
        _zeros((rows, hidden.shape[-1]), hidden.dtype, axes),
        jnp.zeros((), jnp.int32),
    )
    loss, d_embedding, d_ordered, _ = _over_chunks(add, empty, hidden, targets, weights)
    inverse = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))
    return loss, (d_ordered[inverse].reshape(hidden.shape), d_embedding.astype(embedding.dtype), weights)


def _nll_backward(vocab_size: int, axes: Axes, residuals, g):
    d_hidden, d_embedding, weights = residuals
    return (g * d_hidden).astype(d_hidden.dtype), g * d_embedding, None, jnp.zeros_like(weights)


_nll.defvjp(_nll_forward, _nll_backward)


def _varying(x: jax.Array, axes: Axes) -> jax.Array:
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _zeros(shape: tuple[int, ...], dtype, axes: Axes) -> jax.Array:
    """Zeros to sum into; a loop's carry must be declared to vary over shards where its sum will."""
    return _varying(jnp.zeros(shape, dtype), axes)


def _supervised_first(weights: Float[Array, "B T"]) -> Int32[Array, " n"]:
    """Flat positions, those with a weight first, each group in order."""
    return jnp.argsort(weights.reshape(-1) == 0, stable=True).astype(jnp.int32)


def _over_chunks(add, carry, hidden, targets, weights, *more):
    """Folds `add` over the chunks that hold supervised positions; the last one is filled up with weight 0."""
    n = weights.size
    order = jnp.pad(_supervised_first(weights), (0, -n % CHUNK))
    flat_hidden, flat_targets, flat_weights = hidden.reshape(n, -1), targets.reshape(n), weights.reshape(n)
    flat_more = [each.reshape(n) for each in more]
    count = jnp.sum(flat_weights != 0, dtype=jnp.int32)

    def body(i, carry):
        index = jax.lax.dynamic_slice(order, (i * CHUNK,), (CHUNK,))
        is_supervised = i * CHUNK + jnp.arange(CHUNK) < count
        chunk = flat_hidden[index], flat_targets[index], flat_weights[index] * is_supervised
        return add(carry, (*chunk, *(each[index] for each in flat_more)))

    with jax.named_scope(SCOPE):
        return jax.lax.fori_loop(0, (count + CHUNK - 1) // CHUNK, body, carry)


def _chunk_nll(
    vocab_size: int,
    embedding: Float[Array, "V D"],
    h: Float[Array, "c D"],
    targets: Int32[Array, " c"],
    weights: Float[Array, " c"],
) -> tuple[Float[Array, " c"], Float[Array, "c V"]]:
    """Each position's weight · −log p(target), and its gradient by the logits: weight · (softmax − one-hot)."""
    logits = head_logits(h, embedding, vocab_size)
    log_p = jax.nn.log_softmax(logits)
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    nll = -(weights * jnp.sum(jnp.where(is_target, log_p, 0), axis=-1))
    return nll, weights[:, None] * (jnp.exp(log_p) - is_target)
