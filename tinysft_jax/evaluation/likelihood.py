"""What models say of texts: how likely ground truths and documents are, and the scores of reward models."""

import sys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from tinysft_jax import accelerator
from tinysft_jax.chat import is_blank
from tinysft_jax.checkpoints import load_tokenizer, open_model
from tinysft_jax.console import RunError, UserError
from tinysft_jax.parameters import ModelDescription, Params
from tinysft_jax.sharding import batch_shards, make_mesh
from tinysft_jax.training.judges import log_probs_under, values_of
from tinysft_jax.training.loss import Softmax
from tinysft_jax.training.packed import Function, Given

Model = tuple[ModelDescription, Params]


def score(
    function: Function, model: Model, name: str, sequences: Sequence[Given], batch_size: int
) -> list[Float32[np.ndarray, " _"]]:
    """The function's values at the positions of each sequence that predict, as of `PackedValues`.

    `name`, the model's, is for messages. Raises: RunError, if a value is not finite.
    """
    (description, params), mesh, longest = model, make_mesh(), max((len(ids) for ids, _ in sequences), default=1)
    seq_len, shards = min(-(-longest // 64) * 64, description.config.max_seq_len), batch_shards(mesh)
    n_rows = -(-min(batch_size, len(sequences) or 1) // shards) * shards
    options = mesh, accelerator.default_dtype(), n_rows, seq_len, f"{name}: scores"
    found = values_of(function, description.config, params, *options)(sequences)
    if not all(np.isfinite(values).all() for values in found):
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
        function = log_probs_under(Softmax(self._model[0].config.vocab_size))
        found = score(function, self._model, self._name, list(kept.values()), batch_size)
        scores = {i: float(log_p.mean()) for i, log_p in zip(kept, found, strict=True)}
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
