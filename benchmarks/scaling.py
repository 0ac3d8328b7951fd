"""What each device computes, keeps and sends in a train step, divided over 1 to 8 devices in three ways.

Counted from the step compiled for virtual CPU devices, beside what theory expects; nothing runs. What is counted then
gives an estimate for 8 to 512 GPUs.

`python benchmarks/scaling.py [--dim 768 --n_layers 12 --n_heads 12 --seq_len 1024 --rows 4]`
"""

import json
import math
from collections import Counter

import hlo
import jax
from compiled import compile_train_step
from flax import nnx
from jax.sharding import AxisType, Mesh
from rich.console import Console
from rich.table import Table

from tinysft_jax import attention as block_attention
from tinysft_jax import console
from tinysft_jax.model import GPT, GPTConfig
from tinysft_jax.sharding import MESH_AXES
from tinysft_jax.training import step as loss

VOCAB_SIZE = 50_260  # GPT-2's and three control tokens
DEVICES = (1, 2, 4, 8)

# The estimate's GPU, an H100 SXM in nodes of 8, as its maker publishes it: dense bfloat16 FLOP/s, and bytes a second
# that a GPU sends within a node (NVLink 4) and between nodes (a 400 Gb/s adapter for each GPU).
PEAK_FLOPS, NVLINK, NETWORK, NODE = 989e12, 450e9, 50e9, 8
UTILISATION = 0.4  # of the peak: an assumption

Result = dict[str, float | dict[str, float]]


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--n_layers", type=int, default=12)
    parser.add_argument("--n_heads", type=int, default=12)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4, help="of each replica")
    parser.add_argument("--supervised", type=float, default=0.25, help="share of a row's positions")
    parser.add_argument("--key_blocks", type=float, default=3.0, help="that a block of queries visits, on average")
    parser.add_argument("--remat", default="none")
    flags = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    config = GPTConfig(VOCAB_SIZE, flags.dim, flags.n_layers, flags.n_heads, flags.seq_len)
    chunks = math.ceil(flags.rows * flags.seq_len * flags.supervised / loss.CHUNK)
    turns = {loss.SCOPE: chunks, block_attention.SCOPE: flags.key_blocks}
    results: dict[str, Result] = {}
    for axis in MESH_AXES:
        for n in DEVICES:
            if n > 1 or not results:  # one device is one device
                print(f"compiling: {axis}={n}", flush=True)
                results[f"{axis}={n}"] = measure(config, axis, n, flags.rows, turns, flags.remat)
    report(results)
    report_estimate(results, flags.rows)
    print(json.dumps({"benchmark": "scaling", **vars(flags), "compiled_for": "cpu", "results": results}))


def measure(config: GPTConfig, axis: str, n: int, rows: int, turns: dict[str, float], remat: str) -> Result:
    """Of one device, where each replica has `rows` rows."""
    replicas = 1 if axis == "tensor" else n
    compiled, partitioned = compile_train_step(config, mesh_of(axis, n), rows * replicas, remat)
    counts, sent = hlo.count(compiled.as_text(), turns), hlo.count(partitioned, turns)
    memory = compiled.memory_analysis()
    return {
        "flops": counts["flops"],
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "sent_in_theory": {kind: round(size) for kind, size in sent_in_theory(config, axis, n, rows).items()},
        "sent_as_partitioned": {kind: round(sent[kind]) for kind in hlo.COLLECTIVES if sent[kind]},
        "sent_as_compiled": {kind: round(counts[kind]) for kind in hlo.COLLECTIVES if counts[kind]},
    }


def mesh_of(axis: str, n: int) -> Mesh:
    sizes = tuple(n if name == axis else 1 for name in MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:n])


def sent_in_theory(config: GPTConfig, axis: str, n: int, rows: int) -> Counter[str]:
    """Bytes that a device sends in a ring: gradients in float32, parameters and activations in bfloat16.

    - data: the gradients' all-reduce;
    - fsdp: the parameters gathered for the forward and the backward pass, the gradients reduced to where they lie;
    - tensor: activations all-reduced twice a layer in the forward pass, twice in the backward pass, and after the
      table's lookup. What the head exchanges, a few rows at a time, is left out.
    """
    share = (n - 1) / n
    model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))
    n_params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    if axis == "data":
        return Counter({"all-reduce": 2 * share * 4 * n_params})
    if axis == "fsdp":
        return Counter({"all-gather": 2 * share * 2 * n_params, "reduce-scatter": share * 4 * n_params})
    activations = rows * config.max_seq_len * config.dim
    return Counter({"all-reduce": (4 * config.n_layers + 1) * 2 * share * 2 * activations})


def report(results: dict[str, Result]) -> None:
    table = Table(
        *("mesh", "GFLOP", "arguments MiB", "temporary MiB", "sent: theory", "as partitioned", "as compiled", "kinds"),
        caption=(
            "A device, a step; sent in MiB. Arguments are parameters, optimizer state and batch. Partitioned: the "
            "program with its communication, in the types of the model. Compiled: after XLA's passes for CPU, which "
            "compute and communicate bfloat16 in float32. Kinds: of what the partitioned program sends."
        ),
    )
    for name, result in results.items():
        sent = [sum(result[f"sent_{key}"].values()) for key in ("in_theory", "as_partitioned", "as_compiled")]
        kinds = (f"{kind} {size / 2**20:,.0f}" for kind, size in result["sent_as_partitioned"].items())
        table.add_row(
            name,
            f"{result['flops'] / 1e9:,.0f}",
            *(f"{size / 2**20:,.0f}" for size in (result["argument_bytes"], result["temporary_bytes"], *sent)),
            "\n".join(kinds),
        )
    Console(width=120).print(table)


def report_estimate(results: dict[str, Result], rows: int) -> None:
    """Milliseconds of a step with `data` sharding: FLOPs grow with the rows, what is sent does not."""
    compute = results["data=1"]["flops"] / rows / (UTILISATION * PEAK_FLOPS)
    gradients = sum(results["data=8"]["sent_as_partitioned"].values()) / (2 * 7 / 8)
    gpus = (8, 64, 512)
    table = Table(
        *("rows a GPU", "compute ms", *(f"sent ms, {n} GPUs" for n in gpus)),
        caption=(
            f"Estimate of data={gpus[0]} to {gpus[-1]}: H100s at {UTILISATION:.0%} of their peak (assumed), NVLink in "
            f"nodes of {NODE}, 400 Gb/s a GPU between them; latency is left out. Sending can hide behind the backward "
            "pass, two thirds of compute."
        ),
    )
    for n_rows in (1, 2, 4, 8, 16, 32):
        times = (f"{1e3 * all_reduce_seconds(gradients, n):.1f}" for n in gpus)
        table.add_row(str(n_rows), f"{1e3 * compute * n_rows:.1f}", *times)
    Console(width=120).print(table)


def all_reduce_seconds(size: float, n: int) -> float:
    """Reduced within nodes, each GPU's share then between nodes, and gathered within nodes."""
    inside = min(n, NODE)
    nodes = n // inside
    return 2 * (inside - 1) / inside * size / NVLINK + 2 * (nodes - 1) / nodes * size / inside / NETWORK


if __name__ == "__main__":
    console.run(main)
