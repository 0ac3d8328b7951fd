"""Runs of GRPO."""

import dataclasses

import numpy as np
import pytest
from runs import assert_same_bits, losses, mesh_of, stop_at, tiny_config
from tiny_model import save_model

from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import Interrupted, RunError, UserError
from tinysft_jax.data import prepare
from tinysft_jax.sampling.decode import advance
from tinysft_jax.training import loop
from tinysft_jax.training.log import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")

REWARDS = "ends:1,length:1,repetition:1,fluency:1"


def grpo_config(data, **changes):
    """Answers of at most 30 tokens or so to six questions at a time; two steps on the same answers."""
    small = {"grpo__prompts": 6, "grpo__group_size": 4, "grpo__updates": 2, "train__eval_batch_size": 24}
    settings = {"rewards": REWARDS, "train__batch_size": 4, "train__eval_batches": 1, "train__max_steps": 8}
    return tiny_config(data, objective="grpo", **small | settings | changes)


@pytest.fixture(scope="module")
def start(chat_data, tmp_path_factory):
    """A model to start from."""
    workdir = tmp_path_factory.mktemp("start") / "sft"
    loop.train(tiny_config(chat_data, train__max_steps=30), workdir)
    return workdir


@pytest.fixture(scope="module")
def finished(start, chat_data, tmp_path_factory):
    """A run's configuration and work directory."""
    config = grpo_config(chat_data, init_from=str(start))
    workdir = tmp_path_factory.mktemp("grpo") / "work"
    loop.train(config, workdir)
    return config, workdir


