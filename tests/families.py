"""Tiny random models of the families that are read, made by transformers, and folders that lie about them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask a server

import copy
import itertools
import json
import struct
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from tinysft_jax.conversion.huggingface import read_huggingface  # noqa: E402
from tinysft_jax.parameters import ModelDescription, Params  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 2000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Epsilons so large that a wrong one shows.
_OWN = {
    "llama": {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "qwen2": {"rms_norm_eps": 1e-2},
    "qwen3": {"rms_norm_eps": 1e-2},
    "stablelm": {"layer_norm_eps": 1e-2, "partial_rotary_factor": 1.0},
}


def random_model(family: str, kv_heads: int = 2, **changes: Any) -> "torch.nn.Module":
    """A float32 model in which every weight, bias and norm is random."""
    transformers.utils.logging.disable_progress_bar()
    settings = _SHAPE | _OWN[family] | {"num_key_value_heads": kv_heads} | changes
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As large as lets every parameter matter, and not so large that round-off grows from layer to layer.
            scale = 0.2 if name.startswith("model.norm.") else 0.5 if name.endswith(".bias") else 1.0
            if "layers" in name and parameter.ndim == 2:
                scale = 1.8 / parameter.shape[1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def save(model: "torch.nn.Module", folder: Path, dtype: str = "float32", **options: Any) -> Path:
    model.to(getattr(torch, dtype)).save_pretrained(folder, **options)
    return folder


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

    model: "torch.nn.Module"
    folder: Path
    description: ModelDescription
    params: Params


def make(case: str, folder: Path) -> Made:
    family, changes = (CASES | MORE)[case]
    model = random_model(family, **changes)
    return Made(model, save(model, folder), *read_huggingface(folder))


HOSTILE_VALUES = [-1, 0, 1, 2, 3, 8, 2.5, 2**30, 2**31 - 1, 2**31, 2**63, 10**400, 1e308, 5e-324, -0.0, float("nan")]
HOSTILE_VALUES += [float("inf"), True, False, None, "8", "\ud800\n", [], [1], {}, {"a": 1}, {"rope_type": "llama3"}]


def hostile(draw: Random, config: dict[str, Any], weights: bytes) -> tuple[str, bytes]:
    """A folder's `config.json` that lies about its tensors, or `model.safetensors` that was damaged or lies itself."""
    (length,) = struct.unpack("<Q", weights[:8])
    header, data = weights[8 : 8 + length], weights[8 + length :]
    kind = draw.choice(["config", "config", "config", "cut", "bits", "header", "length"])
    if kind == "config":
        config = copy.deepcopy(config)
        for _ in range(draw.randint(1, 2)):
            inner = draw.choice([config, config, *(value for value in config.values() if isinstance(value, dict))])
            key = draw.choice(sorted(inner) or ["rope_theta"])
            inner[key] = copy.deepcopy(draw.choice([*HOSTILE_VALUES, draw.randint(1, 300)]))
            if draw.random() < 0.1:
                del inner[key]
    elif kind == "cut":
        weights = weights[: draw.randrange(len(weights))]
    elif kind == "bits":
        changed = bytearray(weights)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(8 + length)] ^= 1 << draw.randrange(8)
        weights = bytes(changed)
    elif kind == "header":
        tensors = json.loads(header)
        entry = tensors[draw.choice(sorted(tensors.keys() - {"__metadata__"}))]
        choices: dict[str, Any] = {
            "dtype": draw.choice(["F32", "F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "C64", "F99"]),
            "shape": [draw.choice([0, 1, 32, 2**31, 2**62]) for _ in range(draw.randint(0, 3))],
            "data_offsets": [draw.choice([0, 4, 2**62]), draw.choice([0, 4, len(data), 2**63])],
        }
        key = draw.choice(sorted(choices))
        entry[key] = choices[key]
        header = json.dumps(tensors).encode()
        weights = struct.pack("<Q", len(header)) + header + data
    else:
        weights = struct.pack("<Q", draw.choice([0, 1, length - 1, 2**40, 2**64 - 1])) + weights[8:]
    return json.dumps(config), weights
