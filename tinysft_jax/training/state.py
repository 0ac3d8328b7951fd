"""Where a run starts: the model it fine-tunes, its vocabulary grown for the data, and the sharded train state."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import UserError
from tinysft_jax.data.store import PreparedData
from tinysft_jax.model import GPT, GPTConfig
from tinysft_jax.parameters import ModelDescription, Params, pad_vocabulary, trim_vocabulary
from tinysft_jax.sharding import state_sharding
from tinysft_jax.tokenizer import ChatTokenizer
from tinysft_jax.training.step import TrainState

RANDOM = "random"


def starting_model(init_from: str, shape: dict, data: PreparedData) -> tuple[ModelDescription, Params | None]:
    """The model that training starts from, able to speak the data's language.

    Args:
      init_from: a model directory, a work directory or a `.pt`; `RANDOM`, or for plain text empty: random weights.
      shape: `GPTConfig`'s fields for random weights; vocab_size 0: the data's.
      data: whose template and tokenizer the model will have.

    Returns:
      The description, and host parameters, or None for random ones.

    Raises:
      UserError: if the model can't be read or does not fit the data.
    """
    tokenizer = ChatTokenizer.from_description(data.description)
    longest = data.description["splits"]["train"]["longest"]
    if not init_from and tokenizer.template is not None:
        raise UserError(
            "init_from is empty, and the data are conversations: fine-tuning starts from a model; give it with "
            f"--config.init_from=PATH, or say --config.init_from={RANDOM} for random weights"
        )
    if init_from in ("", RANDOM):
        config = GPTConfig(**(shape | {"vocab_size": shape["vocab_size"] or tokenizer.vocab_size}))
        if config.vocab_size < tokenizer.vocab_size:
            raise UserError(f"model.vocab_size {config.vocab_size} is below the data's {tokenizer.vocab_size}")
        longest = min(longest, config.max_seq_len)
        source = {"kind": "random"}
        return ModelDescription(config, **tokenizer.description(), source=source, trained_length=longest), None
    description, params = open_model(init_from)
    check_same_language(description, tokenizer, init_from)
    config = description.config
    if tokenizer.template == "control" and description.chat_template is None:
        config, params = grow_vocabulary(config, params, tokenizer)
    source = {"kind": "fine-tuned", "init_from": Path(init_from).name, "from": description.source}
    longest = min(max(longest, description.trained_length), config.max_seq_len)
    description = ModelDescription(config, **tokenizer.description(), source=source, trained_length=longest)
    return description, params


def grow_vocabulary(config: GPTConfig, params: Params, tokenizer: ChatTokenizer) -> tuple[GPTConfig, Params]:
    """Gives the control tokens rows in the table: each the mean of the rows of its marker's BPE pieces.

    So the model starts from what the marker's spelling means to it, not from noise.

    Args:
      config: the model's shape.
      params: its parameters, the table padded or not.
      tokenizer: with the `control` template.

    Returns:
      The grown shape and parameters, the table padded; the arrays passed in are left as they were.
    """
    grown = dataclasses.replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
    old = np.asarray(trim_vocabulary(params, config)["tok_emb"]["embedding"])
    table = np.zeros((grown.vocab_size, config.dim), old.dtype)
    table[: len(old)] = old
    for marker, pieces in tokenizer.marker_pieces().items():
        table[tokenizer.control_ids[marker]] = old[list(pieces)].mean(axis=0)
    return grown, pad_vocabulary(params | {"tok_emb": {"embedding": table}}, grown)


def state_shapes(
    mesh: Mesh, model: GPT, optimizer: optax.GradientTransformation, averaged: bool = False
) -> tuple[TrainState, TrainState]:
    """The shapes of a train state, and how it is sharded.

    Args:
      mesh: where it lies.
      model: an abstract GPT (`nnx.eval_shape`).
      optimizer: whose state is part of it.
      averaged: whether it holds the parameters' moving average.
    """
    shapes = jax.eval_shape(lambda params: _fresh(params, optimizer, averaged), nnx.to_pure_dict(nnx.state(model)))
    return shapes, state_sharding(mesh, shapes)


def create_state(
    shardings: TrainState, model: GPT, params: Params | None, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state of step 0, created as it is sharded.

    Args:
      shardings: of `state_shapes`; with an average there, the state has one.
      model: an abstract GPT, for its shape.
      params: host parameters; None: random.
      optimizer: whose state to make.
      seed: of random parameters.
    """
    averaged = "average" in shardings
    if params is None:

        def random(key):
            return _fresh(nnx.to_pure_dict(nnx.state(GPT(model.config, rngs=nnx.Rngs(key)))), optimizer, averaged)

        return jax.jit(random, out_shardings=shardings)(jax.random.key(seed))
    # Copied by the jitted function: steps will donate the state, and the caller's arrays are not ours to give away.
    fresh = jax.jit(lambda params: _fresh(params, optimizer, averaged), out_shardings=shardings)
    return fresh(jax.device_put(params, shardings["params"]))


def _fresh(params: Params, optimizer: optax.GradientTransformation, averaged: bool) -> TrainState:
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
    # A copy of its own: a step gives both away, and no array can be given twice.
    return state | ({"average": jax.tree.map(jnp.copy, params)} if averaged else {})


def check_same_language(description: ModelDescription, tokenizer: ChatTokenizer, init_from: str) -> None:
    """Raises: UserError, if a model and the data have other vocabularies or chat templates."""
    plain_vocabulary = tokenizer.eot_id + 1
    if description.tokenizer is None:
        # A checkpoint that does not name its tokenizer, and isn't GPT-2's size: it can only be the data's own.
        if description.config.vocab_size != plain_vocabulary:
            raise UserError(
                f"{init_from} has {description.config.vocab_size} tokens and names no tokenizer, the data's has "
                f"{plain_vocabulary}; prepare the data with --bpe_ranks {description.config.vocab_size - 1}"
            )
    elif description.tokenizer != tokenizer.description()["tokenizer"]:
        raise UserError(
            f"{init_from} has the tokenizer {description.tokenizer}, the data {tokenizer.description()['tokenizer']}; "
            f"prepare the data with --bpe_ranks {description.tokenizer.get('bpe_ranks')}"
        )
    if description.chat_template is not None and tokenizer.template is None:
        raise UserError(f"{init_from} is a chat model, the data plain text; prepare conversations to fine-tune it")
    if description.chat_template not in (None, tokenizer.template):
        raise UserError(
            f"{init_from} speaks the chat template {description.chat_template!r}, the data {tokenizer.template!r}; "
            f"prepare the data with --template {description.chat_template}"
        )
