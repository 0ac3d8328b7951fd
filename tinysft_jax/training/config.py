"""Checks a run's configuration before anything is read or compiled."""

import importlib.metadata
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from tinysft_jax.attention import ATTENTION_BACKENDS
from tinysft_jax.errors import UserError
from tinysft_jax.interop.export import parse_export
from tinysft_jax.model import REMAT_POLICIES, default_dtype
from tinysft_jax.training.optimizer import DECAYED
from tinysft_jax.training.profile import parse_window

DTYPES = ("auto", "bfloat16", "float32")
WANDB_MODES = ("disabled", "offline", "online")

_AT_LEAST_1 = (
    "data.seq_len",
    "train.max_steps",
    "train.batch_size",
    "train.grad_accumulation_steps",
    "train.log_interval",
    "train.eval_interval",
    "train.save_interval",
    "train.keep_checkpoints",
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
    "train.dtype": DTYPES,
    "train.attention": ATTENTION_BACKENDS,
    "train.remat": REMAT_POLICIES,
    "wandb.mode": WANDB_MODES,
}


def check_config(config: ConfigDict, batch_shards: int) -> None:
    """Refuses values that can't be a run.

    Args:
      config: of `configs/`.
      batch_shards: into how many parts the mesh divides a batch's rows.

    Raises:
      UserError: naming the key.
    """
    for keys, least in ((_AT_LEAST_1, 1), (_AT_LEAST_0, 0)):
        for key in keys:
            value = _get(config, key)
            if not least <= value < float("inf"):
                raise UserError(f"{key} is {value}; it must be at least {least}")
    for key, choices in _CHOICES.items():
        if _get(config, key) not in choices:
            raise UserError(f"{key} is {_get(config, key)!r}; choose one of {', '.join(choices)}")
    for key in ("optimizer.beta1", "optimizer.beta2", "optimizer.ema_decay"):
        if not 0 <= _get(config, key) < 1:
            raise UserError(f"{key} is {_get(config, key)}; it must be at least 0 and below 1")
    if config.seed >= 2**31:
        raise UserError(f"seed is {config.seed}; it must be below 2**31")
    if config.train.num_epochs is not None and config.train.num_epochs < 1:
        raise UserError(f"train.num_epochs is {config.train.num_epochs}; it must be at least 1")
    parse_window(config.profile)
    parse_export(config.export)
    rows, divisor = config.train.batch_size, config.train.grad_accumulation_steps * batch_shards
    if rows % divisor:
        raise UserError(
            f"train.batch_size {rows} must be a multiple of {divisor}: train.grad_accumulation_steps "
            f"{config.train.grad_accumulation_steps} × {batch_shards} shard(s) of the mesh"
        )


def compute_dtype(config: ConfigDict):
    """The dtype that `train.dtype` names."""
    return default_dtype() if config.train.dtype == "auto" else jnp.dtype(config.train.dtype)


def resolved(config: ConfigDict, total_steps: int) -> dict[str, Any]:
    """What `config.json` holds: the configuration, the steps it comes to, and the packages that ran it."""
    packages = ("tinysft-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "format_version": 1,
        "config": config.to_dict(),
        "total_steps": total_steps,
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def _get(config: ConfigDict, key: str):
    section, _, name = key.rpartition(".")
    return (config[section] if section else config)[name]
