"""Causal attention within segments in plain JAX, block by block: for CPUs, and for what no fused kernel takes."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from tinysft_jax.linear import product

# Queries, and keys, in a block. Measured on a CPU, 4 rows of 1024, 12 heads of 64, conversations of 60 to 350 tokens,
# forward and backward: 133 ms with 64, 140 with 128, 347 with 256; without skipping any block 266, 235 and 277.
BLOCK = 128
MOST_QUERY_BLOCKS = 8  # of `static_block_attention`, which is compiled block by block
SCOPE = "key_blocks"  # names the loops whose number of iterations depends on the rows, for profiles and counts
# A masked score. Finite: a block of nothing but masked scores adds weights that the diagonal block, which comes last
# and always has the query's own key, scales down to 0.
MASKED = -1e30

Heads = Float[Array, "B T H D"]
Blocks = Float[Array, "N B H C D"]  # N blocks of C positions
SegmentBlocks = Int32[Array, "N B C"]


@jax.custom_vjp
def static_block_attention(q: Heads, k: Heads, v: Heads, segment_ids: Int32[Array, "B T"]) -> Heads:
    """`segment_attention` without a loop: the formula itself, for a block of queries and all keys up to its end.

    Scores and sums are float32; the backward pass recomputes the scores. The compiler may keep those of several blocks
    at a time: all of them have T² / 2 entries for each head and row.
    """
    out = []
    for start, stop in _query_blocks(q.shape[1]):
        weights = _weights(q, k, segment_ids, start, stop)
        out.append(product("bhqk,bkhd->bqhd", weights.astype(v.dtype), v[:, :stop]))
    return jnp.concatenate(out, axis=1)


def _static_backward(residuals, d_out):
    q, k, v, segment_ids = residuals
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, stop in _query_blocks(q.shape[1]):
        weights, d_block = _weights(q, k, segment_ids, start, stop), d_out[:, start:stop]
        d_weights = product("bqhd,bkhd->bhqk", d_block, v[:, :stop], jnp.float32)
        delta = (weights * d_weights).sum(axis=-1, keepdims=True)
        d_scores = (q.shape[-1] ** -0.5 * weights * (d_weights - delta)).astype(q.dtype)
        d_q.append(product("bhqk,bkhd->bqhd", d_scores, k[:, :stop]))
        d_k = d_k.at[:, :stop].add(product("bhqk,bqhd->bkhd", d_scores, q[:, start:stop], jnp.float32))
        d_v = d_v.at[:, :stop].add(product("bhqk,bqhd->bkhd", weights.astype(v.dtype), d_block, jnp.float32))
    return jnp.concatenate(d_q, axis=1), d_k.astype(k.dtype), d_v.astype(v.dtype), None


static_block_attention.defvjp(lambda *arrays: (static_block_attention(*arrays), arrays), _static_backward)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """Where each block of queries starts and stops."""
    block = max(BLOCK, -(-length // MOST_QUERY_BLOCKS))
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _weights(q: Heads, k: Heads, segment_ids: Int32[Array, "B T"], start: int, stop: int) -> Float[Array, "B H C S"]:
    """Softmax weights of a block of queries, over all keys up to its end."""
    is_earlier = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
    mask = (segment_ids[:, start:stop, None] == segment_ids[:, None, :stop]) & is_earlier[None]
    scores = product("bqhd,bkhd->bhqk", q[:, start:stop], k[:, :stop], jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)


def block_attention(q: Heads, k: Heads, v: Heads, segment_ids: Int32[Array, "B T"]) -> Heads:
    """`segment_attention` in loops over blocks (FlashAttention-2, https://arxiv.org/abs/2307.08691).

    Scores and sums are float32; the backward pass recomputes the scores. Blocks of keys that share no segment with a
    block of queries are not visited, so loops end where the rows' segments tell.
    """
    n_rows, length, n_heads, head_dim = q.shape
    block = min(BLOCK, length)
    padding = ((0, 0), (0, -length % block))

    def blocks(x):
        x = jnp.pad(x, (*padding, (0, 0), (0, 0)))
        return x.reshape(n_rows, -1, block, n_heads, head_dim).transpose(1, 0, 3, 2, 4)

    segments = jnp.pad(segment_ids, padding).reshape(n_rows, -1, block).swapaxes(0, 1)
    out = _attend(blocks(q), blocks(k), blocks(v), segments)
    return out.transpose(1, 0, 3, 2, 4).reshape(n_rows, -1, n_heads, head_dim)[:, :length]


@jax.custom_vjp
def _attend(q: Blocks, k: Blocks, v: Blocks, segments: SegmentBlocks) -> Blocks:
    return _forward(q, k, v, segments)[0]


def _forward(q, k, v, segments):
    """The output, and what the backward pass needs: the inputs, the output, and log Σ exp(score) of each query."""
    first = first_key_blocks(segments)

    def query_block(_, j):
        def key_block(i, carry):
            out, highest, total = carry
            scores = _scores(q, k, segments, j, i)
            new_highest = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_highest), jnp.exp(highest - new_highest)
            added = product("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[i], jnp.float32)
            return out * shrink + added, new_highest, total * shrink + weights.sum(axis=-1, keepdims=True)

        none = jnp.zeros((*q.shape[1:-1], 1), jnp.float32)
        empty = (jnp.zeros(q.shape[1:], jnp.float32), none + MASKED, none)
        with jax.named_scope(SCOPE):
            out, highest, total = lax.fori_loop(first[j], j + 1, key_block, empty)
        return None, ((out / total).astype(q.dtype), highest + jnp.log(total))

    _, (out, log_sums) = lax.scan(query_block, None, jnp.arange(len(q)))
    return out, (q, k, v, segments, out, log_sums)


def _backward(residuals, d_out):
    q, k, v, segments, out, log_sums = residuals
    first = first_key_blocks(segments)
    scale = q.shape[-1] ** -0.5
    # Σ over keys of weight · its gradient, which the softmax's gradient subtracts.
    delta = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)

    def query_block(d_keys_values, j):
        def key_block(i, carry):
            d_q, d_k, d_v = carry
            weights = jnp.exp(_scores(q, k, segments, j, i) - log_sums[j])
            d_weights = product("bhqd,bhkd->bhqk", d_out[j], v[i], jnp.float32)
            d_scores = (scale * weights * (d_weights - delta[j])).astype(q.dtype)
            return (
                d_q + product("bhqk,bhkd->bhqd", d_scores, k[i], jnp.float32),
                d_k.at[i].add(product("bhqk,bhqd->bhkd", d_scores, q[j], jnp.float32)),
                d_v.at[i].add(product("bhqk,bhqd->bhkd", weights.astype(q.dtype), d_out[j], jnp.float32)),
            )

        start = jnp.zeros(q.shape[1:], jnp.float32)
        with jax.named_scope(SCOPE):
            d_q, d_k, d_v = lax.fori_loop(first[j], j + 1, key_block, (start, *d_keys_values))
        return (d_k, d_v), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (d_k, d_v), d_q = lax.scan(query_block, (zeros, zeros), jnp.arange(len(q)))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def first_key_blocks(segments: SegmentBlocks) -> Int32[Array, " N"]:
    """For each block of queries, the first block of keys that shares a segment with it in any row.

    Blocks are compared by the range of their segments: that is exact where segments follow each other in a row, and
    visits too many blocks, never too few, where they don't.
    """
    # Padding comes last in a row: counted as 0, it would make the last block's range reach back to the first.
    ordered = jnp.where(segments == 0, jnp.iinfo(jnp.int32).max, segments)
    low, high = ordered.min(axis=-1), ordered.max(axis=-1)
    meet = (low[:, None] <= high[None, :]) & (high[:, None] >= low[None, :])
    return jnp.argmax(meet.any(axis=-1), axis=-1).astype(jnp.int32)


def _scores(q: Blocks, k: Blocks, segments: SegmentBlocks, j, i) -> Float[Array, "B H C C"]:
    """The scaled scores of query block j over key block i; `MASKED` where a key is later or of another segment."""
    positions = jnp.arange(segments.shape[-1])
    is_earlier = (i < j) | (positions[:, None] >= positions[None, :])
    mask: Bool[Array, "B C C"] = (segments[j][:, :, None] == segments[i][:, None, :]) & is_earlier[None]
    scores = product("bhqd,bhkd->bhqk", q[j], k[i], jnp.float32)
    return jnp.where(mask[:, None], q.shape[-1] ** -0.5 * scores, MASKED)
