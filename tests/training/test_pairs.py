"""Runs of DPO and of a reward model."""

import json
import math

import numpy as np
import pytest
from runs import assert_same_bits, losses, mesh_of, stop_at, tiny_config

from tinysft_jax import export
from tinysft_jax.checkpoints import load_description, load_model, open_model
from tinysft_jax.console import Interrupted, RunError, UserError
from tinysft_jax.data import prepare
from tinysft_jax.data.mixture import open_parts
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.training import loop, reference
from tinysft_jax.training.evaluate import Evaluator
from tinysft_jax.training.log import read_metrics


def pair_config(data, objective: str, **changes):
    return tiny_config(data, objective=objective, **{"dpo__beta": 0.5, "train__batch_size": 8, **changes})


@pytest.fixture(scope="module")
def start(chat_data, tmp_path_factory):
    """A model to start from."""
    workdir = tmp_path_factory.mktemp("start") / "sft"
    loop.train(tiny_config(chat_data, train__max_steps=2), workdir)
    return workdir


@pytest.fixture(scope="module", params=["dpo", "reward"])
def finished(request, start, pair_data, tmp_path_factory):
    """A run's objective, configuration and work directory."""
    config = pair_config(pair_data, request.param, init_from=str(start))
    workdir = tmp_path_factory.mktemp(request.param) / "work"
    loop.train(config, workdir)
    return request.param, config, workdir


def test_a_run_learns_which_answers_are_preferred(finished):
    objective, _, workdir = finished
    train, valid = losses(workdir, f"{objective}/train_loss"), losses(workdir, f"{objective}/val_loss")
    # A model that is where it started, or whose head is 0, has no preference.
    assert train[1] == pytest.approx(math.log(2), rel=1e-5) and valid[0] == pytest.approx(math.log(2), rel=1e-5)
    assert list(train) == list(range(1, 13)) and list(valid) == [0, 5, 10, 12]
    assert train[12] < 0.5 and valid[12] < 0.5
    assert (
        losses(workdir, f"{objective}/val_accuracy")[0] < 0.2 and losses(workdir, f"{objective}/val_accuracy")[12] > 0.9
    )
    last = next(line for line in read_metrics(workdir) if line["step"] == 12)
    figures = {f"{objective}/train_{name}" for name in ("loss", "margin", "accuracy", "chosen", "rejected")}
    assert figures < last.keys() and not [key for key in last if key.startswith("sft/")]
    chosen, rejected = (last[f"{objective}/train_{name}"] for name in ("chosen", "rejected"))
    scale = 0.5 if objective == "dpo" else 1
    assert last[f"{objective}/train_margin"] == pytest.approx(scale * (chosen - rejected), abs=1e-4)
    assert f"{objective}/final_val_loss" in read_metrics(workdir)[-1]
    assert (workdir / "loss.png").exists()


def test_a_stopped_run_resumes_with_the_same_bits(finished, tmp_path, monkeypatch):
    objective, config, workdir = finished
    with monkeypatch.context() as patch:
        stop_at(6, patch)
        with pytest.raises(Interrupted, match="run the same command"):
            loop.train(config, tmp_path)
    if objective == "dpo":
        monkeypatch.setattr(reference, "_compute", lambda *_: pytest.fail("was computed once"))
    loop.train(config, tmp_path)
    assert_same_bits(tmp_path, workdir)


def test_a_lost_or_damaged_reference_ends_a_run_that_resumes(start, pair_data, tmp_path, monkeypatch):
    config = pair_config(pair_data, "dpo", init_from=str(start))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(4, patch)
        loop.train(config, tmp_path / "work")
    (file,) = (tmp_path / "work" / "reference").iterdir()
    whole, arrays = file.read_bytes(), dict(np.load(file))
    np.savez(tmp_path / "others.npz", **{name: values[1:] for name, values in arrays.items()})
    for content in (b"", whole[:-100], (tmp_path / "others.npz").read_bytes()):
        file.write_bytes(content)
        with pytest.raises(RunError, match=r"\.npz is missing or damaged, .*; put it back, or choose another"):
            loop.train(config, tmp_path / "work")
    file.write_bytes(whole)
    loop.train(config, tmp_path / "work")
    assert max(losses(tmp_path / "work", "dpo/train_loss")) == 12


def test_a_new_run_leaves_no_other_reference(start, pair_data, tmp_path):
    """Nor what a killed process was writing."""
    directory = tmp_path / "work" / "reference"
    directory.mkdir(parents=True)
    for name in ("of-another-model.npz", ".of-this-model.npz.0a1b2c3d.partial"):
        (directory / name).touch()
    loop.train(pair_config(pair_data, "dpo", init_from=str(start), train__max_steps=2), tmp_path / "work")
    assert len([*directory.iterdir()]) == 1 and not next(directory.iterdir()).name.startswith((".", "of-"))


def test_nothing_is_left_of_a_reference_that_was_interrupted(start, pair_data, tmp_path, monkeypatch):
    compute = reference._compute

    def interrupted(run, *arguments):
        run.stop._noted = 130
        return compute(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "_compute", interrupted)
        with pytest.raises(Interrupted, match="before the first step; run the same command") as stop:
            loop.train(pair_config(pair_data, "dpo", init_from=str(start)), tmp_path / "work")
    assert stop.value.exit_code == 130 and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("objective", "complaint"),
    [
        ("sft", r"data.path holds pairs, and objective sft .*configs/dpo.py or configs/reward.py$"),
        ("dpo", r"objective dpo learns from pairs, .*--format preference-jsonl$"),
        ("reward", r"objective reward learns from pairs, .*--format preference-jsonl$"),
    ],
)
def test_an_objective_needs_its_kind_of_data(chat_data, pair_data, tmp_path, objective, complaint):
    data = pair_data if objective == "sft" else chat_data
    with pytest.raises(UserError, match=complaint) as refusal:
        loop.train(pair_config(data, objective), tmp_path / "work")
    assert "\n" not in str(refusal.value) and not (tmp_path / "work").exists()


