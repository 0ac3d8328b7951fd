"""How malloc is told to spread what threads allocate."""

import re
import subprocess
import sys

import pytest

# Thirty threads that live and allocate at the same time; then malloc says what it has.
PROGRAM = """
import ctypes, sys, threading
from tinysft_jax.memory import use_few_arenas
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
    process = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return len(re.findall(r"^Arena \d+:", process.stderr, re.MULTILINE))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_threads_share_two_arenas():
    assert arenas("few") <= 2 < arenas("as many as malloc likes")
