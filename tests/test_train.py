"""The command itself, in processes of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinysft_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SIZES = ["model.dim=16", "model.n_layers=1", "model.n_heads=2", "model.max_seq_len=64", "data.seq_len=64"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "train.py", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def settings(data: Path, *more: str) -> list[str]:
    return [f"--config.{setting}" for setting in (*SIZES, f"data.path={data}", "train.batch_size=8", *more)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--config=FILE and --workdir=DIR are needed"),
        (["--config=configs/sft.py"], "--workdir=DIR"),
        (["--config=configs/none.py", "--workdir=x"], "configs/none.py"),
        (["--config=configs/sft.py:huge", "--workdir=x"], "no preset 'huge'"),
        (["--config=configs/sft.py", "--workdir=x", "--config.train.stepps=3"], "stepps"),
        (["--config=configs/sft.py", "--workdir=x", "--config.train.max_steps=many"], "many"),
        (["--config=configs/sft.py", "--workdir=x", "more"], "unexpected argument 'more'"),
        (["--config=configs/sft.py", "--workdir=x", "--speed=3"], "speed"),
        (
            ["--config=configs/sft.py", "--workdir=x", "--config.data.path=nowhere", "--config.train.batch_size=8"],
            "nowhere is not a prepared",
        ),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments, complaint):
    result = run(*arguments)
    assert result.returncode == 2
    assert complaint in result.stderr and result.stderr.count("\n") == 1
    assert not (ROOT / "x").exists()


def test_ctrl_c_saves_and_the_same_command_continues(chat_data, tmp_path):
    arguments = [f"--workdir={tmp_path}", *settings(chat_data, "train.max_steps=100000", "train.eval_interval=50000")]
    process = subprocess.Popen(
        command("--config=configs/sft.py", *arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not any(line["step"] >= 10 for line in read_metrics(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "checkpoint saved; run the same command to continue" in stderr.splitlines()[-1]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert int(checkpoint.name) >= 10
    assert "Traceback" not in stderr
    again = run("--config=configs/sft.py", *arguments, f"--config.train.max_steps={int(checkpoint.name) + 5}")
    assert again.returncode == 0, again.stderr
    assert f"continuing at step {int(checkpoint.name):,} of" in again.stderr
    assert max(line["step"] for line in read_metrics(tmp_path)) == int(checkpoint.name) + 5
