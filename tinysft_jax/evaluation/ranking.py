"""How often reward models rank the answers of validation pairs right."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from tinysft_jax import accelerator
from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import Progress, RunError, UserError
from tinysft_jax.data.batches import make_batch
from tinysft_jax.data.store import PreparedData, Split
from tinysft_jax.evaluation import report as reports
from tinysft_jax.evaluation.likelihood import Model
from tinysft_jax.parameters import make_model
from tinysft_jax.training.objectives import conversation_scores
from tinysft_jax.training.state import check_tokenizer

SIDES = ("chosen", "rejected")


class Ranking:
    """Scores of up to `flags.cases` random validation pairs by the reward models of `flags`.

    Raises: UserError, if the data are no pairs, or a model is none or has another tokenizer or a shorter context.
    """

    def __init__(self, flags: Namespace):
        data = PreparedData(flags.data)
        split = data.split("valid")
        if data.per_item == 1 or not len(split):
            found = "conversations, not pairs" if data.per_item == 1 else "no validation pairs"
            raise UserError(f"{data.directory} holds {found}: a reward model is measured by pairs")
        self._pairs = np.random.default_rng(flags.seed).permutation(len(split) // 2)[: flags.cases]
        speakers = {"model": flags.checkpoint} | ({"baseline": flags.baseline} if flags.baseline else {})
        models = {speaker: _load(path, data) for speaker, path in speakers.items()}
        conversations = split.conversations_of(self._pairs).tolist()
        self._scores = {
            speaker: np.reshape(_scores(model, speakers[speaker], split, conversations, flags.batch_size), (-1, 2))
            for speaker, model in models.items()
        }
        self._settings = speakers | {"data": str(flags.data), "cases": flags.cases, "seed": flags.seed}

    def report(self) -> reports.Report:
        """The share of pairs whose chosen answer scores higher, and by how much."""
        margins = {speaker: (of[:, 0] - of[:, 1]).tolist() for speaker, of in self._scores.items()}
        right = {speaker: [margin > 0 for margin in of] for speaker, of in margins.items()}
        figures = {"ranked_right": reports.columns_of(right), "margin": reports.columns_of(margins)}
        return {"format_version": reports.FORMAT_VERSION, "settings": self._settings, "tasks": {"preference": figures}}

    def write_answers(self, path: Path) -> None:
        """Writes a JSON object for each pair, with the scores of each speaker."""
        with path.open("w", encoding="utf-8") as file:
            for i, pair in enumerate(self._pairs.tolist()):
                scores = {
                    speaker: dict(zip(SIDES, of[i].tolist(), strict=True)) for speaker, of in self._scores.items()
                }
                file.write(json.dumps({"pair": pair, **scores}) + "\n")


def _load(path: str, data: PreparedData) -> Model:
    description, params = open_model(path, reward=True)
    check_tokenizer(description, data.tokenizer, path)
    context, longest = description.config.max_seq_len, data.description["splits"]["valid"]["longest"]
    if longest > context:
        raise UserError(f"{path} has a context of {context} tokens, and the data a conversation of {longest}")
    return description, params


def _scores(model: Model, name: str, split: Split, conversations: Sequence[int], batch_size: int) -> list[float]:
    """A reward model's score of each conversation, computed a row each."""
    description, params = model
    config = description.config
    graph, params = nnx.split(make_model(config, params, dtype=accelerator.default_dtype()))
    seq_len = min(-(-split.totals["longest"] // 64) * 64, config.max_seq_len)
    step = jax.jit(lambda params, batch: conversation_scores(nnx.merge(graph, params), batch, 1)[:, 0])
    scores: list[float] = []
    with Progress(f"{name}: scores", len(conversations)) as progress:
        while len(scores) < len(conversations):
            here = conversations[len(scores) : len(scores) + batch_size]
            rows = [[split.conversation(index)] for index in here] + [[]] * (batch_size - len(here))
            scores += np.asarray(step(params, make_batch(rows, seq_len)))[: len(here)].tolist()
            progress.update(len(scores))
    if not np.isfinite(scores).all():
        raise RunError(f"{name} gives a score that is not finite; it has diverged or is damaged")
    return scores
