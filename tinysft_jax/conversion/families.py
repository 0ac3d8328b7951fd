"""The model families of Hugging Face that this package's GPT can be, and what their `config.json` says of a model."""

import dataclasses
from typing import Any, NamedTuple

from tinysft_jax.console import UserError, shown
from tinysft_jax.conversion.names import mlp_ratio
from tinysft_jax.gpt_config import LARGEST_SIZE, GPTConfig, RopeScaling


class Family(NamedTuple):
    """What the models of a family have in common."""

    architecture: str
    traits: dict[str, Any]  # fields of a GPTConfig, the same in all models of the family
    keys: dict[str, str]  # further fields → keys in config.json
    defaults: dict[str, Any]  # what transformers assumes where a file leaves a key out
    # Key → the value (also where a file leaves it out) with which the model is this package's GPT, and what another one
    # means. None is not written.
    fixed: dict[str, tuple[Any, str]]


_BIASES = "biases in every part of its attention"
_WINDOW = "attention within sliding windows"
# Of all families; `hidden_dim` becomes `mlp_ratio`.
_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
    "n_kv_heads": "num_key_value_heads",
    "tied_head": "tie_word_embeddings",
}
_FIXED = {
    "hidden_act": ("silu", "another activation"),
    "quantization_config": (None, "it is quantized; convert the model that was quantized"),
    "num_experts": (None, "a mixture of experts"),
    "num_local_experts": (None, "a mixture of experts"),
}
_RMS_KEYS = {"head_dim": "head_dim", "norm_epsilon": "rms_norm_eps"}
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
FAMILIES = {
    "stablelm": Family(
        "StableLmForCausalLM",
        {"norm": "layer", "qk_norm": False},
        {"qkv_bias": "use_qkv_bias", "norm_epsilon": "layer_norm_eps"},
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-5,
            "use_qkv_bias": False,
            "partial_rotary_factor": 0.25,
        },
        {
            "qk_layernorm": (False, "norms of queries and keys with a weight for each head"),
            "use_parallel_residual": (False, "attention and MLP in parallel"),
            "sliding_window": (None, _WINDOW),
        },
    ),
    "llama": Family(
        "LlamaForCausalLM",
        {"norm": "rms", "qkv_bias": False, "qk_norm": False},
        _RMS_KEYS,
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
        {
            "attention_bias": (False, _BIASES),
            "mlp_bias": (False, "biases in its MLP"),
            "sliding_window": (None, _WINDOW),
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"norm": "rms", "qkv_bias": True, "qk_norm": False},
        _RMS_KEYS,
        _QWEN_DEFAULTS,
        {"use_sliding_window": (False, _WINDOW)},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"norm": "rms", "qkv_bias": False, "qk_norm": True},
        _RMS_KEYS,
        _QWEN_DEFAULTS | {"head_dim": 128},
        {"attention_bias": (False, _BIASES), "use_sliding_window": (False, _WINDOW)},
    ),
}
_SCALING = {  # fields of a RopeScaling → keys
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
_WORDS = {int: "a positive integer below 2^31", float: "a positive number below 2^31", bool: "true or false"}
_TYPES = {field.name: field.type for each in (GPTConfig, RopeScaling) for field in dataclasses.fields(each)}
_TYPES["hidden_dim"] = int


def family_of(config: GPTConfig) -> str:
    """The `model_type` that a model of this shape has. Raises: UserError, if there is none."""
    for model_type, family in FAMILIES.items():
        fits = "head_dim" in family.keys or config.head_dim * config.n_heads == config.dim
        if fits and all(getattr(config, field) == value for field, value in family.traits.items()):
            return model_type
    parts = ("norm", "qkv_bias", "qk_norm", "dim", "n_heads", "head_dim")
    raise UserError(
        f"no model of Hugging Face's {', '.join(FAMILIES)} has "
        f"{', '.join(f'{part}={getattr(config, part)!r}' for part in parts)} together; it can stay a model directory"
    )


def write_config(config: GPTConfig, dtype: str) -> dict[str, Any]:
    """What `config.json` says of a model whose tensors are of this dtype. Raises: UserError, if no family has it."""
    model_type = family_of(config)
    family, scaling = FAMILIES[model_type], {}
    rope: dict[str, Any] = {"rope_theta": config.rope_theta}
    if "partial_rotary_factor" in family.defaults:
        rope["partial_rotary_factor"] = 1.0
    if config.rope_scaling:
        scaling = {key: getattr(config.rope_scaling, field) for field, key in _SCALING.items()}
    kind = {"rope_type": "llama3" if scaling else "default"}
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        **{key: getattr(config, field) for field, key in (_KEYS | family.keys).items()},
        **{key: value for key, (value, _) in (family.fixed | _FIXED).items() if value is not None},
        **rope,  # read by transformers before version 5, with rope_scaling
        **({"rope_scaling": kind | scaling} if scaling else {}),
        "rope_parameters": kind | rope | scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def read_config(content: dict[str, Any]) -> GPTConfig:
    """The shape of the model that a `config.json` describes. Raises: UserError, saying what is not this package's."""
    model_type = content.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(
            f"it is a model of type {shown(model_type)}; this program's GPT can be of the types {', '.join(FAMILIES)}"
        )
    for key, (wanted, meaning) in (family.fixed | _FIXED).items():
        if (value := content.get(key)) not in (None, wanted):
            raise UserError(f"its {key} is {shown(value)}, not {wanted!r}: {meaning}")
    kinds = content.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"its layer_types are {shown(kinds)}; only full_attention is known")
    stated = {"tie_word_embeddings": False, "num_key_value_heads": None, "head_dim": None} | family.defaults | content
    fields = {field: _read(stated, key, _TYPES[field]) for field, key in (_KEYS | family.keys).items()}
    hidden_dim, theta, scaling = fields.pop("hidden_dim"), *_read_rope(stated)
    ratio = mlp_ratio(fields["dim"], hidden_dim)
    config = GPTConfig(**family.traits, **fields, mlp_ratio=ratio, rope_theta=theta, rope_scaling=scaling)
    if stated["head_dim"] not in (None, config.head_dim):
        raise UserError(f"its head_dim is {shown(stated['head_dim'])}, not hidden_size / num_attention_heads")
    return config