def test_what_is_logged(finished):
    _, workdir = finished
    lines = [line for line in read_metrics(workdir) if "grpo/train_reward" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    names = {f"reward/{part.partition(':')[0]}" for part in REWARDS.split(",")}
    names |= {"reward", "no_spread", "length", "cut_off", "repetition", "fluency", "kl", "clip", "gap", "loss"}
    for line in lines:
        assert {f"grpo/train_{name}" for name in names} < line.keys()
        assert line["grpo/seconds_sampling"] > 0 and line["grpo/seconds_scoring"] > 0
        parts = [value for key, value in line.items() if key.startswith("grpo/train_reward/")]
        assert len(parts) == 4 and all(0 <= value <= 1 for value in parts)
    rewards = [line["grpo/train_reward"] for line in lines]
    assert rewards[::2] == rewards[1::2] and len(set(rewards)) == 4, "two steps on the same answers"
    # On the first step on its answers, trainer and sampler agree; the second one follows a change.
    assert all(line["grpo/train_gap"] < 1e-4 for line in lines[::2]) and lines[1]["grpo/train_gap"] > 1e-3
    assert lines[0]["grpo/train_kl"] == pytest.approx(0, abs=1e-4)
    valid = losses(workdir, "grpo/val_reward")
    assert list(valid) == [0, 5, 8] and losses(workdir, "grpo/val_loss")[0] == -valid[0]
    assert (workdir / "loss.png").exists()


def test_a_stopped_run_resumes_with_the_same_bits(finished, tmp_path, monkeypatch):
    """It stops only where its next answers are those of the parameters that it has saved."""
    config, workdir = finished
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(Interrupted, match=r"after step 4 of 8, .*run the same command"):
            loop.train(config, tmp_path)
    loop.train(config, tmp_path)
    assert_same_bits(tmp_path, workdir)


def test_nothing_is_compiled_after_the_first_steps(finished, tmp_path):
    config, _ = finished
    before = advance._cache_size()  # private: nothing public counts the programs
    loop.train(config, tmp_path)
    assert advance._cache_size() == before > 0


@pytest.mark.parametrize("how", ["wrong", "masked"])
def test_answers_without_room_to_end(chat_data, tmp_path, how):
    """Random weights hardly ever end one."""
    loop.train(grpo_config(chat_data, rewards="repetition:1", grpo__cut_off=how, train__max_steps=2), tmp_path)
    line = next(line for line in read_metrics(tmp_path) if line["step"] == 1)
    share, reward = line["grpo/train_cut_off"], line["grpo/train_reward"]
    assert 0.5 < share < 1
    assert reward == pytest.approx(1 - share if how == "wrong" else 1, abs=0.02)


def test_rewards_belong_to_a_run(finished, chat_data):
    config, workdir = finished
    with pytest.raises(UserError, match=r"another run: rewards was ends:1,.*, now ends:2; choose another --workdir"):
        loop.train(grpo_config(chat_data, init_from=config.init_from, rewards="ends:2"), workdir)


@pytest.mark.slow
def test_devices_change_nothing(finished, tmp_path, monkeypatch, not_from_disk):
    config, workdir = finished
    monkeypatch.setattr(loop, "make_mesh", lambda **_: mesh_of(2, 2, 2))
    loop.train(config, tmp_path)
    for key in ("reward", "length", "fluency", "loss", "kl"):
        one, many = (losses(each, f"grpo/train_{key}") for each in (workdir, tmp_path))
        assert many == pytest.approx(one, abs=1e-4)


def test_a_run_that_resumes_needs_its_start(start, chat_data, tmp_path, monkeypatch):
    config = grpo_config(chat_data, init_from=str(tmp_path / "model"))
    _, params = open_model(start)
    save_model(tmp_path / "model", *reversed(open_model(start)))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(4, patch)
        loop.train(config, tmp_path / "work")
    params["tok_emb"]["embedding"][0, 0] += 1
    save_model(tmp_path / "model", params, open_model(start)[0], overwrite=True)
    with pytest.raises(RunError, match=r"model is not the model that the run started from"):
        loop.train(config, tmp_path / "work")


def test_a_gap_between_sampler_and_trainer_ends_a_run(start, chat_data, tmp_path):
    config = grpo_config(chat_data, init_from=str(start), grpo__max_gap=1e-9)
    with pytest.raises(
        RunError, match=r"step 1: the log-probabilities of sampler and trainer differ by .*, more than grpo.max_gap; "
    ):
        loop.train(config, tmp_path)


def reward_model(start, path):
    description, params = open_model(start)
    params = params | {"score": np.random.default_rng(0).normal(size=description.config.dim).astype(np.float32)}
    config = dataclasses.replace(description.config, scalar_head=True)
    save_model(path, params, dataclasses.replace(description, config=config))
    return str(path)


def test_a_reward_model_is_pleased(start, chat_data, tmp_path):
    config = grpo_config(
        chat_data,
        init_from=str(start),
        reward_model=reward_model(start, tmp_path / "reward"),
        rewards="preferred:1",
        grpo__updates=1,
        train__max_steps=30,
    )
    loop.train(config, tmp_path / "work")
    rewards = [*losses(tmp_path / "work", "grpo/train_reward/preferred").values()]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.02


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rewards": "wit:1"}, r"rewards can't be 'wit:1': give some of words, "),
        ({"rewards": "ends:much"}, r"rewards can't be 'ends:much': "),
        ({"rewards": "preferred:1"}, r"the reward preferred and reward_model=PATH need each other"),
        ({"reward_model": "x"}, r"the reward preferred and reward_model=PATH need each other"),
        ({"rewards": "preferred:1", "reward_model": "START"}, r"sft is a language model; give a reward model"),
        ({"init_from": "REWARD"}, r"reward is a reward model"),
        ({"grpo__tasks": "story"}, r"has no task 'story'; choose from chat"),
        ({"train__save_interval": 3}, r"train.save_interval 3 is not a multiple of grpo.updates 2"),
        ({"train__max_steps": 7}, r"train.max_steps 7 is not a multiple of grpo.updates 2"),
        ({"train__grad_accumulation_steps": 2}, r"leave train.grad_accumulation_steps 1"),
        ({"grpo__group_size": 1}, r"grpo.group_size is 1; it must be int >= 2"),
    ],
)
def test_mistakes_are_one_line(start, chat_data, tmp_path, changes, complaint):
    names = {"START": str(start), "REWARD": str(tmp_path / "reward")}
    reward_model(start, tmp_path / "reward")
    changes = {key: names.get(value, value) for key, value in changes.items()}
    with pytest.raises(UserError, match=complaint) as refusal:
        loop.train(grpo_config(chat_data, **{"init_from": str(start), **changes}), tmp_path / "work")
    assert "\n" not in str(refusal.value) and not (tmp_path / "work").exists()


def test_data_without_questions_are_refused(start, pair_data, tmp_path):
    (tmp_path / "text.txt").write_text("A cat.\n<|endoftext|>\nA dog.\n<|endoftext|>\n" * 20, encoding="utf-8")
    flags = [f"--input={tmp_path / 'text.txt'}", f"--output={tmp_path / 'text'}", "--bpe_ranks=256", "--format=text"]
    prepare.main([*flags, "--workers=1", "--max_tokens=64"])
    data_sets = {
        str(pair_data): "holds pairs, which measure a reward model; give conversations",
        str(tmp_path / "text"): "holds plain text, no conversations; there is nothing to ask",
    }
    for data, complaint in data_sets.items():
        with pytest.raises(UserError, match=complaint):
            loop.train(grpo_config(data, init_from=str(start)), tmp_path / "work")
    assert not (tmp_path / "work").exists()
