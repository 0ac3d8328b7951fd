"""Starting several processes of one run on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_address() -> str:
    """A HOST:PORT that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start_training(arguments: list[str], num_processes: int, devices: int) -> list[subprocess.Popen]:
    """`train.py` in processes that each have some virtual devices and know of each other by flags."""
    # Without the compilation cache: see `not_from_disk` in tests/training/test_step.py.
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    coordinator = free_address()
    return [
        subprocess.Popen(
            [
                *[sys.executable, "train.py", "--config=configs/sft.py", *arguments],
                *[f"--coordinator={coordinator}", f"--num_processes={num_processes}", f"--process_id={index}"],
            ],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(num_processes)
    ]
