"""A model's parameters as a tree of arrays, and the description that goes with them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from tinysft_jax.console import UserError, shown
from tinysft_jax.model import GPT, LARGEST_SIZE, GPTConfig

FORMAT_VERSION = 1


Params = dict[str, Any]  # nested dicts of arrays; the keys are listed in `model_parameter_shapes`


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """What `model.json` says.

    Attributes:
      config: the model's shape.
      chat_template: "control", "text", or None for a model that completes plain text.
      tokenizer: `{"kind": "gpt2", "bpe_ranks": N}`, or None where it is not known.
      source: where the parameters came from, for people.
      trained_length: tokens of the longest sequence that it was trained on, as far as that is known; else its context.
    """

    config: GPTConfig
    chat_template: str | None
    tokenizer: dict[str, Any] | None
    source: dict[str, Any]
    trained_length: int | None = None

    def __post_init__(self):
        if self.trained_length is None:
            object.__setattr__(self, "trained_length", self.config.max_seq_len)

    def to_json(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        return {"format_version": FORMAT_VERSION, "model": content.pop("config"), **content}

    @classmethod
    def from_json(cls, content: dict[str, Any], where: Path) -> "ModelDescription":
        """Raises: UserError, if a part is missing or can't be."""
        shape, source = content.get("model"), content.get("source", {})
        known = dataclasses.fields(GPTConfig)
        if not isinstance(shape, dict) or not isinstance(source, dict):
            raise UserError(f"{where}: 'model' and 'source' must be objects")
        assumed = source.get("assumed", {})
        if not (isinstance(assumed, dict) and assumed.items() <= shape.items()):
            raise UserError(f"{where}: 'source.assumed' must be an object of entries of 'model', not {shown(assumed)}")
        names = sorted(field.name for field in known)
        if sorted(shape) != names:
            raise UserError(f"{where}: 'model' must have exactly the keys {', '.join(names)}")
        try:
            config = GPTConfig(**{field.name: _number(field, shape[field.name]) for field in known})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        template, tokenizer = content.get("chat_template"), content.get("tokenizer")
        if template not in ("control", "text", None):
            raise UserError(f"{where}: chat_template {shown(template)} is not 'control', 'text' or null")
        if not isinstance(tokenizer, dict | None):
            raise UserError(f"{where}: 'tokenizer' must be an object or null")
        try:
            length = parse_trained_length(content, config)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return cls(config, template, tokenizer, source, length)


def parse_trained_length(content: dict[str, Any], config: GPTConfig) -> int | None:
    """A description's `trained_length`, or None if it has none.

    Raises:
      UserError: if it can't be.
    """
    length, context = content.get("trained_length"), config.max_seq_len
    if length is not None and (type(length) is not int or not 1 <= length <= context):
        raise UserError(f"trained_length is {shown(length)}; it must be from 1 to the context, {context}")
    return length


def _number(field: dataclasses.Field, value: Any) -> int | float:
    """A field of a GPTConfig as JSON has it, where 4.0 may stand as 4."""
    if field.type is float and type(value) is int and abs(value) <= LARGEST_SIZE:
        return float(value)
    if type(value) is not field.type:
        raise UserError(f"model.{field.name} is {shown(value)}; it must be a positive {field.type.__name__}")
    return value


def make_model(config: GPTConfig, params: Params, **options) -> GPT:
    """A GPT with these parameters, the table padded (see `pad_vocabulary`)."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), **options)))
    return nnx.merge(graph, jax.tree.map(jax.numpy.asarray, params))


def model_parameter_shapes(config: GPTConfig) -> Params:
    """The parameters' dicts with shapes and dtypes in place of arrays, the table padded."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))))


def trim_vocabulary(params: Params, config: GPTConfig) -> Params:
    """The parameters (or their shapes) without the table's padding rows."""

    def trim(table):
        if isinstance(table, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((config.vocab_size, *table.shape[1:]), table.dtype)
        return table[: config.vocab_size]

    return params | {"tok_emb": {"embedding": trim(params["tok_emb"]["embedding"])}}


def pad_vocabulary(params: Params, config: GPTConfig) -> Params:
    """The parameters with zero rows added to the table, up to `config.padded_vocab_size`."""
    table = np.asarray(params["tok_emb"]["embedding"])
    padded = np.zeros((config.padded_vocab_size, config.dim), table.dtype)
    padded[: len(table)] = table
    return params | {"tok_emb": {"embedding": padded}}
