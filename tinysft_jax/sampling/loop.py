"""What runs on the device: the prompts' prefill, and the loop that draws one token after another and feeds it back."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Key, UInt32

from tinysft_jax.model import GPT, GPTConfig, LayerCache
from tinysft_jax.sampling.filters import Knobs, draw, penalize

# The most steps of one call to `advance`.
CHUNK = 64


class DecodeState(NamedTuple):
    """Where a batch of rows stands.

    Attributes:
      cache: keys and values of the positions so far, one pair a layer.
      hidden: what the head reads to predict each row's next token.
      positions: that token's position.
      limits: the position at which a row has to end.
      keys: each row's source of random numbers.
      seen: the ids that the repetition penalty is for.
      active: whether a row goes on.
    """

    cache: list[LayerCache]
    hidden: Float[Array, "B dim"]
    positions: Int32[Array, " B"]
    limits: Int32[Array, " B"]
    keys: Key[Array, " B"]
    seen: Bool[Array, "B padded_vocab"]
    active: Bool[Array, " B"]


@functools.lru_cache
def decoding_graph(config: GPTConfig, dtype) -> nnx.GraphDef:
    """What makes a model, one block a layer, from its parameters."""
    return nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), dtype=dtype).unstacked()))[0]


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="cache")
def start(
    params: dict[str, Any],
    cache: list[LayerCache],
    tokens: Int32[Array, "B P"],
    starts: Int32[Array, " B"],
    lengths: Int32[Array, " B"],
    limits: Int32[Array, " B"],
    rows: Int32[Array, " B"],
    seen: Bool[Array, "B padded_vocab"],
    seed: UInt32[Array, ""],
    *,
    config: GPTConfig,
    dtype,
) -> DecodeState:
    """Feeds the prompts (prefill).

    Args:
      params: the parameters of the model that `decoding_graph` describes.
      cache: with what stands before `starts`; the buffers are taken over.
      tokens: prompts, padded on the right.
      starts: the position of each prompt's first token.
      lengths: how many tokens of each row count; at least 1.
      limits: the position at which a row has to end.
      rows: the row's number, which chooses its random numbers.
      seen: the ids that the repetition penalty is for.
      seed: of the random numbers.
      config: the model's shape.
      dtype: what it computes in.
    """
    model = nnx.merge(decoding_graph(config, dtype), params)
    positions = starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, cache = model.hidden_cached(tokens, positions, cache)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), row))(rows)
    ends = starts + lengths
    return DecodeState(cache, last, ends, limits, keys, seen, ends < limits)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "top_k"), donate_argnames="state")
def advance(
    params: dict[str, Any],
    state: DecodeState,
    n_steps: Int32[Array, ""],
    knobs: Knobs,
    stop_ids: Int32[Array, " n_stop"],
    forbidden: Bool[Array, " padded_vocab"],
    *,
    top_k: int,
    config: GPTConfig,
    dtype,
) -> tuple[DecodeState, Int32[Array, "B chunk"]]:
    """Draws up to `n_steps` tokens a row, until no row goes on.

    A drawn token is fed at once, so that the cache always holds all that was emitted.

    Args:
      params: the parameters of the model that `decoding_graph` describes.
      state: where the rows stand; the buffers are taken over.
      n_steps: at most `CHUNK`.
      knobs: see `filters.draw`.
      stop_ids: a row that draws one of them emits nothing more.
      forbidden: ids that are never drawn.
      top_k: see there.
      config: the model's shape.
      dtype: what it computes in.

    Returns:
      Where the rows stand now, and the tokens they emitted; -1 at the steps where a row emitted none.
    """
    model = nnx.merge(decoding_graph(config, dtype), params)

    def step(carry):
        i, state, emitted = carry
        logits = penalize(model.logits(state.hidden), state.seen, knobs.repetition_penalty)
        logits = jnp.where(forbidden[None], -jnp.inf, logits)
        # Random numbers belong to a position, so that neither chunks nor buckets change what is drawn there.
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.positions)
        token = draw(logits, keys, knobs, top_k)
        emits = state.active & ~(token[:, None] == stop_ids[None]).any(axis=1)
        emitted = emitted.at[:, i].set(jnp.where(emits, token, -1))
        hidden, cache = model.hidden_cached(token[:, None], state.positions[:, None], state.cache)
        positions = state.positions + emits
        seen = state.seen.at[jnp.arange(len(token)), token].set(True)
        active = emits & (positions < state.limits)
        state = state._replace(cache=cache, hidden=hidden[:, 0], positions=positions, seen=seen, active=active)
        return i + 1, state, emitted

    def goes_on(carry):
        i, state, _ = carry
        return (i < n_steps) & state.active.any()

    emitted = jnp.full((len(state.positions), CHUNK), -1, jnp.int32)
    _, state, emitted = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, emitted))
    return state, emitted
