import json
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from runs import assert_same_bits, latest_checkpoint, losses, stop_at, tiny_config
from tiers import slow
from tiny_model import family, make_tokenizer, random_params, save_model

from tinysft_jax import files
from tinysft_jax.checkpoints import load_description, load_model
from tinysft_jax.console import Interrupted, RunError, UserError
from tinysft_jax.data import prepare
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import PreparedData
from tinysft_jax.parameters import ModelDescription
from tinysft_jax.training import loop
from tinysft_jax.training.checkpoints import Checkpoints
from tinysft_jax.training.evaluate import Evaluator
from tinysft_jax.training.log import RunLog, read_metrics


def test_a_run_learns_and_leaves_what_it_should(finished):
    train, valid = losses(finished), losses(finished, "sft/val_loss")
    assert list(train) == list(range(1, 13)) and list(valid) == [0, 5, 10, 12]
    assert train[12] < train[1] - 0.5 and valid[12] < valid[0] - 0.5
    rates = losses(finished, "sft/lr")
    assert [rates[1], rates[2]] == pytest.approx([0.005, 0.01]) and rates[12] < rates[11] < rates[3]
    assert {path.name for path in finished.iterdir()} == {
        "checkpoints", "config.json", "loss.png", "metrics.jsonl", "model", "models",
    }  # fmt: skip
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["12", "4", "8"]
    settings = json.loads((finished / "config.json").read_text())
    assert settings["config"]["train"]["batch_size"] == 8 and "jax" in settings["packages"]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    last = next(line for line in read_metrics(finished) if line["step"] == 12)
    assert 0 < last["sft/supervised_tokens_per_second"] < last["sft/tokens_per_second"]
    assert 0 <= last["sft/padding_fraction"] < 0.5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", "1"),
        ("format_version", 3),
        ("run", None),
        ("run", {"steps": True}),
        ("best_loss", "low"),
        ("best_step", -1),
        ("evaluated_step", 1.5),
        ("skipped_steps", [0]),
        ("model", []),
        ("model", None),
    ],
)
def test_what_a_checkpoint_says_of_its_run_is_checked(chat_data, finished, monkeypatch, key, value):
    """Whoever alters it can write a manifest that fits."""
    honest = ocp.metadata(finished / "checkpoints" / "12").custom_metadata
    monkeypatch.setattr(ocp, "metadata", lambda _: SimpleNamespace(custom_metadata=honest | {key: value}))
    before = sorted(path.name for path in finished.rglob("*"))
    with pytest.raises(RunError, match=rf"can't resume from .*checkpoints/12: .*({key}|newer program)"):
        loop.train(tiny_config(chat_data), finished)
    assert sorted(path.name for path in finished.rglob("*")) == before


def test_a_checkpoint_of_version_1_is_refused_with_the_way_on(chat_data, finished, tmp_path):
    """The moments in its optimizer state are interleaved; its best model can still be used."""
    work = shutil.copytree(finished, tmp_path / "work", symlinks=True)
    content = json.loads((work / "checkpoints" / "12" / "_CHECKPOINT_METADATA").read_text())
    assert content["custom_metadata"]["format_version"] == 2
    content["custom_metadata"]["format_version"] = 1
    (work / "checkpoints" / "12" / "_CHECKPOINT_METADATA").write_text(json.dumps(content))
    files.write_manifest(work / "checkpoints" / "12")
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"--config.init_from={work} --workdir=DIR$") as refusal:
        loop.train(tiny_config(chat_data), work, accept_changes=True)
    assert refusal.value.exit_code == 2 and "\n" not in str(refusal.value)
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before


def test_model_is_a_link_to_the_best(chat_data, finished):
    valid = losses(finished, "sft/val_loss")
    best = min((step for step in valid if step), key=valid.get)
    assert os.readlink(finished / "model") == f"models/{best}"
    assert [path.name for path in (finished / "models").iterdir()] == [str(best)]
    description = load_description(finished / "model")
    assert description.chat_template == "control"
    assert description.trained_length == PreparedData(chat_data).split("train").lengths.max() < 64
    assert load_model(finished).config.vocab_size == 260


