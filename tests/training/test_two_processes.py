"""Two processes of two devices on one machine, against one process with one device."""

import importlib.util
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from launch import start_training
from runs import TINY, latest_checkpoint, losses

SETTINGS = TINY | {
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 2,
    "train.max_steps": 20,
    "train.log_interval": 1,
    "train.eval_interval": 5,
    "train.save_interval": 10,
}


def run(data: Path, workdir: Path, num_processes: int = 2, devices: int = 2, **changes) -> list[tuple[int, str]]:
    """Exit codes and error outputs of a run's processes."""
    processes = launch(data, workdir, num_processes, devices, **changes)
    return [(process.wait(timeout=200), process.stderr.read()) for process in processes]


def launch(data: Path, workdir: Path, num_processes: int = 2, devices: int = 2, **changes):
    settings = SETTINGS | {"data.path": data} | {key.replace("__", "."): value for key, value in changes.items()}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return start_training([f"--workdir={workdir}", *flags], num_processes, devices)


@pytest.fixture(scope="module")
def alone(chat_data, tmp_path_factory) -> Path:
    """The work directory of a run by one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "work"
    ((code, text),) = run(chat_data, workdir, num_processes=1, devices=1)
    assert code == 0, text
    return workdir


def assert_same_run(workdir: Path, alone: Path, objective: str = "sft") -> None:
    for key in (f"{objective}/train_loss", f"{objective}/val_loss", f"{objective}/final_val_loss"):
        assert losses(workdir, key).keys() == losses(alone, key).keys()
        np.testing.assert_allclose([*losses(workdir, key).values()], [*losses(alone, key).values()], rtol=1e-5)
    assert os.readlink(workdir / "model") == os.readlink(alone / "model")


def test_two_processes_train_as_one_device_does(chat_data, alone, tmp_path):
    """Each reads its own part of the rows; the first alone writes logs; both write the checkpoint."""
    exports = {"huggingface": tmp_path / "huggingface", "torch": tmp_path / "model.pt"}
    if not importlib.util.find_spec("torch"):
        del exports["torch"]
    (first, spoken), (second, silent) = run(chat_data, tmp_path, export=",".join(exports))
    assert (first, second) == (0, 0), (spoken, silent)
    assert all(path.exists() and f"exported: {path}" in spoken for path in exports.values())
    assert "step 20: validation loss" in spoken and "loss" not in silent
    assert len(losses(alone)) == 20 and losses(alone)[20] < losses(alone)[1] - 0.1
    assert_same_run(tmp_path, alone)
    one, other = latest_checkpoint(tmp_path), latest_checkpoint(alone)
    for path in (path for path in other if path.startswith("['params']")):
        np.testing.assert_allclose(one[path], other[path], atol=1e-5)


@pytest.mark.slow
def test_one_process_asked_to_stop_stops_both_and_one_device_goes_on(chat_data, alone, tmp_path):
    """With parameters divided over both processes."""
    # An evaluation at each step, so that there is time to ask.
    changes = {"train__eval_interval": 1, "mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}
    processes = launch(chat_data, tmp_path, **changes)
    deadline = time.monotonic() + 150
    while max(losses(tmp_path), default=0) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    endings = [(process.wait(timeout=100), process.stderr.read()) for process in processes]
    assert [code for code, _ in endings] == [143, 143], endings
    assert all("checkpoint saved; run the same command to resume" in text for _, text in endings)
    (stopped_at,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert 4 <= stopped_at < 20
    ((code, text),) = run(chat_data, tmp_path, num_processes=1, devices=1)
    assert code == 0 and f"resuming at step {stopped_at} of 20" in text
    assert [*losses(tmp_path)] == [*range(1, 21)]
    np.testing.assert_allclose([*losses(tmp_path).values()], [*losses(alone).values()], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_evaluate_a_kept_model_that_is_in_no_memory(chat_data, tmp_path):
    """Without a learning rate the first model is kept, and read again at the end, by both."""
    changes = {"optimizer__learning_rate": 0, "train__max_steps": 2, "train__eval_interval": 1}
    endings = run(chat_data, tmp_path, mesh__data=1, mesh__fsdp=2, mesh__tensor=2, **changes)
    assert [code for code, _ in endings] == [0, 0], endings
    assert os.readlink(tmp_path / "model") == "models/1"
    assert losses(tmp_path, "sft/final_val_loss") == {2: pytest.approx(losses(tmp_path, "sft/val_loss")[2], rel=1e-6)}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_two_processes_learn_from_pairs_as_one_device_does(pair_data, tmp_path, objective):
    """The reference's log-likelihoods, of which each computes its rows, as well."""
    changes = {"objective": objective, "dpo__beta": 0.5}
    for name, sizes in (("alone", (1, 1)), ("both", (2, 2))):
        for code, text in run(pair_data, tmp_path / name, *sizes, **changes):
            assert code == 0, text
    assert_same_run(tmp_path / "both", tmp_path / "alone", objective)
    assert losses(tmp_path / "alone", f"{objective}/train_loss")[20] < 0.66
