"""Hugging Face folders: what transformers computes from them, and what comes back."""

import dataclasses
import json
import logging
import runpy
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from tiny_model import make_model_directory, make_tokenizer, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import tinysft_jax as tsft
from tinysft_jax.checkpoints import load_model, open_model
from tinysft_jax.console import UserError
from tinysft_jax.conversion.huggingface import read_huggingface, write_huggingface
from tinysft_jax.conversion.torch import read_torch_checkpoint
from tinysft_jax.data.store import PreparedData
from tinysft_jax.parameters import ModelDescription, Params, make_model
from tinysft_jax.tokenizer import ChatTokenizer
from tinysft_jax.training.state import starting_model

torch = pytest.importorskip("torch")

transformers.utils.logging.disable_progress_bar()
EMBEDDING = "model.embed_tokens.weight"


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


def test_what_comes_back_is_the_same_bits(exported, tmp_path):
    """As parameters, and as a folder that is written from a model directory."""
    description, params = read_huggingface(exported.folder)
    assert description.config == exported.description.config
    assert description.chat_template == exported.description.chat_template
    assert description.source == {"kind": "huggingface", "directory": exported.folder.name}
    jax.tree.map(np.testing.assert_array_equal, params, exported.params)
    logits = make_model(description.config, params, dtype=jnp.float32)(jnp.asarray(exported.golden["input_ids"]))
    np.testing.assert_allclose(logits, exported.golden["logits"], rtol=0, atol=2e-5)
    save_model(tmp_path / "model", params, description)
    (tmp_path / "folder").mkdir()
    write_huggingface(tmp_path / "folder", open_model(tmp_path / "model")[1], description)
    for path in (tmp_path / "folder").iterdir():
        assert path.read_bytes() == (exported.folder / path.name).read_bytes()


def test_sizes_agree_and_padding_is_not_exported(exported):
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["pad_token_id"] is config["eos_token_id"] is None  # no tokenizer is known
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


