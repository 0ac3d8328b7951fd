"""The reference of DPO: the log-likelihoods of all answers under the model that a run starts from.

They are computed once, before the first step, and kept in the work directory. So no second model is in memory.
"""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32

from tinysft_jax import distributed, files
from tinysft_jax.console import Interrupted, Progress
from tinysft_jax.data.batches import BatchSource
from tinysft_jax.data.mixture import Part
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import SPLITS, Split
from tinysft_jax.parameters import Params
from tinysft_jax.sharding import global_batch
from tinysft_jax.training.checkpoints import data_hash
from tinysft_jax.training.evaluate import packed_batches
from tinysft_jax.training.stop import StopRequest

DIRECTORY = "reference"  # in the work directory; a file there is named by the hashes of data and model
# Split → of each conversation, the log-likelihood of its supervised tokens.
LogLikelihoods = dict[str, Float32[np.ndarray, " conversations"]]


def fingerprint(params: Params | None, seed: int) -> str:
    """The hash of the parameters that a run starts from; None: random ones."""
    digest = hashlib.sha256(b"" if params else f"random {seed}".encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]


class Reference:
    """Computes the log-likelihoods, or reads them, for data that is packed so.

    `packings`: of each part and split.
    """

    def __init__(
        self,
        workdir: Path,
        seq_len: int,
        parts: list[Part],
        packings: dict[str, list[Packing]],
        stop: StopRequest,
    ):
        self._directory, self._seq_len, self._parts = workdir / DIRECTORY, seq_len, parts
        self._packings, self._stop, self._done = packings, stop, 0

    def log_likelihoods(
        self, model: str, batch_size: int, step: Callable, params: Callable[[], Params]
    ) -> list[LogLikelihoods]:
        """Of each part, under the model with this hash; its parameters are asked for only if they are needed.

        Raises: Interrupted, if the run is asked to stop; then nothing is written.
        """
        paths = [self._directory / f"{data_hash(part.data)}-{model}.npz" for part in self._parts]
        found = [_read(path, part) for path, part in zip(paths, self._parts, strict=True)]
        if distributed.first_decides(None not in found):
            return found
        start = params()
        total = sum(packing.n_rows for packings in self._packings.values() for packing in packings)
        with Progress("reference", total, quiet=not distributed.is_first()) as progress:
            found = [
                {name: self._compute(step, start, number, name, batch_size, progress) for name in SPLITS}
                for number in range(len(self._parts))
            ]
        distributed.on_first(lambda: _write(paths, found))
        return found

    def _compute(
        self, step: Callable, params: Params, number: int, name: str, batch_size: int, progress: Progress
    ) -> Float32[np.ndarray, " conversations"]:
        """Of all conversations of a split, in batches of packed rows."""
        split: Split = self._parts[number].data.split(name)
        plan, mesh = self._packings[name][number].epoch(), jax.sharding.get_mesh()
        values, rows = np.zeros(len(split), np.float32), BatchSource(split, plan, batch_size, self._seq_len)
        for index, (_, batch) in enumerate(packed_batches(split, plan, batch_size, self._seq_len, mesh)):
            if self._stop.agreed():
                raise Interrupted("stopped before the first step; run the same command to begin", self._stop.exit_code)
            of_rows = np.asarray(step(params, global_batch(mesh, batch)))
            for row, of_segments in zip(rows.rows(index), of_rows, strict=True):
                members = rows.segments_of(row)
                values[members] = of_segments[: len(members)]
            self._done += min(batch_size, len(plan) - index * batch_size)
            progress.update(self._done)
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
    """Writes the files, and removes those of other data and models."""
    directory = paths[0].parent
    directory.mkdir(exist_ok=True)
    for path, arrays in zip(paths, found, strict=True):
        with files.atomic(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
    for other in set(directory.glob("*.npz")) - set(paths):
        other.unlink()
