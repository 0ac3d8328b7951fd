"""What a model says of sequences of any lengths, computed in batches of packed rows of one shape."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32

from tinysft_jax.console import Progress
from tinysft_jax.data.batches import make_batch
from tinysft_jax.data.packing import Packing, PackingPlan
from tinysft_jax.model import GPT
from tinysft_jax.parameters import Params
from tinysft_jax.sharding import batch_sharding, global_batch
from tinysft_jax.training.objectives import Batch

# Token ids, and how many of them are given, at least 1; the others are predicted.
Given = tuple[Sequence[int] | np.ndarray, int]
Function = Callable[[GPT, Batch], jax.Array]  # to float32[B, T]


def pack(sequences: Sequence[Given], seq_len: int) -> PackingPlan:
    """Which sequences share a row."""
    return Packing(np.array([len(ids) for ids, _ in sequences], np.int64), seq_len, "answer").epoch()


def rows_of(sequences: Sequence[Given], plan: PackingPlan) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """The plan's rows, as `make_batch` takes them."""
    arrays = [(np.array(ids), np.arange(len(ids)) >= given) for ids, given in sequences]
    return [[arrays[item] for item in plan.row(row).tolist()] for row in range(len(plan))]


def places(sequences: Sequence[Given], plan: PackingPlan) -> Iterator[tuple[int, int, slice]]:
    """Each sequence with its row, and the positions there that predict what is not given."""
    for row in range(len(plan)):
        start = 0
        for item in plan.row(row).tolist():
            ids, given = sequences[item]
            yield item, row, slice(start + given - 1, start + len(ids) - 1)
            start += len(ids)


class PackedValues:
    """A function of a model and a batch to `[B, T]`, of sequences: `values(params, sequences)`.

    The batches have `n_rows` rows, a multiple of the mesh's shards, of `seq_len` tokens. A `name` shows progress.
    """

    def __init__(
        self,
        function: Function,
        graph: nnx.GraphDef,
        mesh: Mesh,
        shardings: Params,
        n_rows: int,
        seq_len: int,
        name: str = "",
    ):
        self._mesh, self._n_rows, self._seq_len, self._name = mesh, n_rows, seq_len, name
        whole = NamedSharding(mesh, PartitionSpec())
        jit = functools.partial(jax.jit, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=whole)
        self._step = jit(lambda params, batch: function(nnx.merge(graph, params), batch))

    def __call__(self, params: Params, sequences: Sequence[Given]) -> list[Float32[np.ndarray, " _"]]:
        """Of each sequence, the values at the positions that predict what is not given."""
        plan = pack(sequences, self._seq_len)
        rows = rows_of(sequences, plan)
        of_rows = []
        with Progress(self._name, len(rows), quiet=not self._name) as progress:
            for first in range(0, len(rows), self._n_rows):
                of_batch = rows[first : first + self._n_rows]
                batch = make_batch(of_batch + [[]] * (self._n_rows - len(of_batch)), self._seq_len)
                of_rows += list(np.asarray(self._step(params, global_batch(self._mesh, batch))))
                progress.update(min(len(of_rows), len(rows)))
        found = {item: of_rows[row][where] for item, row, where in places(sequences, plan)}
        return [found[item] for item in range(len(sequences))]
