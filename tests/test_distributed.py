"""How processes find each other, and what two of them settle between them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jax._src.clusters import ClusterEnv  # private: nothing public tells what JAX would detect
from launch import free_address

from tinysft_jax.console import UserError
from tinysft_jax.distributed import Launch, find_launch

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08],login",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-a-1@1",
}
KUBERNETES = {"JOB_COMPLETION_INDEX": "3", "JAX_NUM_PROCESSES": "4"}


@pytest.fixture
def pod(monkeypatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.setattr(socket, "getfqdn", lambda: name)


def test_a_process_alone_is_alone():
    assert find_launch({}) is None
    assert find_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find_launch(SLURM, num_processes=1) is None
    assert find_launch({"JOB_COMPLETION_INDEX": "3"}) is None  # an indexed job of runs of their own


def test_slurm():
    launch = find_launch(SLURM)
    host, port = launch.coordinator.split(":")
    assert host == "gpu07" and 61_440 <= int(port) <= 65_535
    assert (launch.num_processes, launch.process_id, launch.local_device_ids) == (16, 9, (1,))
    assert find_launch(SLURM | {"SLURM_PROCID": "0"}).coordinator == launch.coordinator
    assert find_launch(SLURM | {"SLURM_JOB_ID": "8"}).coordinator != launch.coordinator
    assert find_launch(SLURM | {"SLURM_STEP_NODELIST": "solo,gpu[1,2]"}).coordinator.startswith("solo:")


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "visible", "devices"),
    [
        ("1(x2)", "1", "0,1,2,3,4,5,6,7", None),  # one process a node takes all its GPUs
        ("8(x1),1", "1", "", None),
        ("8(x1),1", "0", "", (1,)),
        ("8(x2)", "1", "0", None),  # bound to one GPU already, which it sees as its first
        ("8(x2)", "1", "0,1,2,3,4,5,6,7", (1,)),
    ],
)
def test_the_gpus_of_a_process(tasks_per_node, node, visible, devices):
    changes = {
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
        "SLURM_NODEID": node,
        "CUDA_VISIBLE_DEVICES": visible,
    }
    assert find_launch(SLURM | changes).local_device_ids == devices


def test_mpi():
    launch = find_launch(OPEN_MPI)
    assert launch.coordinator.startswith("localhost:")
    assert (launch.num_processes, launch.process_id, launch.local_device_ids) == (2, 1, (1,))
    assert find_launch(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-a-2@1"}).coordinator != launch.coordinator
    two_nodes = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(UserError, match="address of process 0 is unknown"):
        find_launch(two_nodes)
    assert find_launch(two_nodes | {"JAX_COORDINATOR_ADDRESS": "a:1"}).coordinator == "a:1"
    assert find_launch({"PMI_SIZE": "2", "PMI_RANK": "0"}, coordinator="b:2") == Launch("b:2", 2, 0)


def test_kubernetes(pod):
    pod("tune-3.peers.lab.svc.cluster.local")
    launch = find_launch(KUBERNETES)
    assert launch.coordinator.rpartition(":")[0] == "tune-0.peers.lab.svc.cluster.local"
    assert (launch.num_processes, launch.process_id, launch.local_device_ids) == (4, 3, None)
    pod("tune-3")
    with pytest.raises(UserError, match="headless service"):
        find_launch(KUBERNETES)


def test_flags_come_first():
    assert find_launch({}, "h:1", 2, 0) == Launch("h:1", 2, 0)
    assert find_launch(SLURM, "h:1").coordinator == "h:1"


@pytest.mark.parametrize(
    ("flags", "environ", "complaint"),
    [
        (("h:1", None, None), {}, "belong together"),
        (("h:1", 2, None), {}, "belong together"),
        ((None, 2, 0), {}, "address of process 0 is unknown"),
        (("h:1", 2, 2), {}, "--process_id 2 is not one of 0 to 1"),
        (("h", 2, 1), {}, "'h' is not HOST:PORT"),
        ((None, None, None), SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x', not a number"),
    ],
)
def test_a_place_that_cannot_be_is_refused(flags, environ, complaint):
    with pytest.raises(UserError, match=complaint):
        find_launch(environ, *flags)


@pytest.mark.parametrize(
    ("environ", "detected"),
    [
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, [0]),  # one GPU of the node's eight
        (OPEN_MPI, None),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, None),
        (KUBERNETES | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Kubernetes environment detected")
def test_jax_itself_does_not_find_these(monkeypatch, environ, detected):
    """Once it does, the table of launchers can go: a process that has a node for itself must get all of its GPUs."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    try:
        *_, local_device_ids = found = ClusterEnv.auto_detect_unset_distributed_params(*[None] * 5, 300)
    except RuntimeError as error:
        assert environ is OPEN_MPI and "requires mpi4py" in str(error)  # newer JAX
    else:
        assert local_device_ids == detected and (detected or found == (None, None, None, None))


SETTLE = """
import json, sys
from pathlib import Path
from tinysft_jax import distributed
from tinysft_jax.console import UserError
coordinator, process_id, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
distributed.start(coordinator, 2, process_id)
distributed.VISIBLE_WITHIN = 0.1

def complaint(check, *arguments):
    try:
        check(*arguments)
    except UserError as error:
        return str(error)

print(json.dumps({
    "first": distributed.is_first(),
    "decided": distributed.first_decides(process_id == 0),
    "same": complaint(distributed.check_same, {"one": "a", "two": "b"}),
    "different": complaint(distributed.check_same, {"one": "a", "two": str(process_id)}),
    "shared": complaint(distributed.check_shared, directory),
    "apart": complaint(distributed.check_shared, directory.parent / f"work{process_id}"),
    "unwritable": complaint(distributed.check_shared, Path("/proc/none")),
}))
"""


def test_two_processes_settle_things(tmp_path):
    coordinator = free_address()
    script = tmp_path / "settle.py"
    script.write_text(SETTLE, encoding="utf-8")
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), coordinator, str(index), str(tmp_path / "work")],
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for index in range(2)
    ]
    # The last line: before it, gloo says on stdout who is connected.
    answers = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in started]
    assert [answer.pop("first") for answer in answers] == [True, False]
    for answer in answers:
        assert "not the same directory for process 1 as for process 0" in answer.pop("apart")
    assert answers[0] == answers[1]
    assert answers[0]["decided"] and answers[0]["same"] is None and answers[0]["shared"] is None
    assert answers[0]["different"].startswith("two differs between process 0 and process 1;")
    assert answers[0]["unwritable"] == "can't write /proc/none; choose another --workdir"
    assert not [*tmp_path.glob("work*")]
