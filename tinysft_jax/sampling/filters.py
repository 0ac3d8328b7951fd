"""How tokens are drawn: the options, the filters, and the draw."""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key, UInt32

from tinysft_jax.console import UserError
from tinysft_jax.gpt_config import VOCAB_MULTIPLE

# The vocabulary is searched block by block; its padded size is a multiple of this.
BLOCK = VOCAB_MULTIPLE
# Scores are (logit - peak) / temperature, with at least this in place of 0: 0 at the peak, so nothing overflows.
_TINY = jnp.finfo(jnp.float32).tiny


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to draw an answer; raises a UserError if a number is out of range."""

    max_new_tokens: int = 200
    temperature: float | int = 0.7  # logits are divided by it; 0: greedy
    top_k: int = 50  # draw among the k most likely tokens; 0: off
    # Draw among the most likely tokens that together have this probability, after temperature and top-k; 1: off.
    top_p: float | int = 1.0
    # Draw only tokens that are at least this fraction as likely as the most likely one, after temperature; 0: off.
    min_p: float | int = 0.0
    # Logits of tokens of prompt and answer so far are divided by it where they are positive, multiplied where negative
    # (CTRL, https://arxiv.org/abs/1909.05858, section 4.1). Stop ids are exempt: a chat is full of them. 1: off.
    repetition_penalty: float | int = 1.0
    max_length: int | None = None  # of prompt and answer together; None: the length that the model was trained to
    seed: int = 0  # a row's random numbers depend on the seed and the row's index only
    stop_ids: tuple[int, ...] = ()  # end an answer, and are not part of it
    forbidden_ids: tuple[int, ...] = ()  # are never drawn

    def __post_init__(self):
        for name, (kind, lowest, highest) in _RANGES.items():
            value = getattr(self, name)
            if name == "max_length" and value is None:
                continue
            # NaN fails the comparison.
            if not isinstance(value, kind) or isinstance(value, bool) or not lowest <= value <= highest:
                noun = "a whole number" if kind is numbers.Integral else "a number"
                raise UserError(f"{name} is {value!r}; it must be {noun} from {lowest} to {highest}")


_RANGES = {
    "max_new_tokens": (numbers.Integral, 0, 2**31 - 1),
    "top_k": (numbers.Integral, 0, 2**31 - 1),
    "max_length": (numbers.Integral, 1, 2**31 - 1),
    "seed": (numbers.Integral, 0, 2**32 - 1),
    "temperature": (numbers.Real, 0, 1e38),
    "top_p": (numbers.Real, 0, 1),
    "min_p": (numbers.Real, 0, 1),
    "repetition_penalty": (numbers.Real, 0.01, 100),
}


class Knobs(NamedTuple):
    """The options that can change without anything being compiled, as arrays: those of each row, then of all."""

    temperature: Float[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    ranked: Bool[Array, " B"]  # whether the most likely tokens are reported, too
    stop_ids: Int32[Array, " n_stop"]
    forbidden: Bool[Array, " V"]

    @classmethod
    def of(cls, options: Sequence[SamplingOptions], stop_ids: Sequence[int], forbidden, ranked=()) -> "Knobs":
        """Those of rows with these options."""
        dtypes = {name: np.float32 for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
        dtypes |= {"top_k": np.int32, "seed": np.uint32}
        of_rows = {name: np.array([getattr(each, name) for each in options], kind) for name, kind in dtypes.items()}
        ranked, stop_ids = np.array(ranked or len(options) * [False]), np.array(stop_ids, np.int32)
        return cls(**of_rows, ranked=ranked, stop_ids=stop_ids, forbidden=forbidden)


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Makes tokens that were seen less likely; see `SamplingOptions.repetition_penalty`."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Float[Array, "B V"], keys: Key[Array, " B"], knobs: Knobs, top_k: int) -> Int32[Array, " B"]:
    """Draws each row's next token; at temperature 0 the most likely one, the first among equals.

    Top-p counts within the top-k candidates. Min-p, which compares with the most likely token, commutes with both. V is
    a multiple of `BLOCK`, and each row has a finite logit. A static `top_k` is that of all rows, and fast; with 0 each
    row has its own, of `knobs`.
    """
    if 0 < top_k < logits.shape[1]:
        return _draw_candidate(logits, keys, knobs, top_k)
    return _draw_from_all(logits, keys, knobs)


def log_probabilities(
    logits: Float[Array, "B V"], tokens: Int32[Array, " B"], temperature: Float[Array, " B"]
) -> Float[Array, " B"]:
    """Each row's log-probability of its token at a temperature, before top-k, top-p and min-p."""
    log_p = jax.nn.log_softmax(logits / _divisor(temperature))
    return jnp.take_along_axis(log_p, tokens[:, None], axis=1)[:, 0]


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

    XLA recognises a top-k as a sort whose only readers are slices of k. Without the barrier it moves other slices up
    to the sort, no longer recognises it, and sorts everything: 15 ms instead of 0.5 for 16 rows on a CPU.
    """
    values, places = jax.lax.top_k(x, k)
    # One barrier each: a barrier around both crashes XLA's partitioner where parameters are on several devices.
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(places)


def _draw_candidate(logits, keys, knobs: Knobs, top_k: int):
    """Draws among the k most likely tokens, which come sorted: what the filters keep is a prefix of them."""
    values, ids = top_k_by_blocks(logits, top_k)
    scores = (values - values[:, :1]) / _divisor(knobs.temperature)
    probabilities = jax.nn.softmax(scores, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = knobs.top_p[:, None]
    # The first candidate, with nothing before it, always stays; and rounding excludes none where p is 1.
    in_nucleus = (mass_before < jnp.maximum(top_p, _TINY)) | (top_p >= 1)
    stays = in_nucleus & (jnp.exp(scores) >= knobs.min_p[:, None])
    place = _categorical(keys, jnp.where(stays, scores, -jnp.inf))
    place = jnp.where(knobs.temperature > 0, place, 0)
    return jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]


def _draw_from_all(logits, keys, knobs: Knobs):
    """Draws a block by its mass, then a token in it: the same distribution as one draw from the whole row."""
    peak, most_likely = top_k_by_blocks(logits, 1)
    weights = jnp.exp((logits - peak) / _divisor(knobs.temperature))
    # The smallest sets that are enough. Ties of the last one stay, and where nothing is enough, all.
    top_k = jnp.where(knobs.top_k > 0, knobs.top_k, logits.shape[1] + 1)
    weights = _heaviest(weights, (knobs.top_k > 0).any(), lambda kept: (kept > 0).sum(axis=-1) >= top_k)
    wanted = jnp.where(knobs.top_p < 1, knobs.top_p * weights.sum(axis=-1), jnp.inf)
    weights = _heaviest(weights, (knobs.top_p < 1).any(), lambda kept: kept.sum(axis=-1) >= wanted)
    weights = jnp.where(weights >= knobs.min_p[:, None], weights, 0)  # the peak's weight is 1
    block_keys, token_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    blocks = weights.reshape(len(weights), -1, BLOCK)
    block = _categorical(block_keys, jnp.log(blocks.sum(axis=-1)))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token = block * BLOCK + _categorical(token_keys, jnp.log(inside))
    return jnp.where(knobs.temperature > 0, token, most_likely[:, 0])


def _divisor(temperature: Float[Array, " B"]) -> Float[Array, "B 1"]:
    return jnp.maximum(temperature, _TINY)[:, None]


def _heaviest(weights: Float[Array, "B V"], wanted: Bool[Array, ""], is_enough: Callable) -> Float[Array, "B V"]:
    """Zeroes all but the smallest set of largest weights that is enough; nothing, if that is not wanted.

    Finds the largest threshold with such a set, by bisection over the bits of a float32: as integers, floats of one
    sign have the same order. So the result is exact.
    """

    def kept_from(bits):
        threshold = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(weights >= threshold[:, None], weights, 0)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = is_enough(kept_from(middle))
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    def search():
        heaviest = jax.lax.bitcast_convert_type(weights.max(axis=-1), jnp.int32)
        return kept_from(jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(heaviest), heaviest + 1))[0])

    return jax.lax.cond(wanted, search, lambda: weights)


def _categorical(keys: Key[Array, " B"], scores: Float[Array, "B N"]) -> Int32[Array, " B"]:
    """A draw from softmax(scores) in each row: the largest of scores plus Gumbel noise (Gumbel-max)."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
    return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)
