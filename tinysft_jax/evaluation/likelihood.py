"""How likely texts are under a model: ground truths as answers to questions, and any texts as documents, by a judge."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from tinysft_jax import accelerator
from tinysft_jax.chat import is_blank
from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import Progress, RunError, UserError
from tinysft_jax.data.batches import make_batch
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription, Params, make_model
from tinysft_jax.training.objectives import Batch, answer_log_likelihoods

Model = tuple[ModelDescription, Params]
Given = tuple[Sequence[int], int]  # token ids, and how many of them are given, at least 1; the others are predicted


def make_losses(model: Model, name: str, n_rows: int, longest: int) -> Callable[[Sequence[Given]], list[float]]:
    """A function of up to `n_rows` sequences of at most `longest` ids: each one's negative log-likelihood in nats.

    `name`, the model's, is for messages. Raises: RunError, if a value is not finite.
    """

    def losses(model: GPT, batch: Batch) -> jax.Array:
        return -answer_log_likelihoods(model, batch, 1)[:, 0]

    return make_scorer(losses, model, name, n_rows, longest)


def make_scorer(
    values: Callable[[GPT, Batch], jax.Array], model: Model, name: str, n_rows: int, longest: int
) -> Callable[[Sequence[Given]], list[float]]:
    """Like `make_losses`, with `values` of a batch, `[n_rows]`, each of whose rows is a sequence."""
    description, params = model
    config = description.config
    graph, params = nnx.split(make_model(config, params, dtype=accelerator.default_dtype()))
    step = jax.jit(lambda params, batch: values(nnx.merge(graph, params), batch))
    seq_len = min(-(-longest // 64) * 64, config.max_seq_len)

    def score(sequences: Sequence[Given]) -> list[float]:
        rows = [[(np.array(ids), np.arange(len(ids)) >= given)] for ids, given in sequences]
        batch = make_batch(rows + [[]] * (n_rows - len(rows)), seq_len)
        found = np.asarray(step(params, batch))[: len(rows)]
        if not np.isfinite(found).all():
            raise RunError(f"{name} gives a value that is not finite; it has diverged or is damaged")
        return found.tolist()

    return score


class Judge:
    """A model that says how likely texts are. Raises: UserError, if it can't be read or has no tokenizer."""

    def __init__(self, path: str):
        self._name, self._model = path, open_model(path)
        try:
            self._tokenizer = self._model[0].make_tokenizer()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def fluency(self, texts: Sequence[str], batch_size: int) -> list[tuple[float | None, int]]:
        """The mean log-likelihood of a token of each text, in nats, and how many tokens that is over.

        A text is a document of its own: its tokens in the judge's vocabulary, then end-of-text. All of them are
        predicted but the first, as in pretraining: nothing is before it. Beyond the length that the judge was trained
        to, a document is cut, so that neither the rest nor end-of-text counts. A blank text has None.
        """
        length = self._model[0].trained_length
        whole = {i: self._tokenizer.encode_document(text) for i, text in enumerate(texts) if not is_blank(text)}
        documents = {i: ids[:length].tolist() for i, ids in sorted(whole.items(), key=lambda item: len(item[1]))}
        scores: list[tuple[float | None, int]] = [(None, 0)] * len(texts)
        order, n_rows = list(documents), min(batch_size, len(documents))
        with Progress("judge: texts", len(order)) as progress:
            if n_cut := sum(len(ids) > length for ids in whole.values()):
                progress.say(f"the judge reads {length:,} tokens, and {n_cut:,} of {len(order):,} texts have more")
            losses = make_losses(self._model, self._name, n_rows, max(map(len, documents.values()), default=1))
            for first in range(0, len(order), n_rows or 1):
                batch = order[first : first + n_rows]
                for i, nll in zip(batch, losses([(documents[i], 1) for i in batch]), strict=True):
                    n_predicted = len(documents[i]) - 1
                    scores[i] = (-nll / n_predicted, n_predicted)
                progress.update(first + len(batch))
        return scores
