"""A model that takes the test: it answers the cases' questions, and weighs their gold answers."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track

from tinysft_jax.data.dataset import PreparedData
from tinysft_jax.errors import RunError, UserError
from tinysft_jax.evaluation.answers import Answer
from tinysft_jax.evaluation.cases import HeldOut
from tinysft_jax.model import GPT, default_dtype
from tinysft_jax.model_directory import make_model
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.options import SamplingOptions
from tinysft_jax.sampling.text import text_options
from tinysft_jax.sharding import make_mesh
from tinysft_jax.tokenizer import ChatTokenizer
from tinysft_jax.training.loss import supervised_sums
from tinysft_jax.training.state import starting_model

SECONDS_BETWEEN_LINES = 10.0


class Respondent:
    """A checkpoint, read and found fit for the cases.

    A model without a chat template is taken as fine-tuning would start from it: its table grown by the markers' rows.

    Args:
      checkpoint: a model directory, a work directory or a `.pt` file.
      data: where the cases are from.
      held_out: the cases.

    Raises:
      UserError: if it can't be read, has another tokenizer or chat template, or too short a context.
    """

    def __init__(self, checkpoint: str, data: PreparedData, held_out: Sequence[HeldOut]):
        description, self._params = starting_model(checkpoint, {}, data)
        self._config, self._checkpoint = description.config, checkpoint
        self._trained_length = description.trained_length
        self._tokenizer, self._held_out = ChatTokenizer.from_description(data.description), held_out
        self._longest = max(len(each.ids) for each in held_out)
        if self._longest > self._config.max_seq_len:
            raise UserError(
                f"{checkpoint} has a context of {self._config.max_seq_len} tokens, and the data a conversation of "
                f"{self._longest}; prepare the data with a smaller --max_tokens"
            )

    def answers(self, options: SamplingOptions, batch_size: int) -> list[Answer]:
        """Answers each case.

        Args:
          options: how to draw.
          batch_size: cases at a time.

        Raises:
          RunError: if a loss is not finite.
        """
        trained_length = max(self._trained_length, self._longest)  # each question can be answered
        model = make_model(self._config, self._params, dtype=default_dtype(), trained_length=trained_length)
        decoder = Decoder(model, make_mesh() if jax.device_count() > 1 else None)
        options = text_options(options, self._tokenizer, self._config)
        weigh = _make_weigh(model)
        length = min(-(-self._longest // 64) * 64, self._config.max_seq_len)
        # Cases of about the same length share a batch.
        order = sorted(range(len(self._held_out)), key=lambda i: len(self._held_out[i].prompt))
        answers: dict[int, Answer] = {}
        for first in _progress(range(0, len(order), batch_size), self._checkpoint):
            rows = order[first : first + batch_size]
            held_out = [self._held_out[i] for i in rows]
            prompts = [each.prompt for each in held_out]
            nll = weigh(_batch(held_out, min(batch_size, len(order)), length))[: len(rows)]
            if not np.isfinite(nll).all():
                raise RunError(f"{self._checkpoint} gives a loss that is not finite; it has diverged or is damaged")
            said = decoder.generate(prompts, options, batch_size, first_row=first)
            for i, prompt, ids, loss in zip(rows, prompts, said, nll, strict=True):
                stopped = not decoder.is_full(prompt, ids, options)
                answers[i] = Answer(self._tokenizer.decode(ids), stopped, float(loss))
        return [answers[i] for i in range(len(self._held_out))]


def _make_weigh(model: GPT) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A function of a batch: Σ weight · −log p(target) of each row."""
    graph, state = nnx.split(model)

    @jax.jit
    def weigh(state, batch):
        model = nnx.merge(graph, state)
        hidden, table = model.hidden(batch["tokens"]), model.tok_emb.embedding[...]
        rows = jax.lax.broadcasted_iota(jnp.int32, batch["tokens"].shape, 0)
        targets, weights = batch["targets"], batch["weights"]
        return supervised_sums(hidden, table, targets, weights, rows, len(rows), model.config.vocab_size)[0]

    return lambda batch: np.asarray(weigh(state, batch))


def _batch(held_out: Sequence[HeldOut], n_rows: int, length: int) -> dict[str, np.ndarray]:
    """A conversation a row, from its beginning; what is after its end, no position before it sees."""
    batch = {key: np.zeros((n_rows, length), np.int32) for key in ("tokens", "targets")}
    batch["weights"] = np.zeros((n_rows, length), np.float32)
    for row, each in enumerate(held_out):
        n = len(each.ids)
        batch["tokens"][row, :n] = each.ids
        batch["targets"][row, : n - 1] = each.ids[1:]
        batch["weights"][row, : n - 1] = each.supervised[1:]
    return batch


def _progress(steps: range, name: str) -> Iterator[int]:
    """Goes through the steps with a bar in a terminal, and a line now and then elsewhere."""
    console, shown = Console(stderr=True), time.monotonic()
    if console.is_terminal:
        yield from track(steps, name, console=console, transient=True)
        return
    for n, step in enumerate(steps):
        if time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            print(f"{name}: {n / len(steps):.0%} answered", file=sys.stderr, flush=True)
        yield step
