import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from runs import load_config, losses, mesh_of, tiny_config

from tinysft_jax.checkpoints import load_model
from tinysft_jax.console import Interrupted
from tinysft_jax.data import prepare
from tinysft_jax.data.mixture import open_parts
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import PreparedData
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.training import loop
from tinysft_jax.training.evaluate import Evaluator, evaluation_rows, n_evaluations
from tinysft_jax.training.objectives import SupervisedTokens
from tinysft_jax.training.step import make_eval_step


@pytest.fixture(scope="module")
def story_data(tmp_path_factory):
    """Five validation records, which give conversations of eight tasks."""
    path = tmp_path_factory.mktemp("stories") / "data"
    prepare.main(["--embedded=100", f"--output={path}", "--bpe_ranks=512", "--max_tokens=512", "--workers=1"])
    return path


def evaluate(data, model: GPT, seq_len: int, batch_size: int, n_rows=None, seed=0, sizes=(1, 1, 1)) -> dict[str, float]:
    """Losses of the sample's first rows, or of all."""
    graph, state = nnx.split(model)
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        changes = {"data__seq_len": seq_len, "train__eval_batch_size": batch_size, "seed": seed}
        evaluator = Evaluator(open_parts(str(data.directory)), tiny_config(data.directory, **changes), mesh)
        step = jax.jit(make_eval_step(graph, len(data.tasks), SupervisedTokens(evaluator.n_segments)))
        return evaluator.losses(step, nnx.to_pure_dict(state), evaluator.n_rows if n_rows is None else n_rows)


def test_the_whole_split_gives_the_loss_of_each_conversation_alone(story_data):
    """For each task and over all, on any mesh, with rows and batches of any size: every token counts once."""
    data = PreparedData(story_data)
    model, split = GPT(GPTConfig(520, 32, 1, 2, 1024), rngs=nnx.Rngs(0)), data.split("valid")
    nll = {task: [] for task in data.tasks}
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)))
    for index, task in enumerate(split.tasks):
        ids, supervised = split.conversation(index)
        log_p = np.asarray(forward(np.pad(ids, (0, 512 - len(ids))).astype(np.int32)[None])[0])
        nll[data.tasks[task]] += [-log_p[i, ids[i + 1]] for i in range(len(ids) - 1) if supervised[i + 1]]
    expected = {f"val_loss/{task}": np.mean(values) for task, values in nll.items() if values}
    assert len(expected) == 8
    expected["val_loss"] = np.mean(np.concatenate([*nll.values()]))
    for seq_len, batch_size, sizes in ((512, 3, (1, 1, 1)), (512, 16, (8, 1, 1)), (1024, 1000, (2, 2, 2))):
        assert evaluate(data, model, seq_len, batch_size, sizes=sizes) == pytest.approx(expected, rel=1e-5)


def test_a_sample_is_the_same_on_any_devices_and_another_for_another_seed(chat_data):
    data, model = PreparedData(chat_data), GPT(GPTConfig(260, 32, 1, 2, 64), rngs=nnx.Rngs(0))
    sample = evaluate(data, model, 64, 2, n_rows=5)
    assert evaluate(data, model, 64, 3, n_rows=5, sizes=(4, 2, 1)) == pytest.approx(sample, rel=1e-6)
    assert evaluate(data, model, 64, 2, n_rows=5, seed=1) != pytest.approx(sample, rel=1e-4)
    assert evaluate(data, model, 64, 2, n_rows=0) == {}


def test_a_conversation_is_in_a_sample_as_often_as_any_other(chat_data):
    """However long it is: over many seeds, the mean of the samples' supervised tokens is their share of all."""
    split = PreparedData(chat_data).split("valid")
    packing = Packing(split.lengths, 64)
    counts = np.zeros(len(split))
    for seed in range(400):
        counts[packing.epoch(seed).first(4).order] += 1
    expected = 4 / packing.n_rows
    assert np.abs(counts / 400 - expected).max() < 5 * np.sqrt(expected * (1 - expected) / 400)


