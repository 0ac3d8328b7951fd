"""Tokamax's flash attention. Its public function takes no start of a query's keys: the private names are all here."""

import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

# The kernel for Hopper and Blackwell. On a GPU that it has no measured configuration for it takes one by rule, and
# says so for each shape, in a line of a thousand characters.
KERNEL = "mosaic_gpu"

Heads = Float[Array, "B T H D"]


def tokamax_attention(q: Heads, k: Heads, v: Heads, segment_ids: Int32[Array, "B T"]) -> Heads:
    """`segment_attention`: a query's keys begin with its segment, and end with itself. Blocks before are skipped."""
    from tokamax._src.ops.attention import api, base  # takes seconds, and is an extra

    logging.getLogger("absl").addFilter(_is_news)
    mask = base.Mask(is_causal=True, k_start=segment_starts(segment_ids)[:, None, :])
    return api.IMPLEMENTATIONS[KERNEL](q, k, v, mask=mask)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Autotuning cache miss")


def segment_starts(segment_ids: Int32[Array, "B T"]) -> Int32[Array, "B T"]:
    """For each position, the first of its segment."""
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = segment_ids != jnp.roll(segment_ids, 1, axis=1)
    return jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)
