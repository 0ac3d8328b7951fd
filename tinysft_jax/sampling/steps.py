"""The steps of generation that run on the device: reading prompts, drawing tokens, and choosing rows."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import LayerCache, cached_hidden, head_logits
from tinysft_jax.parameters import Params
from tinysft_jax.sampling.filters import Knobs, draw, log_probabilities, penalize, top_k_by_blocks

CHUNK = 64  # steps of one call to `advance`, at most
N_RANKED = 20  # tokens that `ranked` tells of, as many as OpenAI's API allows


class Ranked(NamedTuple):
    """Log-probabilities of a token and of the most likely ones, under the model itself: all ids, temperature 1."""

    log_prob: Float[Array, "*N"]
    top_ids: Int32[Array, "*N ranked"]
    top_log_probs: Float[Array, "*N ranked"]


class DecodeState(NamedTuple):
    """A batch of rows on the device. A row is finished when its position has reached its limit."""

    cache: list[LayerCache]
    hidden: Float[Array, "B dim"]  # what the head reads to predict the next token
    positions: Int32[Array, " B"]  # of the next token
    limits: Int32[Array, " B"]
    rows: Int32[Array, " B"]  # the number of each row, which chooses its random numbers
    seen: Bool[Array, "B V"]  # the ids that the repetition penalty is for


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def prefill(
    params: Params, state: DecodeState, tokens: Int32[Array, "B P"], lengths: Int32[Array, " B"], config: GPTConfig
) -> DecodeState:
    """Feeds the next tokens of the prompts: `lengths` of each row, at least 1; the others are padding."""
    return _read(params, state, tokens, lengths, config)[0]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def feed(
    params: Params,
    state: DecodeState,
    row: Int32[Array, ""],
    start: Int32[Array, ""],
    length: Int32[Array, ""],
    tokens: Int32[Array, " P"],
    targets: Int32[Array, " P"],
    wanted: Bool[Array, ""],
    seen: Bool[Array, " V"],
    config: GPTConfig,
) -> tuple[DecodeState, Ranked]:
    """Feeds one row of several a piece of its prompt: `length` tokens, from position `start` on.

    If that is `wanted`, it also ranks the tokens that follow each, the targets.
    """
    part = jax.tree.map(lambda whole: jax.lax.dynamic_slice_in_dim(whole, row, 1), state)
    part = part._replace(positions=start[None], seen=seen[None])
    part, hidden = _read(params, part, tokens[None], length[None], config)
    state = jax.tree.map(lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, row, 0), state, part)
    return state, _rank(wanted, lambda: head_logits(hidden[0], _table(params, config), config.vocab_size), targets)


def _read(params: Params, state: DecodeState, tokens, lengths, config: GPTConfig):
    """The state after these tokens, and what the head reads after each."""
    positions = state.positions[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, cache = cached_hidden(params, tokens, positions, state.cache, config)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return state._replace(cache=cache, hidden=last, positions=state.positions + lengths), hidden


def _table(params: Params, config: GPTConfig) -> jax.Array:
    return params["tok_emb" if config.tied_head else "head"]["embedding"]


def sampled(_: Float[Array, "B V"], logits: Float[Array, "B V"], tokens: Int32[Array, " B"], knobs: Knobs) -> jax.Array:
    """For `advance`: the log-probabilities with which tokens are drawn, but for top-k, top-p and min-p."""
    return log_probabilities(logits, tokens, knobs.temperature)


def ranked(logits: Float[Array, "B V"], _: Float[Array, "B V"], tokens: Int32[Array, " B"], knobs: Knobs) -> Ranked:
    """For `advance`: the tokens beside the most likely ones, if any row wants that."""
    return _rank(knobs.ranked.any(), lambda: logits, tokens)


def _rank(wanted: Bool[Array, ""], logits: Callable[[], Float[Array, "N V"]], tokens: Int32[Array, " N"]) -> Ranked:
    def rank() -> Ranked:
        log_p = jax.nn.log_softmax(logits())
        values, ids = top_k_by_blocks(log_p, N_RANKED)
        return Ranked(jnp.take_along_axis(log_p, tokens[:, None], axis=1)[:, 0], ids, values)

    nothing = jax.eval_shape(rank)
    return jax.lax.cond(wanted, rank, lambda: jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), nothing))


@functools.partial(jax.jit, static_argnames=("top_k", "config", "all_steps", "report"), donate_argnames="state")
def advance(
    params: Params,
    state: DecodeState,
    n_steps: Int32[Array, ""],
    knobs: Knobs,
    top_k: int,
    config: GPTConfig,
    all_steps: int = 0,
    report: Callable[..., Any] | None = None,
) -> tuple[DecodeState, tuple[Int32[Array, "B chunk"], Any]]:
    """Draws up to `n_steps` (at most `CHUNK`) tokens a row; returns the state and the tokens, padded with -1.

    The tokens include the stop id. With them come, for each, what `report` gives of the model's logits, those that are
    drawn from (penalized, and -inf where forbidden), the tokens and the knobs; None without it.

    A token is fed as soon as it is drawn, so the cache always holds all that was returned. A row that draws a stop id
    is finished. The loop ends when all rows are; but with `all_steps` it makes that many steps, in place of `n_steps`:
    on a GPU, the host would read after each step whether the loop goes on, and the GPU would wait. A finished row then
    writes to the slot of its position, which may be one beyond its limit.
    """
    keys = jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(knobs.seed)
    row_keys = jax.vmap(jax.random.fold_in)(keys, state.rows)
    table = _table(params, config)

    def step(i, state, new):
        of_model = head_logits(state.hidden, table, config.vocab_size)
        logits = penalize(of_model, state.seen, knobs.repetition_penalty)
        logits = jnp.where(knobs.forbidden[None], -jnp.inf, logits)
        # Random numbers belong to a row and a position: neither chunks nor buckets change what is drawn.
        token = draw(logits, jax.vmap(jax.random.fold_in)(row_keys, state.positions), knobs, top_k)
        unfinished = state.positions < state.limits
        active = unfinished & ~(token[:, None] == knobs.stop_ids[None]).any(axis=1)
        hidden, cache = cached_hidden(params, token[:, None], state.positions[:, None], state.cache, config)
        state = state._replace(
            cache=cache,
            hidden=hidden[:, 0],
            positions=state.positions + active,
            limits=jnp.where(active, state.limits, state.positions),
            seen=state.seen.at[jnp.arange(len(token)), token].set(True, unique_indices=True),
        )
        found = jnp.where(unfinished, token, -1), report(of_model, logits, token, knobs) if report else None
        return state, jax.tree.map(lambda whole, part: whole.at[:, i].set(part), new, found)

    def unfinished(carry):
        i, state, _ = carry
        return (i < n_steps) & (state.positions < state.limits).any()

    shapes = jax.eval_shape(report, *2 * [state.seen.astype(jnp.float32)], state.rows, knobs) if report else None
    shape = (len(state.positions), CHUNK)
    reports = jax.tree.map(lambda each: jnp.zeros((*shape, *each.shape[1:]), each.dtype), shapes)
    new = jnp.full(shape, -1, jnp.int32), reports
    if all_steps:
        return jax.lax.fori_loop(0, all_steps, lambda i, carry: step(i, *carry), (state, new))
    carry = jnp.int32(0), state, new
    return jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, *step(*carry)), carry)[1:]


@jax.jit
def select(state: DecodeState, places: Int32[Array, " n"]) -> DecodeState:
    """The state of these rows."""
    return jax.tree.map(lambda of_rows: of_rows[places], state)
