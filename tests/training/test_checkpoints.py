"""A run that was killed, whose files were damaged, or whose disk was full."""

import contextlib
import functools
import logging
import os
import random
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_same_bits, tiny_config
from tiers import slow

from tinysft_jax import files
from tinysft_jax.console import RunError, UserError
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.parameters import ModelDescription
from tinysft_jax.training import checkpoints as checkpoints_module
from tinysft_jax.training import loop
from tinysft_jax.training.checkpoints import Checkpoints, RunStatus


def settings(data: Path, **changes):
    """Two checkpoints at a time, so that old ones are removed; an evaluation between them."""
    return tiny_config(data, train__keep_checkpoints=2, **changes)


class Copies:
    """Copies a work directory at chosen moments: what a SIGKILL then would have left."""

    def __init__(self, workdir: Path, target: Path):
        self._workdir, self._target = workdir, target
        self.made: dict[str, Path] = {}

    def make(self, name: str) -> None:
        if name not in self.made:
            self.made[name] = self._target / name
            # A file may vanish while the tree is copied.
            with contextlib.suppress(shutil.Error):
                shutil.copytree(self._workdir, self.made[name], symlinks=True)

    def around(self, patch, module, function: str, name: str) -> None:
        original = getattr(module, function)

        def wrapped(*arguments, **options):
            self.make(f"before {name}")
            result = original(*arguments, **options)
            self.make(f"after {name}")
            return result

        patch.setattr(module, function, wrapped)


@pytest.fixture(scope="module")
def killed(chat_data, tmp_path_factory) -> dict[str, Path]:
    """Work directories of runs that were killed, by when."""
    target = tmp_path_factory.mktemp("killed")
    copies = Copies(target / "work", target)
    remove = shutil.rmtree

    def remove_half(path, *arguments, **options):
        if Path(path).name == ".4.old":
            for file in sorted(file for file in Path(path).rglob("*") if file.is_file())[::2]:
                file.unlink()
            copies.make("amid the removal of an old checkpoint")
        remove(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints_module.shutil, "rmtree", remove_half)
        copies.around(patch, files, "write_manifest", "the manifest")
        copies.around(patch, files, "link", "the link to the best model")
        copies.around(patch, checkpoints_module.ocp, "save_async", "the copy to host memory")
        loop.train(settings(chat_data), target / "work")
    return copies.made


