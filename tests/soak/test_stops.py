"""SIGTERM and Ctrl-C at the demo's size: how long until the process has gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinysft_jax.training.checkpoints import Checkpoints
from tinysft_jax.training.log import read_metrics

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.soak


def start(data: Path, workdir: Path) -> subprocess.Popen:
    model = {"dim": 128, "n_layers": 4, "n_heads": 4, "max_seq_len": 1024}
    flags = [f"--config.model.{key}={value}" for key, value in model.items()]
    flags += ["--config.init_from=random", f"--config.data.path={data}", "--config.train.log_interval=1"]
    return subprocess.Popen(
        [sys.executable, "train.py", "--config=configs/sft.py:demo", f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        stderr=subprocess.PIPE,
        text=True,
    )


def seconds_to_stop(process: subprocess.Popen, workdir: Path, signals: list[int], step: int) -> tuple[float, str]:
    while max((line["step"] for line in read_metrics(workdir)), default=0) < step:
        assert process.poll() is None
        time.sleep(0.05)
    began = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    stderr = process.communicate(timeout=120)[1]
    return time.monotonic() - began, stderr


def test_stops_of_the_demo(demo_data, tmp_path, figures):
    taken = {}
    step = 3
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = start(demo_data, tmp_path)
        seconds, stderr = seconds_to_stop(process, tmp_path, [number], step)
        taken[number.name] = round(seconds, 1)
        checkpoints = Checkpoints(tmp_path, keep=3)
        assert checkpoints.find_newest() == "" and checkpoints.newest >= step
        assert process.returncode == code and "run the same command to resume" in stderr.splitlines()[-1]
        assert seconds < 30
        step = checkpoints.newest + 3
    process = start(demo_data, tmp_path)
    seconds, stderr = seconds_to_stop(process, tmp_path, [signal.SIGINT, signal.SIGINT], step)
    taken["SIGINT twice"] = round(seconds, 1)
    assert process.returncode == 130 and seconds < 2 and "left at once" in stderr.splitlines()[-1]
    after = Checkpoints(tmp_path, keep=3)
    assert after.find_newest() == "" and after.newest == checkpoints.newest
    figures(seconds=taken)
