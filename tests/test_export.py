"""Exports straight from a run, and what they may replace."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import UserError
from tinysft_jax.conversion.gguf import read_gguf
from tinysft_jax.conversion.huggingface import read_huggingface
from tinysft_jax.conversion.torch import read_torch_checkpoint
from tinysft_jax.data import prepare
from tinysft_jax.export import check_exports, check_output, export_run, parse_export
from tinysft_jax.gpt_config import GPTConfig, RopeScaling
from tinysft_jax.parameters import ModelDescription
from tinysft_jax.training import loop

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")

CONFIG = Path(__file__).parents[1] / "configs" / "sft.py"


@pytest.fixture(scope="module")
def merged_data(tmp_path_factory) -> Path:
    """Chats whose tokenizer has merges, which llama.cpp needs."""
    directory = tmp_path_factory.mktemp("data")
    roles = ("system", "user", "assistant")
    chats = [[dict(role=role, content=f"{role[0]} {i}") for role in roles] for i in range(200)]
    lines = [json.dumps({"messages": messages}) for messages in chats]
    (directory / "chats.jsonl").write_text("\n".join(lines))
    flags = ["--bpe_ranks=300", "--valid_fraction=0.1", "--workers=1", "--max_tokens=64"]
    prepare.main([f"--input={directory}/chats.jsonl", f"--output={directory}/data", *flags])
    return directory / "data"


@pytest.fixture(scope="module")
def finished(merged_data, tmp_path_factory) -> Path:
    """The work directory of a run that exported."""
    spec = importlib.util.spec_from_file_location("sft", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config, workdir = module.get_config(), tmp_path_factory.mktemp("run") / "work"
    config.update(
        {"init_from": "random", "export": "huggingface,torch,gguf", "data": {"path": str(merged_data), "seq_len": 64}}
    )
    config.model.update({"dim": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 64})
    config.optimizer.warmup_steps = 1
    config.train.update({"max_steps": 2, "batch_size": 8, "eval_interval": 1})
    loop.train(config, workdir)
    export_run(workdir, config.export)
    return workdir


def test_a_run_exports_its_best_model(finished):
    description, params = open_model(finished)
    for other, other_params in (
        read_huggingface(finished / "huggingface"),
        read_torch_checkpoint(finished / "model.pt"),
        read_gguf(finished / "model.gguf"),
    ):
        assert (other.config, other.chat_template, other.tokenizer) == (
            description.config,
            description.chat_template,
            description.tokenizer,
        )
        jax.tree.map(np.testing.assert_array_equal, other_params, params)
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    content = torch.load(finished / "model.pt", weights_only=True)
    best = min((m for m in metrics if m["step"] and "sft/val_loss" in m), key=lambda m: m["sft/val_loss"])
    assert (content["step"], content["loss"]) == (best["step"], metrics[-1]["sft/final_val_loss"])
    card = (finished / "huggingface" / "README.md").read_text()
    assert card.count("# work\n") == 1 and '"batch_size": 8' in card and "conversations" in card
    assert (finished / "huggingface" / "loss.png").read_bytes() == (finished / "loss.png").read_bytes()


def edit_the_card(work: Path) -> str:
    (work / "huggingface" / "README.md").write_text("mine")
    return "README.md"


def put_it_under_version_control(work: Path) -> str:
    (work / "huggingface" / ".git").mkdir()
    (work / "huggingface" / ".git" / "HEAD").write_text("ref: refs/heads/main")
    return ".git/HEAD"


def lose_the_record(work: Path) -> str:
    (work / "exports.json").unlink()
    return "exports.json does not list it"


@pytest.mark.slow
@pytest.mark.parametrize("change", [edit_the_card, put_it_under_version_control, lose_the_record])
def test_an_export_that_somebody_changed_is_kept(finished, tmp_path, change):
    work = shutil.copytree(finished, tmp_path / "work", symlinks=True)
    assert export_run(work, "huggingface") == [f"exported: {work / 'huggingface'}"]
    told = change(work)
    before = {path: path.read_bytes() for path in (work / "huggingface").rglob("*") if path.is_file()}
    (line,) = export_run(work, "huggingface")
    assert line.startswith(f"kept: {work / 'huggingface'}, ") and told in line and "move it away" in line
    assert {path: path.read_bytes() for path in before} == before
    (work / "huggingface").rename(tmp_path / "away")
    assert export_run(work, "huggingface,torch")[0] == f"exported: {work / 'huggingface'}"
    assert export_run(work, "") == []
    assert not list(finished.glob(".*"))


def test_names_are_checked(monkeypatch):
    assert parse_export("") == ()
    assert parse_export(" torch, huggingface,torch") == ("torch", "huggingface")
    with pytest.raises(UserError, match="'onnx'; it lists any of huggingface, torch"):
        parse_export("onnx")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"needs safetensors: pip install -e '\.\[hf\]'"):
        parse_export("torch,huggingface")


def test_forms_that_cannot_hold_the_model_are_refused_before_training():
    plain = ModelDescription(GPTConfig(), None, None, {})
    llama = ModelDescription(GPTConfig(norm="rms", n_kv_heads=4), None, None, {})
    check_exports("huggingface,torch", plain)
    check_exports("huggingface", llama)
    with pytest.raises(UserError, match="export=torch can't be written: the PyTorch project has no such model"):
        check_exports("huggingface,torch", llama)
    check_exports("gguf", llama)
    scaled = RopeScaling(8.0, 1.0, 4.0, 8192)
    qwen = dataclasses.replace(llama, config=dataclasses.replace(llama.config, qkv_bias=True, rope_scaling=scaled))
    with pytest.raises(UserError, match=r"export=gguf can't be written: llama\.cpp scales"):
        check_exports("gguf", qwen)
    with pytest.raises(UserError, match="export=huggingface can't be written: no model of"):
        check_exports("huggingface", dataclasses.replace(plain, config=GPTConfig(qk_norm=True)))


def test_a_folder_is_not_taken_for_a_run(finished):
    description, _ = open_model(finished / "huggingface")
    assert description.source["kind"] == "huggingface" and open_model(finished)[0].source["kind"] == "random"


def test_only_the_same_kind_is_replaced(finished, tmp_path):
    """A work directory has a config.json as well: it is not taken for a Hugging Face folder."""
    check_output("huggingface", finished / "huggingface", overwrite=True)
    check_output("torch", finished / "model.pt", overwrite=True)
    for kind, path in (("huggingface", finished), ("model", finished), ("torch", finished), ("huggingface", tmp_path)):
        with pytest.raises(UserError, match="--overwrite replaces nothing else"):
            check_output(kind, path, overwrite=True)
    for kind, name, message in (
        ("torch", "a", r"a file that ends in \.pt"),
        ("gguf", "a.pt", r"a file that ends in \.gguf"),
        ("huggingface", "a.pt", "a directory, which"),
        ("model", "a.gguf", "a directory, which"),
    ):
        with pytest.raises(UserError, match=f"--to {kind} writes {message}"):
            check_output(kind, tmp_path / name, overwrite=False)
