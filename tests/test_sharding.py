import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_model import FAMILIES, family

from tinysft_jax.console import UserError
from tinysft_jax.parameters import model_parameter_shapes
from tinysft_jax.sharding import (
    PARAMETER_AXES,
    batch_shards,
    constrain,
    global_batch,
    make_mesh,
    process_part,
    state_sharding,
)


def test_one_size_may_be_what_is_left():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (-2, 1, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(UserError, match="mesh data="):
        make_mesh(*sizes)


@pytest.mark.parametrize(("sizes", "rows"), [((8, 1, 1), 1), ((2, 4, 1), 1), ((2, 2, 2), 2), ((1, 1, 8), 8)])
def test_rows_are_divided_over_data_and_fsdp(sizes, rows):
    mesh = make_mesh(*sizes)
    batch = global_batch(mesh, {"tokens": np.arange(32).reshape(8, 4)})["tokens"]
    assert {shard.data.shape for shard in batch.addressable_shards} == {(rows, 4)}
    assert batch_shards(mesh) == 8 // rows
    np.testing.assert_array_equal(batch, np.arange(32).reshape(8, 4))


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((8, 1, 1), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((1, 4, 2), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 1, 4), [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes divide the work on a row
        ((1, 1, 8), [(0, 1)] * 4),
    ],
)
def test_each_process_reads_the_rows_of_its_devices(monkeypatch, sizes, parts):
    """Four processes of two devices each."""
    mesh = make_mesh(*sizes)
    for process, part in enumerate(parts):
        local = set(jax.devices()[2 * process : 2 * process + 2])
        monkeypatch.setattr(
            NamedSharding,
            "addressable_devices_indices_map",
            lambda self, shape, local=local: {d: i for d, i in self.devices_indices_map(shape).items() if d in local},
        )
        assert process_part(mesh) == part


def test_optimizer_state_lies_as_its_parameter_and_odd_sizes_stay_whole():
    mesh = make_mesh(2, 2, 2)
    table = {"tok_emb": {"embedding": jax.ShapeDtypeStruct((256, 6), jnp.float32)}}
    odd = {"tok_emb": {"embedding": jax.ShapeDtypeStruct((256, 5), jnp.float32)}}
    shardings = state_sharding(mesh, {"params": table, "opt_state": ({"mu": table}, odd), "step": jnp.int32(0)}, 2)
    assert shardings["params"]["tok_emb"]["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["opt_state"][0]["mu"]["tok_emb"]["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["opt_state"][1]["tok_emb"]["embedding"].spec == PartitionSpec("tensor", None)
    assert shardings["step"].spec == PartitionSpec()


@pytest.mark.parametrize("name", FAMILIES)
def test_all_parameters_but_norms_have_axes(name):
    """Nothing that is large is whole on each device because its name is missing in the table."""
    for path, leaf in jax.tree.leaves_with_path(model_parameter_shapes(family(name))):
        keys = [entry.key for entry in path]
        is_norm = any("norm" in key or key.startswith("ln_") for key in keys)
        axes = PARAMETER_AXES.get(".".join(keys))
        assert is_norm if axes is None else len(axes) == leaf.ndim, keys


@pytest.mark.parametrize(
    ("name", "sizes", "divided"),
    [
        ("everything", (2, 2, 2), True),
        ("everything", (2, 1, 4), False),
        ("qwen2", (4, 1, 2), True),
        ("qwen3", (2, 2, 2), False),  # one head of keys
    ],
)
def test_keys_and_values_are_divided_by_whole_heads_or_not_at_all(name, sizes, divided):
    config, mesh = family(name), make_mesh(*sizes)
    shapes = {"mu": model_parameter_shapes(config)}
    shardings, (q_dim, k_dim, _) = state_sharding(mesh, shapes, config.n_kv_heads), config.qkv_dims
    attn = jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), shapes, shardings)["mu"]["blocks"][
        "attn"
    ]
    dim, tensor = config.dim // sizes[1], sizes[2]
    for part, width in (("wq", q_dim // tensor), ("wk", k_dim // (tensor if divided else 1))):
        expected = {"kernel": (2, dim, width)} | ({"bias": (2, width)} if config.qkv_bias else {})
        assert attn[part] == expected
    assert attn["wv"] == attn["wk"] and attn["wo"]["kernel"] == (2, q_dim // tensor, dim)


def test_an_activation_is_pinned_where_a_mesh_is_set():
    x = jnp.zeros((8, 4))
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(make_mesh(2, 4, 1)):
        assert jax.jit(lambda x: constrain(x, "batch", None))(x).sharding.spec[0] == ("data", "fsdp")
