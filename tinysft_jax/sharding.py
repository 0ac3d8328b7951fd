"""One mesh, and one table of how every array is sharded over it."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tinysft_jax.console import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis → the mesh axes it is sharded over.
RULES = {
    "batch": ("data", "fsdp"),  # each replica has its own rows
    "embed": ("fsdp",),  # parameters are gathered along the model dimension where they are used
    "heads": ("tensor",),
    "kv_heads": ("tensor",),  # of keys and values, each shared by several of queries
    "hidden": ("tensor",),
    "vocab": ("tensor",),
}

# The logical axes of each parameter; None is not sharded. All other arrays (norms, counters) are replicated.
PARAMETER_AXES = {
    "tok_emb.embedding": ("vocab", "embed"),
    "head.embedding": ("vocab", "embed"),
    "blocks.attn.wq.kernel": (None, "embed", "heads"),
    "blocks.attn.wk.kernel": (None, "embed", "kv_heads"),
    "blocks.attn.wv.kernel": (None, "embed", "kv_heads"),
    "blocks.attn.wq.bias": (None, "heads"),
    "blocks.attn.wk.bias": (None, "kv_heads"),
    "blocks.attn.wv.bias": (None, "kv_heads"),
    "blocks.attn.wo.kernel": (None, "heads", "embed"),
    "blocks.mlp.w1.kernel": (None, "embed", "hidden"),
    "blocks.mlp.w3.kernel": (None, "embed", "hidden"),
    "blocks.mlp.w2.kernel": (None, "hidden", "embed"),
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of all devices of all processes, of these sizes; one of them may be -1: what is left."""
    sizes = mesh_sizes(jax.device_count(), data, fsdp, tensor)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> tuple[int, ...]:
    """The sizes of `make_mesh` for a number of devices."""
    sizes = [data, fsdp, tensor]
    wanted = " × ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh {wanted}: sizes are positive, at most one of them -1 (what is left)")
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // -math.prod(sizes)
    if math.prod(sizes) != devices:
        raise UserError(f"mesh {wanted} does not fit {devices} device(s); change mesh.data, mesh.fsdp or mesh.tensor")
    return tuple(sizes)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of shards of the batch dimension."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def process_part(mesh: Mesh) -> tuple[int, int]:
    """Which of how many equal parts of a batch this process's devices hold, as (index, count).

    Processes that share the work on a row (over `tensor`) hold the same part.
    """
    shards = batch_shards(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((shards,))
    held = sorted({rows.start or 0 for (rows,) in indices.values()})
    if held != list(range(held[0], held[0] + len(held))) or held[0] % len(held):
        raise UserError("this mesh gives a process rows that are not consecutive; order its devices by process")
    return held[0] // len(held), shards // len(held)


def spec(*axes: str | None) -> PartitionSpec:
    """The partition of an array with these logical axes."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's `[B, T]` arrays."""
    return NamedSharding(mesh, spec("batch"))


def global_batch(mesh: Mesh, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global batch, of which `rows` are this process's part."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in rows.items()}


def state_sharding(mesh: Mesh, state, n_kv_heads: int):
    """The sharding of each array in a train state, a pytree that holds the parameters' dicts anywhere.

    An array whose path ends with a parameter's is sharded as that parameter: so are Adam's moments, wherever optax
    keeps them. Axes that the mesh does not divide evenly stay whole; those of keys and values stay whole unless it
    divides their heads.
    """

    def divides(axis: str | None, size: int) -> bool:
        parts = n_kv_heads if axis == "kv_heads" else size
        return axis is not None and parts % math.prod(mesh.shape[name] for name in RULES[axis]) == 0

    def sharding(path, leaf) -> NamedSharding:
        keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        suffixes = (".".join(keys[start:]) for start in range(len(keys)))
        axes = next((PARAMETER_AXES[suffix] for suffix in suffixes if suffix in PARAMETER_AXES), ())
        sizes = zip(axes, leaf.shape, strict=False)  # without axes: replicated
        return NamedSharding(mesh, spec(*(axis if divides(axis, size) else None for axis, size in sizes)))

    return jax.tree_util.tree_map_with_path(sharding, state)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shards an activation by its logical axes if a mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def batch_axes() -> tuple[str, ...]:
    """The axes, larger than 1, of the current mesh over which the batch is sharded."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in RULES["batch"] if mesh.shape.get(axis, 1) > 1)


def over_shards(
    function: Callable[..., jax.Array], in_axes: Sequence[Sequence[str | None]], out_axes: Sequence[str | None]
) -> Callable[..., jax.Array]:
    """`function`, run by each shard of the current mesh on its own part of the arrays, given their logical axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    in_specs = tuple(spec(*axes) for axes in in_axes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=spec(*out_axes), check_vma=False)
