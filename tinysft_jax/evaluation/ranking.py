"""How often reward models rank the answers of validation pairs right."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import UserError
from tinysft_jax.data.forms import SIDES
from tinysft_jax.data.mixture import Part
from tinysft_jax.evaluation import report as reports
from tinysft_jax.evaluation.likelihood import Model, score
from tinysft_jax.training.judges import next_scores
from tinysft_jax.training.state import check_context, check_tokenizer


def rank(flags: Namespace, parts: Sequence[Part]) -> tuple[reports.Report, list[dict[str, Any]]]:
    """Scores up to `flags.cases` random validation pairs of each data set by the reward models `flags.models`.

    Returns: the report, and a line for each pair, with the scores of each speaker. Raises: UserError, if there are no
    pairs, or a model is no reward model or has another tokenizer or a shorter context.
    """
    models = {speaker: _load(path, parts) for speaker, path in flags.models.items()}
    tasks, lines = {}, []
    for part in parts:
        split = part.data.split("valid")
        if not len(split):
            raise UserError(f"{part.data.directory} has no validation pairs; prepare it with a --valid_fraction")
        pairs = np.random.default_rng(flags.seed).permutation(len(split) // 2)[: flags.cases]
        conversations = [(split.conversation(index)[0], 1) for index in split.conversations_of(pairs).tolist()]
        scores, margins = {}, {}
        for speaker, model in models.items():
            values = score(next_scores, model, flags.models[speaker], conversations, flags.batch_size)
            found = [float(of[-1]) for of in values]
            scores[speaker] = list(zip(found[::2], found[1::2], strict=True))
            margins[speaker] = [chosen - rejected for chosen, rejected in scores[speaker]]
        right = {speaker: [margin > 0 for margin in of] for speaker, of in margins.items()}
        task = f"{part.name}/preference".lstrip("/")
        tasks[task] = {"ranked_right": reports.columns_of(right), "margin": reports.columns_of(margins)}
        for i, pair in enumerate(pairs.tolist()):
            of_pair = {speaker: dict(zip(SIDES, of[i], strict=True)) for speaker, of in scores.items()}
            lines.append({"task": task, "pair": pair, **of_pair})
    settings = flags.models | {"data": flags.data, "cases": flags.cases, "seed": flags.seed}
    return reports.make_report(settings, tasks, flags.models), lines


def _load(path: str, parts: Sequence[Part]) -> Model:
    description, params = open_model(path, reward=True)
    check_tokenizer(description, parts[0].data.tokenizer, path)
    check_context(description, path, max(part.data.description["splits"]["valid"]["longest"] for part in parts))
    return description, params
