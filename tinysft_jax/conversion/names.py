"""Where the tensors of other projects' files lie in this package's parameters."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from tinysft_jax.console import UserError
from tinysft_jax.model import GPTConfig
from tinysft_jax.parameters import Params, model_parameter_shapes, pad_vocabulary, trim_vocabulary

# What wrappers of the whole model or of a part put into keys: torch.compile, DistributedDataParallel, activation
# checkpointing, FSDP, and FSDP of old. They can occur anywhere, more than once, in any order.
_WRAPPERS = frozenset({"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module"})

# Name inside a block → path below "blocks". Kernels are [in, out] here and [out, in] in PyTorch.
_BLOCK_NAMES = {
    "ln_1.weight": ("ln_1", "scale"),
    "ln_1.bias": ("ln_1", "bias"),
    "attn.wq.weight": ("attn", "wq", "kernel"),
    "attn.wk.weight": ("attn", "wk", "kernel"),
    "attn.wv.weight": ("attn", "wv", "kernel"),
    "attn.wo.weight": ("attn", "wo", "kernel"),
    "ln_2.weight": ("ln_2", "scale"),
    "ln_2.bias": ("ln_2", "bias"),
    "mlp.w1.weight": ("mlp", "w1", "kernel"),
    "mlp.w2.weight": ("mlp", "w2", "kernel"),
    "mlp.w3.weight": ("mlp", "w3", "kernel"),
}

EMBEDDING, HEAD = "tok_emb.weight", "head.weight"  # one parameter under two names


class Place(NamedTuple):
    """Where one tensor lies: a path in the parameters, the layer of a stacked array, and whether it is transposed."""

    path: tuple[str, ...]
    layer: int | None
    transposed: bool

    def view(self, params: Mapping[str, Any]) -> Any:
        """The tensor, in PyTorch's shape, as a view of NumPy parameters: write to it to import, read it to export.

        Args:
          params: the parameters (or gradients) as nested dicts, the table without padding rows.
        """
        array: Any = params
        for key in self.path:
            array = array[key]
        if self.layer is not None:
            array = array[self.layer]
        return array.T if self.transposed else array


def torch_names(n_layers: int) -> dict[str, Place]:
    """Every parameter of the PyTorch model, in its order; `HEAD`, the second name of `EMBEDDING`, is not listed."""
    names = {EMBEDDING: Place(("tok_emb", "embedding"), None, False)}
    for layer in range(n_layers):
        for name, path in _BLOCK_NAMES.items():
            names[f"blocks.{layer}.{name}"] = Place(("blocks", *path), layer, path[-1] == "kernel")
    names["ln_f.weight"] = Place(("ln_f", "scale"), None, False)
    names["ln_f.bias"] = Place(("ln_f", "bias"), None, False)
    return names


def bare_name(key: str) -> str:
    """A state key without what wrappers put into it, such as `blocks.0._orig_mod.ln_1.bias` of a compiled block."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def as_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as float32 NumPy, without a copy where it is float32 already."""
    return tensor.detach().float().numpy()


HUGGINGFACE_EMBEDDING, HUGGINGFACE_HEAD = (
    "model.embed_tokens.weight",
    "lm_head.weight",
)  # one parameter; a file holds the first of them

# Name inside a layer → path below "blocks". Kernels are [in, out] here and [out, in] there.
_HUGGINGFACE_LAYER = {
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
    names = {HUGGINGFACE_EMBEDDING: Place(("tok_emb", "embedding"), None, False)}
    for layer in range(n_layers):
        for name, path in _HUGGINGFACE_LAYER.items():
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


_MOST_LISTED = 20


def check_names(found: Collection[str], wanted: Collection[str], optional: str) -> None:
    """Raises: UserError, if names are missing, or there are others than `wanted` and `optional`."""
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted and name != optional],
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
        raise UserError(f"its state is not this model's; {listed}")


def collect_params(
    config: GPTConfig,
    places: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> Params:
    """The parameters, copied tensor by tensor, so that no more than one lies in memory twice.

    Args:
      config: the shape.
      places: where each tensor belongs.
      shapes: of the file's tensors.
      read: a tensor's values as float32, by name.

    Returns:
      Nested dicts of float32 NumPy arrays, the table padded.

    Raises:
      UserError: if a shape is not the model's, or a value is not finite.
    """
    wanted = trim_vocabulary(model_parameter_shapes(config), config)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), wanted)
    views = {name: place.view(params) for name, place in places.items()}
    wrong = [
        f"{name} has shape {list(shapes[name])}, not {list(view.shape)}"
        for name, view in views.items()
        if tuple(shapes[name]) != view.shape
    ]
    if wrong:
        raise UserError("; ".join(wrong))
    for name, view in views.items():
        view[...] = read(name)
        if not (finite := np.isfinite(view)).all():
            first = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise UserError(f"{name} has {(~finite).sum()} values that are not finite, the first at {list(first)}")
    return pad_vocabulary(params, config)


def _listed(names: list[str]) -> str:
    """The first of them, each up to a length, and how many there are besides."""
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(name[:100] for name in names[:_MOST_LISTED]) + more
