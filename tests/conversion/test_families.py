"""Models of Hugging Face's families: what transformers computes from a folder is what comes out here, and back."""

import dataclasses
import itertools
import json
import shutil
import time
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import LLAMA3, hostile, random_model, save
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiers import slow
from tiny_model import save_model

import tinysft_jax as tsft
from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import UserError
from tinysft_jax.conversion.families import family_of, read_config
from tinysft_jax.conversion.huggingface import read_huggingface, rounded, write_huggingface
from tinysft_jax.conversion.names import huggingface_layout
from tinysft_jax.conversion.parity import measure_parity
from tinysft_jax.model import GPTConfig
from tinysft_jax.parameters import ModelDescription, Params, make_model, model_parameter_shapes, trim_vocabulary

torch = pytest.importorskip("torch")

FAMILIES = ("llama", "qwen2", "qwen3", "stablelm")
# Name → family and what differs from `random_model`'s own.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {"kv_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    f"{family}, {kv_heads} heads of keys{', tied' * tied}": (
        family,
        {"kv_heads": kv_heads, "tie_word_embeddings": tied},
    )
    for family, kv_heads, tied in itertools.product(FAMILIES, (1, 2, 4), (False, True))
}
MORE |= {f"{family}, scaled": (family, {"rope_parameters": LLAMA3}) for family in ("qwen2", "qwen3")}
MORE |= {
    "llama, default rotation": ("llama", {"rope_parameters": None}),
    "qwen2, large heads": ("qwen2", {"head_dim": 24}),
    "stablelm, scaled": ("stablelm", {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 1.0}}),
    "three layers": ("llama", {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 37}),
}


class Made(NamedTuple):
    """A random model of transformers, the folder that it saved, and what is read from it."""

    model: torch.nn.Module
    folder: Path
    description: ModelDescription
    params: Params


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    made: dict[str, Made] = {}

    def get(case: str) -> Made:
        if case not in made:
            family, changes = (CASES | MORE)[case]
            model = random_model(family, **changes)
            folder = save(model, tmp_path_factory.mktemp("folder"))
            made[case] = Made(model, folder, *read_huggingface(folder))
        return made[case]

    return get


def tokens_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(97, size=shape, dtype=np.int32)


@pytest.mark.parametrize("case", [*CASES, *slow(*MORE)])
def test_logits_and_gradients_are_those_of_transformers(make, case):
    made, tokens = make(case), tokens_of(2, 64)
    config = made.description.config
    inputs = torch.from_numpy(tokens).long()
    made.model.zero_grad()
    theirs = made.model(inputs, labels=inputs)  # the mean of the cross-entropy of each next token
    theirs.loss.backward()

    graph, _ = nnx.split(make_model(config, made.params, dtype=jnp.float32))

    def loss(params, tokens):
        logits = nnx.merge(graph, params)(tokens)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean(), logits

    params = jax.tree.map(jnp.asarray, made.params)
    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, theirs.logits.detach().numpy(), rtol=0, atol=1e-4)
    assert np.ptp(logits) > 5, "not so small that any would be close"
    assert float(value) == pytest.approx(theirs.loss.item(), abs=1e-5)

    grads = trim_vocabulary(jax.tree.map(np.asarray, grads), config)
    views = huggingface_layout(config).views(grads, config.n_layers)
    expected = {name: parameter.grad.numpy() for name, parameter in made.model.named_parameters()}
    assert views.keys() == expected.keys()
    for name, view in views.items():
        largest = np.abs(expected[name]).max()
        assert largest > 0
        np.testing.assert_allclose(view, expected[name], rtol=0, atol=1e-4 * largest, err_msg=name)


@pytest.mark.parametrize("case", [*CASES, *slow(*MORE)])
def test_greedy_tokens_are_those_of_transformers(make, case):
    made, prompts = make(case), tokens_of(4, 8)
    model = make_model(made.description.config, made.params, dtype=jnp.float32)
    ours = tsft.generate(model, prompts.tolist(), max_new_tokens=50, temperature=0)
    inputs = torch.from_numpy(prompts).long()
    theirs = made.model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=50, pad_token_id=0
    )
    assert ours == theirs[:, 8:].tolist()
    assert {len(ids) for ids in ours} == {50} and len({id for ids in ours for id in ids}) > 5


