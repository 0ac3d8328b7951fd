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
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.parameters import Params, model_parameter_shapes, reorder_heads, trim_vocabulary

# The key in exported files for entries of `ModelDescription` that their format has no place for.
OWN_KEY = "tinysft_jax"
# Parts of keys that come from torch.compile, DistributedDataParallel, activation checkpointing and FSDP (now and
# formerly). They can occur anywhere, more than once.
_WRAPPERS = frozenset({"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module"})


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tensors of a family of files."""

    names: dict[str, str]  # path in the parameters → name in the file; `{}` is the layer, the first axis in "blocks"
    head: str  # the output head's name; a file need not hold it if it is tied to the embedding
    interleaved: bool  # whether RoPE rotates features 2i and 2i + 1 of a head there; here it rotates i and i + half

    @property
    def embedding(self) -> str:
        return self.names["tok_emb.embedding"]

    def paths(self, n_layers: int) -> dict[str, tuple[str, int | None]]:
        """Every tensor's name → its path in the parameters and its layer, in the file's order; without a tied head."""
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

    def shapes(self, config: GPTConfig) -> dict[str, list[int]]:
        """Every tensor's name → its shape in the file."""
        sizes = {"vocab": config.vocab_size, "dim": config.dim, "hidden": config.hidden_dim, "head": config.head_dim}
        sizes |= zip("qkv", config.qkv_dims, strict=True)
        return {name: [sizes[axis] for axis in _AXES[path]] for name, (path, _) in self.paths(config.n_layers).items()}

    def export_tensors(
        self, params: Params, config: GPTConfig, dtype: np.typing.DTypeLike = np.float32
    ) -> dict[str, np.ndarray]:
        """The model's tensors as a file holds them, without a head that is the embedding."""
        params = jax.tree.map(np.asarray, trim_vocabulary(params, config))
        if self.interleaved:
            params = reorder_heads(params, config, interleave=True)
        # Copied, because a view would be saved with all of the array behind it.
        return {name: np.array(view, dtype, order="C") for name, view in self.views(params, config.n_layers).items()}

    def import_tensors(self, tensors: Mapping[str, Any], config: GPTConfig) -> Params:
        """The parameters, float32 and the embedding padded, from a file's tensors: NumPy arrays, or what becomes one.

        Nothing is read or allocated before all shapes are known to be the model's.

        Raises: UserError, if the names or shapes are not the model's, a value is not finite, or the head is not tied
        where the model's is.
        """
        if config.n_layers > len(tensors):
            raise UserError(f"it has {len(tensors)} tensors, too few for {config.n_layers:,} layers")
        self.check_names(tensors, config.n_layers)
        shapes = {name: (list(tensors[name].shape), ours) for name, ours in self.shapes(config).items()}
        if wrong := [f"{name} has shape {its}, not {ours}" for name, (its, ours) in shapes.items() if its != ours]:
            raise UserError("; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model_parameter_shapes(config))
        views = self.views(trim_vocabulary(params, config), config.n_layers)
        for name, view in views.items():
            with np.errstate(over="ignore"):  # what is too large for float32 is refused below
                view[...] = np.asarray(tensors[name])
            if not (finite := np.isfinite(view)).all():
                first = np.argwhere(~finite)[0].tolist()
                raise UserError(f"{name} has {(~finite).sum()} values that are not finite, the first at {first}")
        is_tied = self.head in tensors and self.head not in views
        if is_tied and not np.array_equal(tensors[self.head], views[self.embedding]):
            raise UserError(f"{self.head} differs from {self.embedding}: an untied head, where this model ties the two")
        return reorder_heads(params, config, interleave=False) if self.interleaved else params

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


# Path in the parameters, shape in a file, and the module's name in the PyTorch project (None: its model has no such
# parameter), in Hugging Face's models and in llama.cpp.
_TENSORS = (
    ("tok_emb.embedding", "vocab dim", "tok_emb", "model.embed_tokens", "token_embd"),
    ("blocks.ln_1.scale", "dim", "ln_1", "input_layernorm", "attn_norm"),
    ("blocks.ln_1.bias", "dim", "ln_1", "input_layernorm", "attn_norm"),
    ("blocks.attn.wq.kernel", "q dim", "attn.wq", "self_attn.q_proj", "attn_q"),
    ("blocks.attn.wk.kernel", "k dim", "attn.wk", "self_attn.k_proj", "attn_k"),
    ("blocks.attn.wv.kernel", "v dim", "attn.wv", "self_attn.v_proj", "attn_v"),
    ("blocks.attn.wq.bias", "q", None, "self_attn.q_proj", "attn_q"),
    ("blocks.attn.wk.bias", "k", None, "self_attn.k_proj", "attn_k"),
    ("blocks.attn.wv.bias", "v", None, "self_attn.v_proj", "attn_v"),
    ("blocks.attn.q_norm.scale", "head", None, "self_attn.q_norm", "attn_q_norm"),
    ("blocks.attn.k_norm.scale", "head", None, "self_attn.k_norm", "attn_k_norm"),
    ("blocks.attn.wo.kernel", "dim q", "attn.wo", "self_attn.o_proj", "attn_output"),
    ("blocks.ln_2.scale", "dim", "ln_2", "post_attention_layernorm", "ffn_norm"),
    ("blocks.ln_2.bias", "dim", "ln_2", "post_attention_layernorm", "ffn_norm"),
    ("blocks.mlp.w1.kernel", "hidden dim", "mlp.w1", "mlp.gate_proj", "ffn_gate"),
    ("blocks.mlp.w2.kernel", "dim hidden", "mlp.w2", "mlp.down_proj", "ffn_down"),
    ("blocks.mlp.w3.kernel", "hidden dim", "mlp.w3", "mlp.up_proj", "ffn_up"),
    ("ln_f.scale", "dim", "ln_f", "model.norm", "output_norm"),
    ("ln_f.bias", "dim", "ln_f", "model.norm", "output_norm"),
    ("head.embedding", "vocab dim", None, "lm_head", "output"),
)
_AXES = {path: axes.split() for path, axes, *_ in _TENSORS}


def _names(column: int, layer: str, config: GPTConfig | None = None) -> dict[str, str]:
    """`Layout.names` from a column of modules in `_TENSORS`; of a model of this shape, if it is given."""
    names = {}
    for path, _, *modules in _TENSORS:
        module = modules[column]
        if module and (config is None or _has(config, path)):
            suffix = "bias" if path.endswith(".bias") else "weight"
            names[path] = f"{layer if path.startswith('blocks.') else ''}{module}.{suffix}"
    return names


def _has(config: GPTConfig, path: str) -> bool:
    """Whether a model of this shape has the parameter."""
    if path == "head.embedding":
        return not config.tied_head
    if "_norm." in path:
        return config.qk_norm
    if path.endswith(".bias"):
        return config.qkv_bias if ".attn." in path else config.norm == "layer"
    return True


TORCH = Layout(_names(0, "blocks.{}."), head="head.weight", interleaved=True)


def huggingface_layout(config: GPTConfig) -> Layout:
    """The tensors of a Hugging Face folder that holds a model of this shape."""
    return Layout(_names(1, "model.layers.{}.", config), head="lm_head.weight", interleaved=False)


def gguf_layout(config: GPTConfig, architecture: str) -> Layout:
    """The tensors of a GGUF file that holds a model of this shape, as one of llama.cpp's architectures."""
    return Layout(_names(2, "blk.{}.", config), head="output.weight", interleaved=architecture == "llama")


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
