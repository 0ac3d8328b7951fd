"""The part of gpu.py that runs PyTorch: two training loops and a sampling loop, with the same data and model shape."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gpu_size import CPU, Cases, Row, Size
from sampling import torch_token_seconds
from torch.nn import functional as F
from train_step import DEVICE, TorchTwin, packed, synchronize, torch_batch, unpacked

from tinysft_jax.console import UserError
from tinysft_jax.data.batches import BatchSource
from tinysft_jax.data.store import PreparedData

WARM_UP = 3  # steps, after the first, which compiles


def pytorch(size: Size, workspace: Path) -> Cases:
    """Attention ignores segments, so packed rows are wrong: that is faster than what would be right."""
    few, many = min(size.train_rows), max(size.train_rows)
    split, length = PreparedData(workspace / "data").split("train"), size.config.max_seq_len
    yield f"reference style, {few} rows", functools.partial(measure_loop, size, unpacked(split, few, length))
    yield f"packed, segments ignored, {many} rows", functools.partial(measure_loop, size, packed(split, many, length))
    yield "sampling, 1 stream", functools.partial(measure_sampling, size)


def make_twin(size: Size) -> TorchTwin:
    if DEVICE == "cpu" and size is not CPU:
        raise UserError("PyTorch sees no GPU")
    config = size.config
    with torch.device(DEVICE):
        return TorchTwin(config.vocab_size, config.dim, config.n_layers, config.n_heads, config.max_seq_len)


def measure_loop(size: Size, source: BatchSource) -> Row:
    """torch.compile, bfloat16 autocast, logits at all positions, fused AdamW; without torch.compile on a CPU."""
    host = [source[i] for i in range(min(size.steps, len(source) - 1))]
    batches = [torch_batch(batch) for batch in host]
    step = make_step(make_twin(size))
    start = time.perf_counter()
    step(*batches[0])
    synchronize()
    first_step = time.perf_counter() - start
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for batch in itertools.islice(itertools.cycle(batches), WARM_UP):
        step(*batch)
    synchronize()
    start = time.perf_counter()
    for batch in itertools.islice(itertools.cycle(batches), size.steps):
        step(*batch)
    synchronize()
    seconds = (time.perf_counter() - start) / size.steps
    run = list(itertools.islice(itertools.cycle(host), size.steps))
    row = {
        "ms": 1e3 * seconds,
        "tokens_per_second": float(np.mean([np.count_nonzero(batch["segment_ids"]) for batch in run])) / seconds,
        "supervised_per_second": float(np.mean([batch["weights"].sum() for batch in run])) / seconds,
        "compile_s": first_step - seconds,
    }
    return row | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if DEVICE == "cuda" else {})


def make_step(model: TorchTwin) -> Callable[[torch.Tensor, torch.Tensor], None]:
    torch.set_float32_matmul_precision("high")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100)

    compiled = torch.compile(loss_of, disable=DEVICE == "cpu")

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        compiled(tokens, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


@torch.inference_mode()
def measure_sampling(size: Size) -> Row:
    """The whole text again for each token, from a text of mean length."""
    model = make_twin(size)
    if DEVICE == "cuda":
        model = model.bfloat16()
    shape = (1, size.prompt + (size.new - size.torch_new) // 2)
    ids = torch.randint(size.config.vocab_size, shape, device=DEVICE)
    torch_token_seconds(model, ids, 1)
    return {"tokens_per_second": 1 / statistics.median(torch_token_seconds(model, ids, size.torch_new))}
