"""Supervised tokens a second: this project against two plain PyTorch loops, on the same conversations.

The loops train the same model on the same machine, in turn, with the same number of positions a step:

- reference style: a conversation a row, padded to the context, logits at every position;
- padded to longest: a conversation a row, padded to the longest of the batch;
- this project: packed rows, the head at supervised positions only.

`python benchmarks/train_step.py [--dim 256 --n_layers 4 --n_heads 4 --seq_len 1024 --positions 4096 --seconds 30]`
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from training import make_step

from tinysft_jax import console
from tinysft_jax.accelerator import default_dtype
from tinysft_jax.attention.blocks import BLOCK, first_key_blocks
from tinysft_jax.data import prepare
from tinysft_jax.data.batches import BatchSource
from tinysft_jax.data.packing import Packing, PackingPlan
from tinysft_jax.data.store import PreparedData, Split
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.sharding import global_batch, make_mesh

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from torch_twin import TorchTwin  # the same model in PyTorch, with its fused attention

VOCAB_SIZE = 50_304
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # PyTorch's
Result = dict[str, float]


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--n_layers", type=int, default=4)
    parser.add_argument("--n_heads", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=1024, help="of a packed row, and the reference's context")
    parser.add_argument("--positions", type=int, default=4096, help="a step; a multiple of --seq_len")
    parser.add_argument("--seconds", type=float, default=30, help="to measure each loop, compilation apart")
    parser.add_argument("--remat", default="none")
    flags = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for PyTorch, too
    rows = flags.positions // flags.seq_len
    config = GPTConfig(VOCAB_SIZE, flags.dim, flags.n_layers, flags.n_heads, flags.seq_len)
    with tempfile.TemporaryDirectory() as directory:
        prepare.main(["--embedded=3000", f"--output={directory}/data", "--workers=1"])
        split = PreparedData(f"{directory}/data").split("train")
        peak = matmul_peak()
        results = {
            "reference style": torch_loop(config, unpacked(split, rows, flags.seq_len), flags.seconds, peak),
            "padded to longest": torch_loop(config, cut(unpacked(split, rows, flags.seq_len)), flags.seconds, peak),
            "this project": our_loop(config, packed(split, rows, flags.seq_len), flags.seconds, flags.remat, peak),
        }
    report(results)
    print(json.dumps({"benchmark": "train_step", **vars(flags), "matmul_peak_gflops": peak / 1e9, "results": results}))


def unpacked(split: Split, rows: int, seq_len: int) -> BatchSource:
    """A conversation a row, in a random order."""
    order = np.random.default_rng(0).permutation(len(split)).astype(np.uint32)
    return BatchSource(split, PackingPlan(order, np.arange(len(order) + 1)), rows, seq_len)


def packed(split: Split, rows: int, seq_len: int) -> BatchSource:
    return BatchSource(split, Packing(split.lengths, seq_len).epoch(), rows, seq_len)


def cut(source: BatchSource) -> Iterator[dict[str, np.ndarray]]:
    """The batches without the columns that hold nothing but padding."""
    for batch in source:
        longest = int((batch["segment_ids"] > 0).sum(axis=1).max())
        yield {key: array[:, :longest] for key, array in batch.items()}


def our_loop(config: GPTConfig, source: BatchSource, seconds: float, remat: str, peak: float) -> Result:
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        step, _, create = make_step(config, mesh, default_dtype(), remat)
        state = create()

        def train(batch):
            nonlocal state
            state, metrics = step(state, global_batch(mesh, batch))
            jax.block_until_ready(metrics)

        return measure(train, iter(source), seconds, lambda batch: our_flops(config, batch), peak)


def torch_loop(config: GPTConfig, batches, seconds: float, peak: float) -> Result:
    """In the dtype that ours computes in: bfloat16 on a GPU."""
    model = TorchTwin(config.vocab_size, config.dim, config.n_layers, config.n_heads, config.max_seq_len).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    precision = torch.autocast("cuda", torch.bfloat16) if DEVICE == "cuda" else contextlib.nullcontext()

    def train(batch):
        tokens, labels = torch_batch(batch)
        with precision:
            loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        synchronize()

    return measure(train, iter(batches), seconds, lambda batch: full_flops(config, batch), peak)


def torch_batch(batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels, which are -100 where nothing is supervised."""
    tokens, targets = (torch.from_numpy(batch[key]).long().to(DEVICE) for key in ("tokens", "targets"))
    return tokens, torch.where(torch.from_numpy(batch["weights"]).to(DEVICE) > 0, targets, -100)


