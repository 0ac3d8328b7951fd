"""The input pipeline: how full rows are, how long it takes to plan an epoch, tokens a second, and memory.

`python benchmarks/input_pipeline.py [--stories 20000 --conversations 10000000 --seq_len 1024 --batch_size 32]`
"""

import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from tinysft_jax import console
from tinysft_jax.data import prepare
from tinysft_jax.data.batches import BatchSource, epoch_batches
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import PreparedData
from tinysft_jax.data.workers import usable_cpus

MB = 1e6
Result = dict[str, float]


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=20_000, help="of the embedded corpus, to read")
    parser.add_argument("--conversations", type=int, default=10_000_000, help="to plan an epoch of")
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=32)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        data = f"{directory}/data"
        prepare.main([f"--embedded={flags.stories}", f"--output={data}"])
        lengths = {"embedded corpus": PreparedData(data).split("train").lengths, "drawn": drawn_lengths()}
        rows = [(name, n) for name, each in lengths.items() for n in (512, 1024, 2048) if each.max() <= n]
        fills = {f"{name}, {n:,}": fill(lengths[name], n) for name, n in rows}
        many = np.resize(lengths["embedded corpus"], flags.conversations)
        setting = (data, flags.batch_size, flags.seq_len)
        results = {
            "fill": fills,
            "plan": {f"{flags.conversations:,}": in_a_fresh_process(plan, many, flags.seq_len)},
            "workers": {str(n): in_a_fresh_process(read, *setting, n) for n in (0, 1, 2)},
        }
    for name, rows in results.items():
        table = Table(name, *(key.replace("_", " ") for key in next(iter(rows.values()))))
        for label, row in rows.items():
            table.add_row(label, *(f"{value:,.4g}" if value < 100 else f"{value:,.0f}" for value in row.values()))
        Console(width=120).print(table)
    print(json.dumps({"benchmark": "input_pipeline", **vars(flags), "cpus": usable_cpus(), "results": results}))


def in_a_fresh_process(function: Callable, *args) -> Any:
    """So that memory that something else needed is not counted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def drawn_lengths(n_stories: int = 25_000) -> Int[np.ndarray, " conversations"]:
    """Lengths as of TinyStories-Instruct: 4.5 conversations of each story of 150 to 450 tokens, and 30 to 120 more."""
    random = np.random.default_rng(0)
    stories = np.clip(np.exp(random.normal(np.log(230), 0.28, n_stories)), 150, 450).astype(np.int32)
    lengths = np.resize(stories, n_stories * 9 // 2)
    return lengths + random.integers(30, 121, lengths.size, dtype=np.int32)


def fill(lengths: Int[np.ndarray, " conversations"], seq_len: int) -> Result:
    start = time.perf_counter()
    packing = Packing(lengths, seq_len)
    return {"percent": 100 * packing.fill, "rows": packing.n_rows, "seconds": time.perf_counter() - start}


def plan(lengths: Int[np.ndarray, " conversations"], seq_len: int) -> Result:
    start, before = time.perf_counter(), memory(os.getpid(), "VmHWM")
    packing = Packing(lengths, seq_len)
    settled = time.perf_counter()
    rows = packing.epoch()
    return {
        "seconds": time.perf_counter() - settled,
        "seconds_once_for_all_epochs": settled - start,
        "peak_mb": memory(os.getpid(), "VmHWM") - before,
        "kept_mb": (lengths.nbytes + rows.order.nbytes + rows.row_starts.nbytes) / MB,
    }


def read(data: str, batch_size: int, seq_len: int, num_workers: int) -> Result:
    """Two epochs: tokens a second (padding not counted) from the second batch on, and memory at the end."""
    absl_flags.FLAGS(["input_pipeline"])  # grain's workers read absl's flags
    split = PreparedData(data).split("train")
    packing = Packing(split.lengths, seq_len)
    for epoch in range(2):
        source = BatchSource(split, packing.epoch(epoch=epoch), batch_size, seq_len)
        start = time.perf_counter()
        batches, tokens = epoch_batches(source, num_workers=num_workers), 0
        next(batches)
        started = time.perf_counter()
        for index, batch in enumerate(batches, 2):
            tokens += int(np.count_nonzero(batch["segment_ids"]))
            del batch
            if index == len(source):
                seconds = time.perf_counter() - started
                processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
                megabytes = sum(memory(pid, "Pss", "smaps_rollup") for pid in processes)
        del batches
        gc.collect()  # grain's iterators are cycles that hold shared memory
    return {
        "tokens_per_second": tokens / seconds,
        "seconds_to_first_batch": started - start,
        "mb_of_all_processes": megabytes,
        "workers_left": len(multiprocessing.active_children()),
    }


def memory(pid: int, key: str, file: str = "status") -> float:
    """In MB. VmHWM: the peak; Pss (of smaps_rollup): with 1/n of what n processes share."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024 / MB


if __name__ == "__main__":
    console.run(main)
