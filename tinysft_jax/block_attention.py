"""Segment attention in blocks: exact, in memory of one block of scores, and in time of the blocks that segments reach.

The softmax is built up block by block of keys, and the backward pass recomputes scores from its logarithmic sums, as
in FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2). In a packed row most blocks of
keys belong to other conversations than a block of queries; they are never visited.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

# Queries, and keys, a block. Measured on a CPU, 4 rows of 1024, 12 heads of 64, conversations of 60 to 350 tokens,
# forward and backward: 133 ms with 64, 140 with 128, 347 with 256; without skipping any block 266, 235 and 277.
BLOCK = 128

SCOPE = "key_blocks"  # names the loops whose number of turns depends on the rows, for profiles and counts

# A masked score. Finite: a block of nothing but masked scores adds weights that the diagonal block, which comes last
# and always has the query's own key, scales down to 0.
MASKED = -1e30

Blocks = Float[Array, "N B H C D"]  # N blocks of C positions


def block_attention(
    q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"], segment_ids: Int32[Array, "B T"]
) -> Float[Array, "B T H D"]:
    """As `attention.segment_attention`, in plain JAX. Scores and sums are float32."""
    n_rows, length, n_heads, head_dim = q.shape
    block = min(BLOCK, length)
    padding = -length % block
    padded = ((0, 0), (0, padding))

    def blocks(x):
        x = jnp.pad(x, (*padded, (0, 0), (0, 0)))
        return x.reshape(n_rows, -1, block, n_heads, head_dim).transpose(1, 0, 3, 2, 4)

    segments = jnp.pad(segment_ids, padded).reshape(n_rows, -1, block).swapaxes(0, 1)
    out = _attend(blocks(q), blocks(k), blocks(v), segments)
    return out.transpose(1, 0, 3, 2, 4).reshape(n_rows, -1, n_heads, head_dim)[:, :length]


@jax.custom_vjp
def _attend(q: Blocks, k: Blocks, v: Blocks, segments: Int32[Array, "N B C"]) -> Blocks:
    return _forward(q, k, v, segments)[0]


def _forward(q, k, v, segments):
    """The output, and beside its inputs what the backward pass needs: log Σ exp(score) of each query."""
    first = first_key_blocks(segments)
    head_dim = q.shape[-1]

    def query_block(_, j):
        def key_block(i, carry):
            out, highest, total = carry
            scores = _scores(q, k, segments, j, i)
            new_highest = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_highest), jnp.exp(highest - new_highest)
            added = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[i], preferred_element_type=jnp.float32)
            return out * shrink + added, new_highest, total * shrink + weights.sum(axis=-1, keepdims=True)

        none = jnp.zeros((*q.shape[1:-1], 1), jnp.float32)
        empty = (jnp.zeros((*q.shape[1:-1], head_dim), jnp.float32), none + MASKED, none)
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
    mean = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)

    def product(equation: str, one, other):
        return jnp.einsum(equation, one.astype(q.dtype), other, preferred_element_type=jnp.float32)

    def query_block(d_keys_values, j):
        def key_block(i, carry):
            d_q, d_k, d_v = carry
            weights = jnp.exp(_scores(q, k, segments, j, i) - log_sums[j])
            d_weights = jnp.einsum("bhqd,bhkd->bhqk", d_out[j], v[i], preferred_element_type=jnp.float32)
            d_scores = scale * weights * (d_weights - mean[j])
            return (
                d_q + product("bhqk,bhkd->bhqd", d_scores, k[i]),
                d_k.at[i].add(product("bhqk,bhqd->bhkd", d_scores, q[j])),
                d_v.at[i].add(product("bhqk,bhqd->bhkd", weights, d_out[j])),
            )

        start = jnp.zeros(q.shape[1:], jnp.float32)
        with jax.named_scope(SCOPE):
            d_q, d_k, d_v = lax.fori_loop(first[j], j + 1, key_block, (start, *d_keys_values))
        return (d_k, d_v), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (d_k, d_v), d_q = lax.scan(query_block, (zeros, zeros), jnp.arange(len(q)))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def first_key_blocks(segments: Int32[Array, "N B C"]) -> Int32[Array, " N"]:
    """For each block of queries, the first block of keys that shares a segment with it in any row.

    Blocks are compared by the range of their segments: that is exact where segments follow each other in a row, and
    visits too many blocks, never too few, where they don't.
    """
    # Padding comes last in a row: counted as 0, it would make the last block's range reach back to the first.
    ordered = jnp.where(segments == 0, jnp.iinfo(jnp.int32).max, segments)
    low, high = ordered.min(axis=-1), ordered.max(axis=-1)
    meet = (low[:, None] <= high[None, :]) & (high[:, None] >= low[None, :])
    return jnp.argmax(meet.any(axis=-1), axis=-1).astype(jnp.int32)


def _scores(q: Blocks, k: Blocks, segments: Int32[Array, "N B C"], j, i) -> Float[Array, "B H C C"]:
    """The scaled scores of query block j over key block i; `MASKED` where a key is later or of another segment."""
    positions = jnp.arange(segments.shape[-1])
    is_earlier = (i < j) | (positions[:, None] >= positions[None, :])
    mask: Bool[Array, "B C C"] = (segments[j][:, :, None] == segments[i][:, None, :]) & is_earlier[None]
    scores = jnp.einsum("bhqd,bhkd->bhqk", q[j], k[i], preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None], q.shape[-1] ** -0.5 * scores, MASKED)