MOMENTS = [
    "before the manifest",
    *slow(
        "after the link to the best model",
        "after the copy to host memory",
        "after the manifest",
        "amid the removal of an old checkpoint",
    ),
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_with_the_same_bits(chat_data, finished, killed, moment):
    loop.train(settings(chat_data), killed[moment])
    assert_same_bits(killed[moment], finished)
    assert sorted(path.name for path in (killed[moment] / "checkpoints").iterdir()) == ["12", "8"]


def flip(path: Path, where: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def every_damage(step: Path):
    """Each file of a checkpoint, truncated, missing, with a flipped bit."""
    draw = random.Random(0)
    for path in sorted(path for path in step.rglob("*") if path.is_file()):
        content, name = path.read_bytes(), path.relative_to(step).as_posix()
        path.unlink()
        yield name, "missing"
        if content:
            path.write_bytes(content[: len(content) // 2])
            yield name, "truncated"
            path.write_bytes(content)
            # The manifest itself holds spaces that mean nothing.
            flip(path, draw.randrange(len(content)) if name != "manifest.json" else content.index(b'"bytes": ') + 9)
            yield name, "flipped"
        path.write_bytes(content)


def test_each_damaged_file_is_recognised_and_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    kinds = set()
    for name, kind in every_damage(tmp_path / "work" / "checkpoints" / "12"):
        checkpoints = Checkpoints(tmp_path / "work", keep=2)
        damage = checkpoints.find_newest()
        assert checkpoints.newest == 8 and "checkpoint 12 is damaged: " in damage, (name, kind)
        assert name in damage or name == "manifest.json", (name, kind, damage)
        kinds.add(kind)
    assert len(kinds) == 3
    sound = Checkpoints(tmp_path / "work", keep=2)
    assert (sound.find_newest(), sound.newest) == ("", 12)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_damage_that_the_manifest_does_not_tell_is_one_line(tmp_path, capfd, caplog, recwarn):
    """Whoever changes a checkpoint can write a manifest that fits: orbax's errors are no tracebacks either."""
    state = {"a": jnp.ones((64, 64)), "b": {"c": jnp.zeros(8)}}
    shapes, shardings = jax.eval_shape(lambda: state), jax.tree.map(lambda leaf: leaf.sharding, state)
    checkpoints, refused = Checkpoints(tmp_path, keep=2), 0
    checkpoints.clear()
    description = ModelDescription(GPTConfig(), None, None, {})
    checkpoints.save(state, RunStatus({"steps": 1}, description, step=1))
    checkpoints.wait()
    directory = tmp_path / "checkpoints" / "1"
    read_status = functools.partial(checkpoints.resume, tiny_config(tmp_path), {"steps": 1}, False)
    read_arrays = functools.partial(checkpoints.restore, shapes, shardings)
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for other in (b"", b"{}", b"[]", b"null", bytes(range(156, 256)), content[:-1]):
            path.write_bytes(other)
            files.write_manifest(directory)
            for read in (read_status, read_arrays):
                try:
                    read()
                except RunError as error:
                    refused += 1
                    assert "\n" not in str(error)
        path.write_bytes(content)
    files.write_manifest(directory)
    assert checkpoints.find_newest() == ""
    jax.tree.map(np.testing.assert_array_equal, read_arrays(), state)
    with checkpoints:
        pass
    assert logging.getLogger("absl").level == logging.CRITICAL, "it writes in the background as well"
    assert refused > 8 and not caplog.records and not recwarn.list and capfd.readouterr().err == ""


def test_the_newest_sound_checkpoint_is_used(chat_data, finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    newest = tmp_path / "work" / "checkpoints" / "12"
    flip(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size), 1000)
    loop.train(settings(chat_data), tmp_path / "work")
    said = capfd.readouterr().err
    assert "checkpoint 12 is damaged: " in said and "other content" in said and "; resuming at step 8 of 12" in said
    assert_same_bits(tmp_path / "work", finished)


def test_without_a_sound_checkpoint_the_run_stops(chat_data, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    for step in ("4", "8", "12"):
        (tmp_path / "work" / "checkpoints" / step / "manifest.json").unlink()
    before = sorted((tmp_path / "work").rglob("*"))
    with pytest.raises(RunError, match=r"no sound checkpoint in .*checkpoint 12 is damaged.*checkpoint 8 is damaged"):
        loop.train(settings(chat_data), tmp_path / "work")
    assert sorted((tmp_path / "work").rglob("*")) == before


@contextlib.contextmanager
def files_no_larger_than(size: int):
    """The system refuses to write beyond `size`, in this process: to orbax it is like a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_intact(chat_data, finished, tmp_path, monkeypatch):
    save, limit = Checkpoints.save, contextlib.ExitStack()

    def save_while_there_is_room(checkpoints, state, status):
        if status.step == 8:
            checkpoints.wait()
            limit.enter_context(files_no_larger_than(16 << 10))
        save(checkpoints, state, status)

    with monkeypatch.context() as patch, limit, pytest.raises(RunError, match=r"can't write .*File too large"):
        patch.setattr(Checkpoints, "save", save_while_there_is_room)
        loop.train(settings(chat_data), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    loop.train(settings(chat_data), tmp_path)
    assert_same_bits(tmp_path, finished)


def test_a_directory_that_cannot_be_written_is_one_line(chat_data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"can't write .*file.work"):
        loop.train(settings(chat_data), tmp_path / "file" / "work")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "checkpoints").touch()
    with pytest.raises(RunError, match=r"can't write .*work"):
        loop.train(settings(chat_data), tmp_path / "work")


def test_a_vanished_shard_is_one_line_and_harms_nothing(chat_data, finished, tmp_path):
    shutil.copytree(chat_data, tmp_path / "data")
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    (tmp_path / "data" / "train" / "tokens-00000.npy").unlink()
    with pytest.raises(UserError, match=r"data is damaged: train/tokens-00000.npy is missing"):
        loop.train(settings(tmp_path / "data"), tmp_path / "work")
    checkpoints = Checkpoints(tmp_path / "work", keep=2)
    assert (checkpoints.find_newest(), checkpoints.newest) == ("", 12)


def test_data_is_verified_when_asked(chat_data, tmp_path):
    """A size is compared always; a flipped bit is found by its hash."""
    shutil.copytree(chat_data, tmp_path / "data")
    flip(tmp_path / "data" / "train" / "tokens-00000.npy", 500)
    with pytest.raises(UserError, match=r"train/tokens-00000.npy has other content"):
        loop.train(settings(tmp_path / "data"), tmp_path / "work", verify=True)
    with (tmp_path / "data" / "train" / "tasks-00000.npy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"train/tasks-00000.npy has \d+ bytes, its manifest says \d+"):
        loop.train(settings(tmp_path / "data"), tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert os.listdir(tmp_path) == ["data"]
