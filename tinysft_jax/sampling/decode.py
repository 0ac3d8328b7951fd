"""Generation: continues prompts of any lengths, by a loop on the device over a cache of keys and values."""

import functools
import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int32

from tinysft_jax import accelerator
from tinysft_jax.console import UserError
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT, fuse_projections
from tinysft_jax.parameters import Params
from tinysft_jax.sampling.filters import Knobs, SamplingOptions
from tinysft_jax.sampling.kept_cache import KeptCache, lengthen
from tinysft_jax.sampling.steps import CHUNK, DecodeState, advance, prefill, sampled, select
from tinysft_jax.sharding import batch_sharding, batch_shards

Prompt = Sequence[int] | np.ndarray

# Steps of one call to `advance` while someone reads the answer as it is generated.
STREAM_CHUNK = 8
# On an accelerator all steps of a call are done, so a call is shorter; see `advance`.
ACCELERATOR_CHUNK = 16
# Lengths are rounded up to powers of two, from this one on.
SHORTEST_BUCKET = 32
# A batch that rows have left is halved, down to this many: fewer are hardly faster, and each number is compiled.
FEWEST_ROWS = 8
# A stream's prompt is fed in pieces of two lengths: as many of the long ones as it fills, then short ones. That
# compiles little and pads little.
PIECES = (256, SHORTEST_BUCKET)


def generate(
    model: GPT,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 200,
    temperature: float | int = 0.7,
    top_k: int = 50,
    top_p: float | int = 1.0,
    seed: int = 0,
    stop_ids: Iterable[int] = (),
    *,
    batch_size: int = 32,
    **options: Any,
) -> list[list[int]]:
    """The new ids of each prompt, without the stop id; the arguments are those of `SamplingOptions`.

    To generate more than once, keep a `Decoder`: it casts the weights only once. Memory grows with `batch_size`, the
    prompts decoded together; the result does not depend on it.

    Raises:
      UserError: if an option is out of range, or a prompt is empty, holds other ids or leaves no room for an answer.
    """
    options = SamplingOptions(
        max_new_tokens, temperature, top_k, top_p, seed=seed, stop_ids=tuple(map(int, stop_ids)), **options
    )
    params = nnx.to_pure_dict(nnx.state(model))
    return Decoder(model.config, params, model.dtype, model.trained_length).generate(prompts, options, batch_size)


def check_prompt(prompt: Prompt, name: str, config: GPTConfig, length: int | None = None) -> Int32[np.ndarray, " n"]:
    """The prompt's ids; a UserError if they can't be continued up to `length` tokens (None: the context)."""
    ids, vocab_size, length = np.asarray(prompt), config.vocab_size, length or config.max_seq_len
    if not ids.size:
        raise UserError(f"{name} is empty; give at least one token")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{name} is not a list of token ids, which are whole numbers")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise UserError(f"{name} holds the id {outside[0]}; the model's ids are 0 to {vocab_size - 1}")
    if len(ids) >= length:
        limit = f"the model's context is {length}"
        if length < config.max_seq_len:
            limit = f"it may end at {length} (see --max_length; the model's context is {config.max_seq_len})"
        raise UserError(f"{name} has {len(ids)} tokens, and {limit}: no room for an answer; shorten it")
    return ids.astype(np.int32)


class Drawn(NamedTuple):
    """An answer as it was drawn, with the stop id that ended it."""

    ids: list[int]
    log_probs: list[float]  # of each id, by the softmax of logits over temperature, without what is forbidden; or none


