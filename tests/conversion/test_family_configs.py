"""What a family's `config.json` may say, and what is refused by name."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from families import LLAMA3

from tinysft_jax.console import UserError
from tinysft_jax.conversion.families import family_of, read_config
from tinysft_jax.conversion.huggingface import write_huggingface
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.parameters import ModelDescription, model_parameter_shapes


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
    "no epsilon": ("qwen2", {"rms_norm_eps": 0}, ["rms_norm_eps is 0"]),
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