@pytest.mark.slow
def test_a_batch_is_answered_as_its_prompts_alone(tmp_path):
    """Prompts of many lengths, answers that end by themselves, and no control token, however likely."""
    description, params = open_model(make_model_directory(tmp_path / "model", "control", ends=True))
    ours, rng = make_tokenizer("control"), np.random.default_rng(0)
    params["tok_emb"]["embedding"][[ours.control_ids["<|user|>"], ours.eot_id], 0] = 3, 2.0
    (tmp_path / "folder").mkdir()
    write_huggingface(tmp_path / "folder", params, description)
    model, theirs = load(tmp_path / "folder"), AutoTokenizer.from_pretrained(tmp_path / "folder")

    def answer(chats: list) -> list[str]:
        asked = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
        prompts = theirs.apply_chat_template(chats, **asked)
        answers = model.generate(**prompts, do_sample=False, temperature=None, top_k=None, max_new_tokens=40)
        return theirs.batch_decode(answers[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)

    contents = ["a" + "".join(rng.choice(list("abc xyz"), rng.integers(1, 60))) for _ in range(20)]
    chats = [[{"role": "system", "content": "s"}, {"role": "user", "content": content}] for content in contents]
    together = answer(chats)
    assert together[:3] == [answer([chat])[0] for chat in chats[:3]]
    expected = tsft.generate(
        make_model(description.config, params, dtype=jnp.float32),
        [ours.encode_prompt(chat).tolist() for chat in chats],
        max_new_tokens=40,
        temperature=0,
        stop_ids=(ours.eot_id,),
        forbidden_ids=tuple(ours.control_ids.values()),
    )
    assert together == [ours.decode(ids) for ids in expected]
    assert len(set(map(len, together))) > 3 and len(set(together)) > 10


def test_folder_says_how_to_speak(chat_folder):
    model, tokenizer = load(chat_folder), make_tokenizer("control")
    assert model.generation_config.eos_token_id == tokenizer.eot_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.vocab_size
    assert (model.generation_config.temperature, model.generation_config.top_k) == (0.7, 50)
    assert model.config.vocab_size == tokenizer.vocab_size + 1
    assert sorted(path.name for path in chat_folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_pad_token_takes_no_probability_from_others(chat_folder):
    """Its logit is the mean of all, so its probability is at most one among as many; the others are as they were."""
    tokens = np.random.default_rng(0).integers(260, size=(4, 64), dtype=np.int32)
    expected = load_model(chat_folder.parent / "model", dtype=jnp.float32)(jnp.asarray(tokens))
    with torch.no_grad():
        logits = load(chat_folder)(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits[..., :260], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[..., 260], expected.mean(axis=-1), rtol=0, atol=1e-4)
    assert torch.from_numpy(logits).softmax(dim=-1)[..., 260].max() <= 1 / 261


def test_a_folder_of_before_the_pad_token_is_read(chat_folder, tmp_path):
    folder = shutil.copytree(chat_folder, tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {EMBEDDING: tensors[EMBEDDING][:-1]}, folder / "model.safetensors")
    for name, change in (
        ("config.json", lambda content: content.update(vocab_size=260)),
        ("tokenizer.json", lambda content: content["added_tokens"].pop()),
    ):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
    assert_same_model(folder, chat_folder)


@pytest.mark.parametrize("template, bpe_ranks, unused", [("text", 300, 3), (None, 256, 1)])
def test_a_folder_that_was_read_is_written_alike(make_folder, tmp_path, template, bpe_ranks, unused):
    """With rows above the tokenizer's vocabulary; transformers has a token for each of them."""
    folder = make_folder(template, bpe_ranks, unused)
    description, params = read_huggingface(folder)
    vocab_size = ChatTokenizer(template, bpe_ranks).vocab_size + unused
    assert description.config.vocab_size == vocab_size
    write_huggingface(tmp_path, params, description)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == load(folder).config.vocab_size == theirs.pad_token_id + 1 == vocab_size + 1


def tuned_elsewhere(folder: Path, output: Path, added: int, multiple: int | None = None) -> torch.Tensor:
    """What transformers saves after special tokens were added and rows changed; returns the table."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|added{i}|>" for i in range(added)]})
    if added or multiple:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[-1] += 1
        table[tokenizer.pad_token_id :, 0] = 9  # all that is above our ids is much likelier than anything else
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return table.detach()


@pytest.mark.parametrize("added, multiple, rows", [(0, None, 260), (2, None, 263), (0, 64, 320), (2, 64, 320)])
def test_a_folder_comes_back_with_our_tokenizer(chat_folder, tmp_path, added, multiple, rows):
    """Only the pad token's row goes, and only where it is the last."""
    table = tuned_elsewhere(chat_folder, tmp_path / "tuned", added, multiple)
    description, params = read_huggingface(tmp_path / "tuned")
    assert (description.chat_template, description.tokenizer) == ("control", {"kind": "gpt2", "bpe_ranks": 256})
    assert description.config.vocab_size == rows
    np.testing.assert_array_equal(params["tok_emb"]["embedding"][:rows], table[:rows])
    assert not params["tok_emb"]["embedding"][rows:].any()


@pytest.mark.slow
def test_a_model_with_tokens_of_others_can_be_used(chat_folder, chat_data, tmp_path, monkeypatch, capsys):
    """It fits prepared data, its own or after growing over them, and they are never drawn."""
    description, params = open_model(make_model_directory(tmp_path / "model", None))
    (tmp_path / "plain").mkdir()
    write_huggingface(tmp_path / "plain", params, description)
    for name, folder in (("chat", chat_folder), ("plain", tmp_path / "plain")):
        tuned_elsewhere(folder, tmp_path / f"tuned {name}", added=6)
        description, params = read_huggingface(tmp_path / f"tuned {name}")
        save_model(tmp_path / f"model {name}", params, description)
        start, _ = starting_model(str(tmp_path / f"model {name}"), {}, PreparedData(chat_data))
        assert start.config.vocab_size == description.config.vocab_size > 264

    script = Path(__file__).parents[2] / "sample.py"
    flags = [f"--checkpoint={tmp_path / 'model chat'}", "--prompt=Hi", "--max_new_tokens=8", "--temperature=0"]
    monkeypatch.setattr(sys, "argv", [str(script), *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and len(capsys.readouterr().out.strip()) == 8


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


# Each: what is changed in config.json, and what the error must name.
FOREIGN = {
    "another model": ({"model_type": "gpt_neox"}, ["'gpt_neox'", "stablelm"]),
    "another family": ({"model_type": "llama"}, ["unexpected: model.layers.0.input_layernorm.bias"]),
    "biases": ({"use_qkv_bias": True}, ["missing: model.layers.0.self_attn.q_proj.bias"]),
    "partial rotary, of old": ({"partial_rotary_factor": 0.25, "rope_parameters": None}, ["0.25", "rotary"]),
    "partial rotary": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["0.5"]),
    "partial rotary, unsaid": ({"partial_rotary_factor": ..., "rope_parameters": ...}, ["0.25"]),
    "scaled rotary": ({"rope_parameters": {"rope_type": "yarn", "partial_rotary_factor": 1.0}}, ["'yarn'"]),
    "scaled rotary, of old": ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, ["'linear'"]),
    "grouped heads": ({"num_key_value_heads": 1}, ["k_proj.weight has shape [32, 32], not [16, 32]"]),
    "grouped heads, unsaid": ({"num_key_value_heads": ...}, ["n_heads 2 is not divisible by model.n_kv_heads 32"]),
    "untied head": ({"tie_word_embeddings": False}, ["missing: lm_head.weight"]),
    "untied head, unsaid": ({"tie_word_embeddings": ...}, ["missing: lm_head.weight"]),
    "parallel": ({"use_parallel_residual": True}, ["use_parallel_residual"]),
    "norms of queries": ({"qk_layernorm": True}, ["qk_layernorm"]),
    "another activation": ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
    "another epsilon": ({"layer_norm_eps": -1e-5}, ["layer_norm_eps is -1e-05, not a positive number"]),
    "quantized": ({"quantization_config": {"bits": 4}}, ["quantized"]),
    "no size": ({"hidden_size": ...}, ["hidden_size is None"]),
    "wrong size": ({"intermediate_size": 100}, ["gate_proj.weight has shape [128, 32], not [100, 32]"]),
    "fewer layers": ({"num_hidden_layers": 1}, ["unexpected: model.layers.1"]),
    "more layers": ({"num_hidden_layers": 3}, ["missing: model.layers.2"]),
    "more ids": ({"vocab_size": 300}, ["[261, 32]", "[300, 32]"]),
    "vast size": ({"hidden_size": 10**400}, ["hidden_size is a number of over 100 digits"]),
    "vast theta": (
        {"rope_parameters": {"rope_theta": 10**400, "partial_rotary_factor": 1.0}},
        ["rope_theta is a number of over 100 digits"],
    ),
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
    "an untied head": ({"lm_head.weight": np.ones((261, 32), np.float32)}, ["lm_head.weight differs", "untied"]),
    "integers": ({"model.norm.bias": np.ones(32, np.int32)}, ["model.norm.bias is I32; only F64, F32, F16, BF16"]),
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
    save_file(tensors | {"lm_head.weight": tensors[EMBEDDING]}, folder / "model.safetensors")
    assert_same_model(folder, chat_folder)


def test_names_of_wrappers_change_nothing(chat_folder, tmp_path):
    """transformers saves them where layers were compiled one by one."""
    model, folder = load(chat_folder), shutil.copytree(chat_folder, tmp_path / "folder")
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer)
    model.save_pretrained(folder)
    assert "model.layers.0._orig_mod.mlp.up_proj.weight" in load_file(folder / "model.safetensors")
    assert_same_model(folder, chat_folder)


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


def test_without_safetensors_the_extra_is_named(chat_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert_refused(chat_folder, [r"pip install -e '.[hf]'"])


def assert_same_model(folder: Path, other: Path) -> None:
    (description, params), (wanted, wanted_params) = read_huggingface(folder), read_huggingface(other)
    assert dataclasses.replace(description, source={}) == dataclasses.replace(wanted, source={})
    jax.tree.map(np.testing.assert_array_equal, params, wanted_params)


def assert_refused(folder: Path, expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_huggingface(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in [str(folder), *expected]:
        assert part in message
