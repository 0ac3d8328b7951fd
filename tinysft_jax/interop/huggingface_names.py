"""Where each tensor of a Hugging Face StableLM model lies in this package's parameters."""

import numpy as np
from jaxtyping import Float

from tinysft_jax.interop.torch_names import Place

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one parameter; a file holds the first of them

# Name inside a layer → path below "blocks". Kernels are [in, out] here and [out, in] there.
_LAYER_NAMES = {
    "input_layernorm.weight": ("ln_1", "scale"),
    "input_layernorm.bias": ("ln_1", "bias"),
    "self_attn.q_proj.weight": ("attn", "wq", "kernel"),
    "self_attn.k_proj.weight": ("attn", "wk", "kernel"),
    "self_attn.v_proj.weight": ("attn", "wv", "kernel"),
    "self_attn.o_proj.weight": ("attn", "wo", "kernel"),
    "post_attention_layernorm.weight": ("ln_2", "scale"),
    "post_attention_layernorm.bias": ("ln_2", "bias"),
    "mlp.gate_proj.weight": ("mlp", "w1", "kernel"),
    "mlp.up_proj.weight": ("mlp", "w3", "kernel"),
    "mlp.down_proj.weight": ("mlp", "w2", "kernel"),
}


def huggingface_names(n_layers: int) -> dict[str, Place]:
    """Every tensor that `model.safetensors` holds; those that `is_rotated` lie there in another order of rows."""
    names = {EMBEDDING: Place(("tok_emb", "embedding"), None, False)}
    for layer in range(n_layers):
        for name, path in _LAYER_NAMES.items():
            names[f"model.layers.{layer}.{name}"] = Place(("blocks", *path), layer, path[-1] == "kernel")
    names["model.norm.weight"] = Place(("ln_f", "scale"), None, False)
    names["model.norm.bias"] = Place(("ln_f", "bias"), None, False)
    return names


def is_rotated(name: str) -> bool:
    """Whether rotary positions turn what this matrix gives: the rows of queries and keys."""
    return name.endswith((".q_proj.weight", ".k_proj.weight"))


def pairs_to_halves(weight: Float[np.ndarray, "dim dim"], n_heads: int) -> Float[np.ndarray, "dim dim"]:
    """Reorders each head's rows: (0, 1), (2, 3), ... are turned together here, (0, half), (1, half + 1), ... there.

    The scores do not change, as queries and keys are reordered alike.
    """
    dim, width = weight.shape
    return weight.reshape(n_heads, dim // n_heads // 2, 2, width).swapaxes(1, 2).reshape(dim, width)


def halves_to_pairs(weight: Float[np.ndarray, "dim dim"], n_heads: int) -> Float[np.ndarray, "dim dim"]:
    """The inverse of `pairs_to_halves`."""
    dim, width = weight.shape
    return weight.reshape(n_heads, 2, dim // n_heads // 2, width).swapaxes(1, 2).reshape(dim, width)