def test_a_stopped_run_resumes_with_the_same_bits(chat_data, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(6, patch, signal.SIGTERM)
        with pytest.raises(Interrupted, match="run the same command") as interruption:
            loop.train(tiny_config(chat_data), tmp_path)
    assert interruption.value.exit_code == 143
    assert max(losses(tmp_path)) in (6, 7)
    loop.train(tiny_config(chat_data), tmp_path)
    assert_same_bits(tmp_path, finished)


def test_a_finished_run_has_nothing_left_to_do(chat_data, finished):
    before = (finished / "checkpoints" / "12").stat().st_mtime_ns
    loop.train(tiny_config(chat_data), finished)
    assert list(losses(finished)) == list(range(1, 13))
    assert (finished / "checkpoints" / "12").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train__batch_size": 16}, "train.batch_size was 8, now 16"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate was 0.01, now 0.5"),
        ({"train__max_steps": 11}, "steps was 12, now 11"),
        ({"model__dim": 32}, "model.dim was 16, now 32"),
        ({"init_from": "elsewhere"}, "init_from was random, now elsewhere"),
        ({"optimizer__warmup_steps": 3}, r"another run: optimizer.warmup_steps was 2, now 3; .*--accept_changes"),
    ],
)
def test_a_work_directory_belongs_to_one_run(chat_data, finished, changes, complaint):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=complaint):
        loop.train(tiny_config(chat_data, **changes), finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_other_data_is_refused_unless_asked_for(finished, chat_data, tmp_path, capfd):
    """Then the run goes on, with rows of the other data; a model that can't speak its language is refused still."""
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    chats = chat_data.parent / "chats.jsonl"
    options = ["--max_tokens=64", "--valid_fraction=0.1", "--workers=1"]
    for name, ranks in (("other", "256"), ("foreign", "257")):
        prepare.main(
            [f"--input={chats}", f"--output={tmp_path / name}", "--limit=200", f"--bpe_ranks={ranks}", *options]
        )
    with pytest.raises(UserError, match=r"another run: data was \w+, now \w+; packing was \w+, now \w+; choose"):
        loop.train(tiny_config(tmp_path / "other"), tmp_path / "work")
    with pytest.raises(UserError, match=r"tokenizer was .*256}, now .*257}"):
        loop.train(tiny_config(tmp_path / "foreign"), tmp_path / "work")
    with pytest.raises(UserError, match="prepare the data with --bpe_ranks 256"):
        loop.train(tiny_config(tmp_path / "foreign"), tmp_path / "work", accept_changes=True)
    loop.train(tiny_config(tmp_path / "other", train__max_steps=14), tmp_path / "work", accept_changes=True)
    assert "resuming with changes: data was " in capfd.readouterr().err
    assert [*losses(tmp_path / "work")] == [*range(1, 15)]


def test_a_longer_run_says_what_becomes_of_the_schedule(chat_data, finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    loop.train(tiny_config(chat_data, train__max_steps=20), tmp_path / "work")
    assert (
        "the run is longer than it was, 20 steps instead of 12: the learning rate of step 13 is 4.13e-03 instead of "
        "0.00e+00, and falls to 0 at step 20"
    ) in capfd.readouterr().err
    rates = losses(tmp_path / "work", "sft/lr")
    assert rates[12] < 1e-3 and rates[13] == pytest.approx(4.13e-3, rel=1e-3)


@pytest.mark.slow
def test_a_longer_run_does_not_take_models_of_the_shorter_one_for_its_own(chat_data, finished, tmp_path, monkeypatch):
    """Killed after its best model and before the next checkpoint."""
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    shutil.rmtree(tmp_path / "work" / "checkpoints" / "12")
    assert os.readlink(tmp_path / "work" / "model") == "models/12"
    seen = []
    train_steps = loop.train_steps

    def look_and_train(run, state):
        seen.append(load_model(run.workdir).ln_f.scale[...])
        return train_steps(run, state)

    monkeypatch.setattr(loop, "train_steps", look_and_train)
    loop.train(tiny_config(chat_data, train__max_steps=13, train__eval_interval=12), tmp_path / "work")
    np.testing.assert_array_equal(seen[0], load_model(finished).ln_f.scale[...])
    assert load_model(tmp_path / "work").ln_f.scale.shape == (16,)
    whole = losses(tmp_path / "work", "sft/val_loss")
    best = min((step for step in whole if step), key=whole.get)
    assert os.readlink(tmp_path / "work" / "model") == f"models/{best}"
    assert [path.name for path in (tmp_path / "work" / "models").iterdir()] == [str(best)]
    assert not np.array_equal(load_model(tmp_path / "work").ln_f.scale[...], seen[0])


@pytest.mark.slow
def test_an_evaluation_made_good_counts_after_a_kill(chat_data, tmp_path, monkeypatch):
    """Stopped amid the evaluation of step 5, which was done at the next start, and killed before a checkpoint."""

    def scripted(*steps_and_losses):
        left = iter(steps_and_losses)
        return lambda *_: next(left)

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    def killed(*_):
        raise RunError("killed")

    first = scripted({"val_loss": 9.0})
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="step 5 "):
        patch.setattr(Evaluator, "losses", lambda run, *_: first() if not losses(tmp_path) else interrupted())
        loop.train(tiny_config(chat_data), tmp_path)
    with monkeypatch.context() as patch, pytest.raises(RunError, match="killed"):
        patch.setattr(Evaluator, "losses", scripted({"val_loss": 1.0}))
        patch.setattr(Checkpoints, "save", killed)
        loop.train(tiny_config(chat_data), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "losses", scripted(*({"val_loss": loss} for loss in (1.0, 2.0, 3.0, 1.5))))
        loop.train(tiny_config(chat_data), tmp_path)
    assert os.readlink(tmp_path / "model") == "models/5"
    assert losses(tmp_path, "sft/val_loss") == {0: 9.0, 5: 1.0, 10: 2.0, 12: 3.0}


@pytest.mark.parametrize("name", ["everything", *slow("default", "llama")])
def test_a_run_resumes_without_what_it_started_from(chat_data, tmp_path, name):
    """A model of any family. And from a checkpoint written in the background, between two others."""
    config, language = family(name, dim=16, n_layers=1, max_seq_len=64), make_tokenizer("control").description()
    description = ModelDescription(config, language["chat_template"], language["tokenizer"], {})
    save_model(tmp_path / "start", random_params(config), description)
    settings = tiny_config(chat_data, init_from=str(tmp_path / "start"))
    loop.train(settings, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part", symlinks=True)
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "12")
    shutil.rmtree(tmp_path / "start")
    loop.train(settings, tmp_path / "part")
    assert_same_bits(tmp_path / "part", tmp_path / "whole")
    assert load_description(tmp_path / "part" / "model").config == config
    assert losses(tmp_path / "part")[12] < losses(tmp_path / "part")[1] - 0.5


def test_a_resumed_run_remembers_its_best_model(chat_data, finished, tmp_path, monkeypatch):
    """And evaluates that one at the end, not the last."""
    scripted, honest = iter([5.0, 1.0, 2.0, 3.0]), Evaluator.losses  # at the steps 0, 5, 10 and 12

    def losses_of(*arguments):
        loss = next(scripted, None)
        return honest(*arguments) if loss is None else {"val_loss": loss}

    monkeypatch.setattr(Evaluator, "losses", losses_of)
    with monkeypatch.context() as patch:
        stop_at(6, patch)
        with pytest.raises(Interrupted):
            loop.train(tiny_config(chat_data), tmp_path)
    loop.train(tiny_config(chat_data), tmp_path)
    assert os.readlink(tmp_path / "model") == "models/5"
    # All evaluations see the whole split here.
    assert losses(tmp_path, "sft/final_val_loss") == {12: pytest.approx(losses(finished, "sft/val_loss")[5], rel=1e-6)}


@pytest.mark.slow
def test_an_evaluation_that_was_cut_short_is_done_again(chat_data, finished, tmp_path, monkeypatch):
    def interrupted(evaluator, *_):
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "losses", interrupted)
        with pytest.raises(Interrupted, match="stopped after step 0"):
            loop.train(tiny_config(chat_data), tmp_path)
    loop.train(tiny_config(chat_data), tmp_path)
    assert losses(tmp_path, "sft/val_loss") == losses(finished, "sft/val_loss")


