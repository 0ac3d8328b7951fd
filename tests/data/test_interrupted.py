"""A run of prepare that is stopped or killed leaves nothing half-written."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinysft_jax.data.prepare import main


def start(output: Path) -> subprocess.Popen:
    """The command with two workers, amid work that would take minutes: something is written, but not at `output`."""
    arguments = ["--embedded=500000", f"--output={output}", "--workers=2"]
    process = subprocess.Popen([sys.executable, "-m", "tinysft_jax.data.prepare", *arguments], stderr=subprocess.PIPE)
    while not any(path.stat().st_size > 100_000 for path in output.parent.glob(".*.partial/train/tokens-*.npy")):
        assert process.poll() is None
        time.sleep(0.02)
    assert not output.exists()
    return process


@pytest.mark.parametrize(("interruption", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_and_says_one_line(tmp_path: Path, interruption, code):
    process = start(tmp_path / "data")
    process.send_signal(interruption)
    assert process.communicate(timeout=20)[1].count(b"\n") == 1
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_aside_goes_with_the_next_one(tmp_path: Path):
    process = start(tmp_path / "data")
    process.kill()
    process.communicate(timeout=20)  # the workers, who hold the other end of the pipe, are gone as well
    assert len(list(tmp_path.iterdir())) == 1 and not (tmp_path / "data").exists()
    living = tmp_path / ".data2.01234567.partial"
    living.mkdir()
    main(["--embedded=20", f"--output={tmp_path / 'data'}", "--workers=1"])
    assert sorted(tmp_path.iterdir()) == [living, tmp_path / "data"]
