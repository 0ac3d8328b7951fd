"""What a train step's program communicates, and where its loops are; and the counter that tells."""

import sys
from pathlib import Path

import hlo
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from runs import mesh_of
from tiers import slow

from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.sharding import batch_sharding
from tinysft_jax.training import loss as train_step

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from training import make_step

CONFIG = GPTConfig(vocab_size=1024, dim=64, n_layers=3, n_heads=4, max_seq_len=256)
BLOCK_BYTES, TABLE_BYTES = 4 * (4 * 64**2 + 3 * 64 * 256), 4 * 1024 * 64  # kernels of a layer; the embedding


def operations_of(mesh_sizes: tuple[int, int, int]) -> list[hlo.Operation]:
    mesh = mesh_of(*mesh_sizes)
    kinds = dict.fromkeys(("tokens", "segment_ids", "positions", "targets"), jnp.int32) | {"weights": jnp.float32}
    with jax.set_mesh(mesh):
        step, state, _ = make_step(CONFIG, mesh, jnp.float32)
        sharding = batch_sharding(mesh)
        batch = {key: jax.ShapeDtypeStruct((8, 256), dtype, sharding=sharding) for key, dtype in kinds.items()}
        return hlo.operations(step.lower(state, batch).compile())


@pytest.mark.parametrize("mesh_sizes", [(2, 4, 1), *slow((1, 1, 1), (8, 1, 1), (1, 8, 1))])
def test_no_collective_is_in_a_loop_whose_length_depends_on_data(mesh_sizes):
    """Each device has a length of its own, so they would wait for each other forever."""
    found = operations_of(mesh_sizes)
    loops = [each for each in found if each.kind == "while"]
    assert any(train_step.SCOPE in each.name for each in loops)
    assert not [each for each in found if each.kind in hlo.COLLECTIVES and None in each.trips]


def test_one_device_communicates_nothing():
    assert not [each for each in operations_of((1, 1, 1)) if each.kind in hlo.COLLECTIVES]


def test_data_parallel_sums_each_gradient_once():
    """But the embedding's twice: once from the head, once from the lookup."""
    found = operations_of((8, 1, 1))
    assert {each.kind for each in found} == {"while", "all-reduce"}
    gradients = CONFIG.n_layers * BLOCK_BYTES + 2 * TABLE_BYTES
    assert gradients <= hlo.bytes_of(found, "all-reduce") < 1.05 * gradients


def test_fsdp_gathers_a_layer_at_a_time():
    found = operations_of((1, 8, 1))
    gathers = [each for each in found if each.kind == "all-gather"]
    assert all(each.n_bytes <= max(BLOCK_BYTES, TABLE_BYTES) for each in gathers)
    in_layers = [each for each in gathers if each.trips == (CONFIG.n_layers,)]
    assert sum(each.n_bytes for each in in_layers) >= 2 * BLOCK_BYTES  # forward and backward


def test_trips_multiply():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))

    def inner(x):
        return jax.lax.scan(lambda x, _: (jax.lax.psum(jnp.sin(x), "a"), None), x, length=5)[0]

    def outer(x):
        return jax.lax.scan(lambda x, _: (inner(x), None), x, length=7)[0]

    run = jax.shard_map(outer, mesh=mesh, in_specs=PartitionSpec("a"), out_specs=PartitionSpec("a"), check_vma=False)
    found = hlo.operations(jax.jit(run).lower(jnp.ones((8, 100))).compile())
    assert [each.trips for each in found if each.kind == "all-reduce"] == [(7, 5)]
    assert (hlo.count(found, "while"), hlo.count(found, "all-reduce")) == (1 + 7, 35)
    assert hlo.bytes_of(found, "all-reduce") == 35 * 400


def test_a_length_that_depends_on_data_is_none():
    def loop(x, n):
        with jax.named_scope("here"):
            return jax.lax.fori_loop(0, n, lambda _, x: jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x), x), x)

    outer, inner = hlo.operations(jax.jit(loop).lower(jnp.ones(8), 3).compile())
    assert (outer.trips, inner.trips) == ((), (None,)) and "here" in outer.name