def rewrite(folder: Path, tmp_path: Path, dtype: str = "float32") -> Path:
    """Folder → model directory → folder."""
    description, params = read_huggingface(folder)
    save_model(tmp_path / "model", params, description)
    description, params = open_model(tmp_path / "model")
    (tmp_path / "folder").mkdir()
    write_huggingface(tmp_path / "folder", params, description, dtype)
    return tmp_path / "folder"


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("case", ["llama", *slow("qwen2", "qwen3", "stablelm", *MORE)])
def test_a_folder_comes_back_bit_by_bit(make, tmp_path, case):
    made = make(case)
    back = rewrite(made.folder, tmp_path)
    assert_same_bits(load_file(back / "model.safetensors"), load_file(made.folder / "model.safetensors"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (made.folder, back))
    assert (after["architectures"], after["model_type"]) == (before["architectures"], before["model_type"])
    assert read_config(after) == read_config(before) == made.description.config
    # Its config.json says the same to transformers, of this version and of those that know no rope_parameters.
    model = make_model(made.description.config, made.params, dtype=jnp.float32)
    assert measure_parity(model, back).holds
    del after["rope_parameters"]
    (back / "config.json").write_text(json.dumps(after))
    assert measure_parity(model, back).holds
    assert read_config(after) == made.description.config


@pytest.mark.parametrize("case", [*FAMILIES[:1], *slow(*FAMILIES[1:])])
def test_a_folder_in_bfloat16_comes_back_bit_by_bit(case, tmp_path):
    """In several files."""
    family, changes = CASES[case]
    folder = save(random_model(family, **changes), tmp_path / "source", "bfloat16", max_shard_size="20KB")
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    assert len(shards) > 1 and not (folder / "model.safetensors").exists()
    back = rewrite(folder, tmp_path, "bfloat16")
    assert_same_bits(load_file(back / "model.safetensors"), {name: each[name] for each in shards for name in each})
    content = json.loads((back / "config.json").read_text())
    assert content["dtype"] == content["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["qwen2", *slow("llama", "qwen3", "stablelm")])
def test_a_folder_in_float16_is_read_exactly(case, tmp_path):
    family, changes = CASES[case]
    folder = save(random_model(family, **changes), tmp_path / "source", "float16")
    theirs, ours = (load_file(each / "model.safetensors") for each in (folder, rewrite(folder, tmp_path)))
    assert_same_bits({name: tensor.astype(np.float32) for name, tensor in theirs.items()}, ours)


@pytest.mark.parametrize("case", ["qwen3", *slow("llama", "qwen2", "stablelm")])
def test_what_is_written_in_bfloat16_is_the_rounded_model(make, tmp_path, case):
    made = make(case)
    write_huggingface(tmp_path, made.params, made.description, "bfloat16")
    params = rounded(made.params, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, read_huggingface(tmp_path)[1], params)
    config = made.description.config
    assert measure_parity(make_model(config, params, dtype=jnp.float32), tmp_path).holds
    assert not measure_parity(make_model(config, made.params, dtype=jnp.float32), tmp_path).holds


# config.json


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """What transformers writes; `...` leaves a key out."""
    content = {
        "llama": {"model_type": "llama", "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False},
        "qwen2": {"model_type": "qwen2", "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 4096},
        "qwen3": {"model_type": "qwen3", "rms_norm_eps": 1e-6, "head_dim": 16, "attention_bias": False},
        "stablelm": {"model_type": "stablelm", "layer_norm_eps": 1e-5, "partial_rotary_factor": 1.0},
    }[family] | {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 5e5,
    }
    return {key: value for key, value in (content | changes).items() if value is not ...}


SCALED = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
# Each: family, what is changed, and what the error must name.
REFUSED = {
    "another type": ("llama", {"model_type": "mistral"}, ["'mistral'", "llama, qwen2, qwen3"]),
    "a mixture by type": ("qwen2", {"model_type": "qwen2_moe"}, ["'qwen2_moe'"]),
    "no type": ("llama", {"model_type": ["llama"]}, ["['llama']"]),
    "experts": ("llama", {"num_local_experts": 8}, ["num_local_experts is 8", "mixture of experts"]),
    "experts of Qwen": ("qwen3", {"num_experts": 8}, ["num_experts is 8", "mixture of experts"]),
    "llama biases": ("llama", {"attention_bias": True}, ["attention_bias is True", "biases"]),
    "llama MLP biases": ("llama", {"mlp_bias": True}, ["mlp_bias is True", "biases"]),
    "qwen3 biases": ("qwen3", {"attention_bias": True}, ["attention_bias is True", "biases"]),
    "qwen2 window": ("qwen2", {"use_sliding_window": True}, ["use_sliding_window is True", "sliding windows"]),
    "qwen3 window": ("qwen3", {"use_sliding_window": True}, ["use_sliding_window is True", "sliding windows"]),
    "llama window": ("llama", {"sliding_window": 4096}, ["sliding_window is 4096", "sliding windows"]),
    "windowed layers": (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        ["layer_types", "'sliding_attention'"],
    ),
    "layer types that are none": ("qwen3", {"layer_types": 7}, ["layer_types are 7"]),
    "activation": ("llama", {"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "another activation"]),
    "quantized": ("qwen2", {"quantization_config": {"bits": 4}}, ["quantization_config", "quantized"]),
    "partial rotation": ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
    "partial rotation, new": ("qwen3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["factor is 0.5"]),
    "partial rotation by default": ("stablelm", {"partial_rotary_factor": ...}, ["partial_rotary_factor is 0.25"]),
    **{
        f"{kind}, {key}": ("llama", {key: {"rope_type": kind, "factor": 2.0}}, [f"type {kind!r}, not 'default'"])
        for kind in ("linear", "dynamic", "yarn", "longrope")
        for key in ("rope_scaling", "rope_parameters")
    },
    "linear, of old": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["type 'linear'"]),
    "by layer": ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["'full_attention' alone"]),
    "rotation that is none": ("llama", {"rope_scaling": [1]}, ["not an object"]),
    "scaling without a factor": ("llama", {"rope_scaling": SCALED | {"factor": None}}, ["factor is None, not a posi"]),
    "scaling upside down": ("llama", {"rope_scaling": SCALED | {"low_freq_factor": 4}}, ["not below high_freq_factor"]),
    "parallel": ("stablelm", {"use_parallel_residual": True}, ["use_parallel_residual is True", "parallel"]),
    "stablelm's norms": ("stablelm", {"qk_layernorm": True}, ["qk_layernorm is True", "norms of queries"]),
    "stablelm's head size": ("stablelm", {"head_dim": 32}, ["head_dim is 32, not hidden_size / num_attention_heads"]),
    "theta": ("llama", {"rope_theta": "x"}, ["rope_theta is 'x'"]),
    "epsilon": ("llama", {"rms_norm_eps": float("nan")}, ["rms_norm_eps is nan, not a positive number"]),
    "no epsilon": ("qwen2", {"rms_norm_eps": 0}, ["rms_norm_eps is 0.0"]),
    "tied, or": ("qwen2", {"tie_word_embeddings": "yes"}, ["tie_word_embeddings is 'yes', not true or false"]),
    "no size": ("qwen2", {"hidden_size": ...}, ["hidden_size is None"]),
    "heads": ("qwen2", {"num_key_value_heads": 3}, ["n_heads 4 is not divisible by model.n_kv_heads 3"]),
    "odd heads": ("llama", {"head_dim": 15}, ["head size 15", "odd"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_model_does_not_do_is_refused_by_name(case):
    family, changes, expected = REFUSED[case]
    with pytest.raises(UserError) as caught:
        read_config(config_of(family, **changes))
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


# Each: family, what is changed, and what of the shape is then what: the same as to transformers.
READ = {
    "plain": ("llama", {}, {"norm": "rms", "rope_theta": 5e5, "n_kv_heads": 2, "head_dim": 16, "norm_epsilon": 1e-5}),
    "defaults of llama": (
        "llama",
        dict.fromkeys(["num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings"], ...),
        {"n_kv_heads": 4, "norm_epsilon": 1e-6, "rope_theta": 10000.0, "max_seq_len": 2048},
    ),
    "defaults of qwen3": ("qwen3", {"head_dim": ..., "rms_norm_eps": ...}, {"head_dim": 128, "norm_epsilon": 1e-6}),
    "defaults of stablelm": ("stablelm", {"layer_norm_eps": ...}, {"norm_epsilon": 1e-5, "qkv_bias": False}),
    "all heads": ("qwen2", {"num_key_value_heads": None}, {"n_kv_heads": 4, "qkv_bias": True}),
    "tied by default": ("llama", {"tie_word_embeddings": ...}, {"tied_head": False}),
    "scaled, of old": ("llama", {"rope_scaling": SCALED}, {"rope_theta": 5e5}),
    "scaled, new": ("llama", {"rope_parameters": LLAMA3, "rope_theta": ...}, {"rope_theta": 2000.0}),
    "scaled, both": ("llama", {"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": SCALED}, {"rope_theta": 5e5}),
    "a whole number": ("llama", {"rope_theta": 500000}, {"rope_theta": 5e5}),
    "no harm": ("llama", {"pretraining_tp": 4, "sliding_window": None, "attention_dropout": 0.1}, {"qkv_bias": False}),
    "layers": ("qwen2", {"layer_types": ["full_attention"] * 2}, {"n_layers": 2}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}, {"qkv_bias": True, "norm": "layer", "tied_head": False}),
}


@pytest.mark.parametrize("case", READ)
def test_what_a_config_says_is_what_transformers_takes_it_for(case):
    import transformers

    family, changes, expected = READ[case]
    content = config_of(family, **changes)
    config = read_config(content)
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.rope_scaling is not None) == case.startswith("scaled")
    theirs = transformers.AutoConfig.for_model(**content)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("llama3" if config.rope_scaling else "default")
    assert theirs.num_key_value_heads == config.n_kv_heads and theirs.tie_word_embeddings == config.tied_head
    assert (getattr(theirs, "head_dim", None) or 16) == config.head_dim
    assert theirs.max_position_embeddings == config.max_seq_len
    assert (theirs.layer_norm_eps if family == "stablelm" else theirs.rms_norm_eps) == config.norm_epsilon


def test_the_original_context_is_the_context_if_nothing_is_said():
    scaling = {key: value for key, value in SCALED.items() if key != "original_max_position_embeddings"}
    assert read_config(config_of("llama", rope_scaling=scaling)).rope_scaling.original_max_seq_len == 256


CONFIG = GPTConfig(vocab_size=97, dim=32, n_layers=1, n_heads=4, norm="rms")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "llama"),
        ({"head_dim": 16}, "llama"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"norm": "layer", "qkv_bias": True}, "stablelm"),
        ({"qkv_bias": True, "qk_norm": True}, None),
        ({"norm": "layer", "qk_norm": True}, None),
        ({"norm": "layer", "head_dim": 16}, None),
    ],
)
def test_the_family_follows_from_the_shape(changes, expected, tmp_path):
    config = dataclasses.replace(CONFIG, **changes)
    if expected:
        assert family_of(config) == expected
    else:
        params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), model_parameter_shapes(config))
        with pytest.raises(UserError, match=r"no model of Hugging Face's .* has norm=.*qk_norm=.* together"):
            write_huggingface(tmp_path, params, ModelDescription(config, None, None, {}))


