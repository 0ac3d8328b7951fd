"""Names and layouts of the parameters in files of other projects."""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from tinysft_jax.console import UserError
from tinysft_jax.model import GPTConfig
from tinysft_jax.parameters import (
    Params,
    from_interleaved,
    model_parameter_shapes,
    pad_vocabulary,
    to_interleaved,
    trim_vocabulary,
)

# The key in exported files for entries of `ModelDescription` that their format has no place for.
OWN_KEY = "tinysft_jax"
# Parts of keys that come from torch.compile, DistributedDataParallel, activation checkpointing and FSDP (now and
# formerly). They can occur anywhere, more than once.
_WRAPPERS = frozenset({"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module"})


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tensors of a family of files."""

    names: dict[str, str]  # path in the parameters → name in the file; `{}` is the layer, the first axis in "blocks"
    head: str  # the output head's name; it is tied to the embedding, so a file need not hold it
    interleaved: bool  # whether RoPE rotates features 2i and 2i + 1 of a head there; here it rotates i and i + half

    @property
    def embedding(self) -> str:
        return self.names["tok_emb.embedding"]

    def paths(self, n_layers: int) -> dict[str, tuple[str, int | None]]:
        """Every tensor's name → its path in the parameters and its layer, in the file's order; without the head."""
        paths: dict[str, tuple[str, int | None]] = {}
        for in_blocks, group in itertools.groupby(self.names.items(), lambda item: "{}" in item[1]):
            rows = list(group)
            for layer in range(n_layers) if in_blocks else (None,):
                paths |= {name.format(layer): (path, layer) for path, name in rows}
        return paths

    def views(self, params: Params, n_layers: int) -> dict[str, Any]:
        """NumPy parameters (or gradients), embedding not padded, as views under the file's names and in its shapes.

        The features of queries and keys keep the order that they have here.
        """
        views = {}
        for name, (path, layer) in self.paths(n_layers).items():
            array: Any = functools.reduce(operator.getitem, path.split("."), params)
            array = array if layer is None else array[layer]
            # Kernels are [in, out] here and [out, in] in PyTorch.
            views[name] = array.T if path.endswith(".kernel") else array
        return views

    def export_tensors(self, params: Params, config: GPTConfig) -> dict[str, np.ndarray]:
        """The model's tensors as a file holds them, without the head, which is the embedding."""
        params = jax.tree.map(np.asarray, trim_vocabulary(params, config))
        if self.interleaved:
            params = to_interleaved(params, config)
        # Copied, because a view would be saved with all of the array behind it.
        return {name: np.array(view, order="C") for name, view in self.views(params, config.n_layers).items()}

    def import_tensors(self, tensors: Mapping[str, np.ndarray], config: GPTConfig) -> Params:
        """The parameters, float32 and the embedding padded, from a file's tensors.

        Raises: UserError, if the names or shapes are not the model's, a value is not finite, or the head is not tied.
        """
        self.check_names(tensors, config.n_layers)
        wanted = trim_vocabulary(model_parameter_shapes(config), config)
        params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), wanted)
        views = self.views(params, config.n_layers)
        shapes = {name: (list(tensors[name].shape), list(view.shape)) for name, view in views.items()}
        if wrong := [f"{name} has shape {its}, not {ours}" for name, (its, ours) in shapes.items() if its != ours]:
            raise UserError("; ".join(wrong))
        for name, view in views.items():
            view[...] = tensors[name]
            if not (finite := np.isfinite(view)).all():
                first = np.argwhere(~finite)[0].tolist()
                raise UserError(f"{name} has {(~finite).sum()} values that are not finite, the first at {first}")
        if self.head in tensors and not np.array_equal(tensors[self.head], tensors[self.embedding]):
            raise UserError(f"{self.head} differs from {self.embedding}: an untied head, where this model ties the two")
        if self.interleaved:
            params = from_interleaved(params, config)
        return pad_vocabulary(params, config)

    def check_names(self, found: Collection[str], n_layers: int) -> None:
        """Raises: UserError, if a file lacks tensors of the model or holds others."""
        wanted, faults = self.paths(n_layers), []
        for fault, names in (
            ("missing", [name for name in wanted if name not in found]),
            ("unexpected", [name for name in found if name not in wanted and name != self.head]),
        ):
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            faults += [f"{fault}: {', '.join(name[:100] for name in names[:20])}{more}"] if names else []
        if faults:
            raise UserError(f"its tensors are not this model's; {'; '.join(faults)}")


# Path in the parameters, name in the PyTorch project, name in Hugging Face's StableLM.
_TENSORS = (
    ("tok_emb.embedding", "tok_emb.weight", "model.embed_tokens.weight"),
    ("blocks.ln_1.scale", "blocks.{}.ln_1.weight", "model.layers.{}.input_layernorm.weight"),
    ("blocks.ln_1.bias", "blocks.{}.ln_1.bias", "model.layers.{}.input_layernorm.bias"),
    ("blocks.attn.wq.kernel", "blocks.{}.attn.wq.weight", "model.layers.{}.self_attn.q_proj.weight"),
    ("blocks.attn.wk.kernel", "blocks.{}.attn.wk.weight", "model.layers.{}.self_attn.k_proj.weight"),
    ("blocks.attn.wv.kernel", "blocks.{}.attn.wv.weight", "model.layers.{}.self_attn.v_proj.weight"),
    ("blocks.attn.wo.kernel", "blocks.{}.attn.wo.weight", "model.layers.{}.self_attn.o_proj.weight"),
    ("blocks.ln_2.scale", "blocks.{}.ln_2.weight", "model.layers.{}.post_attention_layernorm.weight"),
    ("blocks.ln_2.bias", "blocks.{}.ln_2.bias", "model.layers.{}.post_attention_layernorm.bias"),
    ("blocks.mlp.w1.kernel", "blocks.{}.mlp.w1.weight", "model.layers.{}.mlp.gate_proj.weight"),
    ("blocks.mlp.w2.kernel", "blocks.{}.mlp.w2.weight", "model.layers.{}.mlp.down_proj.weight"),
    ("blocks.mlp.w3.kernel", "blocks.{}.mlp.w3.weight", "model.layers.{}.mlp.up_proj.weight"),
    ("ln_f.scale", "ln_f.weight", "model.norm.weight"),
    ("ln_f.bias", "ln_f.bias", "model.norm.bias"),
)
TORCH = Layout({path: name for path, name, _ in _TENSORS}, head="head.weight", interleaved=True)
STABLELM = Layout({path: name for path, _, name in _TENSORS}, head="lm_head.weight", interleaved=False)


def own_entries(content: Mapping[Any, Any]) -> dict[str, Any]:
    """What is under `OWN_KEY` in a file's content."""
    entries = content.get(OWN_KEY)
    return entries if isinstance(entries, dict) else {}


def bare_name(key: str) -> str:
    """A key without the names of wrappers: `blocks.0._orig_mod.ln_1.bias` is `blocks.0.ln_1.bias`."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def mlp_ratio(dim: int, hidden_dim: int) -> float:
    """The ratio for which int(dim * ratio) is exactly `hidden_dim`."""
    ratio = hidden_dim / dim
    while int(dim * ratio) < hidden_dim:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return ratio
