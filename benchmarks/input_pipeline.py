"""The input pipeline: how long it takes to plan an epoch, how full rows are, tokens a second, and memory.

`python benchmarks/input_pipeline.py [--stories 20000 --conversations 10000000 --seq_len 1024 --batch_size 32]`
"""

import ctypes
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags
from rich.console import Console
from rich.table import Table

from tinysft_jax import console
from tinysft_jax.data import prepare
from tinysft_jax.data.batches import BatchSource, epoch_batches
from tinysft_jax.data.packing import Packing, best_fit_decreasing
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
    parser.add_argument("--epochs", type=int, default=10, help="to watch the memory for")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        data = f"{directory}/data"
        prepare.main([f"--embedded={flags.stories}", f"--output={data}"])
        setting = (data, flags.batch_size, flags.seq_len)
        few = in_a_fresh_process(plan, data, flags.conversations // 10, flags.seq_len)
        many = in_a_fresh_process(plan, data, flags.conversations, flags.seq_len)
        results = {
            "plan": many,
            "plan_of_a_tenth": few,
            "kept_bytes_a_conversation": (many["kept_mb"] - few["kept_mb"]) * MB / (0.9 * flags.conversations),
            "fill": {seq_len: fill(data, seq_len) for seq_len in (512, 1024, 2048)},
            "workers": {n: in_a_fresh_process(speed, *setting, n) for n in (0, 1, 2)},
            "epochs": in_a_fresh_process(memory_by_epoch, *setting, flags.epochs),
        }
    report(results)
    print(json.dumps({"benchmark": "input_pipeline", **vars(flags), "cpus": usable_cpus(), "results": results}))


def in_a_fresh_process(function: Callable, *args) -> Any:
    """So that memory that was needed for something else is not counted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def plan(data: str, n: int, seq_len: int) -> Result:
    """An epoch of `n` conversations, as long as those of the corpus."""
    lengths = PreparedData(data).split("train").lengths
    peak_before, kept_before = status("VmHWM"), status("RssAnon")
    lengths = np.resize(lengths, n)
    start = time.perf_counter()
    packing = Packing(lengths, seq_len)
    settled = time.perf_counter()
    rows = packing.epoch()
    seconds, settle_seconds = time.perf_counter() - start, settled - start
    ctypes.CDLL(None).malloc_trim(0)  # or what the C library keeps to use again would count
    assert len(rows) == packing.n_rows
    return {
        "seconds": seconds,
        "of_these_once_for_all_epochs": settle_seconds,
        "peak_mb": status("VmHWM") - peak_before,
        "kept_mb": status("RssAnon") - kept_before,
        "lengths_mb": lengths.nbytes / MB,
    }


def fill(data: str, seq_len: int) -> Result:
    lengths = PreparedData(data).split("train").lengths
    start = time.perf_counter()
    packing = Packing(lengths, seq_len)
    seconds = time.perf_counter() - start
    by_best_fit = best_fit_decreasing(Counter(lengths.tolist()), seq_len).total()
    return {
        "fill": packing.fill,
        "by_best_fit_decreasing": float(lengths.sum() / (by_best_fit * seq_len)),
        "rows": packing.n_rows,
        "seconds": seconds,
    }


def speed(data: str, batch_size: int, seq_len: int, num_workers: int) -> Result:
    """Tokens a second, padding apart, over an epoch from its second batch on."""
    source = next(epochs(data, batch_size, seq_len, 1))
    start = time.perf_counter()
    batches = epoch_batches(source, num_workers=num_workers)
    next(batches)
    started = time.perf_counter()
    tokens, ended = 0, started
    for batch in batches:
        tokens += int(np.count_nonzero(batch["segment_ids"]))
        del batch
        ended = time.perf_counter()  # without the workers' end
    gc.collect()  # grain's iterators are cycles that hold shared memory
    return {"tokens_per_second": tokens / (ended - started), "seconds_to_first_batch": started - start}


def memory_by_epoch(data: str, batch_size: int, seq_len: int, n: int) -> list[Result]:
    """What reading with two workers takes, at the end of each epoch, and what it leaves behind."""
    measured = []
    for source in epochs(data, batch_size, seq_len, n):
        batches, last = epoch_batches(source, num_workers=2), len(source) - 1
        for index, batch in enumerate(batches):
            del batch
            if index == last:
                processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
                memory = {
                    "processes": len(processes),
                    **{f"{kind.lower()}_mb": sum(rollup(pid, kind) for pid in processes) for kind in ("Rss", "Pss")},
                }
        del batches
        gc.collect()
        memory["processes_left"] = len(multiprocessing.active_children())
        memory["parent_anonymous_mb"] = status("RssAnon")
        memory["open_files"] = len(os.listdir("/proc/self/fd"))
        memory["plans_on_disk"] = len(list(Path(tempfile.gettempdir()).glob("tinysft-jax-plan-*")))
        measured.append(memory)
    return measured


def epochs(data: str, batch_size: int, seq_len: int, n: int):
    """The sources of `n` epochs, one at a time."""
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS(["input_pipeline"])  # grain's workers ask absl's flags
    tempfile.tempdir = str(Path(data).parent)
    split = PreparedData(data).split("train")
    packing = Packing(split.lengths, seq_len)
    for epoch in range(n):
        yield BatchSource(split, packing.epoch(epoch=epoch), batch_size, seq_len)


def status(key: str) -> float:
    """A number of /proc/self/status, in MB: VmHWM is the most memory so far, RssAnon what belongs to no file."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024 / MB


def rollup(pid: int, key: str) -> float:
    """A process's memory in MB: Rss, or Pss, where what n processes share counts 1/n for each."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key}:")) * 1024 / MB


def report(results: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table("an epoch's plan", "seconds", "once for all epochs", "peak MB", "kept MB", "lengths MB")
    for name in ("plan_of_a_tenth", "plan"):
        table.add_row(name, *(f"{value:,.2f}" for value in results[name].values()))
    console.print(table)
    console.print(f"kept: {results['kept_bytes_a_conversation']:.2f} bytes a conversation")
    table = Table("row length", "fill", "by best-fit decreasing", "rows", "seconds")
    for seq_len, row in results["fill"].items():
        table.add_row(
            f"{seq_len:,}",
            f"{row['fill']:.2%}",
            f"{row['by_best_fit_decreasing']:.2%}",
            f"{row['rows']:,}",
            f"{row['seconds']:.2f}",
        )
    console.print(table)
    table = Table("workers", "tokens/s", "s to first batch")
    for n, row in results["workers"].items():
        table.add_row(f"{n}", f"{row['tokens_per_second']:,.0f}", f"{row['seconds_to_first_batch']:.2f}")
    console.print(table)
    table = Table("epoch", *(key.replace("_", " ") for key in results["epochs"][0]))
    for epoch, row in enumerate(results["epochs"]):
        table.add_row(f"{epoch}", *(f"{value:,.0f}" for value in row.values()))
    console.print(table)


if __name__ == "__main__":
    console.run(main)
