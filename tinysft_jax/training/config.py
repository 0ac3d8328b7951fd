"""Checks a run's configuration before anything is read or compiled."""

import difflib
import importlib.metadata
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

import tinysft_jax
from tinysft_jax.attention import ATTENTION_BACKENDS
from tinysft_jax.console import UserError
from tinysft_jax.model import REMAT_POLICIES, GPTConfig, default_dtype
from tinysft_jax.training.evaluate import FINAL_EVALS
from tinysft_jax.training.step import DECAYED

DTYPES = ("auto", "bfloat16", "float32")
WANDB_MODES = ("disabled", "offline", "online")

# Every key of a configuration and what it holds; a float may be written as an int.
KEYS: dict[str, type | tuple[type, ...]] = {
    "seed": int,
    "init_from": str,
    "model.vocab_size": int,
    "model.dim": int,
    "model.n_layers": int,
    "model.n_heads": int,
    "model.max_seq_len": int,
    "model.mlp_ratio": float,
    "data.path": str,
    "data.seq_len": int,
    "data.num_workers": int,
    "optimizer.learning_rate": float,
    "optimizer.warmup_steps": int,
    "optimizer.weight_decay": float,
    "optimizer.beta1": float,
    "optimizer.beta2": float,
    "optimizer.grad_clip": float,
    "optimizer.decayed": str,
    "optimizer.ema_decay": float,
    "train.max_steps": int,
    "train.num_epochs": (int, type(None)),
    "train.batch_size": int,
    "train.grad_accumulation_steps": int,
    "train.log_interval": int,
    "train.eval_interval": int,
    "train.eval_batch_size": int,
    "train.eval_batches": int,
    "train.final_eval": str,
    "train.save_interval": int,
    "train.keep_checkpoints": int,
    "train.max_skipped_steps": int,
    "train.dtype": str,
    "train.attention": str,
    "train.remat": str,
    "export": str,
    "profile": str,
    "mesh.data": int,
    "mesh.fsdp": int,
    "mesh.tensor": int,
    "wandb.mode": str,
    "wandb.project": str,
    "wandb.name": str,
}

_AT_LEAST_1 = (
    "data.seq_len",
    "train.max_steps",
    "train.batch_size",
    "train.grad_accumulation_steps",
    "train.log_interval",
    "train.eval_interval",
    "train.eval_batch_size",
    "train.save_interval",
    "train.keep_checkpoints",
    "train.max_skipped_steps",
)
_AT_LEAST_0 = (
    "seed",
    "data.num_workers",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.grad_clip",
    "train.eval_batches",
)
_CHOICES = {
    "optimizer.decayed": DECAYED,
    "train.final_eval": FINAL_EVALS,
    "train.dtype": DTYPES,
    "train.attention": ATTENTION_BACKENDS,
    "train.remat": REMAT_POLICIES,
    "wandb.mode": WANDB_MODES,
}


def check_keys(config: ConfigDict) -> None:
    """Refuses a configuration that lacks a key, has one that nothing reads, or a value of another type.

    A key on the command line is checked by its flag; this is for configuration files that someone wrote.

    Raises:
      UserError: naming the key.
    """
    values = flat(config)
    for key in values.keys() - KEYS.keys():
        near = difflib.get_close_matches(key, KEYS, 1)
        raise UserError(f"there is no setting {key}{f'; do you mean {near[0]}?' if near else ''}")
    for key, kind in KEYS.items():
        if key not in values:
            raise UserError(f"the configuration lacks {key}; configs/sft.py has all keys")
        value, kinds = values[key], kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, (*kinds, int) if float in kinds else kinds) or isinstance(value, bool):
            raise UserError(f"{key} is {value!r}, which is {type(value).__name__}; it must be {kinds[0].__name__}")


