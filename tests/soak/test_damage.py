"""Every file of a checkpoint and of a data set, damaged in every way; and a disk that is really full."""

import json
import os
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from launch import start_training
from runs import assert_same_bits, tiny_config

from tinysft_jax import files
from tinysft_jax.training import loop
from tinysft_jax.training.checkpoints import Checkpoints

FLIPS = 50  # a file

pytestmark = pytest.mark.soak


def damaged(directory: Path, draw: random.Random):
    """Damages one file after the other, and restores it when the caller goes on."""
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        content, name = path.read_bytes(), path.relative_to(directory).as_posix()
        path.unlink()
        yield name, "missing"
        for length in {0, len(content) // 2, len(content) - 1} - {len(content), -1}:
            path.write_bytes(content[:length])
            yield name, "truncated"
        for _ in range(FLIPS if content else 0):
            flipped = bytearray(content)
            flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            yield name, "flipped"
        path.write_bytes(content)


def means_the_same(manifest: Path, before: dict) -> bool:
    """Spaces of a manifest say nothing."""
    try:
        return json.loads(manifest.read_bytes()) == before
    except (ValueError, FileNotFoundError):
        return False


def count_recognised(directory: Path) -> Counter:
    assert files.find_damage(directory) is None
    before, counts = json.loads((directory / "manifest.json").read_bytes()), Counter()
    for name, kind in damaged(directory, random.Random(0)):
        if name == "manifest.json":
            if means_the_same(directory / name, before):
                continue
            # A hash or a name that was flipped is laid at the door of the file that it is about.
            assert files.find_damage(directory)
        else:
            assert name in files.find_damage(directory)
        counts[kind] += 1
    assert files.find_damage(directory) is None
    return counts


def test_every_damage_is_recognised(chat_data, tmp_path, figures):
    loop.train(tiny_config(chat_data), tmp_path / "work")
    shutil.copytree(chat_data, tmp_path / "data")
    figures(
        checkpoint=count_recognised(tmp_path / "work" / "checkpoints" / "12"),
        data=count_recognised(tmp_path / "data"),
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB, where we may make one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tinysft-jax-test", str(path)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can't be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(chat_data, small_disk, tmp_path, figures):
    """One line, exit code 3, the last checkpoint intact; with more room, the run ends as if nothing had been."""
    settings = {
        "data.path": chat_data, "model.dim": 32, "model.n_layers": 1, "model.n_heads": 2, "model.max_seq_len": 64,
        "data.seq_len": 64, "optimizer.warmup_steps": 5, "train.max_steps": 40, "train.batch_size": 8,
        "train.eval_interval": 20, "train.save_interval": 2, "train.keep_checkpoints": 30,
    }  # fmt: skip

    def run(workdir: Path) -> tuple[int, list[str]]:
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        (process,) = start_training([f"--workdir={workdir}", *flags], 1, 1)
        stderr = process.communicate(timeout=300)[1]
        return process.returncode, [line for line in stderr.splitlines() if not line.startswith("step ")]

    code, said = run(small_disk / "work")
    assert code == 3 and len(said) == 1 and "No space left" in said[0], said
    checkpoints = Checkpoints(small_disk / "work", keep=30)
    assert checkpoints.find_newest() == "" and checkpoints.newest
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert run(small_disk / "work")[0] == 0
    assert run(tmp_path / "reference")[0] == 0
    assert_same_bits(small_disk / "work", tmp_path / "reference")
    figures(full_after_step=checkpoints.newest, said=said[0])
