"""Small runs, and how to compare them."""

import functools
import importlib.util
import math
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from tinysft_jax.sharding import make_mesh
from tinysft_jax.training import loop
from tinysft_jax.training.log import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs"


def mesh_of(*sizes: int):
    """A mesh over the first devices, as many as it takes."""
    devices = jax.devices()[: math.prod(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: len(devices))
        patch.setattr(jax, "make_mesh", functools.partial(jax.make_mesh, devices=devices))
        return make_mesh(*sizes)


def load_config(name: str, preset: str = ""):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset)


# A model and batches that train in milliseconds.
TINY = {
    "init_from": "random",
    "model.dim": 16,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "model.max_seq_len": 64,
    "data.seq_len": 64,
    "train.batch_size": 8,
}


def tiny_config(data: Path, **changes):
    """A run of 12 steps; `changes` are by dotted key, dots written as two underscores."""
    config = load_config("sft")
    settings = TINY | {"data.path": str(data), "optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 2}
    steps = {"max_steps": 12, "log_interval": 1, "eval_interval": 5, "save_interval": 4}
    settings |= {f"train.{key}": value for key, value in steps.items()}
    config.update_from_flattened_dict(settings | {key.replace("__", "."): value for key, value in changes.items()})
    return config


def stop_at(step: int, monkeypatch, number=signal.SIGINT) -> None:
    """Sends this process a signal once the given step has been logged."""
    log_metrics = loop.log_metrics

    def log_and_interrupt(run, done, metrics):
        log_metrics(run, done, metrics)
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop, "log_metrics", log_and_interrupt)


def losses(workdir: Path, key: str = "sft/train_loss") -> dict[int, float]:
    return {line["step"]: line[key] for line in read_metrics(workdir) if key in line}


def arrays(directory: Path) -> dict[str, np.ndarray]:
    """All arrays that orbax stored in a directory, by path."""
    stored = ocp.metadata(directory).metadata
    state = ocp.load(directory, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def latest_checkpoint(workdir: Path) -> dict[str, np.ndarray]:
    return arrays(max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name)))


def assert_same_bits(workdir: Path, other: Path) -> None:
    """Two runs logged the same losses, and ended with the same state and the same best model."""
    # Of the steps since the last report, the first after a start left out.
    rates = ("tokens_per_second", "supervised_tokens_per_second", "padding_fraction", "mfu")
    rates += ("seconds_sampling", "seconds_scoring", "seconds_training")
    lines = [
        [{key: value for key, value in line.items() if not key.endswith(rates)} for line in read_metrics(each)]
        for each in (workdir, other)
    ]
    assert lines[0] == lines[1]
    assert os.readlink(workdir / "model") == os.readlink(other / "model")
    pairs = [
        (latest_checkpoint(workdir), latest_checkpoint(other)),
        (arrays((workdir / "model" / "params").resolve()), arrays((other / "model" / "params").resolve())),
    ]
    for one, two in pairs:
        assert one.keys() == two.keys()
        for path in one:
            np.testing.assert_array_equal(one[path], two[path])