def synchronize() -> None:
    """Waits until PyTorch's device has done what was queued."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(train: Callable, batches: Iterator, seconds: float, flops: Callable, peak: float) -> Result:
    """Runs steps for a while; the first, which compiles, is left out."""
    train(next(batches))
    totals = {"steps": 0, "positions": 0, "tokens": 0, "supervised": 0.0, "flops": 0.0}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = next(batches)
        train(batch)
        totals["steps"] += 1
        totals["positions"] += batch["tokens"].size
        totals["tokens"] += int((batch["segment_ids"] > 0).sum())
        totals["supervised"] += float(batch["weights"].sum())
        totals["flops"] += flops(batch)
    elapsed = time.perf_counter() - start
    return {
        "seconds_a_step": elapsed / totals["steps"],
        "supervised_tokens_per_second": totals["supervised"] / elapsed,
        "padding": 1 - totals["tokens"] / totals["positions"],
        "supervised_share": totals["supervised"] / totals["tokens"],
        "matmul_gflops": totals["flops"] / elapsed / 1e9,
        "matmul_share_of_peak": totals["flops"] / elapsed / peak,
    }


def full_flops(config: GPTConfig, batch: dict[str, np.ndarray]) -> float:
    """Of the matmuls of a step with logits everywhere; attention over half of the square."""
    rows, length = batch["tokens"].shape
    return matmul_flops(config, rows * length, rows * length, length / 2)


def our_flops(config: GPTConfig, batch: dict[str, np.ndarray]) -> float:
    """Of the matmuls of a step with logits at supervised positions; attention over the blocks that are visited."""
    rows, length = batch["tokens"].shape
    segments = batch["segment_ids"].reshape(rows, -1, BLOCK).swapaxes(0, 1)
    visited = np.arange(1, len(segments) + 1) - np.asarray(first_key_blocks(segments))
    return matmul_flops(config, rows * length, float(batch["weights"].sum()), BLOCK * visited.mean())


def matmul_flops(config: GPTConfig, positions: int, scored: float, keys: float) -> float:
    """Forward and backward, two operations a product; `keys`: how many a query is compared with."""
    block = 4 * config.dim**2 + 3 * config.dim * config.hidden_dim + 2 * config.dim * keys
    return 6 * (positions * config.n_layers * block + scored * config.vocab_size * config.dim)


def matmul_peak(size: int = 4096) -> float:
    """FLOP/s of a large product, in PyTorch or JAX, whichever is faster: what this machine can do."""
    ours, a = jax.jit(jax.numpy.matmul), jax.numpy.ones((size, size), default_dtype())
    theirs, times = torch.ones(size, size, dtype=getattr(torch, default_dtype().name), device=DEVICE), []

    def torch_product() -> None:
        theirs @ theirs
        synchronize()

    for product in (torch_product, lambda: jax.block_until_ready(ours(a, a))):
        product()
        for _ in range(3):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def report(results: dict[str, Result]) -> None:
    table = Table("loop", "s a step", "supervised tokens/s", "ratio", "padding", "supervised", "GFLOP/s", "of peak")
    table.caption = "GFLOP/s in matmuls, and their share of what one large product reaches."
    base = results["reference style"]["supervised_tokens_per_second"]
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['seconds_a_step']:.2f}",
            f"{result['supervised_tokens_per_second']:,.0f}",
            f"{result['supervised_tokens_per_second'] / base:.1f}",
            f"{result['padding']:.0%}",
            f"{result['supervised_share']:.0%}",
            f"{result['matmul_gflops']:.0f}",
            f"{result['matmul_share_of_peak']:.0%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    console.run(main)
