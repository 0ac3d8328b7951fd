"""A run's configuration: each key once, with its type, default, range and meaning.

Checks, `train.py --help` and docs/configuration.md derive from it. Nothing here imports JAX, which takes seconds.
"""

import dataclasses
import difflib
import importlib.metadata
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from ml_collections import ConfigDict, config_dict

import tinysft_jax
from tinysft_jax.console import UserError


def setting(default: Any, meaning: str, at_least: int = 0, below: int | float = math.inf) -> Any:
    """A key: its default, what it means, and the range of a number."""
    return field(default=default, metadata={"meaning": meaning, "at_least": at_least, "below": below})


@dataclass
class Model:
    """The model's shape for random weights; a model that is fine-tuned keeps its own."""

    vocab_size: int = setting(0, "size of the vocabulary; 0: that of the data")
    dim: int = setting(768, "width of the residual stream")
    n_layers: int = setting(12, "number of blocks")
    n_heads: int = setting(12, "attention heads")
    max_seq_len: int = setting(1024, "context length in tokens")
    mlp_ratio: float = setting(4.0, "hidden units of the MLP as a multiple of dim")


@dataclass
class Data:
    path: str = setting("data", "a prepared data set")
    seq_len: int = setting(1024, "tokens of a packed row; at least prepare's --max_tokens", 1)
    num_workers: int = setting(0, "processes that build batches; 0: a thread, which suffices for one GPU")


@dataclass
class Optimizer:
    learning_rate: float = setting(2e-5, "peak, at the end of warm-up; a tenth of pretraining's")
    warmup_steps: int = setting(500, "of linear warm-up; then a cosine down to 0 at the last step")
    weight_decay: float = setting(0.01, "of AdamW, as a multiple of the learning rate")
    beta1: float = setting(0.9, "decay of the first moment", below=1)
    beta2: float = setting(0.95, "decay of the second moment", below=1)
    grad_clip: float = setting(1.0, "global norm to which gradients are clipped; 0: off")
    decayed: Literal["all", "matrices"] = setting("all", "what is decayed: all parameters, or all but the norms")
    ema_decay: float = setting(0.0, "of a moving average of the parameters, then evaluated and kept; 0: none", below=1)


@dataclass
class Train:
    max_steps: int = setting(10_000, "optimizer steps", 1)
    num_epochs: int | None = setting(None, "when set, replaces max_steps", 1)
    batch_size: int = setting(4, "packed rows of one optimizer step, over all devices together", 1)
    grad_accumulation_steps: int = setting(1, "micro-batches that a step's rows are divided into", 1)
    log_interval: int = setting(10, "steps between lines of metrics", 1)
    eval_interval: int = setting(500, "steps between evaluations; another precedes the first step and ends the run", 1)
    eval_batch_size: int = setting(32, "packed rows of an evaluation's batch (rounded up to fit the devices)", 1)
    eval_batches: int = setting(0, "batches of each evaluation; 0: all evaluations take at most 7 % of the run's rows")
    final_eval: Literal["sample", "all"] = setting(
        "sample", "of the kept model: at most 3 % of the run's rows, or the whole validation split"
    )
    save_interval: int = setting(1000, "steps between checkpoints", 1)
    keep_checkpoints: int = setting(3, "how many of the newest are kept", 1)
    max_skipped_steps: int = setting(10, "the run stops after so many steps in a row without a finite loss", 1)
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto", "of matmuls; auto: bfloat16 on accelerators, float32 on a CPU"
    )
    attention: Literal["auto", "xla", "cudnn"] = setting("auto", "auto: cudnn where it can run, else xla")
    remat: Literal["none", "dots", "full"] = setting(
        "none", "what the backward pass recomputes of a block: nothing, all but matmuls, or all"
    )


@dataclass
class Mesh:
    data: int = setting(-1, "devices with rows of their own; -1: what the others leave", -1)
    fsdp: int = setting(1, "devices over which parameters and rows are divided", -1)
    tensor: int = setting(1, "devices over which heads, hidden units and vocabulary are divided", -1)


@dataclass
class Wandb:
    mode: Literal["disabled", "offline", "online"] = setting("disabled", "whether Weights & Biases is used")
    project: str = setting("tinysft-jax", "name of the project")
    name: str = setting("", "name of the run; empty: that of the work directory")


@dataclass
class Config:
    seed: int = setting(0, "of random weights, order of the data, validation sample", below=2**31)
    init_from: str = setting(
        "",
        "the model to fine-tune: a work directory (its best model), a model directory, a .pt or a Hugging Face folder; "
        "random: random weights of the shape model.*; empty: the same, for plain text only",
    )
    export: str = setting("", "forms to write the best model in at the end: huggingface, torch, or both with a comma")
    profile: str = setting("", "START:STOP: trace these steps with JAX's profiler into WORKDIR/profile")
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    wandb: Wandb = field(default_factory=Wandb)


def _settings() -> Iterator[tuple[str, dataclasses.Field]]:
    for each in dataclasses.fields(Config):
        if dataclasses.is_dataclass(each.type):
            yield from ((f"{each.name}.{inner.name}", inner) for inner in dataclasses.fields(each.type))
        else:
            yield each.name, each


SETTINGS: dict[str, dataclasses.Field] = dict(_settings())  # by dotted key


