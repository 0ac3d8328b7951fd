"""The counter that benchmarks/cost.py and benchmarks/scaling.py stand on."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from tinysft_jax import attention as block_attention
from tinysft_jax.model import GPT, GPTConfig
from tinysft_jax.training import step as loss

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import hlo

A, W = jnp.ones((48, 32)), jnp.ones((32, 32))


def counted(function, *args, turns=None):
    return hlo.count(jax.jit(function).lower(*args).compile().as_text(), turns)


def test_a_matrix_product_is_counted_by_its_formula():
    assert counted(jnp.matmul, A, jnp.ones((32, 80)))["flops"] == 2 * 48 * 32 * 80
    batched = functools.partial(jnp.einsum, "bij,bkj->bik")
    assert counted(batched, jnp.ones((3, 48, 32)), jnp.ones((3, 16, 32)))["flops"] == 2 * 3 * 48 * 32 * 16


def test_a_loop_counts_as_often_as_it_turns():
    def inner(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ W), None), x, length=5)[0]

    def outer(x):
        return jax.lax.scan(lambda x, _: (inner(x), None), x, length=7)[0]

    product = 2 * 48 * 32 * 32
    assert counted(inner, A)["flops"] == 5 * product
    assert counted(outer, A)["flops"] == 35 * product


def test_a_loop_that_depends_on_data_counts_as_its_caller_says():
    def loop(x, n):
        with jax.named_scope("inner"):
            x = jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ W), x)
        with jax.named_scope("outer"):
            return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ W), x)

    assert counted(loop, A, 3, turns={"inner": 2.5, "outer": 4})["flops"] == 6.5 * 2 * 48 * 32 * 32
    for turns in (None, {"inner": 2.5}):
        with pytest.raises(ValueError, match="depends on data"):
            counted(loop, A, 3, turns=turns)


def test_branches_count_as_equally_likely():
    def either(x, is_wide):
        return jax.lax.cond(is_wide, lambda x: jnp.tanh(x @ W) @ W, lambda x: x + 1, x)

    assert counted(either, A, True)["flops"] == 2 * 48 * 32 * 32


def test_scanned_and_unrolled_layers_count_the_same():
    """The scan saves and reads what the unrolled layers have at hand, so only products must agree."""
    scan = jax.lax.scan
    scanned = layers_flops("none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "scan", lambda body, x, xs, **options: scan(body, x, xs, unroll=True))
        assert scanned == pytest.approx(layers_flops("none"), rel=0.02)


def test_what_remat_recomputes_is_counted():
    """For "dots" attention's two products; for "full" all but the last product of each layer."""
    none, dots, full = map(layers_flops, ("none", "dots", "full"))
    assert 1 < dots / none < 1.04 and 1.15 < full / none < 1.34


def layers_flops(remat: str) -> float:
    config = GPTConfig(vocab_size=256, dim=64, n_layers=6, n_heads=2, max_seq_len=64)
    graph, params = nnx.split(GPT(config, rngs=nnx.Rngs(0), remat=remat))
    tokens, weights = jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64))

    def sum_nll(params):
        model = nnx.merge(graph, params)
        embedding = model.tok_emb.embedding[...]
        return loss.supervised_nll(model.hidden(tokens), embedding, tokens, weights, config.vocab_size)

    return counted(jax.value_and_grad(sum_nll), params, turns={loss.SCOPE: 1, block_attention.SCOPE: 1})["flops"]


def test_traffic_is_what_an_instruction_reads_and_writes():
    size = 4 * 48 * 32
    assert counted(jnp.add, A, A)["bytes"] == 3 * size


def test_a_loop_over_a_stack_reads_each_slice_once():
    stack = jnp.ones((50, 256, 256))

    def total(stack):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x + layer), None), jnp.zeros((256, 256)), stack)[0]

    reads_and_writes = 3 * stack.nbytes  # each turn reads a slice and x, and writes x
    assert counted(total, stack)["bytes"] == pytest.approx(reads_and_writes, rel=0.01)


def test_an_update_in_place_moves_the_update():
    def fill(rows):
        def write(i, buffer):
            return jax.lax.dynamic_update_slice(buffer, jnp.tanh(rows), (i, 0))

        return jax.lax.fori_loop(0, 1000, write, jnp.zeros((1000, 256)))

    zeros_and_updates = (1 + 2) * 4 * 1000 * 256
    assert counted(fill, jnp.ones((1, 256)))["bytes"] == pytest.approx(zeros_and_updates, rel=0.05)


SENT = {  # of a shard of S bytes, by n devices
    "all-reduce": (lambda x, axes: jax.lax.psum(x, axes), lambda n: 2 * (n - 1) / n),
    "all-gather": (lambda x, axes: jax.lax.all_gather(x, axes, tiled=True), lambda n: n - 1),
    "reduce-scatter": (lambda x, axes: jax.lax.psum_scatter(x, axes, tiled=True), lambda n: (n - 1) / n),
    "all-to-all": (lambda x, axes: jax.lax.all_to_all(x, axes, 0, 0, tiled=True), lambda n: (n - 1) / n),
}


@pytest.mark.parametrize("kind", SENT)
@pytest.mark.parametrize("axes, n", [(("a",), 4), (("b",), 2), (("a", "b"), 8)])
def test_collectives_send_what_a_ring_sends(kind, axes, n):
    exchange, factor = SENT[kind]
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    whole = PartitionSpec(("a", "b"))
    run = jax.shard_map(
        lambda x: exchange(x, axes), mesh=mesh, in_specs=whole, out_specs=PartitionSpec(), check_vma=False
    )
    counts = counted(run, jnp.ones((8 * 64, 10)))
    assert {key: counts[key] for key in hlo.COLLECTIVES if counts[key]} == {kind: factor(n) * 64 * 10 * 4}


def test_a_collective_in_a_loop_counts_each_time():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))

    def shift(x):
        ring = [(i, (i + 1) % 8) for i in range(8)]
        return jax.lax.fori_loop(0, 6, lambda _, x: jax.lax.ppermute(jnp.sin(x), "a", ring), x)

    run = jax.shard_map(shift, mesh=mesh, in_specs=PartitionSpec("a"), out_specs=PartitionSpec("a"))
    assert counted(run, jnp.ones((8, 100)))["collective-permute"] == 6 * 100 * 4


@pytest.mark.parametrize(
    "groups, n",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
    ],
)
def test_groups_are_read_in_each_way_of_writing_them(groups, n):
    """In the asynchronous form, which this backend doesn't use."""
    text = f"""HloModule exchange, num_partitions=8

ENTRY %main (x: f32[100]) -> f32[100] {{
  %x = f32[100]{{0}} parameter(0)
  %start = f32[100]{{0}} all-reduce-start(%x), channel_id=1, replica_groups={groups}, to_apply=%add
  ROOT %done = f32[100]{{0}} all-reduce-done(%start)
}}
"""
    assert hlo.count(text)["all-reduce"] == 2 * (n - 1) / n * 400
