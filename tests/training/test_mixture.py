"""Runs on several data sets at once."""

import json
import math
import os
import shutil

import numpy as np
import pytest
from absl import flags
from runs import assert_same_bits, losses, mesh_of, stop_at, tiny_config

from tinysft_jax.console import Interrupted, UserError
from tinysft_jax.data import prepare
from tinysft_jax.data.mixture import open_parts
from tinysft_jax.data.packing import Packing
from tinysft_jax.training import loop
from tinysft_jax.training.evaluate import Evaluator
from tinysft_jax.training.log import read_metrics
from tinysft_jax.training.source import TrainingBatches


@pytest.fixture(scope="module")
def mixture(chat_data, tmp_path_factory) -> str:
    """Chats, and a few others that say one thing."""
    directory = tmp_path_factory.mktemp("mixture")
    lines = [{"prompt": f"{number}?", "completion": "zzz"} for number in range(40)]
    (directory / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--bpe_ranks=256", "--max_tokens=96", "--valid_fraction=0.1", "--workers=1"]
    prepare.main([f"--input={directory / 'own.jsonl'}", f"--output={directory / 'own'}", *options])
    os.symlink(chat_data, directory / "chats")
    return f"{directory}/chats=0.75,{directory}/own=0.25"


def mixed_config(mixture, **changes):
    changes = {"data__seq_len": 96, "model__max_seq_len": 96, "train__eval_batches": 100, **changes}
    return tiny_config(mixture, **changes)


@pytest.fixture(scope="module")
def finished(mixture, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mixed") / "work"
    loop.train(mixed_config(mixture), workdir)
    return workdir


def test_each_part_is_in_the_metrics(finished):
    chats, own, both = (losses(finished, f"sft/val_loss{name}") for name in ("/chats", "/own", ""))
    assert chats.keys() == own.keys() == both.keys() == {0, 5, 10, 12}
    for step in both:
        assert both[step] == pytest.approx(0.75 * chats[step] + 0.25 * own[step], rel=1e-6)
    assert own[12] < own[0] - 0.5 and chats[12] < chats[0] - 0.5
    # After 12 steps of 8 rows.
    assert losses(finished, "sft/rows/chats")[12] == 72 and losses(finished, "sft/rows/own")[12] == 24
    assert not [key for line in read_metrics(finished) for key in line if "prepared" in key]


def test_the_loss_of_a_part_is_that_of_its_data_alone(mixture, finished, tmp_path):
    """Of a model that is where it started; with all of its rows."""
    entries = dict(entry.split("=") for entry in mixture.split(","))
    for path in entries:
        loop.train(mixed_config(path, train__max_steps=1, optimizer__warmup_steps=0), tmp_path / os.path.basename(path))
    whole = losses(finished, "sft/val_loss/own")[0]
    assert losses(tmp_path / "own", "sft/val_loss")[0] == pytest.approx(whole, rel=1e-6)


def test_a_run_resumes_with_the_same_bits(mixture, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(6, patch)
        loop.train(mixed_config(mixture), tmp_path)
    loop.train(mixed_config(mixture), tmp_path)
    assert_same_bits(tmp_path, finished)


def test_another_mix_is_another_run(mixture, finished):
    with pytest.raises(UserError, match=r"another run: data was 3/4 chats \w+, 1/4 own \w+, now 9/10 chats \w+, 1/10"):
        loop.train(mixed_config(mixture.replace("0.75", "0.9").replace("0.25", "0.1")), finished)


@pytest.fixture
def batches(mixture):
    """A run's batches: of a long run, and of 3 epochs."""
    return lambda **changes: TrainingBatches(mixed_config(mixture, **changes), open_parts(mixture), (0, 1))


def test_a_thousand_batches_hold_the_shares_and_every_conversation_in_turn(batches, mixture):
    found, source = [0, 0], batches(train__max_steps=1000).source
    parts = [part.data.split("train") for part in open_parts(mixture)]
    seen = [np.zeros(len(split), int) for split in parts]
    for step in range(1000):
        for part, members in source.places(step):
            found[part] += 1
            np.add.at(seen[part], members, 1)
    assert found == [6000, 2000]
    for counts in seen:  # each of an epoch's conversations once before any of the next epoch's
        assert counts.max() - counts.min() <= 1


def test_an_epoch_is_that_of_the_longest_part(batches, mixture):
    n_rows = [Packing(part.data.split("train").lengths, 96).n_rows for part in open_parts(mixture)]
    assert n_rows[0] > n_rows[1]
    assert batches(train__num_epochs=3).total_steps == 3 * math.ceil(n_rows[0] / 0.75 / 8)


def test_processes_build_parts_of_the_same_batches(batches, mixture):
    with batches() as whole:
        for step in (3, 4, 9):
            parts = (
                TrainingBatches(mixed_config(mixture), open_parts(mixture), (index, 2)).source[step] for index in (0, 1)
            )
            halves = list(parts)
            for key, rows in whole(None, step).items():
                np.testing.assert_array_equal(rows, np.concatenate([half[key] for half in halves]))


@pytest.mark.slow
def test_workers_build_the_same_batches(batches):
    if not flags.FLAGS.is_parsed():  # grain's workers ask absl's flags
        flags.FLAGS(["test"])
    with batches() as plain, batches(data__num_workers=2) as by_workers:
        for step in (3, 4, 5):
            for key, rows in plain(None, step).items():
                np.testing.assert_array_equal(rows, by_workers(None, step)[key])


def test_a_skipped_step_names_the_part_of_each_conversation(batches):
    source = batches()
    named = source.conversations(3)
    assert {name.partition(":")[0] for name in named} == {"chats", "own"}
    assert len(named) == sum(len(members) for _, members in source.source.places(2))


def test_a_process_names_the_conversations_of_all(batches, mixture):
    own = TrainingBatches(mixed_config(mixture), open_parts(mixture), (1, 2))
    assert own.conversations(3) == batches().conversations(3)
    first = own.source.places(2, everywhere=True)[0][1]
    assert own.conversations(3)[: len(first)] == [f"chats:{number}" for number in first.tolist()]


def test_a_row_must_hold_the_longest_of_all_parts(mixture, tmp_path):
    with pytest.raises(UserError, match=r"data.seq_len 80 is below the data's max_tokens 96"):
        loop.train(mixed_config(mixture, data__seq_len=80), tmp_path / "work")


@pytest.mark.parametrize("n_rows", [0, 1, 5, 12, 100])
def test_a_sample_has_the_shares_as_far_as_there_are_rows(mixture, n_rows):
    evaluator = Evaluator(open_parts(mixture), mixed_config(mixture), mesh_of(1, 1, 1))
    whole = [packing.n_rows for packing in evaluator.packings]
    sizes = evaluator.sizes(n_rows)
    assert sum(sizes) == min(n_rows, sum(whole))
    assert sizes[0] == min(max(round(0.75 * n_rows), n_rows - whole[1]), whole[0]) or abs(sizes[0] - 0.75 * n_rows) < 1


@pytest.mark.slow
def test_a_part_without_validation_data_leaves_the_loss_to_the_others(mixture, chat_data, tmp_path):
    options = ["--bpe_ranks=256", "--max_tokens=64", "--valid_fraction=0", "--workers=1", "--limit=50"]
    prepare.main([f"--input={chat_data.parent / 'chats.jsonl'}", f"--output={tmp_path / 'none'}", *options])
    own = mixture.split(",")[1].partition("=")[0]
    loop.train(mixed_config(f"{tmp_path / 'none'}=0.5,{own}=0.5", train__max_steps=2), tmp_path / "work")
    assert losses(tmp_path / "work", "sft/val_loss") == losses(tmp_path / "work", "sft/val_loss/own")


@pytest.mark.slow
def test_with_another_mix_the_search_for_the_best_model_starts_over(mixture, finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    other = mixture.replace("0.75", "0.25").replace("=0.25", "=0.75", 2).replace("chats=0.75", "chats=0.25")
    assert other != mixture
    config = mixed_config(other, train__max_steps=14, optimizer__learning_rate=0.0)
    loop.train(config, tmp_path / "work", accept_changes=True)
    assert "the search for the best model starts over" in capfd.readouterr().err
    assert os.readlink(tmp_path / "work" / "model") == "models/14"


@pytest.mark.slow
def test_all_parts_are_verified(mixture, tmp_path):
    paths = [entry.partition("=")[0] for entry in mixture.split(",")]
    for path in paths:
        shutil.copytree(path, tmp_path / os.path.basename(path))
    file = next((tmp_path / "own" / "train").glob("tokens-*.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    mixed = ",".join(f"{tmp_path / os.path.basename(path)}=1" for path in paths)
    with pytest.raises(UserError, match="own is damaged"):
        loop.train(mixed_config(mixed), tmp_path / "work", verify=True)