def make_config(preset: str, presets: dict[str, dict[str, Any]]) -> ConfigDict:
    """The defaults with a preset's changes, for the `get_config` of a configuration file.

    Args:
      preset: what follows the colon of `--config=FILE:PRESET`, or "".
      presets: values by dotted key, for each preset.
    """
    if preset not in presets:
        raise UserError(f"there is no preset {preset!r}; choose one of {', '.join(filter(None, presets))}")
    config = ConfigDict(dataclasses.asdict(Config()))
    config.train.num_epochs = config_dict.placeholder(int)  # None has no type, which a flag needs
    config.update_from_flattened_dict(presets[preset])
    return config.lock()


def flat(config: ConfigDict) -> dict[str, Any]:
    """A configuration's values by dotted key."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        section = value.items() if isinstance(value, ConfigDict) else ()
        values |= {f"{key}.{name}": inner for name, inner in section} or {key: value}
    return values


def check_config(config: ConfigDict) -> None:
    """Raises: UserError, naming a key that is unknown, missing, or has a value that it can't have."""
    values = flat(config)
    for key in values:
        check_key(key)
    for key, description in SETTINGS.items():
        if key not in values:
            raise UserError(f"the configuration lacks {key}; docs/configuration.md lists all keys")
        if not _is_allowed(values[key], description):
            raise UserError(f"{key} is {values[key]!r}; it must be {_allowed(description)}")
    parse_window(config.profile)


def check_key(key: str) -> None:
    """Raises: UserError, if there is no such setting."""
    if key not in SETTINGS:
        near = difflib.get_close_matches(key, SETTINGS, 1)
        raise UserError(f"there is no setting {key}{f'; do you mean {near[0]}?' if near else ''}")


def _is_allowed(value: Any, description: dataclasses.Field) -> bool:
    kind, limits = description.type, description.metadata
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    # A float may be written as an int; True is an int to Python.
    if isinstance(value, bool) or not isinstance(value, float | int if kind is float else kind):
        return False
    return not isinstance(value, float | int) or limits["at_least"] <= value < limits["below"]


def _allowed(description: dataclasses.Field) -> str:
    """The values of a setting, for people."""
    kind, limits = description.type, description.metadata
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if kind is str:
        return "text"
    below = f" and below {limits['below']}" if limits["below"] < math.inf else ""
    return f"{'float' if kind is float else 'int'}, at least {limits['at_least']}{below}"


def reference() -> str:
    """Every key with its default, what it may be, and its meaning, as a Markdown list."""
    return "\n".join(
        f"- `{key}={description.default}` ({_allowed(description)}): {description.metadata['meaning']}"
        for key, description in SETTINGS.items()
    )


def parse_window(window: str) -> range:
    """The steps of "START:STOP"; none for an empty text."""
    if not window:
        return range(0)
    start, _, stop = window.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise UserError(f"profile is {window!r}; it must be START:STOP, two step numbers, the first below the second")
    return range(int(start), int(stop))


def check_batch(config: ConfigDict, batch_shards: int) -> None:
    """Raises: UserError, if the rows of a step can't be divided over shards of the mesh and micro-batches."""
    rows, micro_batches = config.train.batch_size, config.train.grad_accumulation_steps
    if rows % (divisor := micro_batches * batch_shards):
        raise UserError(
            f"train.batch_size {rows}, the rows of a step over all devices, is not a multiple of {divisor} (mesh.data "
            f"× mesh.fsdp = {batch_shards}, train.grad_accumulation_steps = {micro_batches}); the next multiple is "
            f"{-(-rows // divisor) * divisor}"
        )


def check_run(config: ConfigDict, total_steps: int, max_tokens: int) -> None:
    """Raises: UserError, if warm-up is longer than the run, or a row shorter than the data's `max_tokens`."""
    warmup, seq_len = config.optimizer.warmup_steps, config.data.seq_len
    if warmup > total_steps:
        raise UserError(f"optimizer.warmup_steps {warmup} is longer than the run of {total_steps} steps")
    if seq_len < max_tokens:
        raise UserError(
            f"data.seq_len {seq_len} is below the data's max_tokens {max_tokens}; raise data.seq_len or prepare with "
            f"--max_tokens {seq_len}"
        )


def check_model(seq_len: int, max_seq_len: int, n_heads: int, tensor: int) -> None:
    """Raises: UserError, if a row exceeds the model's context, or `tensor` devices can't divide its heads."""
    if seq_len > max_seq_len:
        raise UserError(f"data.seq_len {seq_len} is longer than the model's context {max_seq_len}")
    if n_heads % tensor:
        divisors = ", ".join(str(n) for n in range(1, n_heads + 1) if n_heads % n == 0)
        raise UserError(
            f"mesh.tensor {tensor} does not divide the model's {n_heads} attention heads; choose one of {divisors}"
        )


def resolved(config: ConfigDict, total_steps: int, identity: dict[str, Any]) -> dict[str, Any]:
    """The content of `config.json`: the configuration, the number of steps, the run's identity, package versions."""
    packages = {"tinysft-jax": tinysft_jax.__version__}  # which has no metadata where it is not installed
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        packages[name] = importlib.metadata.version(name)
    settings = {"config": config.to_dict(), "total_steps": total_steps, "run": identity}
    return {"format_version": 1, **settings, "packages": packages}


if __name__ == "__main__":
    print(
        f"# Configuration\n\nEvery key with its default; `python -m {__spec__.name}` writes this page.\n\n{reference()}"
    )
