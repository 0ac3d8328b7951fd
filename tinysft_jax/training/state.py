"""Where a run starts: the model to fine-tune, its vocabulary grown for the data, the sharded state and its steps."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tinysft_jax.accelerator import default_dtype
from tinysft_jax.attention.backends import choose_backend
from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import UserError
from tinysft_jax.data.store import PreparedData
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.parameters import TABLES, ModelDescription, Params, pad_vocabulary, trim_vocabulary
from tinysft_jax.sharding import batch_sharding, state_sharding
from tinysft_jax.tokenizer import ChatTokenizer
from tinysft_jax.training.config import check_model
from tinysft_jax.training.objectives import SFT, Objective
from tinysft_jax.training.step import (
    Schedule,
    TrainState,
    make_eval_step,
    make_likelihood_step,
    make_optimizer,
    make_train_step,
    warmup_cosine,
)

RANDOM = "random"


def starting_model(
    init_from: str, shape: dict, *data: PreparedData, reward: bool = False
) -> tuple[ModelDescription, Params | None]:
    """The model that training starts from, with the tokenizer and chat template of all the data sets.

    `init_from` is a path that `open_model` takes, `RANDOM`, or for plain text empty, which is the same. Random weights
    have `shape` (`GPTConfig`'s fields; vocab_size 0: the data's), and None for parameters. With `reward`, the head over
    the vocabulary gives way to a scalar one, which starts at 0. Raises a UserError if the model can't be read or does
    not fit the data.
    """
    tokenizer = data[0].tokenizer
    if not init_from and tokenizer.template is not None:
        raise UserError(
            "init_from is empty, and the data are conversations: fine-tuning starts from a model; give it with "
            f"--config.init_from=PATH, or say --config.init_from={RANDOM} for random weights"
        )
    length = max(each.description["splits"]["train"]["longest"] for each in data)
    if init_from in ("", RANDOM):
        params, source = None, {"kind": "random"}
        config = GPTConfig(**shape | {"vocab_size": shape["vocab_size"] or tokenizer.vocab_size})
        if config.vocab_size < tokenizer.vocab_size:
            raise UserError(f"model.vocab_size {config.vocab_size} is below the data's {tokenizer.vocab_size}")
    else:
        start, params = open_model(init_from)
        check_tokenizer(start, tokenizer, init_from)
        config = start.config
        if tokenizer.template == "control" and start.chat_template is None:
            config, params = grow_vocabulary(config, params, tokenizer)
        source = {"kind": "fine-tuned", "init_from": Path(init_from).name, "from": start.source}
        length = max(length, start.trained_length)
    if reward:
        config, source = dataclasses.replace(config, scalar_head=True), source | {"kind": "reward model"}
        params = params and {name: of for name, of in params.items() if name != "head"}
        params = params and params | {"score": np.zeros(config.dim, np.float32)}
    length = min(length, config.max_seq_len)
    model = ModelDescription(config, **tokenizer.description(), source=source, trained_length=length)
    return dataclasses.replace(model, tokenizer_files=tokenizer.files), params


def grow_vocabulary(config: GPTConfig, params: Params, tokenizer: ChatTokenizer) -> tuple[GPTConfig, Params]:
    """Adds a row for each control token, the mean of those of its marker's BPE pieces, and pads the result.

    To the embedding, and to an untied head as well.
    """
    grown = dataclasses.replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))

    def grow(table) -> np.ndarray:
        old = np.asarray(table)
        new = np.zeros((grown.vocab_size, config.dim), old.dtype)
        new[: len(old)] = old
        for marker, pieces in tokenizer.marker_pieces().items():
            new[tokenizer.control_ids[marker]] = old[list(pieces)].mean(axis=0)
        return new

    params = trim_vocabulary(params, config)
    tables = {name: jax.tree.map(grow, params[name]) for name in TABLES if name in params}
    return grown, pad_vocabulary(params | tables, grown)


def check_tokenizer(description: ModelDescription, tokenizer: ChatTokenizer, init_from: str) -> None:
    """Raises: UserError, if the model's tokenizer or chat template is not the data's."""
    config, theirs, ours = description.config, description.tokenizer, tokenizer.description()["tokenizer"]
    template, wanted = description.chat_template, tokenizer.template
    needed = theirs or {"kind": "gpt2", "bpe_ranks": config.vocab_size - 1}
    if needed != ours:
        found = f"tokenizer {theirs}" if theirs else f"{config.vocab_size} tokens and names no tokenizer"
        flag = f"--bpe_ranks {needed['bpe_ranks']}" if needed["kind"] == "gpt2" else f"--tokenizer {init_from}"
        raise UserError(f"{init_from} has {found}, the data {ours}; prepare the data with {flag}")
    if template is not None and wanted is None:
        raise UserError(f"{init_from} is a chat model, the data plain text; prepare conversations to fine-tune it")
    same_files = description.tokenizer_files == tokenizer.files != {}  # a template may put in the day it is read on
    if template not in (None, tokenizer.description()["chat_template"]) and not same_files:
        its = f"the chat template {template!r}" if isinstance(template, str) else "its own chat template"
        the_datas = repr(wanted) if isinstance(wanted, str) else "another model's"
        raise UserError(f"{init_from} has {its}, the data {the_datas}; prepare the data with --tokenizer {init_from}")


def check_context(description: ModelDescription, path: str, longest: int) -> None:
    """Raises: UserError, if the longest conversation is beyond the model's context."""
    if longest > (context := description.config.max_seq_len):
        raise UserError(
            f"{path} has a context of {context} tokens, and the data a conversation of {longest}; "
            "prepare the data with a smaller --max_tokens"
        )