def check_config(config: ConfigDict, batch_shards: int) -> None:
    """Refuses values that can't be a run.

    Args:
      config: of `configs/`.
      batch_shards: into how many parts the mesh divides a batch's rows.

    Raises:
      UserError: naming the key.
    """
    values = flat(config)
    for keys, least in ((_AT_LEAST_1, 1), (_AT_LEAST_0, 0)):
        for key in keys:
            value = values[key]
            if not least <= value < float("inf"):
                raise UserError(f"{key} is {value}; it must be at least {least}")
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"{key} is {values[key]!r}; choose one of {', '.join(choices)}")
    for key in ("optimizer.beta1", "optimizer.beta2", "optimizer.ema_decay"):
        if not 0 <= values[key] < 1:
            raise UserError(f"{key} is {values[key]}; it must be at least 0 and below 1")
    if config.seed >= 2**31:
        raise UserError(f"seed is {config.seed}; it must be below 2**31")
    if config.train.num_epochs is not None and config.train.num_epochs < 1:
        raise UserError(f"train.num_epochs is {config.train.num_epochs}; it must be at least 1")
    parse_window(config.profile)
    rows, divisor = config.train.batch_size, config.train.grad_accumulation_steps * batch_shards
    if rows % divisor:
        below, above = rows // divisor * divisor, -(-rows // divisor) * divisor
        raise UserError(
            f"train.batch_size {rows}, the rows of a step over all devices, is not a multiple of {divisor} "
            f"(mesh.data × mesh.fsdp = {batch_shards}, train.grad_accumulation_steps = "
            f"{config.train.grad_accumulation_steps}); the nearest that {'fit are' if below else 'fits is'} "
            f"{f'{below} and ' if below else ''}{above}"
        )


def check_run(config: ConfigDict, total_steps: int, max_tokens: int) -> None:
    """Refuses what does not fit the length of the run or the data.

    Args:
      config: of `configs/`.
      total_steps: of the run.
      max_tokens: to which the data was trimmed.

    Raises:
      UserError: naming the key.
    """
    if config.optimizer.warmup_steps > total_steps:
        raise UserError(
            f"optimizer.warmup_steps {config.optimizer.warmup_steps} is longer than the run of {total_steps} steps"
        )
    if config.data.seq_len < max_tokens:
        raise UserError(
            f"data.seq_len {config.data.seq_len} is below the data's max_tokens {max_tokens}; raise data.seq_len or "
            f"prepare with --max_tokens {config.data.seq_len}"
        )


def check_model(shape: GPTConfig, seq_len: int, tensor: int) -> None:
    """Refuses what does not fit the model.

    Args:
      shape: of the model.
      seq_len: tokens a row.
      tensor: devices over which heads are divided.

    Raises:
      UserError: naming the key.
    """
    if seq_len > shape.max_seq_len:
        raise UserError(f"data.seq_len {seq_len} is longer than the model's context {shape.max_seq_len}")
    if shape.n_heads % tensor:
        fitting = [str(n) for n in range(1, shape.n_heads + 1) if shape.n_heads % n == 0]
        raise UserError(
            f"mesh.tensor {tensor} does not divide the model's {shape.n_heads} attention heads; choose one of "
            f"{', '.join(fitting)}"
        )


def flat(config: ConfigDict) -> dict[str, Any]:
    """A configuration's values by dotted key."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            values |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        else:
            values[key] = value
    return values


def compute_dtype(config: ConfigDict):
    """The dtype that `train.dtype` names."""
    return default_dtype() if config.train.dtype == "auto" else jnp.dtype(config.train.dtype)


def resolved(config: ConfigDict, total_steps: int, identity: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` holds: the configuration, the steps it comes to, whose run it is, and what ran it."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "format_version": 1,
        "config": config.to_dict(),
        "total_steps": total_steps,
        "run": identity,
        # Not from the metadata of packages: this one runs from a checkout that is not installed, too.
        "packages": {"tinysft-jax": tinysft_jax.__version__, **versions},
    }


def parse_window(window: str) -> tuple[int, int]:
    """START and STOP of "START:STOP"; an empty window for an empty string."""
    if not window:
        return 0, 0
    start, _, stop = window.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise UserError(f"profile is {window!r}; it must be START:STOP, two step numbers, the first below the second")
    return int(start), int(stop)
