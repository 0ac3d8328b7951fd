"""The model that a run starts from, with which DPO and GRPO compare.

DPO needs the log-likelihoods of all answers. They are computed once, before the first step, and kept in the work
directory. So no second model is in memory. GRPO's answers are new at each step, so it keeps the model itself.
"""

import hashlib
import zipfile
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32

from tinysft_jax import distributed, files
from tinysft_jax.console import Interrupted, Progress, RunError
from tinysft_jax.data.batches import BatchSource
from tinysft_jax.data.mixture import Part
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import SPLITS
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.parameters import Params
from tinysft_jax.sharding import batch_shards, global_batch
from tinysft_jax.training.checkpoints import data_hash
from tinysft_jax.training.evaluate import packed_batches
from tinysft_jax.training.rollout import Answerer
from tinysft_jax.training.run import Run
from tinysft_jax.training.state import RANDOM, starting_model

DIRECTORY = "reference"  # in the work directory; a file there is named by the hashes of data and model
# Split → of each conversation, the log-likelihood of its supervised tokens.
LogLikelihoods = dict[str, Float32[np.ndarray, " _"]]


def fingerprint(config: GPTConfig, params: Params | None, seed: int) -> str:
    """The hash of the model that a run starts from; no parameters: random ones."""
    digest = hashlib.sha256(f"{config} {'' if params else seed}".encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]


def use_reference(run: Run, params: Params | None) -> None:
    """Gives the run's batches and its evaluator the log-likelihoods under the model that it starts from.

    `params` are that model's, of a new run. Raises: RunError, if one that resumes lacks them; Interrupted, if the run
    is asked to stop; then nothing is written.
    """
    directory, model = run.workdir / DIRECTORY, run.status.reference
    paths = [directory / f"{data_hash(part.data)}-{model}.npz" for part in run.parts]
    found = [_read(path, part) for path, part in zip(paths, run.parts, strict=True)]
    if not distributed.first_decides(None not in found):
        if params is None:
            raise RunError(
                f"{paths[found.index(None)]} is missing or damaged, and only a new run can compute it; put it back, or "
                "choose another --workdir"
            )
        packings = run.batches.packings, run.evaluator.packings
        found = [
            {name: _compute(run, params, part, name, of[number]) for name, of in zip(SPLITS, packings, strict=True)}
            for number, part in enumerate(run.parts)
        ]
        distributed.on_first(lambda: _write(paths, found))
    run.batches.source.n_segments = run.evaluator.n_segments
    for source, split in ((run.batches.source, "train"), (run.evaluator, "valid")):
        source.reference = [of[split] for of in found]


def use_start(run: Run, params: Params | None) -> None:
    """Gives a run of GRPO the model that it starts from, which judges answers.

    `params` are that model's, of a new run; None: random ones. Raises: RunError, if one that resumes finds another.
    """
    config, status = run.config, run.status
    if run.checkpoints.newest >= 0 and config.init_from not in ("", RANDOM):
        model, params = starting_model(config.init_from, {}, run.parts[0].data)
        if fingerprint(model.config, params, config.seed) != status.reference:
            raise RunError(
                f"{config.init_from} is not the model that the run started from, by which answers are judged; put it "
                "back, or choose another --workdir"
            )
    start = run.steps.create(params, config.seed)["params"]
    answerer = Answerer(config, run.parts[0].data, run.mesh, status.model, run.steps, start)
    run.batches.answerer = run.evaluator.answerer = answerer


def _compute(run: Run, params: Params, part: Part, name: str, packing: Packing) -> Float32[np.ndarray, " n"]:
    """Of all conversations of a split, in batches of packed rows."""
    split, plan, shards = part.data.split(name), packing.epoch(), batch_shards(run.mesh)
    batch_size = -(-run.config.train.eval_batch_size // shards) * shards
    values, rows = np.zeros(len(split), np.float32), BatchSource(split, plan, batch_size, packing.seq_len)
    batches = packed_batches(split, plan, batch_size, packing.seq_len, run.mesh)
    with Progress(f"reference, {name}", len(plan), quiet=not distributed.is_first()) as progress:
        for index, (_, batch) in enumerate(batches):
            if run.stop.agreed():
                message = "stopped before the first step; run the same command to begin"
                raise Interrupted(message, run.stop.exit_code)
            of_rows = np.asarray(run.steps.log_likelihoods(params, global_batch(run.mesh, batch)))
            for row, of_segments in zip(rows.rows(index), of_rows, strict=True):
                members = rows.segments_of(row)
                values[members] = of_segments[: len(members)]
            progress.update(min(rows.rows(index).stop, len(plan)))
    return values


def _read(path: Path, part: Part) -> LogLikelihoods | None:
    """What the file holds; None if it is missing, damaged, or of other sizes."""
    try:
        with np.load(path) as stored:
            found = {name: stored[name] for name in SPLITS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = all(of.dtype == np.float32 and of.shape == (len(part.data.split(name)),) for name, of in found.items())
    return found if fits else None


def _write(paths: list[Path], found: list[LogLikelihoods]) -> None:
    """Writes the files, and removes those of other data and models, and what killed processes left."""
    directory = paths[0].parent
    directory.mkdir(exist_ok=True)
    for path, arrays in zip(paths, found, strict=True):
        with files.atomic(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
    for other in set(directory.iterdir()) - set(paths):
        other.unlink()
