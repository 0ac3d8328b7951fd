"""A model's parameters as a tree of arrays, and the description that goes with them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinysft_jax.console import UserError, named, shown
from tinysft_jax.files import check
from tinysft_jax.gpt_config import GPTConfig, RopeScaling
from tinysft_jax.model import GPT
from tinysft_jax.tokenizer import ChatTokenizer, parse_template

# Version 1 had queries and keys interleaved, see `reorder_heads`; versions 1 and 2 only the PyTorch project's model;
# versions 1 to 3 no reward models.
FORMAT_VERSION = 4

Params = dict[str, Any]  # nested dicts of arrays, see `model_parameter_shapes`
TABLES = ("tok_emb", "head")  # have a row for each id; the second only in a model with an untied head


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """The content of `model.json`."""

    config: GPTConfig
    chat_template: str | dict[str, Any] | None  # as `ChatTokenizer.description` has it
    tokenizer: dict[str, Any] | None  # the same; None if unknown
    source: dict[str, Any]  # where the parameters came from, for people
    trained_length: int | None = None  # tokens of the longest training sequence; if unknown, set to the context
    # Name → content of the files that the tokenizer was read from; they lie beside `model.json`, in `tokenizer/`.
    tokenizer_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if self.trained_length is None:
            object.__setattr__(self, "trained_length", self.config.max_seq_len)

    def make_tokenizer(self) -> ChatTokenizer:
        """Raises: UserError, if the tokenizer is unknown, or its files are missing or others."""
        return ChatTokenizer.from_description(self.to_json(), self.tokenizer_files)

    def to_json(self) -> dict[str, Any]:
        content = dataclasses.asdict(dataclasses.replace(self, tokenizer_files={}))
        del content["tokenizer_files"]
        return {"format_version": FORMAT_VERSION, "model": content.pop("config"), **content}

    @classmethod
    def from_json(cls, content: dict[str, Any], where: Path) -> "ModelDescription":
        """Raises: UserError, naming `where`, if a part is missing or invalid."""
        content = {"source": {}, "tokenizer": None, "chat_template": None} | content
        with named(where):
            check(content, {"model": {}, "source": {}})
            shape, source, template, tokenizer = map(content.get, ("model", "source", "chat_template", "tokenizer"))
            assumed = source.get("assumed", {})
            if not (isinstance(assumed, dict) and assumed.items() <= shape.items()):
                raise UserError(f"'source.assumed' must be an object of entries of 'model', not {shown(assumed)}")
            parse_template(template)
            if not isinstance(tokenizer, dict | None):
                raise UserError("'tokenizer' must be an object or null")
            config = _parse_config(shape, content.get("format_version"))
            return cls(config, template, tokenizer, source, parse_trained_length(content, config))


def _parse_config(shape: dict[str, Any], format_version: Any) -> GPTConfig:
    """The shape in `model.json`; versions before 3 have only the keys up to `rope_theta`."""
    fields, scaling = [field.name for field in dataclasses.fields(GPTConfig)], shape.get("rope_scaling")
    required = fields[: fields.index("rope_theta") + 1]
    known = required if format_version in (1, 2) else fields
    if not set(required) <= shape.keys() <= set(known):
        others = f" than {', '.join(known)}" if known != required else ""
        raise UserError(f"'model' must have the keys {', '.join(required)}, and no others{others}")
    if isinstance(scaling, dict):
        names = [field.name for field in dataclasses.fields(RopeScaling)]
        if scaling.keys() != set(names):
            raise UserError(f"model.rope_scaling must have exactly the keys {', '.join(names)}")
        scaling = RopeScaling(**scaling)
    return GPTConfig(**shape | ({"rope_scaling": scaling} if "rope_scaling" in shape else {}))


def parse_trained_length(content: dict[str, Any], config: GPTConfig) -> int | None:
    """The `trained_length` of a description, None if it has none. Raises a UserError if it is invalid."""
    length, context = content.get("trained_length"), config.max_seq_len
    if length is not None and (type(length) is not int or not 1 <= length <= context):
        raise UserError(f"trained_length is {shown(length)}; it must be from 1 to the context, {context}")
    return length


def describe(
    config: GPTConfig, tokenizer: ChatTokenizer | None, source: dict[str, Any], stated: Mapping[str, Any]
) -> ModelDescription:
    """The description of a model with this tokenizer, if it is known, in whose file this package `stated` more.

    Raises: UserError, if the tokenizer has too many ids, or what is stated is invalid.
    """
    length = parse_trained_length(stated, config)
    if tokenizer is None:
        template = "text" if stated.get("chat_template") == "text" else None
        return ModelDescription(config, template, None, source, length)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}")
    return ModelDescription(
        config, **tokenizer.description(), source=source, trained_length=length, tokenizer_files=tokenizer.files
    )


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
    """The parameters, or their shapes, without the padding rows of the embedding, and of the head if it is untied."""

    def trim(table):
        if isinstance(table, jax.ShapeDtypeStruct):
            return table.update(shape=(config.vocab_size, config.dim))
        return table[: config.vocab_size]

    return params | {name: jax.tree.map(trim, params[name]) for name in TABLES if name in params}


def pad_vocabulary(params: Params, config: GPTConfig) -> Params:
    """The inverse of `trim_vocabulary`: with zero rows up to `config.padded_vocab_size`, as NumPy arrays."""

    def pad(table):
        return np.pad(np.asarray(table), ((0, config.padded_vocab_size - len(table)), (0, 0)))

    return params | {name: jax.tree.map(pad, params[name]) for name in TABLES if name in params}


def reorder_heads(params: Params, config: GPTConfig, interleave: bool) -> Params:
    """Reorders queries and keys for RoPE on the features 2i and 2i + 1 of a head, or back for i and i + half, as here.

    Attention scores don't change, as both are reordered alike.
    """
    half = config.head_dim // 2
    shape = (-1, 2, half) if interleave else (-1, half, 2)

    def reorder(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(*kernel.shape[:-1], *shape).swapaxes(-1, -2).reshape(kernel.shape)

    attention = params["blocks"]["attn"]
    reordered = {name: {"kernel": reorder(attention[name]["kernel"])} for name in ("wq", "wk")}
    return params | {"blocks": params["blocks"] | {"attn": attention | reordered}}
