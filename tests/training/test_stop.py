import hashlib
import os
import signal
import threading
import time

import jax
import pytest

from tinysft_jax.sharding import make_mesh
from tinysft_jax.training import stop as stops
from tinysft_jax.training.stop import StopRequest


def busy(seconds: float) -> None:
    """Keeps this thread in C, where no handler of Python's can run, as a compiler does."""
    until = time.monotonic() + seconds
    turns = 1 << 16
    while time.monotonic() < until:
        began = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"", b"", turns)
        turns = max(1, int(turns * (until - time.monotonic()) / (time.monotonic() - began)))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_the_second_leaves_at_once(monkeypatch, capfd, number, code):
    """Even while the main thread is deep in a compiler."""
    left: list[tuple[int, bool]] = []
    computing = threading.Event()
    monkeypatch.setattr(stops.os, "_exit", lambda code: left.append((code, computing.is_set())))
    mesh = make_mesh(jax.device_count())
    with StopRequest(mesh) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed() and stop.exit_code == code

        def ask_again():
            computing.set()
            time.sleep(0.1)
            os.kill(os.getpid(), number)

        threading.Thread(target=ask_again).start()
        busy(1.5)
        computing.clear()
    assert left == [(code, True)]
    said = capfd.readouterr().err
    assert "stopping after this step, with a checkpoint; once more to leave at once" in said
    assert "left at once; the same command resumes from the last checkpoint" in said


def test_afterwards_signals_are_what_they_were():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threading.active_count()
    with StopRequest(make_mesh(jax.device_count())):
        assert threading.active_count() == before[2] + 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threading.active_count()) == before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
