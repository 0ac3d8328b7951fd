"""A GPT's shape as the `config.json` of a Hugging Face StableLM model, and back."""

from typing import Any

from tinysft_jax.errors import UserError
from tinysft_jax.interop.torch_checkpoint import mlp_ratio
from tinysft_jax.model import GPTConfig

MODEL_TYPE, ARCHITECTURE = "stablelm", "StableLmForCausalLM"

# What makes a StableLM model the GPT of this package. Key → what it must be, what it is where a file leaves it out,
# and what another value would mean.
_FIXED = {
    "tie_word_embeddings": (True, False, "an untied head"),
    "use_qkv_bias": (False, False, "biases in its attention"),
    "qk_layernorm": (False, False, "norms of queries and keys"),
    "use_parallel_residual": (False, False, "attention and MLP side by side"),
    "hidden_act": ("silu", "silu", "another activation"),
    "layer_norm_eps": (1e-5, 1e-5, "another epsilon in its norms"),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def to_huggingface_config(config: GPTConfig, special_ids: dict[str, int | None]) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
      config: the shape.
      special_ids: `bos_token_id` and so on, where the tokenizer is known.
    """
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "max_position_embeddings": config.max_seq_len,
        **{key: value for key, (value, _, _) in _FIXED.items()},
        # Said twice: the first two are what programs of before transformers 5 read.
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0},
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",
        **special_ids,
    }


def from_huggingface_config(content: dict[str, Any]) -> GPTConfig:
    """The shape that a `config.json` describes.

    Raises:
      UserError: if it is another architecture; it says what makes it one.
    """
    if content.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"it is a model of type {content.get('model_type')!r}; only {MODEL_TYPE!r} can be this program's GPT"
        )
    for key, (wanted, default, meaning) in _FIXED.items():
        if content.get(key, default) != wanted:
            raise UserError(f"its {key} is {content.get(key, default)!r}, not {wanted!r}: {meaning}")
    if content.get("quantization_config") is not None:
        raise UserError("it is quantized; convert the model that it was made from")
    sizes = {key: content.get(key) for key in _SIZES}
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"its {key} is {value!r}, not a positive integer")
    heads = sizes["num_attention_heads"]
    if (shared := content.get("num_key_value_heads", 32)) != heads:
        raise UserError(
            f"its num_key_value_heads is {shared!r}, not {heads}: heads that share keys and values (grouped)"
        )
    if content.get("head_dim") not in (None, sizes["hidden_size"] // heads):
        raise UserError(f"its head_dim is {content['head_dim']!r}, not hidden_size / num_attention_heads")
    return GPTConfig(
        vocab_size=sizes["vocab_size"],
        dim=sizes["hidden_size"],
        n_layers=sizes["num_hidden_layers"],
        n_heads=heads,
        max_seq_len=sizes["max_position_embeddings"],
        mlp_ratio=mlp_ratio(sizes["hidden_size"], sizes["intermediate_size"]),
        rope_theta=_rope_theta(content),
    )


def _rope_theta(content: dict[str, Any]) -> float:
    """Raises: UserError, if rotary positions are partial or scaled."""
    # transformers 5 writes rope_parameters; before, its entries stood by themselves, and scaling in rope_scaling.
    rope = content.get("rope_parameters") or {}
    scaling = content.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise UserError("its rope_parameters or rope_scaling is not an object")
    factor = rope.get("partial_rotary_factor", content.get("partial_rotary_factor", 0.25))
    if factor != 1:
        raise UserError(
            f"its partial_rotary_factor is {factor!r}, not 1: rotary positions turn a part of each head only"
        )
    kind = rope.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    if kind != "default":
        raise UserError(f"its rotary positions are of the type {kind!r}, not 'default': they are scaled")
    theta = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise UserError(f"its rope_theta is {theta!r}, not a number")
    return float(theta)
