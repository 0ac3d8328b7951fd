"""3,000 steps of the demo's size, with evaluations and checkpoints: nothing grows, nothing slows down."""

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tinysft_jax.training.log import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = int(os.environ.get("SOAK_STEPS", "3000"))
MODEL = {"dim": 128, "n_layers": 4, "n_heads": 4, "max_seq_len": 1024}

pytestmark = pytest.mark.soak


class Sample(NamedTuple):
    """A process at a moment."""

    step: int
    resident_mib: float
    threads: int
    files: int
    cpu_seconds: float


def sample(process: subprocess.Popen, workdir: Path) -> Sample | None:
    """What Linux says of a process; None once it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        open_files = len(os.listdir(f"/proc/{process.pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    if "VmRSS" not in status:
        return None
    resident, threads = (int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmRSS", "Threads"))
    ticks = int(times[11]) + int(times[12])
    step = max((line["step"] for line in read_metrics(workdir)), default=0)
    return Sample(step, resident / 1024, threads, open_files, ticks / os.sysconf("SC_CLK_TCK"))


def average(samples: list[Sample], field: str, start: float, stop: float) -> float:
    """Of the samples from step `start` to step `stop`."""
    return statistics.mean(getattr(entry, field) for entry in samples if start <= entry.step <= stop)


def cpu_seconds_a_step(samples: list[Sample], start: float, stop: float) -> float:
    within = [entry for entry in samples if start <= entry.step <= stop]
    return (within[-1].cpu_seconds - within[0].cpu_seconds) / (within[-1].step - within[0].step)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_long_run_neither_grows_nor_slows_down(demo_data, tmp_path, figures):
    settings = {f"model.{key}": value for key, value in MODEL.items()} | {
        "init_from": "random",
        "data.path": demo_data,
        "train.max_steps": STEPS,
        "train.eval_interval": 100,
        "train.eval_batches": 1,
        "train.save_interval": 50,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    environ = os.environ | {"XLA_FLAGS": ""}
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config=configs/sft.py:demo", f"--workdir={tmp_path / 'run'}", *flags],
        cwd=ROOT,
        env=environ,
        stderr=(tmp_path / "log").open("w"),
    )
    samples, began = [], time.monotonic()
    while process.poll() is None:
        if (now := sample(process, tmp_path / "run")) and now.step:
            samples.append(now)
        time.sleep(2)
    assert process.returncode == 0, (tmp_path / "log").read_text()[-2000:]

    early, late = (STEPS // 15, STEPS // 5), (STEPS - STEPS // 7, STEPS)
    before, after = (
        {field: average(samples, field, *span) for field in ("resident_mib", "threads", "files")}
        for span in (early, late)
    )
    seconds = [cpu_seconds_a_step(samples, *span) for span in (early, late)]
    checkpoints, evaluations = STEPS // 50, STEPS // 100
    figures(
        steps=STEPS,
        checkpoints=checkpoints,
        evaluations=evaluations,
        minutes=round((time.monotonic() - began) / 60, 1),
        resident_mib=[round(side["resident_mib"]) for side in (before, after)],
        threads=[round(side["threads"], 1) for side in (before, after)],
        files=[round(side["files"], 1) for side in (before, after)],
        cpu_seconds_a_step=[round(value, 3) for value in seconds],
        largest_resident_mib=round(max(entry.resident_mib for entry in samples)),
    )
    assert after["resident_mib"] < 1.05 * before["resident_mib"]
    # A checkpoint that is being written has threads and files for a moment.
    assert after["threads"] < before["threads"] + 2 and after["files"] < before["files"] + 2
    assert seconds[1] < 1.1 * seconds[0]
