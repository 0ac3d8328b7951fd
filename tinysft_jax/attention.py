"""Causal attention within segments, by backend, and attention over a cache of keys and values."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from tinysft_jax.console import UserError
from tinysft_jax.sharding import over_batch_shards

ATTENTION_BACKENDS = ("auto", "xla", "cudnn")

# Queries, and keys, in a block. Measured on a CPU, 4 rows of 1024, 12 heads of 64, conversations of 60 to 350 tokens,
# forward and backward: 133 ms with 64, 140 with 128, 347 with 256; without skipping any block 266, 235 and 277.
BLOCK = 128
SCOPE = "key_blocks"  # names the loops whose number of iterations depends on the rows, for profiles and counts
# A masked score. Finite: a block of nothing but masked scores adds weights that the diagonal block, which comes last
# and always has the query's own key, scales down to 0.
MASKED = -1e30

Heads = Float[Array, "B T H D"]
Slots = Float[Array, "B H S D"]  # a cache of S positions
Blocks = Float[Array, "N B H C D"]  # N blocks of C positions
SegmentBlocks = Int32[Array, "N B C"]


def segment_attention(q: Heads, k: Heads, v: Heads, segment_ids: Int32[Array, "B T"], backend: str = "auto") -> Heads:
    """Softmax(q kᵀ / √D) v over the earlier positions of each query's segment, and itself; padding is a segment, too.

    No backend ignores segments. Raises a UserError if the backend is unknown or can't run here.
    """
    if choose_backend(backend, q.dtype, q.shape[-1], q.shape[1]) == "cudnn":
        return _cudnn_attention(q, k, v, segment_ids)
    return over_batch_shards(block_attention, q, k, v, segment_ids)


def choose_backend(backend: str, dtype, head_dim: int, seq_len: int) -> str:
    """The backend that will run; a UserError if the one asked for is unknown or can't run here."""
    if backend not in ATTENTION_BACKENDS:
        raise UserError(f"attention backend {backend!r} is not one of {', '.join(ATTENTION_BACKENDS)}")
    if backend == "xla":
        return "xla"
    obstacle = _cudnn_obstacle(dtype, head_dim, seq_len)
    if backend == "cudnn" and obstacle:
        raise UserError(f"attention=cudnn can't run here: {obstacle}; use attention=auto or xla")
    return "xla" if obstacle else "cudnn"


def _cudnn_obstacle(dtype, head_dim: int, seq_len: int) -> str:
    """Why cuDNN's attention can't run in this process; empty if it can."""
    device = jax.devices()[0]
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return "there is no NVIDIA GPU"
    if float(device.compute_capability) < 8:
        return f"it needs compute capability 8.0, this GPU has {device.compute_capability}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {dtype}"
    if head_dim > 128 or head_dim % 8:
        return f"it takes heads of a multiple of 8 up to 128, not {head_dim}"
    return f"it takes rows of even length, not {seq_len}" if seq_len % 2 else ""


def _cudnn_attention(q, k, v, segment_ids):
    """Segments go in as a mask: with cuDNN's causal flag alone, conversations in a row would see each other."""
    positions = jnp.arange(q.shape[1])
    causal = positions[:, None] >= positions[None, :]
    mask = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & causal[None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def cached_attention(q: Heads, k: Slots, v: Slots, positions: Int32[Array, "B T"]) -> Heads:
    """Attention of queries at `positions` over cache slots 0..position, where slot i holds position i.

    The heads' axis comes before the slots': each head's slots are contiguous, where `jax.nn.dot_product_attention`
    would transpose the whole cache at every step (on a CPU, 16 rows of 512 slots, 4 layers: 7 ms a step, not 1.7).
    """
    scores = jnp.einsum("bthd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask: Bool[Array, "B 1 T S"] = positions[:, None, :, None] >= jnp.arange(k.shape[2])[None, None, None, :]
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bhsd->bthd", weights.astype(v.dtype), v)


def block_attention(q: Heads, k: Heads, v: Heads, segment_ids: Int32[Array, "B T"]) -> Heads:
    """`segment_attention` in plain JAX, block by block (FlashAttention-2, https://arxiv.org/abs/2307.08691).

    Scores and sums are float32; the backward pass recomputes the scores. Blocks of keys that share no segment with a
    block of queries are not visited.
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
            added = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[i], preferred_element_type=jnp.float32)
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

    def product(equation: str, one, other):
        return jnp.einsum(equation, one.astype(q.dtype), other, preferred_element_type=jnp.float32)

    def query_block(d_keys_values, j):
        def key_block(i, carry):
            d_q, d_k, d_v = carry
            weights = jnp.exp(_scores(q, k, segments, j, i) - log_sums[j])
            d_weights = jnp.einsum("bhqd,bhkd->bhqk", d_out[j], v[i], preferred_element_type=jnp.float32)
            d_scores = scale * weights * (d_weights - delta[j])
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
    scores = jnp.einsum("bhqd,bhkd->bhqk", q[j], k[i], preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None], q.shape[-1] ** -0.5 * scores, MASKED)
