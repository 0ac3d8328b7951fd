"""How often reward models rank the answers of validation pairs right."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import Progress, UserError
from tinysft_jax.data.mixture import Part
from tinysft_jax.data.store import PreparedData, Split
from tinysft_jax.evaluation import report as reports
from tinysft_jax.evaluation.likelihood import Model, make_scorer
from tinysft_jax.model import GPT
from tinysft_jax.training.objectives import Batch, conversation_scores
from tinysft_jax.training.state import check_tokenizer

SIDES = ("chosen", "rejected")


class Ranking:
    """Scores of up to `flags.cases` random validation pairs of each data set, by the reward models of `flags`.

    Raises: UserError, if there are none, or a model is none or has another tokenizer or a shorter context.
    """

    def __init__(self, flags: Namespace, parts: Sequence[Part]):
        speakers = {"model": flags.checkpoint} | ({"baseline": flags.baseline} if flags.baseline else {})
        models = {speaker: _load(path, parts) for speaker, path in speakers.items()}
        self._settings = speakers | {"data": flags.data, "cases": flags.cases, "seed": flags.seed}
        # Of each data set, the pairs, and of each speaker float64[pairs, 2].
        self._found: list[tuple[str, np.ndarray, dict[str, np.ndarray]]] = []
        for part in parts:
            split = part.data.split("valid")
            if not len(split):
                raise UserError(f"{part.data.directory} has no validation pairs; prepare it with a --valid_fraction")
            pairs = np.random.default_rng(flags.seed).permutation(len(split) // 2)[: flags.cases]
            scores = {
                name: _scores(model, speakers[name], split, pairs, flags.batch_size) for name, model in models.items()
            }
            self._found.append((f"{part.name}/preference".lstrip("/"), pairs, scores))

    def report(self) -> reports.Report:
        """The share of pairs whose chosen answer scores higher, and by how much."""
        tasks = {}
        for task, _, scores in self._found:
            margins = {speaker: (of[:, 0] - of[:, 1]).tolist() for speaker, of in scores.items()}
            right = {speaker: [margin > 0 for margin in of] for speaker, of in margins.items()}
            tasks[task] = {"ranked_right": reports.columns_of(right), "margin": reports.columns_of(margins)}
        return {"format_version": reports.FORMAT_VERSION, "settings": self._settings, "tasks": tasks}

    def write_answers(self, path: Path) -> None:
        """Writes a JSON object for each pair, with the scores of each speaker."""
        with path.open("w", encoding="utf-8") as file:
            for task, pairs, scores in self._found:
                for i, pair in enumerate(pairs.tolist()):
                    of_pair = {speaker: dict(zip(SIDES, of[i].tolist(), strict=True)) for speaker, of in scores.items()}
                    file.write(json.dumps({"task": task, "pair": pair, **of_pair}) + "\n")


def _load(path: str, parts: Sequence[Part]) -> Model:
    description, params = open_model(path, reward=True)
    check_tokenizer(description, parts[0].data.tokenizer, path)
    context, longest = description.config.max_seq_len, max(_longest(part.data) for part in parts)
    if longest > context:
        raise UserError(f"{path} has a context of {context} tokens, and the data a conversation of {longest}")
    return description, params


def _longest(data: PreparedData) -> int:
    return data.description["splits"]["valid"]["longest"]


def _scores(model: Model, name: str, split: Split, pairs: np.ndarray, batch_size: int) -> np.ndarray:
    """A reward model's scores of the chosen and the rejected conversation of each pair; `name` is for messages."""

    def values(model: GPT, batch: Batch) -> jax.Array:
        return conversation_scores(model, batch, 1)[:, 0]

    score = make_scorer(values, model, name, batch_size, split.totals["longest"])
    conversations, scores = split.conversations_of(pairs).tolist(), []
    with Progress(f"{name}: scores", len(conversations)) as progress:
        for first in range(0, len(conversations), batch_size):
            ids = (split.conversation(index)[0].tolist() for index in conversations[first : first + batch_size])
            scores += score([(each, 1) for each in ids])
            progress.update(len(scores))
    return np.reshape(scores, (-1, 2))
