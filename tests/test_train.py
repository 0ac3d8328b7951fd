"""The command itself, in processes of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TINY, assert_same_bits, tiny_config

from tinysft_jax.training.log import read_metrics
from tinysft_jax.training.loop import train

ROOT = Path(__file__).parents[1]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "train.py", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def settings(data: Path, *more: str) -> list[str]:
    tiny = (f"{key}={value}" for key, value in TINY.items())
    return [f"--config.{setting}" for setting in (*tiny, f"data.path={data}", *more)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--config=FILE and --workdir=DIR are needed"),
        (["--config=configs/sft.py"], "--workdir=DIR"),
        (["--config=configs/none.py", "--workdir=x"], "configs/none.py"),
        (["--config=configs/sft.py:huge", "--workdir=x"], "no preset 'huge'"),
        (["--config=configs/sft.py", "--workdir=x", "--config.train.stepps=3"], "stepps"),
        (["--config=configs/sft.py", "--workdir=x", "--config.train.max_steps=many"], "many"),
        (["--config=configs/sft.py", "--workdir=x", "--config.nope=1"], "nope"),
        (["--config=configs/sft.py", "--workdir=x", "--config.optimizer.learning_rate=fast"], "fast"),
        (["--config=configs/sft.py", "--workdir=x", "--config.export=onnx"], "export is 'onnx'"),
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


def start_until(step: int, workdir: Path, arguments: list[str], **options) -> subprocess.Popen:
    """The command, once it has logged step `step`."""
    process = subprocess.Popen(
        command("--config=configs/sft.py", *arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True, **options
    )
    deadline = time.monotonic() + 200
    while not any(line["step"] >= step for line in read_metrics(workdir)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_ctrl_c_saves_and_the_same_command_resumes(chat_data, tmp_path):
    arguments = [f"--workdir={tmp_path}", *settings(chat_data, "train.max_steps=100000", "train.eval_interval=50000")]
    process = start_until(10, tmp_path, arguments)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "checkpoint saved; run the same command to resume" in stderr.splitlines()[-1]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert int(checkpoint.name) >= 10
    assert "Traceback" not in stderr
    shorter = [f"--config.train.max_steps={int(checkpoint.name) + 5}", "--config.optimizer.warmup_steps=5"]
    again = run("--config=configs/sft.py", *arguments, *shorter, "--accept_changes", "--verify")
    assert again.returncode == 0, again.stderr
    assert f"resuming at step {int(checkpoint.name):,} of" in again.stderr
    assert max(line["step"] for line in read_metrics(tmp_path)) == int(checkpoint.name) + 5


@pytest.mark.slow
def test_a_run_that_is_killed_and_left_at_once_ends_as_if_it_had_not_been(chat_data, tmp_path):
    """SIGKILL amid the first checkpoint that is found half-written, then Ctrl-C twice."""
    values = {"train.max_steps": 300, "optimizer.warmup_steps": 20, "train.eval_interval": 100}
    values |= {"train.save_interval": 10, "train.log_interval": 1}
    options = settings(chat_data, *(f"{key}={value}" for key, value in values.items()))
    work, whole = tmp_path / "work", tmp_path / "whole"
    killed = start_until(30, work, [f"--workdir={work}", *options])
    while not any((work / "checkpoints").glob(".*")) and killed.poll() is None:
        time.sleep(0.001)
    killed.kill()
    killed.communicate()
    left = start_until(max(line["step"] for line in read_metrics(work)) + 30, work, [f"--workdir={work}", *options])
    left.send_signal(signal.SIGINT)
    time.sleep(0.05)
    left.send_signal(signal.SIGINT)
    left.communicate(timeout=60)
    assert (killed.returncode, left.returncode) == (-signal.SIGKILL, 130)
    last = run("--config=configs/sft.py", f"--workdir={work}", *options)
    assert last.returncode == 0 and "resuming at step" in last.stderr
    config = tiny_config(chat_data)
    config.update_from_flattened_dict({"optimizer.learning_rate": 2e-5, **values})
    train(config, whole)
    assert_same_bits(work, whole)


@pytest.fixture
def with_a_worker(chat_data, tmp_path):
    """A run whose batches a process of its own builds, and that leads a group of processes."""
    workdir = tmp_path / "work"
    values = ("train.max_steps=1000000", "train.eval_interval=500000", "data.num_workers=1", "train.log_interval=5")
    arguments = [f"--workdir={workdir}", *settings(chat_data, *values)]
    return start_until(10, workdir, arguments, start_new_session=True), workdir


def workers_of(process: subprocess.Popen) -> list[int]:
    children = []
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            children += map(int, path.read_text().split())
    return [pid for pid in children if b"spawn_main" in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


@pytest.mark.slow
def test_a_dead_worker_is_one_line_after_a_checkpoint(with_a_worker):
    process, workdir = with_a_worker
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:  # one that has built its last batch is not missed
        for worker in workers_of(process):
            os.kill(worker, signal.SIGKILL)
        time.sleep(0.1)
    stderr = process.communicate(timeout=60)[1]
    last = stderr.splitlines()[-1]
    assert process.returncode == 3 and "Traceback" not in stderr and last.startswith("error: the data can't be read: ")
    (checkpoint,) = (workdir / "checkpoints").iterdir()
    assert last.endswith(f"step {int(checkpoint.name):,} is saved, the same command resumes")
    assert int(checkpoint.name) >= max(line["step"] for line in read_metrics(workdir))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_group_that_is_stopped_stops_in_good_order(with_a_worker, number, code):
    """The worker is of the group, too. A closed terminal's signal may come twice, of terminal and shell."""
    process, workdir = with_a_worker
    workers = workers_of(process)
    os.killpg(process.pid, number)
    if number == signal.SIGHUP:
        process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "checkpoint saved; run the same command to resume" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr and "Warning" not in stderr
    assert len(list((workdir / "checkpoints").iterdir())) == 1
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["2>&1 | head -2", ">&- 2>&-"])
def test_a_run_does_not_depend_on_who_reads_along(chat_data, tmp_path, redirection):
    values = ("train.max_steps=20", "optimizer.warmup_steps=2", "train.log_interval=1")
    line = " ".join(command("--config=configs/sft.py", f"--workdir={tmp_path}", *settings(chat_data, *values)))
    line = f"{line} {redirection}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "checkpoints" / "20").is_dir() and (tmp_path / "model").is_symlink()


@pytest.mark.slow
def test_a_checkpoint_that_is_damaged_beyond_help_is_exit_code_3(chat_data, tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    result = run("--config=configs/sft.py", f"--workdir={tmp_path}", *settings(chat_data))
    assert result.returncode == 3 and result.stderr.count("\n") == 1
    assert "no sound checkpoint in" in result.stderr and "checkpoint 10 is damaged" in result.stderr


# Thirty threads that live and allocate at the same time; then malloc says what it has.
THREADS = """
import ctypes, sys, threading
from train import use_few_arenas
if sys.argv[1] == "few":
    assert use_few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
barrier = threading.Barrier(30)
def work():
    barrier.wait()
    libc.malloc(1000)
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(30)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.malloc_stats()
"""


def arenas(how: str) -> int:
    process = subprocess.run([sys.executable, "-c", THREADS, how], cwd=ROOT, capture_output=True, text=True, check=True)
    return len(re.findall(r"^Arena \d+:", process.stderr, re.MULTILINE))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_threads_share_two_arenas():
    assert arenas("few") <= 2 < arenas("as many as malloc likes")
