"""What models say of texts: how likely ground truths and documents are, and the scores of reward models."""

import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from tinysft_jax import accelerator
from tinysft_jax.chat import is_blank
from tinysft_jax.checkpoints import load_tokenizer, open_model
from tinysft_jax.console import Progress, RunError, UserError
from tinysft_jax.data.batches import make_batch
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription, Params, make_model
from tinysft_jax.training.objectives import Batch, answer_log_likelihoods

Model = tuple[ModelDescription, Params]
# Token ids, and how many of them are given, at least 1; the others are predicted.
Given = tuple[Sequence[int] | np.ndarray, int]


def score(
    values: Callable[[GPT, Batch, int], jax.Array], model: Model, name: str, sequences: Sequence[Given], batch_size: int
) -> list[float]:
    """The value of each sequence, by `answer_log_likelihoods`, `conversation_scores` or the like.

    `name`, the model's, is for messages. Raises: RunError, if a value is not finite.
    """
    (description, params), n_rows = model, min(batch_size, len(sequences))
    graph, params = nnx.split(make_model(description.config, params, dtype=accelerator.default_dtype()))
    step = jax.jit(lambda params, batch: values(nnx.merge(graph, params), batch, 1)[:, 0])
    longest = max((len(ids) for ids, _ in sequences), default=1)
    seq_len, found = min(-(-longest // 64) * 64, description.config.max_seq_len), []
    with Progress(f"{name}: scores", len(sequences)) as progress:
        for first in range(0, len(sequences), batch_size):
            of_batch = sequences[first : first + batch_size]
            rows = [[(np.array(ids), np.arange(len(ids)) >= given)] for ids, given in of_batch]
            batch = make_batch(rows + [[]] * (n_rows - len(rows)), seq_len)
            found += np.asarray(step(params, batch))[: len(rows)].tolist()
            progress.update(len(found))
    if not np.isfinite(found).all():
        raise RunError(f"{name} gives a value that is not finite; it has diverged or is damaged")
    return found


class Judge:
    """A model that says how likely texts are. Raises: UserError, if it can't be read or has no tokenizer."""

    def __init__(self, path: str):
        self._name, self._tokenizer, self._model = path, load_tokenizer(path), open_model(path)

    def fluency(self, texts: Sequence[str], batch_size: int, questions: Sequence[str] = ()) -> list[float | None]:
        """The mean log-likelihood of a token of each text, in nats.

        A text is a document of its own: its tokens in the judge's vocabulary, then end-of-text. All of them are
        predicted but the first, as in pretraining: nothing is before it. If the judge has a chat template, and
        `questions` one for each text, it is the answer to it instead: its tokens and what ends it count. Beyond the
        length that the judge was trained to, either is cut, so that neither the rest nor end-of-text counts. A text
        that is blank, that the template refuses, or that is cut as a whole has None.
        """
        length = self._model[0].trained_length
        asked = questions if questions and self._tokenizer.template is not None else [None] * len(texts)
        whole = {i: sequence for i, sequence in enumerate(map(self._encode, texts, asked)) if sequence}
        if cut := sum(len(ids) > length for ids, _ in whole.values()):
            print(f"the judge reads {length:,} tokens, and {cut:,} of {len(whole):,} texts have more", file=sys.stderr)
        kept = {i: (ids[:length], given) for i, (ids, given) in whole.items() if given < length}
        totals = score(answer_log_likelihoods, self._model, self._name, list(kept.values()), batch_size)
        scores = {i: total / (len(kept[i][0]) - kept[i][1]) for i, total in zip(kept, totals, strict=True)}
        return [scores.get(i) for i in range(len(texts))]

    def _encode(self, text: str, question: str | None) -> Given | None:
        """A text as a document, or as the answer to a question; None if it is blank or the template refuses it."""
        if question is None:
            return None if is_blank(text) else (self._tokenizer.encode_document(text), 1)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        try:
            ids, supervised = self._tokenizer.encode_chat(messages)
        except UserError:
            return None
        answer = np.flatnonzero(supervised)
        return ids[: answer[-1] + 1], int(answer[0])
