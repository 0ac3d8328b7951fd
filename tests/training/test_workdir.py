"""A work directory belongs to one run at a time, and what others put there is left alone."""

import errno
import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_wandb import FakeWandb
from runs import arrays, losses, tiny_config
from test_train import run, settings, start_until

from tinysft_jax.console import RunError, UserError
from tinysft_jax.training.evaluate import Evaluator
from tinysft_jax.training.log import RunLog
from tinysft_jax.training.loop import train


def best_model(workdir: Path) -> dict[str, np.ndarray]:
    return arrays((workdir / "model" / "params").resolve())


def kill_at(step: int, monkeypatch) -> None:
    """Has a run end at a step as SIGKILL would: without another word to the work directory."""
    write = RunLog.write

    def write_or_die(log, now, metrics):
        if now == step:
            raise RuntimeError("killed")
        write(log, now, metrics)

    monkeypatch.setattr(RunLog, "write", write_or_die)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"optimizer__learning_rate": 1e-3}])
def test_models_of_a_run_without_checkpoint_are_not_the_next_runs(chat_data, tmp_path, monkeypatch, change):
    """Killed after its first evaluation; the next run in the directory may have other settings, or the same."""
    before = {"train__eval_interval": 2, "train__max_steps": 4, "train__save_interval": 100}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        kill_at(3, patch)
        train(tiny_config(chat_data, **before), tmp_path / "work")
    assert os.readlink(tmp_path / "work" / "model") == "models/2"
    old = best_model(tmp_path / "work")
    if not change:  # what is there might be of a program that computed otherwise
        (tmp_path / "work" / "models" / "2" / "params" / "altered").touch()
    for name in ("work", "new"):
        train(tiny_config(chat_data, **before | change), tmp_path / name)
    one, other = best_model(tmp_path / "work"), best_model(tmp_path / "new")
    for path in one:
        np.testing.assert_array_equal(one[path], other[path])
    assert losses(tmp_path / "work") == losses(tmp_path / "new")
    assert not list((tmp_path / "work").rglob("altered"))
    if change:
        kept = tmp_path / "work" / "earlier-1"
        assert {path.name for path in kept.iterdir()} == {
            "config.json", "loss.png", "metrics.jsonl", "model", "models",
        }  # fmt: skip
        for path, leaf in best_model(kept).items():
            np.testing.assert_array_equal(leaf, old[path])


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_is_gone(chat_data, tmp_path):
    work = tmp_path / "work"
    arguments = [f"--workdir={work}", *settings(chat_data, "train.max_steps=100000", "train.eval_interval=50000")]
    first = start_until(1, work, arguments)
    began = time.strftime("%Y-%m-%d")
    second = run("--config=configs/sft.py", *arguments)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"{work} is in use by another run: process {first.pid} on " in second.stderr and began in second.stderr
    first.kill()
    first.communicate()
    assert (work / ".lock").exists()
    shorter = ["--config.train.max_steps=2", "--config.optimizer.warmup_steps=1"]
    third = run("--config=configs/sft.py", *arguments, *shorter)
    assert third.returncode == 0, third.stderr
    assert not (work / ".lock").exists() and (work / "earlier-1" / "metrics.jsonl").exists()


def test_a_file_system_without_locks_is_said_and_borne(chat_data, tmp_path, monkeypatch, capfd):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    train(tiny_config(chat_data, train__max_steps=1, optimizer__warmup_steps=1), tmp_path / "work")
    assert "without locks (No locks available): nothing keeps two runs apart" in capfd.readouterr().err


def test_a_file_system_without_links_is_told_at_the_start(chat_data, tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "symlink", no_links)
    with pytest.raises(UserError, match=r"without symbolic links \(.*not supported\).* choose another --workdir"):
        train(tiny_config(chat_data), tmp_path / "above" / "work")
    assert not (tmp_path / "above").exists()


@pytest.mark.parametrize("name", ["run[1]", "a*", "b?", "c\\d"])
@pytest.mark.parametrize("above", [False, True])
def test_a_path_that_would_be_taken_for_a_pattern_is_refused(chat_data, tmp_path, name, above):
    workdir = tmp_path / name / "work" if above else tmp_path / name
    with pytest.raises(UserError, match=r"contains .*takes for a pattern; choose another path"):
        train(tiny_config(chat_data), workdir)
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_what_a_user_put_between_checkpoints_and_models_stays(chat_data, finished, tmp_path, monkeypatch):
    work = shutil.copytree(finished, tmp_path / "work", symlinks=True)
    places = ("checkpoints/notes", "checkpoints/.git", "checkpoints/2 copy", "models/best", "models/.keep", "models/1a")
    for place in places:
        (work / place).mkdir()
        (work / place / "mine").write_text("1")
    shutil.rmtree(work / "checkpoints" / "12")
    for place in ("checkpoints/.2.partial", "checkpoints/9", "models/.2.partial", "models/9"):
        (work / place).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "losses", lambda *_: {"val_loss": 0.0})
        train(tiny_config(chat_data), work)
    assert all((work / place / "mine").exists() for place in places)
    ours = {path.name for path in (work / "checkpoints").iterdir()} - {Path(place).name for place in places}
    assert ours == {"4", "8", "12"}
    assert os.readlink(work / "model") == "models/10"
    assert {path.name for path in (work / "models").iterdir()} == {"10", "best", ".keep", "1a"}


@pytest.mark.slow
def test_the_same_start_may_be_written_otherwise(chat_data, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "start", symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for start in ("start", "start/", "./start", f"{tmp_path}/start", "~/start"):
        train(tiny_config(chat_data, init_from=start, train__max_steps=2), tmp_path / "work")
    assert max(losses(tmp_path / "work")) == 2
    shutil.copytree(tmp_path / "start", tmp_path / "other", symlinks=True)
    with pytest.raises(UserError, match="init_from was start, now other"):
        train(tiny_config(chat_data, init_from="other", train__max_steps=2), tmp_path / "work")


@pytest.mark.slow
def test_a_home_directory_is_found_in_every_path(chat_data, tmp_path):
    """A shell leaves the `~` of `--workdir=~/work` to the program. At its end, the run exports."""
    pytest.importorskip("torch")
    (tmp_path / "data").symlink_to(chat_data)
    arguments = ["train.py", "--config=configs/sft.py", "--workdir=~/work", *settings(Path("~/data"))]
    arguments += ["--config.train.max_steps=1", "--config.optimizer.warmup_steps=1", "--config.export=torch"]
    root, environ = Path(__file__).parents[2], os.environ | {"HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, *arguments], cwd=root, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "work" / "model").is_symlink() and not (root / "~").exists()
    assert (tmp_path / "work" / "model.pt").is_file() and result.stderr.splitlines()[-1].startswith("exported: ")


@pytest.mark.slow
def test_it_runs_from_a_checkout_that_is_not_installed(chat_data, tmp_path, monkeypatch):
    version = importlib.metadata.version

    def version_of_others(name: str) -> str:
        if name.startswith("tinysft"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", version_of_others)
    train(tiny_config(chat_data, train__max_steps=1, optimizer__warmup_steps=1), tmp_path / "work")


@pytest.mark.slow
def test_a_run_that_diverged_is_no_finished_one_for_wandb(chat_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    changes = {"wandb__mode": "offline", "optimizer__grad_clip": 0.0}
    with pytest.raises(RunError, match="diverged"):
        train(tiny_config(chat_data, optimizer__learning_rate=1e30, **changes), tmp_path / "one")
    train(tiny_config(chat_data, train__max_steps=2, **changes), tmp_path / "two")
    assert [code != 0 for code in fake.finished] == [True, False]
