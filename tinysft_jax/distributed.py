"""A run over several processes: how they find each other, and what they settle between them."""

import contextlib
import dataclasses
import hashlib
import os
import re
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from tinysft_jax.console import RunError, UserError, reason

# Seconds that a file may take to show on another node (network file systems cache directories).
VISIBLE_WITHIN = 30


@dataclasses.dataclass(frozen=True)
class Launch:
    """This process's place in a run.

    Attributes:
      coordinator: "HOST:PORT", on which process 0 listens.
      num_processes: of the run.
      process_id: 0 to num_processes - 1.
      local_device_ids: which of the node's GPUs this process takes; None: all that it sees.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class _Launcher:
    """The variables in which something that starts processes says what it did."""

    name: str
    num_processes: str
    process_id: str
    local_id: str = ""  # rank among the processes of this node
    local_size: str = ""  # how many those are


_LAUNCHERS = (
    _Launcher("SLURM", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    _Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Launcher("MPI", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # Kubernetes tells an indexed job's pod its index, but not how many there are: the manifest sets that.
    _Launcher("Kubernetes", "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"),
)


def find_launch(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Launch | None:
    """This process's place in a run, from flags or else from the launcher's environment.

    JAX can read launchers' variables too; it gives each process one GPU even where SLURM starts one process a node,
    and asks the Kubernetes API for what a pod's own name says.

    Args:
      environ: of the process.
      coordinator: "HOST:PORT" of process 0.
      num_processes: of the run; 1: a run of its own, whatever the environment says.
      process_id: of this process.

    Returns:
      None for a run of one process.

    Raises:
      UserError: if something is missing or can't be.
    """
    launcher = next((entry for entry in _LAUNCHERS if {entry.num_processes, entry.process_id} <= environ.keys()), None)
    if launcher and num_processes is None:
        num_processes = _number(environ, launcher.num_processes)
    if num_processes == 1 or (num_processes is None and process_id is None and coordinator is None):
        return None
    if process_id is None and launcher:
        process_id = _number(environ, launcher.process_id)
    if num_processes is None or process_id is None:
        raise UserError("--coordinator, --num_processes and --process_id belong together: give all three")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id {process_id} is not one of 0 to {num_processes - 1}")
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS") or _coordinator(environ, launcher)
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator {coordinator!r} is not HOST:PORT")
    return Launch(coordinator, num_processes, process_id, _local_devices(environ, launcher))


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of a run, if there are any. To be called before JAX looks for devices.

    Args: as of `find_launch`.

    Raises:
      UserError: as `find_launch` and `check_devices`.
      RunError: if the others can't be reached.
    """
    if launch := find_launch(os.environ, coordinator, num_processes, process_id):
        _join(launch)
    check_devices()


def _join(launch: Launch) -> None:
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.num_processes,
            launch.process_id,
            local_device_ids=launch.local_device_ids,
            cluster_detection_method="deactivate",
            # A process that fails must not wait long for the others, which wait for it.
            shutdown_timeout_seconds=20,
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"process {launch.process_id} of {launch.num_processes} can't join the others at {launch.coordinator}: "
            f"{reason(error)}"
        ) from None


