"""SIGKILL at random moments, on one process and on two: every run ends with the bits of one that went through."""

import os
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from launch import start_training
from runs import assert_same_bits, losses

from tinysft_jax.training.log import read_metrics

KILLS = int(os.environ.get("SOAK_KILLS", "20"))
SETTINGS = {
    "init_from": "random",
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.max_seq_len": 64,
    "data.seq_len": 64,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 20,
    "train.batch_size": 8,
    "train.log_interval": 10,
    "train.eval_interval": 50,
    "train.save_interval": 25,
}

pytestmark = pytest.mark.soak


def start(data: Path, workdir: Path, num_processes: int, devices: int, steps: int) -> list[subprocess.Popen]:
    settings = SETTINGS | {"data.path": data, "train.max_steps": steps}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return start_training([f"--workdir={workdir}", *flags], num_processes, devices)


def finish(processes: list[subprocess.Popen]) -> None:
    endings = [(process.communicate(timeout=600)[1], process.returncode) for process in processes]
    assert all(code == 0 for _, code in endings), endings


def kill(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()


def last_step(workdir: Path) -> int:
    return max((line["step"] for line in read_metrics(workdir)), default=0)


def is_writing(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob(".*.partial*"))


def wait_for_the_moment(processes: list[subprocess.Popen], workdir: Path, kind: str, draw: random.Random) -> None:
    """Returns at the moment to kill, or when the run has ended."""
    if kind == "at the start":
        time.sleep(draw.uniform(0, 8))
        return
    before = last_step(workdir)

    def goes_on() -> bool:
        return all(process.poll() is None for process in processes)

    while goes_on() and last_step(workdir) <= before:
        time.sleep(0.02)
    if kind == "at work":
        time.sleep(draw.uniform(0, 3))
        return
    while goes_on() and not is_writing(workdir):
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.05))


@pytest.mark.parametrize(("num_processes", "devices", "steps"), [(1, 1, 1500), (2, 1, 600)])
def test_killed_runs_end_with_the_same_bits(chat_data, tmp_path, figures, num_processes, devices, steps):
    reference, began = tmp_path / "reference", time.monotonic()
    finish(start(chat_data, reference, num_processes, devices, steps))
    draw, kinds = random.Random(0), ("amid a checkpoint", "at work", "at the start", "amid a checkpoint", "at work")
    killed, amid_a_checkpoint, runs = 0, 0, 0
    while killed < KILLS:
        workdir, runs = tmp_path / f"run-{runs}", runs + 1
        processes = start(chat_data, workdir, num_processes, devices, steps)
        while killed < KILLS:
            wait_for_the_moment(processes, workdir, kinds[killed % len(kinds)], draw)
            if all(process.poll() is not None for process in processes):
                break  # the run was through before: the next one is killed on
            writing = is_writing(workdir)
            kill(processes)
            killed, amid_a_checkpoint = killed + 1, amid_a_checkpoint + (writing and is_writing(workdir))
            processes = start(chat_data, workdir, num_processes, devices, steps)
        finish(processes)
        assert_same_bits(workdir, reference)
    minutes = (time.monotonic() - began) / 60
    figures(kills=killed, amid_a_checkpoint=amid_a_checkpoint, runs=runs, steps=steps, minutes=round(minutes, 1))


def test_a_killed_run_of_two_processes_goes_on_with_one_device(chat_data, tmp_path, figures):
    """To round-off, the same run."""
    finish(start(chat_data, tmp_path / "reference", 1, 1, 100))
    processes = start(chat_data, tmp_path / "work", 2, 2, 100)
    while not (tmp_path / "work" / "checkpoints" / "50").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    kill(processes)
    finish(start(chat_data, tmp_path / "work", 1, 1, 100))
    one, other = losses(tmp_path / "work"), losses(tmp_path / "reference")
    assert one.keys() == other.keys()
    np.testing.assert_allclose([*one.values()], [*other.values()], rtol=1e-4)
    figures(largest_relative_difference=max(abs(one[step] / other[step] - 1) for step in one))
