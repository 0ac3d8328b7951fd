"""A train step compiled from shapes alone: nothing is allocated, nothing runs."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from training import make_step

from tinysft_jax.model import GPTConfig
from tinysft_jax.sharding import batch_sharding

BATCH_DTYPES = {
    "tokens": jnp.int32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
    "targets": jnp.int32,
    "weights": jnp.float32,
}


def compile_train_step(
    config: GPTConfig, mesh: Mesh, rows: int, remat: str = "none"
) -> tuple[jax.stages.Compiled, str]:
    """Compiles the train step, with bfloat16 matmuls, for batches `[rows, config.max_seq_len]`.

    Returns:
      The compiled step, and the HLO of one device's program as the partitioner leaves it. That one has the types the
      model asks for, where a CPU's compiled program computes and communicates bfloat16 in float32.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from a cache leaves no dump
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as dump:
        step, state, _ = make_step(config, mesh, jnp.bfloat16, remat)
        batch = {
            key: jax.ShapeDtypeStruct((rows, config.max_seq_len), dtype, sharding=batch_sharding(mesh))
            for key, dtype in BATCH_DTYPES.items()
        }
        options = {"xla_dump_to": dump, "xla_dump_hlo_pass_re": "spmd.*"}
        compiled = step.lower(state, batch).compile(options)
        partitioned = [path.read_text() for path in Path(dump).rglob("*.after_spmd-partitioning.*.txt")]
    return compiled, partitioned[0] if partitioned else compiled.as_text()  # one device: there is nothing to partition
