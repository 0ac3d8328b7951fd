"""Preparing data: its size, tokens a second and a CPU second, and the largest process, by size of text and workers.

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
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinysft_jax import console
from tinysft_jax.corpus.stories import embedded_stories, record_text
from tinysft_jax.data.store import SPLITS
from tinysft_jax.data.workers import usable_cpus

MB = 1e6
STORIES = 20_000
NAME = re.compile(r"\b(?:Lily|Tom|Ben|Mia|Max|Anna|Sam|Zoe|Finn|Rosa|Leo|Nora|Tim|Pip|Coco)\b")


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
    same = {size: len({row.pop("manifest") for row in results if row["megabytes"] == size}) == 1 for size in sizes}
    table = Table(*(key.replace("_", " ") for key in results[0]))
    for row in results:
        table.add_row(*(f"{value:,.0f}" for value in row.values()))
    Console(width=120).print(table)
    settings = {**vars(flags), "cpus": usable_cpus(), "same_bytes_for_any_workers": same}
    print(json.dumps({"benchmark": "prepare", **settings, "results": results}))


def write_stories(path: Path, megabytes: int) -> None:
    """Writes embedded records, in each round with other names, so that none recurs."""
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
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "tinysft_jax.data.prepare", f"--input={text}", f"--output={output}"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, f"--workers={workers}", "--overwrite"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # usage: with that of its workers
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    tokens = sum(split["tokens"] for split in json.loads((output / "data.json").read_text())["splits"].values())
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {
        "records": sum(json.loads((output / "ledger.json").read_text())["splits"][split]["read"] for split in SPLITS),
        "prepared_mb": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / MB,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "largest_process_mb": usage.ru_maxrss * 1024 / MB,
        "manifest": hashlib.sha256((output / "manifest.json").read_bytes()).hexdigest(),
    }


if __name__ == "__main__":
    console.run(main)
