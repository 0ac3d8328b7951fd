"""A model's parameters as a tree of arrays, and the description that goes with them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinysft_jax.console import UserError, shown
from tinysft_jax.files import check
from tinysft_jax.model import GPT, LARGEST_SIZE, GPTConfig

FORMAT_VERSION = 2  # version 1 had queries and keys interleaved, see `from_interleaved`

Params = dict[str, Any]  # nested dicts of arrays, see `model_parameter_shapes`


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """The content of `model.json`."""

    config: GPTConfig
    chat_template: str | None  # "control", "text", or None for a model that completes plain text
    tokenizer: dict[str, Any] | None  # `{"kind": "gpt2", "bpe_ranks": N}`, or None if unknown
    source: dict[str, Any]  # where the parameters came from, for people
    trained_length: int | None = None  # tokens of the longest training sequence; if unknown, set to the context

    def __post_init__(self):
        if self.trained_length is None:
            object.__setattr__(self, "trained_length", self.config.max_seq_len)

    def to_json(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        return {"format_version": FORMAT_VERSION, "model": content.pop("config"), **content}

    @classmethod
    def from_json(cls, content: dict[str, Any], where: Path) -> "ModelDescription":
        """Raises: UserError, naming `where`, if a part is missing or invalid."""
        try:
            return cls._parse(content)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def _parse(cls, content: dict[str, Any]) -> "ModelDescription":
        content = {"source": {}, "tokenizer": None, "chat_template": None} | content
        check(content, {"model": {}, "source": {}})
        shape, source, template, tokenizer = (content[key] for key in ("model", "source", "chat_template", "tokenizer"))
        fields = {field.name: field.type for field in dataclasses.fields(GPTConfig)}
        if shape.keys() != fields.keys():
            raise UserError(f"'model' must have exactly the keys {', '.join(fields)}")
        assumed = source.get("assumed", {})
        if not (isinstance(assumed, dict) and assumed.items() <= shape.items()):
            raise UserError(f"'source.assumed' must be an object of entries of 'model', not {shown(assumed)}")
        if template not in ("control", "text", None):
            raise UserError(f"chat_template {shown(template)} is not 'control', 'text' or null")
        if not isinstance(tokenizer, dict | None):
            raise UserError("'tokenizer' must be an object or null")
        config = GPTConfig(**{name: _number(name, shape[name], kind) for name, kind in fields.items()})
        return cls(config, template, tokenizer, source, parse_trained_length(content, config))


def _number(name: str, value: Any, kind: type) -> int | float:
    if kind is float and type(value) is int and abs(value) <= LARGEST_SIZE:  # 4.0 may be written as 4
        return float(value)
    if type(value) is not kind:
        raise UserError(f"model.{name} is {shown(value)}; it must be a positive {kind.__name__}")
    return value


def parse_trained_length(content: dict[str, Any], config: GPTConfig) -> int | None:
    """The `trained_length` of a description, None if it has none. Raises a UserError if it is invalid."""
    length, context = content.get("trained_length"), config.max_seq_len
    if length is not None and (type(length) is not int or not 1 <= length <= context):
        raise UserError(f"trained_length is {shown(length)}; it must be from 1 to the context, {context}")
    return length


def make_model(config: GPTConfig, params: Params, **options) -> GPT:
    """A GPT with these parameters, the embedding padded (see `pad_vocabulary`); `options` are GPT's."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), **options)))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, params))


def model_parameter_shapes(config: GPTConfig) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s, the embedding padded."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))))


def count_parameters(config: GPTConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(trim_vocabulary(model_parameter_shapes(config), config)))


def trim_vocabulary(params: Params, config: GPTConfig) -> Params:
    """The parameters, or their shapes, without the padding rows of the embedding."""
    embedding = params["tok_emb"]["embedding"]
    if isinstance(embedding, jax.ShapeDtypeStruct):
        trimmed = embedding.update(shape=(config.vocab_size, config.dim))
    else:
        trimmed = embedding[: config.vocab_size]
    return params | {"tok_emb": {"embedding": trimmed}}


def pad_vocabulary(params: Params, config: GPTConfig) -> Params:
    """The parameters with zero rows appended to the embedding, up to `config.padded_vocab_size`."""
    embedding = np.asarray(params["tok_emb"]["embedding"])
    rows = config.padded_vocab_size - len(embedding)
    return params | {"tok_emb": {"embedding": np.pad(embedding, ((0, rows), (0, 0)))}}


def from_interleaved(params: Params, config: GPTConfig) -> Params:
    """Reorders queries and keys from RoPE on the features 2i and 2i + 1 of a head to RoPE on i and i + half, as here.

    Attention scores don't change, as both are reordered alike.
    """
    return _reorder_heads(params, (config.n_heads, config.head_dim // 2, 2))


def to_interleaved(params: Params, config: GPTConfig) -> Params:
    """The inverse of `from_interleaved`."""
    return _reorder_heads(params, (config.n_heads, 2, config.head_dim // 2))


def _reorder_heads(params: Params, shape: tuple[int, int, int]) -> Params:
    """Reorders the features of queries and keys: `shape` splits them, and its last two axes are swapped."""

    def reorder(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(*kernel.shape[:-1], *shape).swapaxes(-1, -2).reshape(kernel.shape)

    attention = params["blocks"]["attn"]
    reordered = {name: {"kernel": reorder(attention[name]["kernel"])} for name in ("wq", "wk")}
    return params | {"blocks": params["blocks"] | {"attn": attention | reordered}}
