"""A run of prepare that is stopped or killed leaves nothing half-written."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tinysft_jax import console
from tinysft_jax.data.prepare import main


def start(output: Path) -> subprocess.Popen:
    """The command with two workers, in a process group of its own as a shell starts it, with work for minutes."""
    arguments = ["--embedded=500000", f"--output={output}", "--workers=2"]
    command = [sys.executable, "-m", "tinysft_jax.data.prepare", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def wait_for_work(process: subprocess.Popen, output: Path) -> None:
    """Until something is written, but not at `output`."""
    while not any(path.stat().st_size > 100_000 for path in output.parent.glob(".*.partial/train/tokens-*.npy")):
        assert process.poll() is None
        time.sleep(0.02)
    assert not output.exists()


@pytest.mark.parametrize("moment", ["starting", "at work"])
@pytest.mark.parametrize(("interruption", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_and_says_one_line(tmp_path: Path, moment, interruption, code):
    """Also when its workers are interrupted with it, as by Ctrl-C at a terminal or by a batch system."""
    process = start(tmp_path / "data")
    if moment == "at work":
        wait_for_work(process, tmp_path / "data")
    else:
        while not any(tmp_path.glob(".*.partial/valid")):  # the workers come next
            time.sleep(0.001)
    os.killpg(process.pid, interruption)
    # The workers hold the other end of the pipe: it ends when they are gone.
    assert process.communicate(timeout=20)[1].count(b"\n") == 1
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_a_killed_worker_ends_the_run_in_one_line(tmp_path: Path, capsys):
    def kill_one() -> None:
        while len(workers := multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        workers[0].kill()

    threading.Thread(target=kill_one).start()
    with pytest.raises(SystemExit) as end:
        console.run(lambda: main(["--embedded=500000", f"--output={tmp_path / 'data'}", "--workers=2"]))
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 3 and error.startswith("error: a worker process died")
    assert list(tmp_path.iterdir()) == [] and not multiprocessing.active_children()


@pytest.mark.slow
def test_what_a_killed_run_left_aside_goes_with_the_next_one(tmp_path: Path):
    process = start(tmp_path / "data")
    wait_for_work(process, tmp_path / "data")
    process.kill()
    process.communicate(timeout=20)  # the workers, who hold the other end of the pipe, are gone as well
    assert len(list(tmp_path.iterdir())) == 1 and not (tmp_path / "data").exists()
    living = tmp_path / ".data2.01234567.partial"
    living.mkdir()
    main(["--embedded=20", f"--output={tmp_path / 'data'}", "--workers=1"])
    assert sorted(tmp_path.iterdir()) == [living, tmp_path / "data"]