def test_evaluations_cost_little_at_the_defaults():
    """25,028 validation records of TinyStories-Instruct, of which each gives about 4.5 conversations."""
    lengths = np.random.default_rng(0).normal(300, 90, 25_028 * 9 // 2).clip(30, 512).astype(np.int32)
    config = load_config("sft")
    periodic, final = evaluation_rows(config, config.train.max_steps, Packing(lengths, config.data.seq_len).n_rows)
    trained, times = config.train.max_steps * config.train.batch_size, n_evaluations(config.train.max_steps, 500)
    assert (times, periodic, final) == (21, 4 * 32, 37 * 32)
    assert 0.06 < times * periodic / trained <= 0.07 and 0.025 < final / trained <= 0.03


@pytest.mark.parametrize(
    ("steps", "split_rows", "changes", "expected"),
    [
        (10_000, 100_000, {}, (128, 1184)),
        (100, 100_000, {}, (32, 32)),  # at least a batch
        (10_000, 20, {}, (20, 20)),  # never more than there is
        (10_000, 0, {}, (0, 0)),
        (10_000, 100_000, {"train__eval_batches": 7}, (224, 1184)),
        (10_000, 100_000, {"train__eval_batches": 100}, (3200, 3200)),  # the final one sees no less than the others
        (10_000, 100_000, {"train__eval_batches": 10**9}, (100_000, 100_000)),
        (10_000, 100_000, {"train__final_eval": "all"}, (128, 100_000)),
        (10_000, 100_000, {"train__eval_batch_size": 8}, (128, 1200)),
        (10_001, 100_000, {"train__eval_interval": 10_000}, (928, 1184)),  # at the steps 0, 10,000 and 10,001
    ],
)
def test_how_much_is_evaluated(tmp_path, steps, split_rows, changes, expected):
    config = tiny_config(tmp_path, **{"train__batch_size": 4, "train__eval_interval": 500, **changes})
    assert evaluation_rows(config, steps, split_rows) == expected


def final_lines(workdir) -> dict[int, tuple[int, float]]:
    """Rows and loss of the final evaluation, by the step of its line; each may stand once."""
    rows, loss = losses(workdir, "sft/final_val_rows"), losses(workdir, "sft/final_val_loss")
    assert rows.keys() == loss.keys()
    assert (workdir / "metrics.jsonl").read_text().count('"sft/final_val_rows"') == len(rows)
    return {step: (rows[step], loss[step]) for step in rows}


@pytest.fixture(scope="module")
def finished(chat_data, tmp_path_factory) -> Path:
    """A run without a change of its parameters: a sample has one loss, and the first model is the best."""
    workdir = tmp_path_factory.mktemp("run") / "work"
    loop.train(small_samples(chat_data), workdir)
    return workdir


def small_samples(data: Path, **changes):
    """A row at each evaluation, two at the end."""
    return tiny_config(data, **{"train__eval_batch_size": 1, "optimizer__learning_rate": 0.0, **changes})


def test_a_run_evaluates_one_sample_and_at_the_end_the_kept_model(chat_data, finished):
    valid, data, kept = losses(finished, "sft/val_loss"), PreparedData(chat_data), load_model(finished)
    assert [*valid] == [0, 5, 10, 12] and len({*valid.values()}) == 1 and os.readlink(finished / "model") == "models/5"
    assert valid[12] == pytest.approx(evaluate(data, kept, 64, 1, n_rows=1)["val_loss"], rel=1e-6)
    final = evaluate(data, kept, 64, 1, n_rows=2)["val_loss"]
    assert final_lines(finished) == {12: (2, pytest.approx(final, rel=1e-6))}


@pytest.mark.slow
def test_the_final_evaluation_is_done_once(chat_data, finished, tmp_path, monkeypatch, capfd):
    """By a run that was killed before it, and one that was stopped amid it; then again only for another sample."""
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    metrics, config, evaluated = tmp_path / "work" / "metrics.jsonl", small_samples(chat_data), []
    whole = metrics.read_text()
    metrics.write_text("".join(line for line in whole.splitlines(True) if "final" not in line))
    honest = Evaluator.losses

    def losses_and_stop(self, eval_step, params, n_rows, *should_stop):
        evaluated.append(n_rows)
        if len(evaluated) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, eval_step, params, n_rows, *should_stop)

    monkeypatch.setattr(Evaluator, "losses", losses_and_stop)
    with pytest.raises(Interrupted, match="run the same command") as interruption:
        loop.train(config, tmp_path / "work")
    assert interruption.value.exit_code == 143 and not final_lines(tmp_path / "work")
    said = "validation: 1 of 17 rows, 4 times; the kept model: 2 rows"
    assert said in capfd.readouterr().err
    for _ in range(2):
        loop.train(config, tmp_path / "work")
        assert metrics.read_text() == whole and "kept model, 2 rows" in capfd.readouterr().out
    assert evaluated == [2, 2]
    loop.train(small_samples(chat_data, train__final_eval="all"), tmp_path / "work")
    data, kept = PreparedData(chat_data), load_model(finished)
    every_row = Packing(data.split("valid").lengths, 64).n_rows
    assert final_lines(tmp_path / "work") == {
        12: (every_row, pytest.approx(evaluate(data, kept, 64, 1)["val_loss"], rel=1e-6))
    }


@pytest.mark.slow
def test_a_longer_run_keeps_its_sample_unless_another_is_asked_for(chat_data, finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    longer = {"train__max_steps": 14, "train__eval_interval": 14}  # of which 3 rows would be evaluated by default
    loop.train(small_samples(chat_data, **longer), tmp_path / "work")
    assert "validation: 1 of" in capfd.readouterr().err
    assert {step: rows for step, (rows, _) in final_lines(tmp_path / "work").items()} == {14: 3}
    assert os.readlink(tmp_path / "work" / "model") == "models/5"
    other = {"train__max_steps": 16, "train__eval_batches": 3}
    loop.train(small_samples(chat_data, **other), tmp_path / "work")
    said = capfd.readouterr().err
    assert "the validation sample is not what it was" in said and "validation: 3 of" in said
    assert os.readlink(tmp_path / "work" / "model") == "models/15"
    assert {step: rows for step, (rows, _) in final_lines(tmp_path / "work").items()} == {16: 3}
