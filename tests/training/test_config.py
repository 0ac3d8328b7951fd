"""What a configuration may hold, and what is derived from its one description."""

import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from runs import load_config

from tinysft_jax.attention.backends import CHOICES
from tinysft_jax.console import UserError
from tinysft_jax.model import REMAT_POLICIES
from tinysft_jax.training.config import SETTINGS, check_config, flat

ROOT = Path(__file__).parents[2]


def changed(key: str, value) -> ConfigDict:
    config = load_config("sft")
    section, _, name = key.rpartition(".")
    with config.unlocked(), config.ignore_type():
        (config[section] if section else config)[name] = value
    return config


@pytest.mark.parametrize(
    ("name", "preset"), [("sft", ""), ("sft", "demo"), ("sft", "real"), ("pretrain", ""), ("pretrain", "demo")]
)
def test_the_projects_configurations_are_valid(name, preset):
    config = load_config(name, preset)
    check_config(config)
    assert flat(config).keys() == SETTINGS.keys()


@pytest.mark.parametrize("name", ["sft", "pretrain"])
def test_presets(name):
    assert load_config(name, "demo").train.max_steps < load_config(name).train.max_steps
    with pytest.raises(UserError, match="no preset 'big'"):
        load_config(name, "big")


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("train.bacth_size", 8, "there is no setting train.bacth_size; do you mean train.batch_size?"),
        ("speed", 8, "there is no setting speed"),
        ("train.max_steps", "12", "train.max_steps is '12'; it must be int"),
        ("train.max_steps", 1e4, "train.max_steps is 10000.0; it must be int"),
        ("train.num_epochs", "two", "train.num_epochs is 'two'; it must be int"),
        ("train.num_epochs", 0, "train.num_epochs is 0; it must be int >= 1"),
        ("seed", True, "seed is True; it must be int >= 0, < 2147483648"),
        ("optimizer.learning_rate", None, "optimizer.learning_rate is None; it must be float"),
        ("data.path", None, "data.path is None; it must be text"),
        ("data", 3, "there is no setting data"),
        ("mesh.data", [1], r"mesh.data is \[1\]; it must be int"),
        ("train.remat", ["full"], r"train.remat is \['full'\]; it must be one of none, dots, full"),
    ],
)
def test_what_someone_wrote_in_a_file_is_checked(key, value, complaint):
    with pytest.raises(UserError, match=complaint):
        check_config(changed(key, value))


def test_a_missing_key_is_named():
    config = load_config("sft")
    with config.unlocked():
        del config.train.eval_batches
    with pytest.raises(UserError, match=r"lacks train.eval_batches; train.py --help lists all keys"):
        check_config(config)


def test_a_float_may_be_written_as_an_int_and_epochs_may_be_unset():
    check_config(changed("optimizer.grad_clip", 0))
    assert flat(changed("train.num_epochs", 3))["train.num_epochs"] == 3


def test_choices_are_those_of_the_model():
    assert SETTINGS["train.attention"].choices == CHOICES
    assert SETTINGS["train.remat"].choices == REMAT_POLICIES


def test_the_help_lists_every_setting():
    command = [sys.executable, "train.py", "--help"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert all(f"  {key}={setting.default} (" in printed for key, setting in SETTINGS.items())
