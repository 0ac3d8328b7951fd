"""Generation: prompts of any lengths in, continuations out, by a loop on the device over a cache of keys and values."""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, Key, UInt32

from tinysft_jax.console import UserError
from tinysft_jax.model import GPT, GPTConfig, LayerCache
from tinysft_jax.sampling.filters import Knobs, SamplingOptions, draw, penalize
from tinysft_jax.sampling.text import Prompt, check_prompt, forbidden_ids, seen_ids
from tinysft_jax.sharding import batch_sharding, batch_shards


class KeptCache:
    """The keys and values of one row of tokens, on the device.

    A prompt takes them over as far as it begins with the same ids, whatever became of the rest: slots behind a
    position are never seen. So going on, going back and starting anew are the same thing.

    Attributes:
      ids: the tokens whose keys and values are held.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Holds nothing."""
        self.ids: list[int] = []
        self._layers: list[LayerCache] = []

    def hold(self, ids: Sequence[int], layers: list[LayerCache]) -> None:
        """Holds the keys and values of these ids."""
        self.ids, self._layers = list(ids), layers

    def take(self, ids: Sequence[int], length: int) -> tuple[int, list[LayerCache]]:
        """Hands over what is held, to be written to, and holds nothing afterwards.

        Args:
          ids: a prompt, not empty.
          length: slots that are needed.

        Returns:
          How many of the prompt's first ids need not be computed (its last one always has to be, for what follows
          it), and the cache with at least so many slots; no layers if nothing is held.
        """
        layers, n_held = self._layers, 0
        for mine, yours in zip(self.ids, ids[:-1], strict=False):
            if mine != yours:
                break
            n_held += 1
        self.clear()
        return n_held, [tuple(_lengthened(part, length) for part in layer) for layer in layers]


def _lengthened(part, length: int):
    missing = length - part.shape[2]
    return part if missing <= 0 else jnp.pad(part, ((0, 0), (0, 0), (0, missing), (0, 0)))


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


# Steps between two looks of the host at what was made, where someone reads along.
STREAM_CHUNK = 8
# Lengths are rounded up to powers of two, from this one on.
SHORTEST_BUCKET = 32
# One row's prompt is fed in pieces of two lengths, whatever its own: as many of the long ones as it fills, then short
# ones. That compiles little and leaves little padding.
PIECES = (256, SHORTEST_BUCKET)


def generate(
    model: GPT,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 200,
    temperature: float | int = 0.7,
    top_k: int = 50,
    top_p: float | int = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    *,
    min_p: float | int = 0.0,
    repetition_penalty: float | int = 1.0,
    forbidden_ids: Sequence[int] = (),
    max_length: int | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """Continues prompts of any lengths.

    To generate more than once, keep a `Decoder`: it prepares the model's weights only once.

    Args:
      model: the model; its `dtype` is what is computed in.
      prompts: token ids; none empty, each shorter than `max_length`.
      max_new_tokens: new ids a prompt, at most; `max_length` can make them fewer.
      temperature: logits are divided by it; 0 is greedy.
      top_k: draw among the k most likely ids; 0: off.
      top_p: draw among the most likely ids that together have this probability; 1: off.
      seed: of the random numbers. Prompt i draws the same ones whatever the other prompts are.
      stop_ids: ids that end a continuation.
      min_p: draw only ids that are at least this fraction as likely as the most likely one; 0: off.
      repetition_penalty: above 1, ids that occurred become less likely; 1: off.
      forbidden_ids: ids that never come out.
      max_length: ids of a prompt and its continuation together, at most, up to the model's context; None: the length
        that the model was trained to.
      batch_size: prompts decoded together; memory grows with it, the result does not depend on it.

    Returns:
      The new ids of each prompt, without the stop id.

    Raises:
      UserError: if a number is out of range or a prompt can't be continued.
    """
    options = SamplingOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_length=max_length,
        seed=seed,
        stop_ids=tuple(map(int, stop_ids)),
        forbidden_ids=tuple(map(int, forbidden_ids)),
    )
    return Decoder(model).generate(prompts, options, batch_size)


