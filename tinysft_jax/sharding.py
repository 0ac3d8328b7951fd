"""One mesh, and one table that says how every array lies on it."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tinysft_jax.console import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# What an axis of an array means → the mesh axes it is divided over.
RULES = {
    "batch": ("data", "fsdp"),  # each replica has its own rows
    "embed": ("fsdp",),  # parameters are divided along the model dimension, and gathered where they are used
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
}

# Each parameter's axes; None is not divided. Whatever is not listed (norms, counters) is on every device.
PARAMETER_AXES = {
    "tok_emb.embedding": ("vocab", "embed"),
    "blocks.attn.wq.kernel": (None, "embed", "heads"),
    "blocks.attn.wk.kernel": (None, "embed", "heads"),
    "blocks.attn.wv.kernel": (None, "embed", "heads"),
    "blocks.attn.wo.kernel": (None, "heads", "embed"),
    "blocks.mlp.w1.kernel": (None, "embed", "hidden"),
    "blocks.mlp.w3.kernel": (None, "embed", "hidden"),
    "blocks.mlp.w2.kernel": (None, "hidden", "embed"),
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of all devices of all processes.

    Args:
      data: replicas that each see other rows; -1 in one of the three places: what is left.
      fsdp: devices over which parameters and rows are divided.
      tensor: devices over which heads, hidden units and vocabulary are divided.

    Raises:
      UserError: if the sizes don't multiply to the number of devices.
    """
    sizes = mesh_sizes(jax.device_count(), data, fsdp, tensor)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> tuple[int, ...]:
    """The sizes of the mesh's axes for a number of devices; see `make_mesh`."""
    sizes = [data, fsdp, tensor]
    wanted = " × ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh {wanted}: sizes are positive, at most one of them -1 (what is left)")
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // -math.prod(sizes)
    if math.prod(sizes) != devices:
        raise UserError(f"mesh {wanted} does not fit {devices} device(s); change mesh.data, mesh.fsdp or mesh.tensor")
    return tuple(sizes)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def process_part(mesh: Mesh) -> tuple[int, int]:
    """Which of how many equal parts of a batch's rows this process's devices hold, as (index, count).

    Processes that divide a row's work between them (over `tensor`) hold the same part.
    """
    shards = batch_shards(mesh)
    where = batch_sharding(mesh).addressable_devices_indices_map((shards,))
    held = sorted({rows.start or 0 for (rows,) in where.values()})
    if held != list(range(held[0], held[0] + len(held))) or held[0] % len(held):
        raise UserError("this mesh gives a process rows that don't follow each other; order its devices by process")
    return held[0] // len(held), shards // len(held)


def spec(*axes: str | None) -> PartitionSpec:
    """The partition of an array whose axes have these meanings."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch's `[B, T]` arrays lie."""
    return NamedSharding(mesh, spec("batch"))


def state_sharding(mesh: Mesh, state):
    """How each array of a train state lies: like the parameter whose path its own path ends with.

    So Adam's moments lie as their parameters do, wherever the optimizer keeps them.

    Args:
      mesh: the mesh.
      state: a pytree of arrays or shapes with the parameters' dicts somewhere inside.
    """

    def sharding(path, leaf) -> NamedSharding:
        keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        for start in range(len(keys)):
            if axes := PARAMETER_AXES.get(".".join(keys[start:])):
                return NamedSharding(mesh, _divisible_spec(mesh, axes, leaf.shape))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins how an activation lies, where a mesh is set; elsewhere nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def batch_axes() -> tuple[str, ...]:
    """The axes of the mesh that is set, if one is, over which rows are divided."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in RULES["batch"] if mesh.shape.get(axis, 1) > 1)


def over_batch_shards(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function` of arrays whose leading axis is the batch's, run by each shard on its own rows.

    So what depends on the rows at run time, a loop's number of turns, say, needs no communication.
    """
    axes = batch_axes()
    if not axes:
        return function(*arrays)
    rows = PartitionSpec(axes)
    return jax.shard_map(function, in_specs=rows, out_specs=rows, axis_names=set(axes), check_vma=False)(*arrays)


def global_batch(mesh: Mesh, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts this process's rows on its devices, as its part of the global batch."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in rows.items()}


def _divisible_spec(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """`spec` that leaves whole each axis of `shape` which its mesh axes don't divide evenly."""

    def divides(axis: str | None, size: int) -> bool:
        return axis is not None and size % math.prod(mesh.shape[name] for name in RULES[axis]) == 0

    return spec(*(axis if divides(axis, size) else None for axis, size in zip(axes, shape, strict=True)))