class Decoder:
    """A GPT's parameters ready to generate: one dict per layer, matrices in `dtype`, that of matmuls and activations.

    What is compiled depends on the model's shape, the buckets (of rows, prompt and cache), `top_k` and the number of
    stop ids, on no other option and on no parameter: all decoders of one shape share it. Answers end at
    `trained_length`, the length of the longest training sequence, unless the options say otherwise. With a mesh, the
    rows of a batch are divided over its devices, each of which holds all parameters.
    """

    def __init__(
        self, config: GPTConfig, params: Params, dtype, trained_length: int | None = None, mesh: Mesh | None = None
    ):
        self.config, self.trained_length = config, trained_length or config.max_seq_len
        self.dtype, self._mesh, self._shards = jnp.dtype(dtype), mesh, 1 if mesh is None else batch_shards(mesh)
        layers = [jax.tree.map(operator.itemgetter(i), params["blocks"]) for i in range(config.n_layers)]

        def cast(tree: Params) -> Params:
            # Vectors (the norms' scales and biases) stay float32, as they take part in float32 arithmetic.
            return jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype if leaf.ndim > 1 else None), tree)

        params = cast(params | {"blocks": None}) | {"blocks": [fuse_projections(cast(layer)) for layer in layers]}
        self.params = params if mesh is None else jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def fingerprint(self) -> str:
        """The SHA-256 of the weights."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.params):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def generate(
        self, prompts: Sequence[Prompt], options: SamplingOptions, batch_size: int = 32, first_row: int = 0
    ) -> list[list[int]]:
        """The new ids of each prompt, without the stop id.

        A prompt's random numbers depend on its row; `first_row` is that of the first prompt, in a larger task.
        """
        drawn = self._draw(prompts, options, batch_size, first_row)
        return [_without_stop(answer.ids, options) for answer in drawn]

    def sample(self, prompts: Sequence[Prompt], options: SamplingOptions, batch_size: int = 32) -> list[Drawn]:
        """As `generate`, with the stop id and, unless the temperature is 0, with log-probabilities.

        They are of the whole softmax: top-k, top-p and min-p don't count.
        """
        return self._draw(prompts, options, batch_size, log_probs=options.temperature > 0)

    def _draw(
        self,
        prompts: Sequence[Prompt],
        options: SamplingOptions,
        batch_size: int,
        first_row: int = 0,
        log_probs: bool = False,
    ) -> list[Drawn]:
        """The answers, in batches of prompts of about the same length.

        Rows that have ended leave a batch, and its cache grows as it is needed. That changes no answer.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be 1 or more")
        length = self.max_length(options)
        prompts = [check_prompt(prompt, f"prompt {row}", self.config, length) for row, prompt in enumerate(prompts)]
        answers, forbidden = [Drawn([], []) for _ in prompts], self.forbidden(options)
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # neighbours share a bucket
        for first in range(0, len(prompts), batch_size):
            rows = by_length[first : first + batch_size]
            filled = rows + (self._n_rows(len(rows)) - len(rows)) * rows[-1:]  # the last one again
            batch = [prompts[row] for row in filled]
            size = self._slots(max(map(len, batch)))
            state = self.begin(batch, [first_row + row for row in filled], options, n_steps=CHUNK)
            state = self._feed(state, batch, size)
            while rows:
                state, new, is_unfinished = self._advance(state, options, forbidden, CHUNK, log_probs)
                for row, (ids, values) in zip(rows, new, strict=False):
                    answers[row].ids.extend(ids)
                    answers[row].log_probs.extend(values.tolist() if log_probs else [])
                rows, state = self._without_finished(rows, state, is_unfinished)
        return answers

    def _without_finished(
        self, rows: list[int], state: DecodeState, is_unfinished: np.ndarray
    ) -> tuple[list[int], DecodeState]:
        """The rows that stay and their state: in a batch of half the size or less where the unfinished ones fit, and
        with a cache that has room for the next call. None stay once all are finished.
        """
        places = np.flatnonzero(is_unfinished[: len(rows)])
        if not len(places):
            return [], state
        n_rows = max(self._n_rows(len(places)), self._n_rows(FEWEST_ROWS))
        if n_rows <= len(state.positions) // 2:
            rows = [rows[place] for place in places]
            state = select(state, np.pad(places, (0, n_rows - len(places)), mode="edge"))
            state = jax.device_put(state, self._sharding(n_rows))
        end = np.minimum(*jax.device_get((state.positions + CHUNK, state.limits))).max()
        return rows, state._replace(cache=lengthen(state.cache, self.cache_slots(int(end))))

    def stream(
        self, prompt: Prompt, options: SamplingOptions, kept: KeptCache | None = None, row: int = 0
    ) -> Iterator[list[int]]:
        """Yields what `generate` returns for this one prompt, a few ids at a time, as they are generated.

        What `kept` holds of the prompt is not computed again. Afterwards it holds prompt and answer, up to where the
        iterator was left.
        """
        ids = check_prompt(prompt, "the prompt", self.config, self.max_length(options)).tolist()
        return self._stream(ids, options, self.forbidden(options), kept or KeptCache(), row)

    def _stream(
        self, ids: list, options: SamplingOptions, forbidden: np.ndarray, kept: KeptCache, row: int
    ) -> Iterator:
        """A generator, which begins at its first chunk; `stream` raises errors at once."""
        n_slots = self.cache_slots(self.limit(len(ids), options))
        start, cache = kept.take(ids, n_slots)
        padding = (start - len(ids)) % PIECES[-1]
        if len(ids) + padding > n_slots:
            # A piece that reached beyond the cache would be written before its place: feed a part of what was kept
            # again, in its padding's place.
            start -= min(start, padding)
        state = self.begin([ids], [row], options, start, cache)
        while start < len(ids):
            size = next((size for size in PIECES if size <= len(ids) - start), PIECES[-1])
            state = self._feed(state, [ids[start : start + size]], size)
            start += size
        # The reader waits for the first token alone; on an accelerator for a whole chunk, which takes milliseconds.
        n_steps, unfinished = 1, True
        while unfinished:
            kept.ids, kept.layers = [], []  # the buffers are about to be overwritten
            state, ((drawn, _), *_), (unfinished,) = self._advance(state, options, forbidden, n_steps)
            new = _without_stop(drawn, options)
            ids = ids + new
            kept.layers, kept.ids = state.cache, ids
            n_steps = STREAM_CHUNK
            if new:
                yield new

    def max_length(self, options: SamplingOptions) -> int:
        """Tokens of prompt and answer together, at most; a UserError if the options ask for more than the context."""
        length, context = options.max_length or self.trained_length, self.config.max_seq_len
        if length > context:
            raise UserError(f"max_length is {length}, and the model's context is {context}; choose up to that")
        return length

    def is_full(self, prompt: Prompt, answer: list[int], options: SamplingOptions) -> bool:
        """Whether an answer ended because there was no room for more, not with a stop id."""
        return len(prompt) + len(answer) >= self.limit(len(prompt), options)

    def note_on_length(self, lengths: Iterable[int], options: SamplingOptions) -> str:
        """A line for the user if answers of these lengths, prompts included, were cut off short of the context."""
        trained, context = self.trained_length, self.config.max_seq_len
        n = sum(length >= trained for length in lengths)
        if options.max_length is not None or trained == context or not n:
            return ""
        return (
            f"({n:,} answer{'s' if n > 1 else ''} cut off at {trained:,} tokens, the question's included: the model "
            f"was not trained on longer sequences; --max_length allows up to {context:,})"
        )

    def forbidden(self, options: SamplingOptions) -> Bool[np.ndarray, " V"]:
        """Which ids can't be drawn. Raises: UserError, if none is left."""
        forbidden = np.isin(np.arange(self.config.padded_vocab_size), options.forbidden_ids)
        if forbidden[: self.config.vocab_size].all():
            raise UserError("forbidden_ids holds the whole vocabulary: nothing is left to draw")
        return forbidden

    def seen(self, prompts: Sequence[Prompt], options: SamplingOptions) -> Bool[np.ndarray, "B V"]:
        """The ids that the repetition penalty is for at first: all of a prompt but stop ids."""
        seen = np.zeros((len(prompts), self.config.padded_vocab_size), bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
        seen[:, [id_ for id_ in options.stop_ids if 0 <= id_ < self.config.vocab_size]] = False
        return seen

    def begin(
        self,
        prompts: Sequence[Prompt],
        rows: list[int],
        options: SamplingOptions,
        start: int = 0,
        cache: Any = (),
        n_steps: int | None = None,
    ) -> DecodeState:
        """The state of these rows before their prompts' tokens from `start` on.

        If no cache is given, a new one, with room for the prompts and `n_steps` (None: all) of their answers.
        """
        n_rows, config = len(rows), self.config
        limits = [self.limit(len(prompt), options) for prompt in prompts]
        if not cache:
            ends = limits if n_steps is None else map(min, limits, (len(prompt) + n_steps for prompt in prompts))
            shape = (n_rows, config.n_kv_heads, self.cache_slots(max(ends)), config.head_dim)
            empty = functools.partial(jnp.zeros, shape, self.dtype, device=self._sharding(n_rows))
            cache = [(empty(), empty()) for _ in range(config.n_layers)]
        hidden = np.zeros((n_rows, config.dim), self.dtype)
        numbers = (np.array(each, np.int32) for each in (n_rows * [start], limits, rows))
        of_rows = (hidden, *numbers, self.seen(prompts, options))
        return DecodeState(cache, *jax.device_put(of_rows, self._sharding(n_rows)))

    def _feed(self, state: DecodeState, pieces: Sequence[Prompt], size: int) -> DecodeState:
        """Feeds a piece of at most `size` tokens to each row."""
        tokens = np.zeros((len(pieces), size), np.int32)
        for row, piece in zip(tokens, pieces, strict=True):
            row[: len(piece)] = piece
        lengths = np.array([len(piece) for piece in pieces], np.int32)
        tokens, lengths = jax.device_put((tokens, lengths), self._sharding(len(pieces)))
        return prefill(self.params, state, tokens, lengths, self.config)

    def _advance(
        self, state: DecodeState, options: SamplingOptions, forbidden: np.ndarray, n_steps: int, log_probs: bool = False
    ) -> tuple[DecodeState, list[tuple[list[int], Any]], Bool[np.ndarray, " B"]]:
        knobs = Knobs.of(len(state.positions) * [options], options.stop_ids, forbidden)
        top_k = options.top_k if options.top_k < self.config.vocab_size else 0
        return self.advance(state, knobs, top_k, n_steps, sampled if log_probs else None)

    def advance(
        self, state: DecodeState, knobs: Knobs, top_k: int, n_steps: int, report: Callable | None = None
    ) -> tuple[DecodeState, list[tuple[list[int], Any]], Bool[np.ndarray, " B"]]:
        """Draws up to `n_steps` tokens a row.

        Returns the new state, each row's new ids with what the report (see `steps.advance`) says of them, as NumPy
        arrays, and which rows are unfinished.
        """
        all_steps = 0
        if accelerator.is_present():  # one length to read along, and one for batches: each is compiled by itself
            all_steps = STREAM_CHUNK if n_steps <= STREAM_CHUNK else ACCELERATOR_CHUNK
        arguments = np.int32(n_steps), knobs, top_k, self.config, all_steps, report
        state, (ids, found) = advance(self.params, state, *arguments)
        ids, found, positions, limits = jax.device_get((ids, found, state.positions, state.limits))
        drawn = []
        for row, n_drawn in enumerate((ids >= 0).sum(axis=1)):
            of_row = jax.tree.map(operator.itemgetter((row, slice(n_drawn))), found)
            drawn.append((ids[row, :n_drawn].tolist(), of_row))
        return state, drawn, positions < limits

    def _n_rows(self, n: int) -> int:
        """`n` rows, rounded up so that few numbers are compiled, to a multiple of the devices."""
        return -(-_bucket(n) // self._shards) * self._shards

    def _sharding(self, n_rows: int) -> NamedSharding | None:
        """How rows are divided over the mesh; a stream's single one is not."""
        return None if self._mesh is None or n_rows % self._shards else batch_sharding(self._mesh)

    def limit(self, n_prompt: int, options: SamplingOptions) -> int:
        """The position at which an answer ends at the latest."""
        return min(n_prompt + options.max_new_tokens, self.max_length(options))

    def _slots(self, n: int) -> int:
        """`n` positions, rounded up so that few shapes are compiled, to whole pieces."""
        context = -(-self.config.max_seq_len // SHORTEST_BUCKET) * SHORTEST_BUCKET
        return min(max(_bucket(n), SHORTEST_BUCKET), context)

    def cache_slots(self, limit: int) -> int:
        """Of a cache for rows that end before position `limit`: that one has a slot, too, where `advance` needs it."""
        return self._slots(limit) + (SHORTEST_BUCKET if accelerator.is_present() else 0)


def _bucket(n: int) -> int:
    """The first power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def _without_stop(ids: list[int], options: SamplingOptions) -> list[int]:
    return ids[:-1] if ids and ids[-1] in options.stop_ids else ids