def test_a_row_holds_the_longest_pair(pair_data, tmp_path):
    with pytest.raises(UserError, match=r"seq_len is 40, but the longest pair has \d+ tokens; raise it, or prepare"):
        loop.train(pair_config(pair_data, "dpo", data__seq_len=40), tmp_path / "work")


def test_settings_of_dpo_belong_to_a_run(finished, pair_data):
    objective, config, workdir = finished
    if objective == "dpo":
        changed = pair_config(pair_data, "dpo", init_from=config.init_from, dpo__sft_weight=0.1)
        with pytest.raises(UserError, match=r"another run: dpo.sft_weight was 0.0, now 0.1"):
            loop.train(changed, workdir)


def test_a_reward_model_is_no_language_model(finished, chat_data, pair_data, tmp_path):
    objective, _, workdir = finished
    assert load_description(workdir / "model").config.scalar_head == (objective == "reward")
    if objective == "dpo":
        with pytest.raises(UserError, match=r"is a language model; give a reward model$"):
            load_model(workdir, reward=True)
        assert load_model(workdir).config.vocab_size == 260
        return
    assert json.loads((workdir / "model" / "model.json").read_text())["model"]["scalar_head"] is True
    for use in (
        lambda: load_model(workdir),
        lambda: open_model(workdir / "model"),
        lambda: export.export_run(workdir, "huggingface"),
        lambda: loop.train(tiny_config(chat_data, init_from=str(workdir)), tmp_path / "sft"),
        lambda: loop.train(pair_config(pair_data, "dpo", init_from=str(workdir)), tmp_path / "dpo"),
    ):
        with pytest.raises(UserError, match=r"is a reward model: it scores answers, and gives none$"):
            use()
    assert load_model(workdir, reward=True).score[...].shape == (16,)


def test_a_reward_model_is_not_exported(pair_data, tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(UserError, match="export=huggingface can't be written: a reward model"):
        loop.train(pair_config(pair_data, "reward", export="huggingface"), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_chosen_answer_that_falls_for_long_is_said(start, pair_data, tmp_path, monkeypatch, capfd):
    """Both answers become less likely where DPO's loss asks for no more than their difference."""
    scripted = iter([0.0, 1.0, -1.0, -2.0, -3.0, -2.0, -1.0, -2.0, -3.0, -4.0, -4.5, -9.0, -9.5, 0.0])
    monkeypatch.setattr(Evaluator, "losses", lambda *_: {"val_loss": 0.5, "val_chosen": next(scripted)})
    loop.train(pair_config(pair_data, "dpo", init_from=str(start), train__eval_interval=1), tmp_path)
    said = [line for line in capfd.readouterr().err.splitlines() if "less likely at each evaluation" in line]
    found = [line.split("now by ")[1].split(" nats")[0] for line in said]
    assert found == ["3.0", "4.0", "4.5", "9.0", "9.5"]
    assert all("raise dpo.sft_weight or dpo.beta" in line for line in said)


def test_each_part_of_a_mixture_has_its_own_reference(start, pair_data, tmp_path):
    """Against itself the model has no margin, so a reference of another conversation would show."""
    lines = (pair_data.parent / "pairs.jsonl").read_text().splitlines(True)
    (tmp_path / "more.jsonl").write_text("".join(reversed(lines[:80])))
    options = ["--bpe_ranks=256", "--max_tokens=32", "--valid_fraction=0.2", "--workers=1"]
    prepare.main([f"--input={tmp_path / 'more.jsonl'}", f"--output={tmp_path / 'more'}", *options])
    data = f"{pair_data}=0.5,{tmp_path / 'more'}=0.5"
    config = pair_config(data, "dpo", init_from=str(start), train__max_steps=2, train__eval_batches=10)
    loop.train(config, tmp_path / "work")
    assert len([*(tmp_path / "work" / "reference").iterdir()]) == 2
    assert losses(tmp_path / "work", "dpo/train_loss")[1] == pytest.approx(math.log(2), rel=1e-5)
    for name in ("", "/prepared", "/more"):
        assert losses(tmp_path / "work", f"dpo/val_loss{name}")[0] == pytest.approx(math.log(2), rel=1e-5)


def test_rows_of_training_may_hold_more_pairs_than_those_of_validation(pair_data):
    config, parts = pair_config(pair_data, "dpo"), open_parts(str(pair_data))
    assert Evaluator(parts, config, mesh_of(1, 1, 1), most_items=40).n_segments == 80


def test_the_shape_of_random_weights_is_part_of_the_reference(pair_data):
    configs = [GPTConfig(260, dim, 1, 2, 64) for dim in (16, 32)]
    assert len({reference.fingerprint(config, None, seed) for config in configs for seed in (0, 1)}) == 4


@pytest.mark.parametrize("accept", [False, True])
def test_a_run_does_not_change_its_objective(finished, chat_data, pair_data, accept):
    objective, config, workdir = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    others = {"sft": chat_data, "dpo": pair_data, "reward": pair_data}
    for other, data in others.items():
        if other != objective:
            with pytest.raises(UserError, match=rf"is a run of the objective {objective}, not {other}; choose another"):
                loop.train(pair_config(data, other, init_from=config.init_from), workdir, accept_changes=accept)
    assert (workdir / "metrics.jsonl").read_bytes() == before
