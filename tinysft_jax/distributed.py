"""Runs of several processes: how they find each other, and what they agree on."""

import contextlib
import hashlib
import os
import re
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from tinysft_jax import files
from tinysft_jax.console import RunError, UserError, explained, reason

# Seconds until a file shows on another node: network file systems cache directories.
VISIBLE_WITHIN = 30


class Launch(NamedTuple):
    """This process's place in a run."""

    coordinator: str  # "HOST:PORT", on which process 0 listens
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None  # of the node's GPUs; None: all that this process sees


class _Launcher(NamedTuple):
    """The environment variables of a launcher."""

    name: str
    num_processes: str
    process_id: str
    local_id: str = ""  # rank among the processes of this node
    local_size: str = ""  # number of processes on this node


# JAX's own detection is not enough: under SLURM, it gives the only process of a node just one of its GPUs, it knows
# Open MPI 5 only with mpi4py, and MPICH not at all, and for Kubernetes it asks the cluster's API. See the tests.
_LAUNCHERS = (
    _Launcher("SLURM", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    _Launcher("Open MPI", *(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Launcher("MPI", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # A pod of an indexed job is told its index, but not the number of pods: the manifest sets JAX_NUM_PROCESSES.
    _Launcher("Kubernetes", "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"),
)


def find_launch(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Launch | None:
    """This process's place in a run, from flags or else from the launcher's environment; None for a single process."""
    launcher = next((entry for entry in _LAUNCHERS if {entry.num_processes, entry.process_id} <= environ.keys()), None)
    if launcher and num_processes is None:
        num_processes = _number(environ, launcher.num_processes)
    if num_processes == 1 or (num_processes is None and process_id is None and coordinator is None):
        return None
    if launcher and process_id is None:
        process_id = _number(environ, launcher.process_id)
    if num_processes is None or process_id is None:
        raise UserError("--coordinator, --num_processes and --process_id belong together: give all three")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id {process_id} is not one of 0 to {num_processes - 1}")
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS") or _coordinator(environ, launcher)
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator {coordinator!r} is not HOST:PORT")
    return Launch(coordinator, num_processes, process_id, _local_device_ids(environ, launcher))


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name} is {environ[name]!r}, not a number") from None


def _coordinator(environ: Mapping[str, str], launcher: _Launcher | None) -> str:
    name = launcher.name if launcher else ""
    if name == "SLURM":
        # The first node of a list: "a[03-07,9],b" → "a03".
        match = re.match(r"([^,\[]+)(?:\[([^],-]+))?", environ.get("SLURM_STEP_NODELIST", ""))
        if not match:
            raise UserError("SLURM_STEP_NODELIST is empty: start the run with srun, or give --coordinator")
        return f"{match[1]}{match[2] or ''}:{_port(environ.get('SLURM_JOB_ID', ''))}"
    if name == "Kubernetes":
        pod, _, domain = socket.getfqdn().partition(".")
        if not domain or not re.search(r"-\d+$", pod):
            raise UserError(
                "this pod has no name in a headless service: set the job's subdomain, or give --coordinator"
            )
        return f"{re.sub(r'[0-9]+$', '0', pod)}.{domain}:{_port('')}"
    if launcher and environ.get(launcher.local_size) == environ[launcher.num_processes]:
        return f"localhost:{_port(environ.get('PMIX_NAMESPACE', ''))}"
    raise UserError("the address of process 0 is unknown: give --coordinator=HOST:PORT or set JAX_COORDINATOR_ADDRESS")


def _port(job: str) -> int:
    """From the upper end of the ephemeral range; two jobs on a node rarely get the same."""
    return 61_440 + zlib.crc32(job.encode()) % 4_096


def _local_device_ids(environ: Mapping[str, str], launcher: _Launcher | None) -> tuple[int, ...] | None:
    """One GPU for each of a node's processes, unless there is one process, or it was given one GPU already."""
    if launcher is None or not {launcher.local_id, launcher.local_size} <= environ.keys():
        return None
    # SLURM lists all nodes: "8(x2),4" for two of 8 tasks and one of 4.
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ[launcher.local_size])
    sizes = [int(size) for size, nodes in groups for _ in range(int(nodes or 1))]
    size = sizes[int(environ.get("SLURM_NODEID", 0)) if len(sizes) > 1 else 0]
    visible = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return None if size == 1 or len(visible) == 1 else (_number(environ, launcher.local_id),)


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of the run, if it has several (see `find_launch`). Call it before using JAX."""
    if launch := find_launch(os.environ, coordinator, num_processes, process_id):
        failure = f"process {launch.process_id} of {launch.num_processes} can't join the others at {launch.coordinator}"
        with explained(failure, RunError, (RuntimeError, ValueError)):
            # The others wait for a process that fails: it must not wait long for them.
            jax.distributed.initialize(*launch, cluster_detection_method="deactivate", shutdown_timeout_seconds=20)
    check_devices()


def check_devices() -> None:
    """Raises: UserError, if JAX finds no devices of the platform that JAX_PLATFORMS names."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter if JAX is installed without that platform
        wanted = os.environ.get("JAX_PLATFORMS", "")
        why = reason(error) if str(error) else "it is not installed"
        raise UserError(
            f"JAX can't use the platform of JAX_PLATFORMS={wanted}: {why}; unset it, or install what it needs (the "
            "extra cuda12 or cuda13 for an NVIDIA GPU)"
        ) from None


def is_first() -> bool:
    """Whether this is process 0, which writes logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first_decides(value: int) -> int:
    """Process 0's value (int32), in all processes."""
    return int(multihost_utils.broadcast_one_to_all(np.array(value, np.int32))) if jax.process_count() > 1 else value


def on_first(function: Callable[[], None]) -> None:
    """Calls a function in process 0. If it raises a UserError, RunError or OSError, all processes raise an error."""
    failure: Exception | None = None
    if is_first():
        try:
            function()
        except (UserError, RunError, OSError) as error:
            failure = error
    code = first_decides(0 if failure is None else getattr(failure, "exit_code", RunError.exit_code))
    if failure:
        raise failure
    if code:
        raise (UserError if code == UserError.exit_code else RunError)("process 0 can't continue; it says why")


def check_same(values: Mapping[str, str]) -> None:
    """Raises: UserError, in every process, if a named value differs between processes."""
    if jax.process_count() == 1:
        return
    digests = np.array([int(hashlib.sha256(text.encode()).hexdigest()[:7], 16) for text in values.values()], np.int32)
    for name, column in zip(values, multihost_utils.process_allgather(digests).T, strict=True):
        if (column != column[0]).any():
            others = _listed(column != column[0])
            raise UserError(f"{name} differs between process 0 and {others}; give all processes the same")


def check_shared(directory: Path) -> None:
    """Raises: UserError, in every process, if `directory` (which need not exist yet) is not the same for all."""
    if jax.process_count() == 1:
        return
    probe = directory / f".shared-{first_decides(secrets.randbits(31)):08x}"
    with contextlib.ExitStack() as stack:
        if is_first():
            with contextlib.suppress(OSError):
                stack.enter_context(files.maybe_new_directory(directory))
                probe.touch()
                stack.callback(probe.unlink, missing_ok=True)
        barrier("probe written")
        deadline = time.monotonic() + (0 if is_first() else VISIBLE_WITHIN)
        while not (found := probe.exists()) and time.monotonic() < deadline:
            time.sleep(0.5)
        missing = ~multihost_utils.process_allgather(np.array(found)).reshape(-1)
    if missing[0]:
        raise UserError(f"can't write {directory}; choose another --workdir")
    if missing.any():
        raise UserError(
            f"{directory} is not the same directory for {_listed(missing)} as for process 0; "
            "choose a --workdir on a file system that all processes share"
        )


def _listed(selected: np.ndarray) -> str:
    """Of a boolean for each process: "process 1, 2"."""
    processes = np.flatnonzero(selected).tolist()
    return f"process {', '.join(map(str, processes[:5]))}{' and others' if len(processes) > 5 else ''}"