class Steps(NamedTuple):
    """The jitted functions of a run, and the state that they take."""

    train: Callable  # (state, batch) -> (state, metrics); donates the state
    evaluate: Callable  # (params, batch) -> sums by task
    log_likelihoods: Callable  # (params, batch) -> those of answers, by row and segment
    create: Callable[[Params | None, int], TrainState]  # (host parameters or None: random ones, seed) -> step 0's state
    shapes: TrainState
    shardings: TrainState
    graph: nnx.GraphDef  # of the model, which `nnx.merge` joins with its parameters


def make_steps(
    mesh: Mesh,
    model: GPT,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    n_tasks: int = 1,
    accumulation: int = 1,
    ema_decay: int | float = 0.0,
    objective: Objective = SFT,
) -> Steps:
    """Jits the steps for an abstract GPT (`nnx.eval_shape`); see `make_train_step`. Nothing is compiled yet."""

    def fresh(params: Params) -> TrainState:
        state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
        # The average is a copy, because no array can be donated twice.
        return state | ({"average": jax.tree.map(jnp.copy, params)} if ema_decay else {})

    def random(key: jax.Array) -> TrainState:
        return fresh(nnx.to_pure_dict(nnx.state(GPT(model.config, rngs=nnx.Rngs(key)))))

    def create(params: Params | None, seed: int) -> TrainState:
        if params is None:
            return jax.jit(random, out_shardings=shardings)(jax.random.key(seed))
        # The jitted function copies: the train step donates its state, and must not give away the caller's arrays.
        return jax.jit(fresh, out_shardings=shardings)(jax.device_put(params, shardings["params"]))

    graph, rows, whole = nnx.graphdef(model), batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(fresh, nnx.to_pure_dict(nnx.state(model)))
    shardings = state_sharding(mesh, shapes, model.config.n_kv_heads)
    # Shardings are pinned, or the second call, whose state comes from the first, would compile again.
    train_step = jax.jit(
        make_train_step(graph, optimizer, schedule, accumulation, ema_decay, objective),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    over_rows = functools.partial(jax.jit, in_shardings=(shardings["params"], rows), out_shardings=whole)
    eval_step = over_rows(make_eval_step(graph, n_tasks, objective))
    likelihood_step = over_rows(make_likelihood_step(graph, objective.n_segments))
    return Steps(train_step, eval_step, likelihood_step, create, shapes, shardings, graph)


def train_dtype(config: ConfigDict) -> jnp.dtype:
    """Of matmuls and activations."""
    return jnp.dtype(default_dtype() if config.train.dtype == "auto" else config.train.dtype)


def steps_of(
    config: ConfigDict,
    shape: GPTConfig,
    total_steps: int,
    n_tasks: int,
    mesh: Mesh,
    objective: Objective = SFT,
    accumulation: int | None = None,
) -> Steps:
    """The steps of a configuration, with its number of micro-batches unless `accumulation` is given.

    Raises: UserError, if the model does not fit it, or attention can't run here.
    """
    check_model(config.data.seq_len, shape.max_seq_len, shape.n_heads, mesh.shape["tensor"])
    dtype = train_dtype(config)
    attention = choose_backend(config.train.attention, config.data.seq_len, shape.n_heads, shape.head_dim, dtype)
    options = {"dtype": dtype, "attention": attention, "remat": config.train.remat}
    options |= {"scan_layers": config.train.scan_layers}
    model = nnx.eval_shape(lambda: GPT(shape, rngs=nnx.Rngs(0), **options))
    settings = config.optimizer.to_dict()
    ema_decay = settings.pop("ema_decay")
    schedule = warmup_cosine(settings.pop("learning_rate"), settings.pop("warmup_steps"), total_steps)
    optimizer = make_optimizer(schedule, **settings)
    accumulation = accumulation or config.train.grad_accumulation_steps
    return make_steps(mesh, model, optimizer, schedule, n_tasks, accumulation, ema_decay, objective)
