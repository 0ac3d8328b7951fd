"""The parts of gpu.py that start train.py: how fast it trains, how soon it starts, and whether it resumes exactly."""

import functools
import hashlib
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from gpu_size import DETERMINISTIC, Cases, Row, Size
from orbax.checkpoint import v1 as ocp

from tinysft_jax.checkpoints import quiet_orbax
from tinysft_jax.console import RunError
from tinysft_jax.training.log import MetricLine, read_metrics

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 0.01
# Of a metrics line, what depends on the clock.
RATES = ("sft/tokens_per_second", "sft/supervised_tokens_per_second", "sft/padding_fraction", "sft/mfu")


class Run:
    """A train.py in a process of its own, on random weights."""

    def __init__(self, size: Size, workspace: Path, settings: dict[str, int], flags: str = "", **environ: str):
        self.workdir = workspace / "runs" / uuid.uuid4().hex[:8]
        self._log = self.workdir.with_suffix(".log")
        self._command = [sys.executable, "train.py", "--config=configs/sft.py", f"--workdir={self.workdir}"]
        settings = settings_of(size, workspace) | settings
        self._command += [f"--config.{key}={value}" for key, value in settings.items()]
        self._environ = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()} | environ
        self.start()

    def start(self) -> None:
        self._log.parent.mkdir(exist_ok=True)
        self.started = time.perf_counter()
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, cwd=ROOT, env=self._environ, stdout=log, stderr=log)

    def lines(self) -> list[MetricLine]:
        return read_metrics(self.workdir)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Raises: RunError, if the run ends before."""
        while not condition():
            if self.process.poll() is not None:
                raise RunError(f"train.py ended, exit code {self.process.returncode}: {self.last_words()}")
            time.sleep(POLL_SECONDS)

    def finish(self) -> None:
        if self.process.wait():
            raise RunError(f"train.py failed, exit code {self.process.returncode}: {self.last_words()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def last_words(self) -> str:
        return (self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]


def settings_of(size: Size, workspace: Path) -> dict[str, int | str]:
    """A random model of this size, and the shortest evaluations; all else is the default."""
    shape = {key: getattr(size.config, key) for key in ("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len")}
    return {
        **{f"model.{key}": value for key, value in shape.items()},
        "init_from": "random",
        "data.path": str(workspace / "data"),
        "data.seq_len": size.config.max_seq_len,
        "train.eval_interval": 10_000,
        "train.eval_batches": 1,
    }


def train(size: Size, workspace: Path) -> Cases:
    """The default run, until it has logged enough. The first has an empty cache, the second what the first left."""
    empty = workspace / "empty_cache"
    for flags in size.flags:
        for rows in size.train_rows:
            name = f"{rows} rows, deterministic" if flags else f"{rows} rows"
            cache = empty if size.starts and not flags and rows == size.train_rows[0] else None
            yield name, functools.partial(measure_run, size, workspace, rows, flags, cache)
            if cache:
                yield f"{rows} rows, second start", functools.partial(measure_start, size, workspace, rows, cache)


def cached_in(cache: Path | None) -> dict[str, str]:
    return {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {}


def measure_run(size: Size, workspace: Path, rows: int, flags: str, cache: Path | None) -> Row:
    run = Run(size, workspace, {"train.batch_size": rows}, flags, **cached_in(cache))
    key = "sft/tokens_per_second"
    try:
        run.wait_for(lambda: any("sft/train_loss" in line for line in run.lines()))
        first_step = time.perf_counter() - run.started
        run.wait_for(lambda: sum(key in line for line in run.lines()) > size.train_lines)
    finally:
        run.kill()  # nothing is saved: the first checkpoint is far off
    lines = [line for line in run.lines() if key in line][1 : size.train_lines + 1]
    names = {"tokens_per_second": key, "supervised_per_second": "sft/supervised_tokens_per_second", "mfu": "sft/mfu"}
    rates = {name: [line[key] for line in lines if key in line] for name, key in names.items()}
    return {name: statistics.median(values) for name, values in rates.items() if values} | {"first_step_s": first_step}


def measure_start(size: Size, workspace: Path, rows: int, cache: Path) -> Row:
    """Seconds from the start of the process to the first step's metrics; an evaluation of one batch comes before."""
    run = Run(size, workspace, {"train.batch_size": rows}, **cached_in(cache))
    try:
        run.wait_for(lambda: any("sft/train_loss" in line for line in run.lines()))
        return {"first_step_s": time.perf_counter() - run.started}
    finally:
        run.kill()


def resume(size: Size, workspace: Path) -> Cases:
    """Three runs of one training at the same time, each of which compiles for itself; one is killed and resumes."""
    jax.config.update("jax_platforms", "cpu")  # here, not in the runs: this process only reads what they wrote
    environ = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    settings = size.resume | {"train.log_interval": 1, "optimizer.warmup_steps": 5}
    one, two, killed = (Run(size, workspace, settings, DETERMINISTIC, **environ) for _ in range(3))
    yield "killed and resumed", functools.partial(compare_after_kill, one, killed, size)
    yield "two runs", functools.partial(compare, one, two)


def compare_after_kill(whole: Run, killed: Run, size: Size) -> Row:
    """Kills the run as soon as it has a checkpoint, resumes it, and compares it with one that was left alone."""
    checkpoint = killed.workdir / "checkpoints" / str(size.resume["train.save_interval"])
    killed.wait_for(checkpoint.exists)
    killed.kill()
    step = max(line["step"] for line in killed.lines())
    killed.start()
    killed.finish()
    return {"killed_after_step": step} | compare(whole, killed)


def compare(one: Run, two: Run) -> Row:
    """Of the last checkpoints and the logs. Raises: RunError, if they differ."""
    for run in (one, two):
        run.finish()
    digests, logs = [last_digests(run.workdir) for run in (one, two)], [logged(run) for run in (one, two)]
    if different := sorted(key for key in digests[0] | digests[1] if digests[0].get(key) != digests[1].get(key)):
        raise RunError(f"{len(different)} of {len(digests[0])} arrays differ in the end, {different[0]} for one")
    if logs[0] != logs[1]:
        step = next((a["step"] for a, b in zip(*logs, strict=False) if a != b), "the end")
        raise RunError(f"the metrics differ, from step {step} on")
    return {"same_arrays": len(digests[0]), "same_metric_lines": len(logs[0])}


def last_digests(workdir: Path) -> dict[str, str]:
    """The SHA-256 of each array of the last checkpoint."""
    directory = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    with quiet_orbax():
        stored = ocp.metadata(directory).metadata
        state = ocp.load(directory, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in leaves}


def logged(run: Run) -> list[MetricLine]:
    return [{key: value for key, value in line.items() if key not in RATES} for line in run.lines()]