@pytest.mark.slow
def test_a_run_that_diverges_says_so(chat_data, tmp_path):
    with pytest.raises(RunError, match=r"has diverged: .* of 10 steps in a row.*lower optimizer.learning_rate"):
        loop.train(tiny_config(chat_data, optimizer__learning_rate=1e30, optimizer__grad_clip=0.0), tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line(chat_data, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.v1.save_async", full)
        with pytest.raises(RunError, match=r"can't write .*checkpoints: .*No space left"):
            loop.train(tiny_config(chat_data), tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", full)
        with pytest.raises(RunError, match=r"can't write .*No space left"):
            loop.train(tiny_config(chat_data), tmp_path / "two")


def test_without_validation_data_the_last_model_is_kept(chat_data, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluator, "losses", lambda *_: {})
    loop.train(tiny_config(chat_data, train__max_steps=2), tmp_path)
    assert os.readlink(tmp_path / "model") == "models/2"


def test_tasks_are_evaluated_one_by_one_from_a_pytorch_checkpoint(tmp_path):
    """Story tasks, a `.pt` to start from, and a stated number of batches."""
    from torch_twin import TorchTwin, save

    options = ["--bpe_ranks=2048", "--max_tokens=512", "--workers=1"]
    prepare.main(["--embedded=60", f"--output={tmp_path / 'data'}", *options])
    twin = TorchTwin(vocab_size=2049, dim=16, n_layers=1, n_heads=2, max_seq_len=512)
    start = save(twin.checkpoint(), tmp_path / "start.pt")
    changes = {"data__seq_len": 512, "train__max_steps": 2, "train__eval_batches": 1, "init_from": str(start)}
    loop.train(tiny_config(tmp_path / "data", **changes), tmp_path / "run")
    evaluated = next(line for line in read_metrics(tmp_path / "run") if "sft/val_loss" in line)
    tasks = {key.removeprefix("sft/val_loss/") for key in evaluated if key.startswith("sft/val_loss/")}
    assert tasks > {"summary", "words", "main_character"} and tasks <= set(PreparedData(tmp_path / "data").tasks)
    assert load_description(tmp_path / "run" / "model").source["from"]["kind"] == "pytorch"


def test_the_functions_of_a_run_are_compiled_once(finished_run):
    assert finished_run[1] == (1, 1)


@pytest.mark.slow
def test_a_run_may_go_over_several_epochs(chat_data, tmp_path):
    split = PreparedData(chat_data).split("train")
    rows = [len(Packing(split.lengths, 64).epoch(0, epoch)) for epoch in range(2)]
    config = tiny_config(chat_data, train__num_epochs=2, train__batch_size=64, train__eval_interval=100)
    loop.train(config, tmp_path)
    assert max(losses(tmp_path)) == sum(-(-n // 64) for n in rows)


def test_what_it_starts_from_may_be_another_runs_best(chat_data, finished, tmp_path):
    loop.train(tiny_config(chat_data, init_from=str(finished), train__max_steps=2), tmp_path)
    best = min(losses(finished, "sft/val_loss").values())
    assert losses(tmp_path, "sft/val_loss")[0] == pytest.approx(best, rel=1e-5)


@pytest.mark.slow
def test_a_window_of_steps_is_traced(chat_data, tmp_path):
    loop.train(tiny_config(chat_data, train__max_steps=4, profile="1:3"), tmp_path)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


def test_the_moving_average_is_what_is_evaluated_and_kept(chat_data, finished, tmp_path):
    loop.train(tiny_config(chat_data, optimizer__ema_decay=0.5), tmp_path)
    assert losses(tmp_path) == losses(finished)
    averaged, plain = losses(tmp_path, "sft/val_loss"), losses(finished, "sft/val_loss")
    assert averaged[0] == plain[0] and averaged[5] > plain[5]
    state = latest_checkpoint(tmp_path)
    kept = np.asarray(load_model(tmp_path).ln_f.scale[...])
    assert os.readlink(tmp_path / "model") == "models/12"
    np.testing.assert_array_equal(kept, state["['average']['ln_f']['scale']"])
    assert not np.array_equal(kept, state["['params']['ln_f']['scale']"])


def test_wandb_is_not_imported_unless_asked_for(finished):
    assert "wandb" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train__batch_size": 12}, "train.batch_size 12, .* not a multiple of 8 .* the next multiple is 16"),
        (
            {"train__grad_accumulation_steps": 3},
            r"train.batch_size 8, .* not a multiple of 24 \(mesh.data × mesh.fsdp = 8, .* the next multiple is 24",
        ),
        ({"mesh__data": 3}, r"mesh data=3 × fsdp=1 × tensor=1 does not fit 8 device"),
        ({"train__dtype": "float16"}, "train.dtype is 'float16'; it must be one of auto, bfloat16, float32"),
        ({"train__remat": "some"}, "train.remat is 'some'"),
        ({"train__log_interval": 0}, "train.log_interval is 0"),
        ({"optimizer__beta1": 1.0}, "optimizer.beta1 is 1.0"),
        ({"optimizer__ema_decay": 1.0}, "optimizer.ema_decay is 1.0"),
        ({"optimizer__decayed": "norms"}, "optimizer.decayed is 'norms'; it must be one of all, matrices"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate is nan"),
        ({"wandb__mode": "on"}, "wandb.mode is 'on'"),
        ({"data__path": "/nowhere"}, "/nowhere is not a prepared data set"),
        ({"init_from": "/nowhere"}, "/nowhere does not exist"),
        ({"data__seq_len": 128}, "data.seq_len 128 is longer than the model's context 64"),
        ({"mesh__tensor": 4}, "mesh.tensor 4 does not divide the model's 2 heads; choose one of 1, 2"),
        ({"init_from": ""}, r"init_from is empty, .* conversations: .*--config.init_from=random"),
        ({"data__seq_len": 63}, "data.seq_len 63 is below the data's max_tokens 64"),
        ({"optimizer__warmup_steps": 13}, "optimizer.warmup_steps 13 is longer than the run of 12 steps"),
        ({"train__max_skipped_steps": 0}, "train.max_skipped_steps is 0"),
        ({"train__attention": "cudnn"}, "cudnn can't run here"),
        ({"seed": 2**31}, "seed is 2147483648"),
        ({"profile": "5"}, "profile is '5'; it must be START:STOP"),
        ({"profile": "5:5"}, "profile is '5:5'"),
    ],
)
def test_what_cannot_be_a_run_is_refused_before_anything_is_written(chat_data, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        loop.train(tiny_config(chat_data, **changes), tmp_path / "work")
    assert not (tmp_path / "work").exists()