def _read(content: dict[str, Any], key: str, kind: type) -> Any:
    """A number above zero, or a truth value. Where null stands for what GPTConfig calls 0, that."""
    value = content.get(key)
    if value is None and key in ("num_key_value_heads", "head_dim"):
        return 0
    is_kind = type(value) is kind or (kind is float and type(value) is int)
    if not is_kind or not (kind is bool or 0 < value <= LARGEST_SIZE):
        raise UserError(f"its {key} is {shown(value)}, not {_WORDS[kind]}")
    return value


def _read_rope(content: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Raises: UserError, if rotary positions are partial, or scaled in another way than Llama 3's."""
    # transformers 5 writes rope_parameters; before, scaling was in rope_scaling and the rest on the top level. Where a
    # file has both, transformers reads rope_scaling, too.
    parts = [content.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError("its rope_parameters or rope_scaling is not an object")
    rope = parts[0] or parts[1]
    if differing := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise UserError(f"its rope_parameters are for {shown(differing[0])} alone, not for all layers")
    content = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0} | content | rope
    if (factor := content["partial_rotary_factor"]) != 1:
        raise UserError(f"its partial_rotary_factor is {shown(factor)}, not 1: only a part of each head is rotated")
    kind, theta = rope.get("rope_type", rope.get("type", "default")), _read(content, "rope_theta", float)
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"its RoPE is of the type {shown(kind)}, not 'default' or 'llama3': positions scaled otherwise")
    rope = {"original_max_position_embeddings": content["max_position_embeddings"]} | rope
    return theta, RopeScaling(**{field: _read(rope, key, _TYPES[field]) for field, key in _SCALING.items()})
