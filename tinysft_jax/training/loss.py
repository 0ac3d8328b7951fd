"""Head and cross-entropy over the supervised positions alone, a chunk of them at a time."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from tinysft_jax import accelerator
from tinysft_jax.linear import product
from tinysft_jax.model import head_logits
from tinysft_jax.sharding import batch_axes

# Supervised positions whose logits exist at a time: on a CPU; and elsewhere a quarter of a shard's, up to 4,096.
# Larger ones make the head's products faster, and the last one emptier.
CHUNK, LARGEST_CHUNK = 512, 4096
SCOPE = "supervised_chunks"  # name of the loop over chunks in profiles and compiled programs


class Softmax(NamedTuple):
    """A distribution over the vocabulary, of logits with padding from `vocab_size` on."""

    vocab_size: int
    temperature: int | float = 1.0  # logits are divided by it; above 0
    forbidden: tuple[int, ...] = ()  # ids without probability, as in `SamplingOptions`

    def log_probs(self, logits: Float[Array, "c V"]) -> Float[Array, "c V"]:
        if self.forbidden:
            is_forbidden = np.isin(np.arange(logits.shape[1]), self.forbidden)
            logits = jnp.where(is_forbidden[None], -jnp.inf, logits)
        return jax.nn.log_softmax(logits if self.temperature == 1 else logits / self.temperature)


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
    nll = functools.partial(_nll, Softmax(vocab_size))
    return _over_batch_shards(nll, "sum", hidden, embedding, targets, weights)


def token_nll(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    weights: Float[Array, "B T"],
    softmax: Softmax,
) -> Float[Array, "B T"]:
    """Each position's weight · −log p(target), as in `supervised_nll`, for losses that are no sum over positions.

    Its gradient depends on what is made of the values, so the backward pass computes the logits once more.
    """
    return _over_batch_shards(functools.partial(_token_nll, softmax), "batch", hidden, embedding, targets, weights)


def _over_batch_shards(
    function: Callable[..., jax.Array], result: Literal["sum", "batch"], hidden, embedding, *positions
) -> jax.Array:
    """`function(hidden, embedding, *positions)` of each shard of the batch: the results' sum, or all, row by row."""
    if not (axes := batch_axes()):
        return function(hidden, embedding, *positions)

    def shard(hidden, embedding, *positions):
        # Marked as varying, so that the gradient by the embedding is summed over the shards.
        own = function(hidden, _varying(embedding), *positions)
        return jax.lax.psum(own, axes) if result == "sum" else own

    batch, whole = PartitionSpec(axes), PartitionSpec()
    in_specs, out_specs = (batch, whole, *(batch for _ in positions)), whole if result == "sum" else batch
    shards = jax.shard_map(shard, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes))
    return shards(hidden, embedding, *positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(softmax: Softmax, hidden, embedding, targets, weights):
    return _nll_forward(softmax, hidden, embedding, targets, weights)[0]


def _nll_forward(softmax: Softmax, hidden, embedding, targets, weights):
    """The loss, and as residuals its gradients by `hidden` and `embedding`."""
    n, order, size = weights.size, _supervised_first(weights), _chunk_size(weights.size)
    table = embedding.astype(hidden.dtype)  # once, not for each chunk

    def add(carry, chunk):
        loss, d_embedding, d_hidden, start = carry
        h, _, _ = chunk
        nll, d_logits = _chunk_nll(softmax, table, *chunk)
        d_logits = d_logits.astype(h.dtype)
        d_embedding += product("cv,cd->vd", d_logits, h, jnp.float32)
        d_h = product("cv,vd->cd", d_logits, table)
        return loss + jnp.sum(nll), d_embedding, jax.lax.dynamic_update_slice(d_hidden, d_h, (start, 0)), start + size

    d_hidden = jnp.zeros((-(-n // size) * size, hidden.shape[-1]), hidden.dtype)  # in the order of `order`
    carry = jnp.float32(0), jnp.zeros(embedding.shape, jnp.float32), d_hidden, jnp.int32(0)
    loss, d_embedding, d_hidden, _ = _over_chunks(add, carry, hidden, targets, weights)
    return loss, (d_hidden[_inverse(order)].reshape(hidden.shape), d_embedding.astype(embedding.dtype), weights)


def _nll_backward(softmax: Softmax, residuals, g):
    d_hidden, d_embedding, weights = residuals
    return (g * d_hidden).astype(d_hidden.dtype), g * d_embedding, None, jnp.zeros_like(weights)


_nll.defvjp(_nll_forward, _nll_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_nll(softmax: Softmax, hidden, embedding, targets, weights):
    n, order, size = weights.size, _supervised_first(weights), _chunk_size(weights.size)
    table = embedding.astype(hidden.dtype)

    def add(carry, chunk):
        values, start = carry
        nll, _ = _chunk_nll(softmax, table, *chunk)
        return jax.lax.dynamic_update_slice(values, nll, (start,)), start + size

    values = jnp.zeros(-(-n // size) * size, jnp.float32)  # in the order of `order`
    values, _ = _over_chunks(add, (values, jnp.int32(0)), hidden, targets, weights)
    return values[_inverse(order)].reshape(weights.shape)


def _token_nll_forward(softmax: Softmax, *arguments):
    return _token_nll(softmax, *arguments), arguments


def _token_nll_backward(softmax: Softmax, arguments, g):
    """The gradients of Σ g · weight · −log p."""
    hidden, embedding, targets, weights = arguments
    _, (d_hidden, d_embedding, _) = _nll_forward(softmax, hidden, embedding, targets, g * weights)
    return d_hidden, d_embedding, None, jnp.zeros_like(weights)


_token_nll.defvjp(_token_nll_forward, _token_nll_backward)


def _varying(tree):
    """Declares that values vary over the shards of the batch, as a loop's carry must if its result will."""
    axes = batch_axes()
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree) if axes else tree


def _supervised_first(weights: Float[Array, "B T"]) -> Int32[Array, " n"]:
    """Flat positions, those with a weight first."""
    return jnp.argsort(weights.reshape(-1) == 0, stable=True).astype(jnp.int32)


def _inverse(order: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """Where each position is in an order of them."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)


def _chunk_size(n: int) -> int:
    """Positions of a chunk, for `n` positions in a shard."""
    return min(max(CHUNK, n // 4), LARGEST_CHUNK) if accelerator.is_present() else CHUNK


def _over_chunks(add, carry, hidden, targets, weights):
    """Folds `add` over chunks of supervised positions; the last one is padded with weight 0."""
    n, size = weights.size, _chunk_size(weights.size)
    order = jnp.pad(_supervised_first(weights), (0, -n % size))
    hidden, arrays = hidden.reshape(n, -1), [each.reshape(n) for each in (weights, targets)]
    count = jnp.sum(weights != 0, dtype=jnp.int32)

    def body(i, carry):
        index = jax.lax.dynamic_slice(order, (i * size,), (size,))
        is_supervised = i * size + jnp.arange(size) < count
        weights, targets = (each[index] for each in arrays)
        return add(carry, (hidden[index], targets, weights * is_supervised))

    with jax.named_scope(SCOPE):
        return jax.lax.fori_loop(0, (count + size - 1) // size, body, _varying(carry))


def _chunk_nll(softmax: Softmax, table, h, targets, weights) -> tuple[Float[Array, " c"], Float[Array, "c V"]]:
    """Each position's weight · −log p(target), and its gradient by the logits: weight · (p − one-hot) / temperature."""
    logits = head_logits(h, table, softmax.vocab_size)
    log_p = softmax.log_probs(logits)
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    nll = -(weights * jnp.sum(jnp.where(is_target, log_p, 0), axis=-1))
    d_scores = weights[:, None] * (jnp.exp(log_p) - is_target)
    return nll, d_scores if softmax.temperature == 1 else d_scores / softmax.temperature
