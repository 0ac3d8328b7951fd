"""A run meets a batch whose loss is no number."""

import json
import os

import pytest
from runs import assert_same_bits, losses, stop_at, tiny_config

from tinysft_jax.console import Interrupted, RunError
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import PreparedData
from tinysft_jax.training import loop
from tinysft_jax.training.evaluate import Evaluator
from tinysft_jax.training.source import StepBatches


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of the batches of these steps no number."""

    def poison(*steps: int) -> None:
        build = StepBatches.__getitem__

        def build_poisoned(source, step):
            batch = build(source, step)
            if step + 1 in steps:
                batch["weights"][0, 0] = 3e38  # times a loss of more than 1
            return batch

        monkeypatch.setattr(StepBatches, "__getitem__", build_poisoned)

    return poison


def test_skipped_steps_are_counted_and_logged_with_their_conversations(chat_data, tmp_path, poison, capfd):
    poison(3, 4, 7)
    loop.train(tiny_config(chat_data), tmp_path)
    assert [step for step in range(1, 13) if step not in losses(tmp_path)] == [3, 4, 7]
    counts = losses(tmp_path, "sft/skipped_steps")
    assert (counts[2], counts[3], counts[5], counts[12]) == (0, 1, 2, 3)
    lines = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 7]
    split = PreparedData(chat_data).split("train")
    plan = Packing(split.lengths, 64).epoch(0, 0)
    expected = [int(index) for row in range(16, 24) for index in plan.row(row)]
    assert lines[0]["conversations"] == expected
    said = capfd.readouterr().err
    assert f"step 3 skipped: its loss is nan, its gradient norm nan; conversations {expected[0]}, " in said


@pytest.mark.slow
def test_a_run_with_skipped_steps_resumes_exactly(chat_data, tmp_path, poison, monkeypatch):
    """The count in a row as well: 4 and 5 were skipped before the stop at 5, 6 after."""
    poison(4, 5, 6)
    loop.train(tiny_config(chat_data, train__max_skipped_steps=4), tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(5, patch)
        loop.train(tiny_config(chat_data, train__max_skipped_steps=4), tmp_path / "stopped")
    with (tmp_path / "stopped" / "skipped_steps.jsonl").open("a") as file:
        file.write('{"step": 6}\n')  # as of a run that was killed after its checkpoint
    loop.train(tiny_config(chat_data, train__max_skipped_steps=4), tmp_path / "stopped")
    assert_same_bits(tmp_path / "stopped", tmp_path / "whole")
    files = [(tmp_path / name / "skipped_steps.jsonl").read_text() for name in ("whole", "stopped")]
    assert files[0] == files[1]
    with pytest.raises(RunError, match=r"of 3 steps in a row, up to step 6, was not finite; lower"):
        loop.train(tiny_config(chat_data, train__max_skipped_steps=3), tmp_path / "strict")


def test_an_evaluation_that_is_no_number_is_not_the_best(chat_data, tmp_path, monkeypatch):
    scripted = iter([5.0, float("nan"), 4.0, float("nan"), 4.5])  # at the steps 0, 5, 10 and 12, and of the kept model
    monkeypatch.setattr(Evaluator, "losses", lambda *_: {"val_loss": next(scripted)})
    loop.train(tiny_config(chat_data), tmp_path)
    assert os.readlink(tmp_path / "model") == "models/10"
    assert losses(tmp_path, "sft/val_loss") == {0: 5.0, 10: 4.0}