def check_devices() -> None:
    """Looks for JAX's devices.

    Raises:
      UserError: if there are none of the platform that the environment asks for.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX is installed without that platform
        wanted = os.environ.get("JAX_PLATFORMS", "")
        why = reason(error) if str(error) else "it is not installed"
        raise UserError(
            f"JAX can't use the platform of JAX_PLATFORMS={wanted}: {why}; unset it, or install what it needs (the "
            "extra cuda12 or cuda13 for an NVIDIA GPU)"
        ) from None


def is_first() -> bool:
    """Whether this is the process that writes logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes have called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first_decides(value: int) -> int:
    """The first process's value, in all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.array(value, np.int32))) if jax.process_count() > 1 else value


def on_first(function: Callable[[], None]) -> None:
    """Calls a function in the first process; the others wait, and learn that it failed if it did.

    Raises:
      UserError, RunError, OSError: if the function raises one; in the others, one of the first two.
    """
    failure: Exception | None = None
    if is_first():
        try:
            function()
        except (UserError, RunError, OSError) as error:
            failure = error
    code = first_decides(0 if failure is None else 2 if isinstance(failure, UserError) else 3)
    if failure:
        raise failure
    if code:
        raise (UserError if code == 2 else RunError)("process 0 can't go on; it says why")


def check_same(values: Mapping[str, str]) -> None:
    """Refuses to run on what differs between processes.

    Args:
      values: what must be the same, by its name.

    Raises:
      UserError: in every process, naming what differs and where.
    """
    if jax.process_count() == 1:
        return
    digests = np.array([int(hashlib.sha256(text.encode()).hexdigest()[:7], 16) for text in values.values()], np.int32)
    everyone = multihost_utils.process_allgather(digests)
    for name, column in zip(values, everyone.T, strict=True):
        others = np.flatnonzero(column != column[0]).tolist()
        if others:
            raise UserError(f"{name} differs between process 0 and {_listed(others)}; give all processes the same")


def check_shared(directory: Path) -> None:
    """Makes sure that all processes see one `directory`, which need not exist yet.

    Raises:
      UserError: in every process, naming those that don't see what process 0 wrote there.
    """
    if jax.process_count() == 1:
        return
    token = np.frombuffer(uuid.uuid4().bytes, np.uint8)
    probe = directory / f".shared-{multihost_utils.broadcast_one_to_all(token).tobytes().hex()}"
    is_new = not directory.exists()
    if is_first():
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            probe.touch()
    barrier("probe written")
    deadline = time.monotonic() + (0 if is_first() else VISIBLE_WITHIN)
    while not (found := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(found)).reshape(-1)).tolist()
    if is_first():
        probe.unlink(missing_ok=True)
        if is_new:  # nothing is left of a run that is refused later
            with contextlib.suppress(OSError):
                directory.rmdir()
    if 0 in blind:
        raise UserError(f"can't write {directory}; choose another --workdir")
    if blind:
        raise UserError(
            f"{directory} is not the same directory for {_listed(blind)} as for process 0; "
            "choose a --workdir on a file system that all processes share"
        )


def _coordinator(environ: Mapping[str, str], launcher: _Launcher | None) -> str:
    """Where process 0 is, as far as the launcher tells."""
    if launcher and launcher.name == "SLURM":
        return f"{_first_host(environ.get('SLURM_STEP_NODELIST', ''))}:{_port(environ.get('SLURM_JOB_ID', ''))}"
    if launcher and launcher.name == "Kubernetes":
        pod, _, domain = socket.getfqdn().partition(".")
        if domain and re.search(r"-\d+$", pod):
            return f"{re.sub(r'[0-9]+$', '0', pod)}.{domain}:{_port('')}"
        raise UserError("this pod has no name in a headless service: set the job's subdomain, or give --coordinator")
    if launcher and environ.get(launcher.local_size) == environ[launcher.num_processes]:
        return f"localhost:{_port(environ.get('PMIX_NAMESPACE', ''))}"
    raise UserError("where process 0 is can't be told: give --coordinator=HOST:PORT or set JAX_COORDINATOR_ADDRESS")


def _first_host(nodes: str) -> str:
    """The first of a SLURM node list: "a[03-07,9],b" → "a03"."""
    match = re.match(r"([^,\[]+)(?:\[([^],-]+))?", nodes)
    if not match:
        raise UserError("SLURM_STEP_NODELIST is empty: start the run with srun, or give --coordinator")
    return match[1] + (match[2] or "")


def _port(job: str) -> int:
    """A port that two jobs on a node will hardly share, from the upper end of the ephemeral range."""
    return 61_440 + zlib.crc32(job.encode()) % 4_096


def _local_devices(environ: Mapping[str, str], launcher: _Launcher | None) -> tuple[int, ...] | None:
    """One GPU for each of a node's processes, unless there is one process, or it was given one GPU already."""
    if launcher is None or not {launcher.local_id, launcher.local_size} <= environ.keys():
        return None
    visible = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if _processes_of_this_node(environ, launcher) == 1 or len(visible) == 1:
        return None
    return (_number(environ, launcher.local_id),)


def _processes_of_this_node(environ: Mapping[str, str], launcher: _Launcher) -> int:
    """SLURM tells it of each node: "8(x2),4" for two nodes of 8 tasks and one of 4."""
    counts: list[int] = []
    for group in environ[launcher.local_size].split(","):
        count, _, times = group.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[int(environ.get("SLURM_NODEID", 0)) if len(counts) > 1 else 0]


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name} is {environ[name]!r}, not a number") from None


def _listed(processes: list[int]) -> str:
    shown = ", ".join(str(process) for process in processes[:5])
    return f"process {shown}{' and others' if len(processes) > 5 else ''}"