# Tensors


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
def test_tensors_that_are_not_the_models_are_refused(make, tmp_path, fault):
    case, tensors, config, expected = TENSOR_FAULTS[fault]
    folder = changed(make(case), tmp_path / "folder", tensors, **config)
    with pytest.raises(UserError) as caught:
        read_huggingface(folder)
    assert "\n" not in str(caught.value)
    for part in [str(folder), *expected]:
        assert part in str(caught.value)


def test_what_old_files_hold_besides_is_no_harm(make, tmp_path):
    """Rotary frequencies, and a tied head."""
    made = make("qwen2")
    table = load_file(made.folder / "model.safetensors")["model.embed_tokens.weight"]
    tensors = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": ROW[:4] for i in range(2)}
    _, params = read_huggingface(changed(made, tmp_path / "folder", tensors | {"lm_head.weight": table}))
    jax.tree.map(np.testing.assert_array_equal, params, made.params)


def test_a_missing_shard_is_named(make, tmp_path):
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
def test_a_size_beyond_all_measure_costs_nothing(make, tmp_path, key):
    made = make("llama")
    for size in (2**30, 2**31 - 2):
        assert_refused_at_once(changed(made, tmp_path / f"{size}", {}, **{key: size}))
    sizes = dict.fromkeys(SIZES, 2**30)
    assert_refused_at_once(changed(made, tmp_path / "all", {}, **sizes))


@pytest.mark.parametrize("family", slow(*FAMILIES))
def test_hostile_folders(make, tmp_path, family):
    """Fifty of each family are refused in one line, or hold the model that they say."""
    made, refused = make(family), 0
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
