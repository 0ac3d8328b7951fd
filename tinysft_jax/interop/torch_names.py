"""Where each tensor of the PyTorch model lies in this package's parameters."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

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
