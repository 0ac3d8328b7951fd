"""Generation: prompts of any lengths in, the model's continuations out, all at once or as they are made."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Int32

from tinysft_jax.errors import UserError
from tinysft_jax.model import GPT
from tinysft_jax.sampling import loop
from tinysft_jax.sampling.options import SamplingOptions

# Steps between two looks of the host at what was made, where someone reads along.
STREAM_CHUNK = 8
# Lengths are rounded up to powers of two, from this one on, so that few shapes are ever compiled.
SHORTEST_BUCKET = 32

Prompt = Sequence[int] | np.ndarray


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
    forbidden_ids: Sequence[int] = (),
    batch_size: int = 32,
) -> list[list[int]]:
    """Continues prompts of any lengths.

    To generate more than once, keep a `Decoder`: it prepares the model's weights only once.

    Args:
      model: the model; its `dtype` is what is computed in.
      prompts: token ids; none empty, each shorter than the model's context.
      max_new_tokens: new ids a prompt, at most; the end of the context can make them fewer.
      temperature: logits are divided by it; 0 is greedy.
      top_k: draw among the k most likely ids; 0: off.
      top_p: draw among the most likely ids that together have this probability; 1: off.
      seed: of the random numbers. Prompt i draws the same ones whatever the other prompts are.
      stop_ids: ids that end a continuation.
      forbidden_ids: ids that never come out.
      batch_size: prompts decoded together; memory grows with it, the result does not depend on it.

    Returns:
      The new ids of each prompt, without the stop id.

    Raises:
      UserError: if a number is out of range or a prompt can't be continued.
    """
    stop_ids, forbidden_ids = tuple(map(int, stop_ids)), tuple(map(int, forbidden_ids))
    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed, stop_ids, forbidden_ids)
    return Decoder(model).generate(prompts, options, batch_size)


class Decoder:
    """A model made ready to generate: one block a layer, weights in the precision of the computation.

    What is compiled depends on the model's shape, the buckets (of rows, prompt and cache) and `top_k`, on no other
    option and on no parameter: all decoders of one shape share it.
    """

    def __init__(self, model: GPT):
        self.config, self._dtype = model.config, model.dtype
        params = nnx.to_pure_dict(nnx.state(model.unstacked()))
        # Vectors (the norms' scales and biases) stay float32, as they take part in float32 arithmetic.
        self._params = jax.tree.map(lambda leaf: leaf.astype(model.dtype) if leaf.ndim > 1 else leaf, params)

    def generate(self, prompts: Sequence[Prompt], options: SamplingOptions, batch_size: int = 32) -> list[list[int]]:
        """Continues prompts; see the function `generate`."""
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be 1 or more")
        names = [f"prompt {row}" for row in range(len(prompts))] if len(prompts) > 1 else ["the prompt"]
        prompts = [self._checked(prompt, name) for prompt, name in zip(prompts, names, strict=False)]
        answers = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # neighbours share a bucket
        for first in range(0, len(prompts), batch_size):
            rows = by_length[first : first + batch_size]
            for chunk in self._chunks([prompts[row] for row in rows], rows, options, loop.CHUNK):
                for row, ids in zip(rows, chunk, strict=True):
                    answers[row] += ids
        return answers

    def stream(self, prompt: Prompt, options: SamplingOptions) -> Iterator[list[int]]:
        """Yields what `generate` gives for this one prompt, a few ids at a time, as they are made."""
        chunks = self._chunks([self._checked(prompt, "the prompt")], [0], options, STREAM_CHUNK)
        return (ids for (ids,) in chunks if ids)

    def _chunks(
        self, prompts: list[np.ndarray], rows: list[int], options: SamplingOptions, n_steps: int
    ) -> Iterator[list[list[int]]]:
        """Yields each prompt's new ids, up to `n_steps` at a time, until no row goes on."""
        forbidden = self._forbidden(options)
        state = self._prefill(prompts, rows, options)
        while True:
            state, emitted = loop.advance(
                self._params,
                state,
                np.int32(n_steps),
                np.float32(options.temperature),
                np.float32(options.top_p),
                np.array(options.stop_ids, np.int32),
                forbidden,
                top_k=options.top_k if options.top_k < self.config.vocab_size else 0,
                config=self.config,
                dtype=self._dtype,
            )
            emitted, active = jax.device_get((emitted, state.active))
            yield [row[row >= 0].tolist() for row in emitted[: len(prompts)]]
            if not active.any():
                return

    def _prefill(self, prompts: list[np.ndarray], rows: list[int], options: SamplingOptions) -> loop.DecodeState:
        """Runs the prompts through the model, as the rows with these numbers."""
        context, padded = self.config.max_seq_len, _bucket(len(prompts))
        # Rows that only fill the bucket have one token of prompt and no room for more.
        filling = padded - len(prompts)
        lengths = [len(prompt) for prompt in prompts] + filling * [1]
        limits = [min(len(prompt) + options.max_new_tokens, context) for prompt in prompts] + filling * [0]
        tokens = np.zeros((padded, min(_bucket(max(lengths), SHORTEST_BUCKET), context)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        model = nnx.merge(loop.decoding_graph(self.config, self._dtype), self._params)
        return loop.start(
            self._params,
            model.init_cache(padded, min(_bucket(max(limits), SHORTEST_BUCKET), context)),
            tokens,
            np.zeros(padded, np.int32),
            np.array(lengths, np.int32),
            np.array(limits, np.int32),
            np.array(rows + filling * [0], np.int32),
            np.uint32(options.seed),
            config=self.config,
            dtype=self._dtype,
        )

    def _forbidden(self, options: SamplingOptions) -> Bool[np.ndarray, " padded_vocab"]:
        forbidden = np.isin(np.arange(self.config.padded_vocab_size), options.forbidden_ids)
        if forbidden[: self.config.vocab_size].all():
            raise UserError("forbidden_ids holds the whole vocabulary: nothing is left to draw")
        return forbidden

    def _checked(self, prompt: Prompt, name: str) -> Int32[np.ndarray, " n"]:
        ids, vocab_size, context = np.asarray(prompt), self.config.vocab_size, self.config.max_seq_len
        if not ids.size:
            raise UserError(f"{name} is empty; give at least one token")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"{name} is not a list of token ids, which are whole numbers")
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.size:
            raise UserError(f"{name} holds the id {outside[0]}; the model's ids are 0 to {vocab_size - 1}")
        if len(ids) >= context:
            raise UserError(
                f"{name} has {len(ids)} tokens, and the model's context is {context}: no room for an answer; shorten it"
            )
        return ids.astype(np.int32)


def _bucket(n: int, shortest: int = 1) -> int:
    """The first power of two that is at least `n` and at least `shortest`."""
    return max(shortest, 1 << (n - 1).bit_length())
