"""Scanned or unrolled layers: compile time, step time and temporary memory of loss and gradients.

`python benchmarks/layers.py [--dim 768 --n_layers 12 --rows 1 --seq_len 512 --dtype float32 --steps 3]`
"""

import json
import time
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from tinysft_jax import console
from tinysft_jax.model import GPT, GPTConfig
from tinysft_jax.training.step import supervised_nll


def unrolled_scan(body, x, layers, scan=jax.lax.scan):
    """`jax.lax.scan`, unrolled where it is over a model's layers."""
    return scan(body, x, layers, unroll=isinstance(layers, nnx.State))


def measure(model: GPT, unrolled: bool, rows: int, seq_len: int, steps: int) -> dict[str, float]:
    """Times one variant; every tenth position is supervised."""
    graph, params = nnx.split(model)
    config = model.config
    tokens = jax.random.randint(jax.random.key(0), (rows, seq_len), 0, config.vocab_size, jnp.int32)
    weights = jnp.broadcast_to(jnp.arange(seq_len) % 10 == 0, (rows, seq_len)).astype(jnp.float32)

    def loss(params):
        model = nnx.merge(graph, params)
        with mock.patch("jax.lax.scan", unrolled_scan if unrolled else jax.lax.scan):
            hidden = model.hidden(tokens)
        return supervised_nll(hidden, model.tok_emb.embedding[...], tokens, weights, config.vocab_size)

    start = time.perf_counter()
    step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    compiled = time.perf_counter()
    jax.block_until_ready(step(params))
    times = []
    for _ in range(steps):
        before = time.perf_counter()
        jax.block_until_ready(step(params))
        times.append(time.perf_counter() - before)
    return {
        "compile_s": compiled - start,
        "step_s": min(times),
        "temporary_mib": step.memory_analysis().temp_size_in_bytes / 2**20,
    }


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--n_layers", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3)
    flags = parser.parse_args()
    config = GPTConfig(flags.vocab_size, flags.dim, flags.n_layers, max(flags.dim // 64, 1), flags.seq_len)
    table = Table("layers", "remat", "compile s", "step s", "temporary MiB")
    results = {}
    for remat in ("none", "full"):
        for unrolled in (False, True):
            if unrolled and remat != "none":
                continue  # only the scan rematerialises
            model = GPT(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(flags.dtype), remat=remat)
            name = "unrolled" if unrolled else "scanned"
            result = measure(model, unrolled, flags.rows, flags.seq_len, flags.steps)
            results[f"{name}_{remat}"] = result
            table.add_row(name, remat, *(f"{value:,.2f}" for value in result.values()))
    Console().print(table)
    print(json.dumps({"benchmark": "layers", **vars(flags), "results": results}))


if __name__ == "__main__":
    console.run(main)
