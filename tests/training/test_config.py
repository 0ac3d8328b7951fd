import pytest
from ml_collections import ConfigDict
from runs import load_config

from tinysft_jax.console import UserError
from tinysft_jax.training.config import KEYS, check_keys, flat


def changed(key: str, value) -> ConfigDict:
    config = load_config("sft")
    section, _, name = key.rpartition(".")
    with config.unlocked(), config.ignore_type():
        (config[section] if section else config)[name] = value
    return config


@pytest.mark.parametrize("name", ["sft", "pretrain"])
@pytest.mark.parametrize("preset", ["", "demo"])
def test_the_projects_configurations_have_just_the_known_keys(name, preset):
    config = load_config(name, preset)
    check_keys(config)
    assert flat(config).keys() == KEYS.keys()


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("train.bacth_size", 8, "there is no setting train.bacth_size; do you mean train.batch_size?"),
        ("speed", 8, "there is no setting speed"),
        ("train.max_steps", "12", "train.max_steps is '12', which is str; it must be int"),
        ("train.max_steps", 1e4, "train.max_steps is 10000.0, which is float; it must be int"),
        ("train.num_epochs", "two", "train.num_epochs is 'two', which is str; it must be int"),
        ("seed", True, "seed is True, which is bool; it must be int"),
        ("optimizer.learning_rate", None, "optimizer.learning_rate is None, which is NoneType; it must be float"),
        ("data.path", None, "data.path is None, which is NoneType; it must be str"),
        ("data", 3, "there is no setting data"),
        ("mesh.data", [1], r"mesh.data is \[1\], which is list; it must be int"),
    ],
)
def test_what_someone_wrote_in_a_file_is_checked(key, value, complaint):
    with pytest.raises(UserError, match=complaint):
        check_keys(changed(key, value))


def test_a_missing_key_is_named():
    config = load_config("sft")
    with config.unlocked():
        del config.train.eval_batches
    with pytest.raises(UserError, match=r"lacks train.eval_batches; configs/sft.py has all keys"):
        check_keys(config)


def test_a_float_may_be_written_as_an_int_and_epochs_may_be_unset():
    check_keys(changed("optimizer.grad_clip", 0))
    assert flat(changed("train.num_epochs", 3))["train.num_epochs"] == 3
