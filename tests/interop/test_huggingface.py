"""Hugging Face folders: what transformers computes from them, and what comes back."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_model import make_tokenizer
from transformers import AutoModelForCausalLM

import tinysft_jax as tsft
from tinysft_jax.errors import UserError
from tinysft_jax.interop.huggingface import is_huggingface, read_huggingface, write_huggingface
from tinysft_jax.interop.huggingface_names import halves_to_pairs, pairs_to_halves
from tinysft_jax.interop.torch_checkpoint import read_torch_checkpoint
from tinysft_jax.model_directory import ModelDescription, Params, load_model, make_model

transformers.utils.logging.disable_progress_bar()


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class Exported(NamedTuple):
    """A checkpoint of the PyTorch project, its golden arrays, and the folder made from it."""

    description: ModelDescription
    params: Params
    golden: dict[str, np.ndarray]
    folder: Path


@pytest.fixture(scope="module", params=["pretrained_small", "pretrained_compiled", "sft_small"])
def exported(request, fixtures, tmp_path_factory) -> Exported:
    path, folder = fixtures / f"{request.param}.pt", tmp_path_factory.mktemp(request.param)
    description, params = read_torch_checkpoint(path)
    write_huggingface(folder, params, description)
    return Exported(description, params, np.load(path.with_suffix(".golden.npz")), folder)


def test_transformers_computes_the_golden_logits(exported, caplog):
    """It misses no weight, finds none too many, and says nothing."""
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            model, loading = AutoModelForCausalLM.from_pretrained(exported.folder, output_loading_info=True)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not any(loading.values()) and not caplog.records
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(torch.from_numpy(exported.golden["input_ids"]).long()).logits.numpy()
    np.testing.assert_allclose(logits, exported.golden["logits"], rtol=0, atol=2e-5)


def test_what_comes_back_is_the_same_bits(exported):
    description, params = read_huggingface(exported.folder)
    assert description.config == exported.description.config
    assert description.chat_template == exported.description.chat_template
    assert description.source == {"kind": "huggingface", "directory": exported.folder.name}
    jax.tree.map(np.testing.assert_array_equal, params, exported.params)
    logits = make_model(description.config, params, dtype=jnp.float32)(jnp.asarray(exported.golden["input_ids"]))
    np.testing.assert_allclose(logits, exported.golden["logits"], rtol=0, atol=2e-5)


def test_sizes_agree_and_padding_is_not_exported(exported):
    config = json.loads((exported.folder / "config.json").read_text())
    tensors = load_file(exported.folder / "model.safetensors")
    assert config["vocab_size"] == exported.description.config.vocab_size
    assert tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        shape = tensors[f"model.layers.{layer}.mlp.gate_proj.weight"].shape
        assert shape == (config["intermediate_size"], config["hidden_size"])
    assert f"model.layers.{config['num_hidden_layers']}.mlp.gate_proj.weight" not in tensors
    assert not [name for name in tensors if name.startswith("lm_head")]
    assert {path.suffix for path in exported.folder.iterdir()} == {".json", ".safetensors"}
    assert len({path.stat().st_mode for path in exported.folder.iterdir()}) == 1  # read by whom config.json is


def test_greedy_answers_are_the_same(chat_folder):
    """20 prompts of different lengths, 50 tokens each."""
    rng, tokenizer = np.random.default_rng(0), make_tokenizer("control")
    prompts = [
        tokenizer.encode_prompt(
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "".join(rng.choice(list("abc xyz"), rng.integers(1, 60)))},
            ]
        ).tolist()
        for _ in range(20)
    ]
    expected = tsft.generate(
        load_model(chat_folder.parent / "model", dtype=jnp.float32), prompts, max_new_tokens=50, temperature=0
    )
    assert {len(answer) for answer in expected} == {50} and len({tuple(answer) for answer in expected}) > 10
    # Rows end at different places, so the prompts are padded on the left.
    width = max(map(len, prompts))
    rows = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    answers = load(chat_folder).generate(
        rows, attention_mask=mask, do_sample=False, max_new_tokens=50, eos_token_id=None, temperature=None, top_k=None
    )
    assert answers[:, width:].tolist() == expected


def test_folder_says_how_to_speak(chat_folder):
    model, tokenizer = load(chat_folder), make_tokenizer("control")
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.eot_id
    assert (model.generation_config.temperature, model.generation_config.top_k) == (0.7, 50)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert sorted(path.name for path in chat_folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_tokenizer_comes_back(chat_folder):
    description, _ = read_huggingface(chat_folder)
    assert description.chat_template == "control"
    assert description.tokenizer == {"kind": "gpt2", "bpe_ranks": 256}


@pytest.mark.parametrize("dtype, sharded", [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)])
def test_what_transformers_saves_is_read(exported, tmp_path, dtype, sharded):
    """In several files, too, and in other precisions, as far as they reach."""
    model = load(exported.folder).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors").exists() != sharded
    description, params = read_huggingface(tmp_path)
    assert description.config == exported.description.config
    rounded = jax.tree.map(lambda leaf: torch.from_numpy(leaf).to(dtype).float().numpy(), exported.params)
    jax.tree.map(np.testing.assert_array_equal, params, rounded)


def test_rows_are_reordered_head_by_head():
    rows = np.arange(8, dtype=np.float32)[:, None].repeat(8, axis=1)
    assert pairs_to_halves(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(halves_to_pairs(pairs_to_halves(rows, 1), 1), rows)


# Each: what is changed in config.json, and what the error must name.
FOREIGN = {
    "another model": ({"model_type": "llama"}, ["'llama'", "stablelm"]),
    "biases": ({"use_qkv_bias": True}, ["use_qkv_bias is True", "biases"]),
    "partial rotary, of old": ({"partial_rotary_factor": 0.25, "rope_parameters": None}, ["0.25", "rotary"]),
    "partial rotary": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["0.5"]),
    "partial rotary, unsaid": ({"partial_rotary_factor": ..., "rope_parameters": ...}, ["0.25"]),
    "scaled rotary": ({"rope_parameters": {"rope_type": "yarn", "partial_rotary_factor": 1.0}}, ["'yarn'"]),
    "scaled rotary, of old": ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, ["'linear'"]),
    "grouped heads": ({"num_key_value_heads": 1}, ["num_key_value_heads is 1, not", "grouped"]),
    "grouped heads, unsaid": ({"num_key_value_heads": ...}, ["num_key_value_heads is 32"]),
    "untied head": ({"tie_word_embeddings": False}, ["tie_word_embeddings is False", "untied head"]),
    "untied head, unsaid": ({"tie_word_embeddings": ...}, ["untied head"]),
    "parallel": ({"use_parallel_residual": True}, ["use_parallel_residual"]),
    "norms of queries": ({"qk_layernorm": True}, ["qk_layernorm"]),
    "another activation": ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
    "another epsilon": ({"layer_norm_eps": 1e-6}, ["layer_norm_eps"]),
    "quantized": ({"quantization_config": {"bits": 4}}, ["quantized"]),
    "no size": ({"hidden_size": ...}, ["hidden_size is None"]),
    "wrong size": ({"intermediate_size": 100}, ["gate_proj.weight has shape [128, 32], not [100, 32]"]),
    "fewer layers": ({"num_hidden_layers": 1}, ["unexpected: model.layers.1"]),
    "more layers": ({"num_hidden_layers": 3}, ["missing: model.layers.2"]),
    "more ids": ({"vocab_size": 300}, ["[260, 32]", "[300, 32]"]),
    "no theta": ({"rope_parameters": {"rope_theta": "x", "partial_rotary_factor": 1.0}}, ["rope_theta is 'x'"]),
}


@pytest.mark.parametrize("change", FOREIGN)
def test_another_architecture_is_refused(chat_folder, tmp_path, change):
    changes, expected = FOREIGN[change]
    folder = shutil.copytree(chat_folder, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    assert_refused(folder, expected)


TENSOR_FAULTS = {
    "a bias": ({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}, ["unexpected", "q_proj.bias"]),
    "an untied head": ({"lm_head.weight": np.ones((260, 32), np.float32)}, ["lm_head.weight differs", "untied"]),
    "integers": ({"model.norm.bias": np.ones(32, np.int32)}, ["model.norm.bias is of type I32"]),
    "with a wrapper's name and without": (
        {"model.layers.0._orig_mod.input_layernorm.bias": np.ones(32, np.float32)},
        ["model.layers.0.input_layernorm.bias occurs twice"],
    ),
    "not finite": ({"model.norm.bias": np.full(32, np.nan, np.float32)}, ["model.norm.bias has 32 values"]),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_unsound_tensors_are_refused(chat_folder, tmp_path, fault):
    changes, expected = TENSOR_FAULTS[fault]
    folder = shutil.copytree(chat_folder, tmp_path / "folder")
    save_file(load_file(folder / "model.safetensors") | changes, folder / "model.safetensors")
    assert_refused(folder, expected)


def test_a_head_that_is_stored_twice_is_no_harm(chat_folder, tmp_path):
    folder = shutil.copytree(chat_folder, tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "model.safetensors")
    assert read_huggingface(folder)[0].config == read_huggingface(chat_folder)[0].config


def test_names_of_wrappers_change_nothing(chat_folder, tmp_path):
    """transformers saves them where layers were compiled one by one."""
    model = load(chat_folder)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer)
    model.save_pretrained(tmp_path)
    assert "model.layers.0._orig_mod.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, read_huggingface(tmp_path)[1], read_huggingface(chat_folder)[1])


def test_damaged_folders_are_refused(chat_folder, tmp_path):
    folder = shutil.copytree(chat_folder, tmp_path / "folder")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert_refused(folder, ["model.safetensors", "copy it again"])
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert_refused(folder, ["pickled weights are not read"])
    for index in ("{", "[]", "{}", '{"weight_map": {"a": "../model.safetensors"}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        assert_refused(folder, ["model.safetensors.index.json"])
    (folder / "config.json").write_text("{")
    assert_refused(folder, ["config.json is not valid JSON"])
    assert not is_huggingface(folder) and not is_huggingface(tmp_path)


def test_without_safetensors_the_extra_is_named(chat_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert_refused(chat_folder, [r"pip install -e '.[hf]'"])


def assert_refused(folder: Path, expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_huggingface(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in [str(folder), *expected]:
        assert part in message
