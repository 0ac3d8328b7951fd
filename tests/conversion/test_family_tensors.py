"""Tensors of a family's folder that are not what its `config.json` says."""

import json
import shutil
import time
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
import pytest
from families import FAMILIES, Made, hostile, random_model, save
from safetensors.numpy import load_file, save_file
from tiers import slow

from tinysft_jax.console import UserError
from tinysft_jax.conversion.huggingface import read_huggingface
from tinysft_jax.parameters import model_parameter_shapes


def changed(made: Made, folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    """A copy of a folder with other tensors (None: without one), and other entries in its `config.json`."""
    shutil.copytree(made.folder, folder)
    kept = {name: tensor for name, tensor in (load_file(made.folder / "model.safetensors") | tensors).items()}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


ROW = np.ones(32, np.float32)
ATTENTION = "model.layers.0.self_attn"
TENSOR_FAULTS = {
    "no head": ("llama", {"lm_head.weight": None}, {}, ["missing: lm_head.weight"]),
    "tied, by its config": ("llama", {}, {"tie_word_embeddings": True}, ["lm_head.weight differs", "untied"]),
    "untied, by its config": ("qwen2", {}, {"tie_word_embeddings": False}, ["missing: lm_head.weight"]),
    "no bias": ("qwen2", {f"{ATTENTION}.k_proj.bias": None}, {}, [f"missing: {ATTENTION}.k_proj.bias"]),
    "a bias too many": ("qwen2", {f"{ATTENTION}.o_proj.bias": ROW}, {}, [f"unexpected: {ATTENTION}.o_proj.bias"]),
    "no norm": ("qwen3", {f"{ATTENTION}.q_norm.weight": None}, {}, [f"missing: {ATTENTION}.q_norm.weight"]),
    "another family": ("qwen2", {}, {"model_type": "llama"}, ["unexpected:", "q_proj.bias"]),
    "fewer heads of keys": (
        "llama",
        {},
        {"num_key_value_heads": 1},
        ["k_proj.weight has shape [32, 32], not [16, 32]"],
    ),
    "a short bias": ("qwen2", {f"{ATTENTION}.v_proj.bias": ROW[:2]}, {}, ["v_proj.bias has shape [2], not [8]"]),
    "a wide head": (
        "llama",
        {"lm_head.weight": np.ones((98, 32), np.float32)},
        {},
        ["lm_head.weight has shape [98, 32], not [97, 32]"],
    ),
    "beyond float32": ("llama", {"model.norm.weight": np.full(32, 1e300)}, {}, ["32 values that are not finite"]),
    "a name of two lines": ("llama", {"a\nb": ROW}, {}, [r"unexpected: 'a\nb'"]),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_that_are_not_the_models_are_refused(make_family, tmp_path, fault):
    case, tensors, config, expected = TENSOR_FAULTS[fault]
    folder = changed(make_family(case), tmp_path / "folder", tensors, **config)
    with pytest.raises(UserError) as caught:
        read_huggingface(folder)
    assert "\n" not in str(caught.value)
    for part in [str(folder), *expected]:
        assert part in str(caught.value)


def test_what_old_files_hold_besides_is_no_harm(make_family, tmp_path):
    """Rotary frequencies, and a tied head."""
    made = make_family("qwen2")
    table = load_file(made.folder / "model.safetensors")["model.embed_tokens.weight"]
    tensors = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": ROW[:4] for i in range(2)}
    _, params = read_huggingface(changed(made, tmp_path / "folder", tensors | {"lm_head.weight": table}))
    jax.tree.map(np.testing.assert_array_equal, params, made.params)


def test_a_missing_shard_is_named(make_family, tmp_path):
    save(random_model("llama"), tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002-of-*.safetensors")).rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"names 'model-00002-of-.*', which is not there; copy the folder again"):
        read_huggingface(tmp_path)


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["num_key_value_heads", "head_dim"]


def assert_refused_at_once(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        within_limits(read_huggingface, folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 3000


def within_limits(act, *arguments):
    """Calls a function, which must take neither time nor memory."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        return act(*arguments)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100 << 20 and time.perf_counter() - start < 5


@pytest.mark.parametrize("key", SIZES)
def test_a_size_beyond_all_measure_costs_nothing(make_family, tmp_path, key):
    made = make_family("llama")
    for size in (2**30, 2**31 - 2):
        assert_refused_at_once(changed(made, tmp_path / f"{size}", {}, **{key: size}))
    sizes = dict.fromkeys(SIZES, 2**30)
    assert_refused_at_once(changed(made, tmp_path / "all", {}, **sizes))


@pytest.mark.parametrize("family", slow(*FAMILIES))
def test_hostile_folders(make_family, tmp_path, family):
    """Fifty of each family are refused in one line, or hold the model that they say."""
    made, refused = make_family(family), 0
    config = json.loads((made.folder / "config.json").read_text())
    weights = (made.folder / "model.safetensors").read_bytes()
    for seed in range(50):
        content, damaged = hostile(Random(f"{family} {seed}"), config, weights)
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "model.safetensors").write_bytes(damaged)
        try:
            description, params = within_limits(read_huggingface, tmp_path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 3000
            continue
        shapes = jax.tree.map(lambda leaf: leaf.shape, model_parameter_shapes(description.config))
        assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    assert 25 < refused < 50
