"""Preparing data: tokens a second and a CPU second, and the most memory that each process takes, by size and workers.

`python benchmarks/prepare.py [--megabytes 50,1000 --workers 1,2]`
"""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinysft_jax import console
from tinysft_jax.corpus.stories import embedded_stories, record_text
from tinysft_jax.data.workers import usable_cpus

MB = 1e6
STORIES = 20_000
NAME = re.compile(r"\b(?:Lily|Tom|Ben|Mia|Max|Anna|Sam|Zoe|Finn|Rosa|Leo|Nora|Tim|Pip|Coco)\b")
SECONDS_BETWEEN_LOOKS = 0.05


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", default="50,1000", help="of text, for each run")
    parser.add_argument("--workers", default="1,2", help="for each run")
    flags = parser.parse_args()
    sizes, workers = ([int(n) for n in value.split(",")] for value in (flags.megabytes, flags.workers))
    results = []
    with tempfile.TemporaryDirectory() as directory:
        for megabytes in sizes:
            text = Path(directory) / "stories.txt"
            write_stories(text, megabytes)
            for n in workers:
                results.append({"megabytes": megabytes, "workers": n, **measure(text, Path(directory) / "data", n)})
    report(results)
    same = {size: len({row.pop("manifest") for row in results if row["megabytes"] == size}) == 1 for size in sizes}
    settings = {**vars(flags), "cpus": usable_cpus(), "same_bytes_for_any_workers": same}
    print(json.dumps({"benchmark": "prepare", **settings, "results": results}))


def write_stories(path: Path, megabytes: int) -> None:
    """Writes records in the data set's form: the embedded ones, in each round with other names, so that none recurs."""
    records = [record_text(story.record) for story in embedded_stories(STORIES)]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for round_number in itertools.count():
            suffix = "" if round_number == 0 else "".join(chr(ord("a") + int(digit)) for digit in str(round_number))
            for record in records:
                written += file.write(NAME.sub(rf"\g<0>{suffix}", record) + "\n<|endoftext|>\n")
                if written >= megabytes * MB:
                    return


def measure(text: Path, output: Path, workers: int) -> dict[str, Any]:
    """Prepares in a process of its own, which is watched with its workers."""
    command = [sys.executable, "-m", "tinysft_jax.data.prepare", f"--input={text}", f"--output={output}"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, f"--workers={workers}", "--overwrite"], stdout=subprocess.DEVNULL)
    looks: dict[int, tuple[float, float]] = {}
    watcher = threading.Thread(target=watch, args=(process, looks))
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    watcher.join()
    if code:
        sys.exit(code)
    totals = json.loads((output / "data.json").read_text())["splits"].values()
    tokens = sum(split["tokens"] for split in totals)
    (main_mb, main_cpu), *others = (looks[pid] for pid in sorted(looks, key=lambda pid: pid != process.pid))
    others = sorted(others)[-workers:] if workers > 1 else []  # apart from multiprocessing's resource tracker
    cpu = main_cpu + sum(seconds for _, seconds in others)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_and_worker": tokens / seconds / workers,
        "tokens_per_cpu_second": tokens / cpu,
        "main_cpu_seconds": main_cpu,
        "worker_cpu_seconds": [seconds for _, seconds in others],
        "main_peak_mb": main_mb,
        "worker_peak_mb": [peak for peak, _ in others],
        "manifest": hashlib.sha256((output / "manifest.json").read_bytes()).hexdigest(),
    }


def watch(process: subprocess.Popen, looks: dict[int, tuple[float, float]]) -> None:
    """Keeps, of the process and its children, the most memory in MB and the CPU seconds, while they run."""
    ticks = os.sysconf("SC_CLK_TCK")
    while process.poll() is None:
        for pid in (process.pid, *children(process.pid)):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if peak := re.search(r"VmHWM:\s+(\d+) kB", status):
                looks[pid] = (int(peak[1]) * 1024 / MB, (int(times[11]) + int(times[12])) / ticks)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def report(results: list[dict[str, Any]]) -> None:
    table = Table("MB", "workers", "tokens", "tokens/s", "tokens/s/worker", "tokens/CPU s", "CPU s", "peak MB")
    for row in results:
        rates = ("tokens", "tokens_per_second", "tokens_per_second_and_worker", "tokens_per_cpu_second")
        cpu, peak = (
            " + ".join(f"{value:,.0f}" for value in (row[f"main_{kind}"], *row[f"worker_{kind}"]))
            for kind in ("cpu_seconds", "peak_mb")
        )
        table.add_row(f"{row['megabytes']:,}", f"{row['workers']}", *(f"{row[rate]:,.0f}" for rate in rates), cpu, peak)
    console = Console(width=120)
    console.print(table)
    console.print("CPU seconds and peak memory: the reading process, and the workers if there are several")


if __name__ == "__main__":
    console.run(main)
