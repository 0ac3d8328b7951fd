"""How tokens are drawn: what a caller can choose, the filters, and the draw."""

import dataclasses
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key

from tinysft_jax.console import UserError
from tinysft_jax.model import VOCAB_MULTIPLE


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to draw an answer.

    Attributes:
      max_new_tokens: the answer's length at most; the end of the model's context can make it shorter.
      temperature: logits are divided by it; 0 always takes the most likely token.
      top_k: draw among the k most likely tokens; 0 switches the filter off.
      top_p: draw among the most likely tokens that together have this probability, after temperature and top-k; 0
        leaves the most likely token, 1 switches the filter off.
      min_p: draw only tokens that are at least this fraction as likely as the most likely one, after temperature; 0
        switches the filter off.
      repetition_penalty: logits of tokens that stand in the prompt or the answer so far are divided by it where they
        are positive and multiplied where they are negative (CTRL, https://arxiv.org/abs/1909.05858, section 4.1); 1
        switches it off. Stop ids are exempt: a chat is full of them.
      max_length: positions that prompt and answer may take together; None: the length that the model was trained to.
      seed: of the random numbers. Those of a row depend on the seed and the row's index only.
      stop_ids: tokens that end an answer and are not part of it.
      forbidden_ids: tokens that are never drawn.

    Raises:
      UserError: if a number is out of range.
    """

    max_new_tokens: int = 200
    temperature: float | int = 0.7
    top_k: int = 50
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    max_length: int | None = None
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    forbidden_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, highest in (("max_new_tokens", 2**31 - 1), ("top_k", 2**31 - 1), ("seed", 2**32 - 1)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not 0 <= value <= highest:
                raise UserError(f"{name} is {value!r}; it must be a whole number from 0 to {highest}")
        length = self.max_length
        if length is not None and (not isinstance(length, numbers.Integral) or isinstance(length, bool) or length < 1):
            raise UserError(f"max_length is {length!r}; it must be a positive whole number")
        ranges = {"temperature": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 100)}
        for name, (lowest, highest) in ranges.items():
            value = getattr(self, name)
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            # Written so that NaN, which compares as false, fails it.
            if not (is_number and lowest <= value <= highest and math.isfinite(value)):
                wanted = f"from {lowest} to {highest}" if math.isfinite(highest) else "0 or more"
                raise UserError(f"{name} is {value!r}; it must be {wanted}")


# The vocabulary is searched block by block; its padded size is a multiple of this.
BLOCK = VOCAB_MULTIPLE

_TINY = jnp.finfo(jnp.float32).tiny


class Knobs(NamedTuple):
    """The numbers of `SamplingOptions` that can change without anything being compiled: float32 scalars."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""]) -> Float[Array, "B V"]:
    """Makes tokens that were seen less likely; see `SamplingOptions.repetition_penalty`."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Float[Array, "B V"], keys: Key[Array, " B"], knobs: Knobs, top_k: int) -> Int32[Array, " B"]:
    """Draws each row's next token.

    Top-p counts within the top-k candidates. Min-p, which compares with the most likely token, commutes with both.

    Args:
      logits: float32; V is a multiple of `BLOCK`; -inf: never drawn. Each row has a finite one.
      keys: one of each row's own.
      knobs: see `SamplingOptions`. Temperature 0: the most likely token, the first among equals.
      top_k: static; 0, or V and more: all tokens.
    """
    if 0 < top_k < logits.shape[1]:
        return _draw_candidate(logits, keys, knobs, top_k)
    return _draw_from_all(logits, keys, knobs)


def top_k_by_blocks(logits: Float[Array, "B V"], k: int) -> tuple[Float[Array, "B k"], Int32[Array, "B k"]]:
    """`jax.lax.top_k` along a long row, ties included, but faster.

    The k largest lie in the k blocks with the largest maxima, so only those are searched. Taken in the order of the
    vocabulary, they leave ties to the lower index, as in the whole row.
    """
    batch, size = logits.shape
    if 2 * k * BLOCK > size:  # the blocks would hold most of the row
        return _top_k(logits, k)
    blocks = logits.reshape(batch, size // BLOCK, BLOCK)
    _, chosen = _top_k(blocks.max(axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(batch, k * BLOCK)
    values, places = _top_k(candidates, k)
    return values, jnp.take_along_axis(chosen, places // BLOCK, axis=1) * BLOCK + places % BLOCK


def _top_k(x: Float[Array, "B N"], k: int) -> tuple[Float[Array, "B k"], Int32[Array, "B k"]]:
    """`jax.lax.top_k`, kept apart from what reads its results.

    XLA knows a top-k by a sort whose only readers are slices of k. Without the barrier it moves other slices up to
    the sort, no longer knows it, and sorts everything: 15 ms instead of 0.5 for 16 rows on a CPU.
    """
    values, places = jax.lax.top_k(x, k)
    # One barrier each: a barrier around both crashes XLA's partitioner where parameters lie on several devices.
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(places)


def _draw_candidate(logits, keys, knobs: Knobs, top_k: int):
    """Draws among the k most likely tokens, which come sorted: what the filters leave is a prefix of them."""
    values, ids = top_k_by_blocks(logits, top_k)
    scores = _scale(values, values[:, :1], knobs.temperature)
    probabilities = jax.nn.softmax(scores, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first candidate, before which there is nothing, always stays; and rounding leaves none out where p is 1.
    in_nucleus = (mass_before < jnp.maximum(knobs.top_p, _TINY)) | (knobs.top_p >= 1)
    stays = in_nucleus & (jnp.exp(scores) >= knobs.min_p)
    place = _categorical(keys, jnp.where(stays, scores, -jnp.inf))
    return _take(ids, jnp.where(knobs.temperature > 0, place, 0))


def _draw_from_all(logits, keys, knobs: Knobs):
    """Draws a block by its mass, then a token in it: the same distribution as one draw from the whole row."""
    peak, most_likely = top_k_by_blocks(logits, 1)
    weights = jnp.exp(_scale(logits, peak, knobs.temperature))
    weights = jax.lax.cond(knobs.top_p < 1, lambda: _nucleus(weights, knobs.top_p), lambda: weights)
    weights = jnp.where(weights >= knobs.min_p, weights, 0)  # the peak's weight is 1
    block_keys, token_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    blocks = weights.reshape(len(weights), -1, BLOCK)
    block = _categorical(block_keys, jnp.log(blocks.sum(axis=-1)))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token = block * BLOCK + _categorical(token_keys, jnp.log(inside))
    return jnp.where(knobs.temperature > 0, token, most_likely[:, 0])


def _nucleus(weights: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Zeroes all but the smallest set of largest weights that has the share `top_p` of their sum.

    Finds the largest threshold whose set is heavy enough, by bisection over the bits of a float32: as integers,
    floats of one sign have the same order. So the result is exact; equals of the last weight in the set stay too.
    """
    wanted = top_p * weights.sum(axis=-1)

    def mass_from(bits):
        threshold = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(weights >= threshold[:, None], weights, 0).sum(axis=-1)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = mass_from(middle) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    heaviest = jax.lax.bitcast_convert_type(weights.max(axis=-1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(heaviest), heaviest + 1))
    return jnp.where(weights >= jax.lax.bitcast_convert_type(low, jnp.float32)[:, None], weights, 0)


def _scale(logits, peak, temperature):
    """(logits - peak) / temperature: 0 at the peak, so that no temperature, however small, overflows."""
    return (logits - peak) / jnp.maximum(temperature, _TINY)


def _categorical(keys: Key[Array, " B"], scores: Float[Array, "B N"]) -> Int32[Array, " B"]:
    """A draw from softmax(scores) in each row: the largest of scores plus Gumbel noise (Gumbel-max)."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
    return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)


def _take(table: Int32[Array, "B N"], places: Int32[Array, " B"]) -> Int32[Array, " B"]:
    return jnp.take_along_axis(table, places[:, None], axis=1)[:, 0]