class Decoder:
    """A model made ready to generate: one block a layer, weights in the precision of the computation.

    What is compiled depends on the model's shape, the buckets (of rows, prompt and cache) and `top_k`, on no other
    option and on no parameter: all decoders of one shape share it.

    Args:
      model: the model.
      mesh: divides the rows of a batch over its devices; each has all the weights then. None: the arrays' own devices.
    """

    def __init__(self, model: GPT, mesh: Mesh | None = None):
        self.config, self._dtype, self._mesh = model.config, model.dtype, mesh
        self.trained_length = model.trained_length
        params = nnx.to_pure_dict(nnx.state(model.unstacked()))
        # Vectors (the norms' scales and biases) stay float32, as they take part in float32 arithmetic.
        params = jax.tree.map(lambda leaf: leaf.astype(model.dtype) if leaf.ndim > 1 else leaf, params)
        self._params = params if mesh is None else jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def fingerprint(self) -> str:
        """The SHA-256 of the weights."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self._params):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def generate(
        self, prompts: Sequence[Prompt], options: SamplingOptions, batch_size: int = 32, first_row: int = 0
    ) -> list[list[int]]:
        """Continues prompts; see the function `generate`.

        Args:
          prompts: token ids.
          options: how to draw.
          batch_size: prompts decoded together.
          first_row: the first prompt's number among all those of a larger task, which its random numbers depend on.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be 1 or more")
        names = [f"prompt {row}" for row in range(len(prompts))] if len(prompts) > 1 else ["the prompt"]
        prompts = [self.check_prompt(prompt, name, options) for prompt, name in zip(prompts, names, strict=False)]
        answers, forbidden = [[] for _ in prompts], forbidden_ids(options, self.config)
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # neighbours share a bucket
        for first in range(0, len(prompts), batch_size):
            rows = by_length[first : first + batch_size]
            state = self._prefill([prompts[row] for row in rows], [first_row + row for row in rows], options)
            goes_on = True
            while goes_on:
                state, new, goes_on = self._advance(state, options, forbidden, CHUNK)
                for row, ids in zip(rows, new, strict=False):
                    answers[row] += ids
        return answers

    def stream(
        self, prompt: Prompt, options: SamplingOptions, kept: KeptCache | None = None, row: int = 0
    ) -> Iterator[list[int]]:
        """Yields what `generate` gives for this one prompt, a few ids at a time, as they are made.

        Args:
          prompt: token ids.
          options: how to draw.
          kept: what it holds of the prompt is not computed again; it holds prompt and answer afterwards, up to where
            the iterator was left.
          row: chooses the random numbers.
        """
        ids, forbidden = self.check_prompt(prompt, "the prompt", options).tolist(), forbidden_ids(options, self.config)
        kept = KeptCache() if kept is None else kept

        def chunks() -> Iterator[list[int]]:
            state, said, n_steps, goes_on = self._extend(kept, ids, row, options), list(ids), 1, True
            while goes_on:
                kept.clear()  # what it holds is about to be written over
                state, (new, *_), goes_on = self._advance(state, options, forbidden, n_steps)
                said += new
                kept.hold(said, state.cache)
                n_steps = STREAM_CHUNK  # only the first token is not waited for
                if new:
                    yield new

        return chunks()  # what is wrong has been said by now, not at the first chunk

    def is_full(self, prompt: Prompt, answer: list[int], options: SamplingOptions) -> bool:
        """Whether an answer ended because there was no room for more, not with a stop id."""
        return len(prompt) + len(answer) >= self._limit(len(prompt), options)

    def note_on_length(self, lengths: Iterable[int], options: SamplingOptions) -> str:
        """A line for the user if answers ended where the model's training did, before its context; else empty.

        Args:
          lengths: of each prompt and its answer together.
          options: how they were drawn.
        """
        trained, context = self.trained_length, self.config.max_seq_len
        n = sum(length >= trained for length in lengths)
        if options.max_length is not None or trained == context or not n:
            return ""
        return (
            f"({n:,} answer{'s' if n > 1 else ''} cut off at {trained:,} tokens, the question's included: the model "
            f"was not trained to more; --max_length goes on, up to {context:,})"
        )

    def max_length(self, options: SamplingOptions) -> int:
        """Positions that prompt and answer may take together.

        Raises:
          UserError: if the options ask for more than the model's context.
        """
        length, context = options.max_length or self.trained_length, self.config.max_seq_len
        if length > context:
            raise UserError(f"max_length is {length}, and the model's context is {context}; choose up to that")
        return length

    def check_prompt(self, prompt: Prompt, name: str, options: SamplingOptions) -> Int32[np.ndarray, " n"]:
        """The ids of a prompt that can be continued; see `prompt.check_prompt`."""
        return check_prompt(prompt, name, self.config, self.max_length(options))

    def _advance(
        self, state: DecodeState, options: SamplingOptions, forbidden: Bool[np.ndarray, " V"], n_steps: int
    ) -> tuple[DecodeState, list[list[int]], bool]:
        """Draws up to `n_steps` tokens: the new state, each row's new ids, and whether any row goes on."""
        knobs = (options.temperature, options.top_p, options.min_p, options.repetition_penalty)
        state, emitted = advance(
            self._params,
            state,
            np.int32(n_steps),
            Knobs(*map(np.float32, knobs)),
            np.array(options.stop_ids, np.int32),
            forbidden,
            top_k=options.top_k if options.top_k < self.config.vocab_size else 0,
            config=self.config,
            dtype=self._dtype,
        )
        emitted, active = jax.device_get((emitted, state.active))
        return state, [row[row >= 0].tolist() for row in emitted], bool(active.any())

    def _prefill(self, prompts: list[np.ndarray], rows: list[int], options: SamplingOptions) -> DecodeState:
        """Feeds the prompts, as the rows with these numbers, all at once."""
        shards = 1 if self._mesh is None else batch_shards(self._mesh)
        padded = -(-_bucket(len(prompts)) // shards) * shards
        # Rows that only fill the bucket have one token of prompt and no room for more.
        filling = padded - len(prompts)
        prompts, rows = prompts + filling * [np.zeros(1, np.int32)], rows + filling * [0]
        lengths = [len(prompt) for prompt in prompts]
        limits = [self._limit(length, options) for length in lengths[: padded - filling]] + filling * [0]
        tokens = np.zeros((padded, self._slots(max(lengths))), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        cache = self._empty_cache(padded, self._slots(max(limits)))
        seen = seen_ids(prompts, options, self.config)
        return self._start(cache, tokens, padded * [0], lengths, limits, rows, seen, options.seed)

    def _extend(self, kept: KeptCache, ids: list[int], row: int, options: SamplingOptions) -> DecodeState:
        """Feeds one prompt from where `kept` has nothing of it, in pieces."""
        limit = self._limit(len(ids), options)
        start, cache = kept.take(ids, self._slots(limit))
        cache = cache or self._empty_cache(1, self._slots(limit))
        seen = seen_ids([np.array(ids, np.int32)], options, self.config)
        while start < len(ids):
            size = next((size for size in PIECES if size <= len(ids) - start), PIECES[-1])
            piece = ids[start : start + size]
            tokens = np.array([piece + (size - len(piece)) * [0]], np.int32)
            state = self._start(cache, tokens, [start], [len(piece)], [limit], [row], seen, options.seed)
            start, cache = start + len(piece), state.cache
        return state

    def _start(self, cache, tokens, starts, lengths, limits, rows, seen, seed: int) -> DecodeState:
        """Calls `start` with the rows' arrays on the rows' devices."""
        numbers = (np.array(each, np.int32) for each in (starts, lengths, limits, rows))
        arrays = jax.device_put((tokens, *numbers, seen), self._sharding(len(tokens)))
        return start(self._params, cache, *arrays, np.uint32(seed), config=self.config, dtype=self._dtype)

    def _empty_cache(self, n_rows: int, n_slots: int) -> list[LayerCache]:
        model = nnx.merge(decoding_graph(self.config, self._dtype), self._params)
        return model.init_cache(n_rows, n_slots, self._sharding(n_rows))

    def _sharding(self, n_rows: int) -> NamedSharding | None:
        """How rows lie on the mesh; a stream's single one is not divided."""
        return None if self._mesh is None or n_rows % batch_shards(self._mesh) else batch_sharding(self._mesh)

    def _limit(self, n_prompt: int, options: SamplingOptions) -> int:
        """The position at which an answer has to end."""
        return min(n_prompt + options.max_new_tokens, self.max_length(options))

    def _slots(self, n: int) -> int:
        """`n`, rounded up so that few shapes are ever compiled."""
        return min(max(_bucket(n), SHORTEST_BUCKET), self.config.max_seq_len)


def _bucket(n: int) -> int:
    """The first power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()
