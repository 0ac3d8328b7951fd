"""A run's configuration: each key once, with its default, range and meaning.

Checks and `train.py --help` derive from it. Nothing here imports JAX, which takes seconds.
"""

import difflib
import importlib.metadata
import math
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

import tinysft_jax
from tinysft_jax.console import UserError


class Setting(NamedTuple):
    """A key of the configuration; a value has the type of the default."""

    default: Any
    meaning: str
    at_least: int | float = 0  # for numbers
    below: float = math.inf
    choices: tuple[str, ...] = ()


# `model.*` is the shape of random weights; a model that is fine-tuned keeps its own.
SETTINGS = {
    "seed": Setting(0, "of random weights, order of the data, validation sample", below=2**31),
    "objective": Setting(
        "sft",
        "answers' likelihood (plain text's, too); of pairs: direct preference optimization, a reward model; rewards of "
        "own answers",
        choices=("sft", "dpo", "reward", "grpo"),
    ),
    "init_from": Setting(
        "",
        "model to fine-tune: work directory (its best model), model directory, .pt or Hugging Face folder; "
        "random: random weights of shape model.*; empty: the same, for plain text only",
    ),
    "export": Setting("", "forms of the best model to write at the end: huggingface, torch, gguf, with commas between"),
    "profile": Setting("", "START:STOP: steps to trace with JAX's profiler, into WORKDIR/profile"),
    "model.vocab_size": Setting(0, "tokens; 0: as many as the data's"),
    "model.dim": Setting(768, "width of the residual stream", 1),
    "model.n_layers": Setting(12, "blocks", 1),
    "model.n_heads": Setting(12, "attention heads", 1),
    "model.max_seq_len": Setting(1024, "context length in tokens", 1),
    "model.mlp_ratio": Setting(4.0, "hidden units of the MLP, as a multiple of dim"),
    "data.path": Setting("data", "a prepared data set, or several: PATH=WEIGHT,PATH=WEIGHT"),
    "data.seq_len": Setting(1024, "tokens of a packed row; at least prepare's --max_tokens", 1),
    "data.num_workers": Setting(0, "processes that build batches; 0: a thread, enough for one GPU"),
    "dpo.beta": Setting(0.1, "how much a log-likelihood ratio counts: the higher, the closer to the start", 1e-6),
    "dpo.length_normalized": Setting(False, "ratios of a token, not an answer; beta is then 100 times higher"),
    "dpo.sft_weight": Setting(0.0, "of the chosen answer's mean negative log-likelihood of a token, beside DPO's loss"),
    "rewards": Setting(
        "words:1,sentence:1,dialogue:1,moral:1,answer:1,ends:0.3,repetition:0.3,length:0.5,fluency:0.5",
        "what answers are worth: names and weights; docs/alignment.md",
    ),
    "reward_model": Setting("", "for the reward preferred: a model trained with configs/reward.py"),
    "grpo.prompts": Setting(8, "questions of a step", 1),
    "grpo.group_size": Setting(8, "answers to each question", 2),
    "grpo.tasks": Setting("", "whose questions are asked, with commas between; empty: all"),
    "grpo.updates": Setting(1, "optimizer steps on the same answers", 1),
    "grpo.clip": Setting(0.2, "how far from 1 the ratio of a token's probabilities has a gradient", 1e-6),
    "grpo.kl": Setting(0.0, "weight of the divergence from the model at the start"),
    "grpo.normalizer": Setting(
        "constant",
        "what the sum over tokens is divided by: the step's answers × their greatest length, or its answers' tokens",
        choices=("constant", "tokens"),
    ),
    "grpo.by_deviation": Setting(False, "advantages are divided by the standard deviation of their group"),
    "grpo.temperature": Setting(1.0, "of sampling, and of the probabilities that are trained", 1e-3),
    "grpo.cut_off": Setting("wrong", "answers without room to end: worth 0 or left out", choices=("wrong", "masked")),
    "grpo.max_gap": Setting(
        0.1, "between sampler's and trainer's log-probability of a token, on average, beyond which a run stops"
    ),
    "optimizer.learning_rate": Setting(2e-5, "peak, after warm-up; a tenth of pretraining's"),
    "optimizer.warmup_steps": Setting(500, "of linear warm-up, before a cosine to 0 at the last step"),
    "optimizer.weight_decay": Setting(0.01, "of AdamW, times the learning rate"),
    "optimizer.beta1": Setting(0.9, "decay of the first moment", below=1),
    "optimizer.beta2": Setting(0.95, "decay of the second moment", below=1),
    "optimizer.grad_clip": Setting(1.0, "largest global norm of the gradients; 0: off"),
    "optimizer.decayed": Setting("all", "what is decayed; matrices: all but norms", choices=("all", "matrices")),
    "optimizer.ema_decay": Setting(0.0, "of a moving average of the parameters, to evaluate and keep; 0: off", below=1),
    "train.max_steps": Setting(10_000, "optimizer steps", 1),
    "train.num_epochs": Setting(None, "if set, replaces max_steps", 1),
    "train.batch_size": Setting(4, "packed rows of an optimizer step (of grpo: computed together), all devices'", 1),
    "train.grad_accumulation_steps": Setting(1, "micro-batches of a step", 1),
    "train.log_interval": Setting(10, "steps between lines of metrics", 1),
    "train.eval_interval": Setting(500, "steps between evaluations; both ends of the run have one too", 1),
    "train.eval_batch_size": Setting(32, "packed rows, rounded up to fit the devices", 1),
    "train.eval_batches": Setting(0, "of an evaluation; 0: all evaluations take at most 7 % of the run's rows"),
    "train.final_eval": Setting(
        "sample",
        "of the kept model: on at most 3 % of the run's rows, or the whole validation split",
        choices=("sample", "all"),
    ),
    "train.save_interval": Setting(1000, "steps between checkpoints", 1),
    "train.keep_checkpoints": Setting(3, "newest ones to keep", 1),
    "train.max_skipped_steps": Setting(10, "consecutive steps without a finite loss that end the run", 1),
    "train.dtype": Setting(
        "auto", "of matmuls; auto: float32 on CPUs, else bfloat16", choices=("auto", "bfloat16", "float32")
    ),
    "train.attention": Setting(
        "auto", "auto: the first that can run here", choices=("auto", "tokamax", "cudnn", "xla")
    ),
    "train.remat": Setting(
        "none", "recomputed in the backward pass: nothing, all but matmuls, all", choices=("none", "dots", "full")
    ),
    "train.scan_layers": Setting(
        "auto",
        "a loop over the layers, or each compiled by itself: faster on a GPU; auto: by device, remat and depth",
        choices=("auto", "on", "off"),
    ),
    "mesh.data": Setting(-1, "devices with rows of their own; -1: what is left", -1),
    "mesh.fsdp": Setting(1, "devices that divide parameters and rows", -1),
    "mesh.tensor": Setting(1, "devices that divide heads, hidden units and vocabulary", -1),
    "wandb.mode": Setting("disabled", "Weights & Biases", choices=("disabled", "offline", "online")),
    "wandb.project": Setting("tinysft-jax", "its project"),
    "wandb.name": Setting("", "of the run; empty: the work directory's"),
}


def make_config(preset: str, presets: dict[str, dict[str, Any]]) -> ConfigDict:
    """The defaults with a preset's changes; `preset` is "" or from `--config=FILE:PRESET`, `presets` by dotted key."""
    if preset not in presets:
        raise UserError(f"there is no preset {preset!r}; choose one of {', '.join(filter(None, presets))}")
    config = ConfigDict({key.partition(".")[0]: {} for key in SETTINGS if "." in key})
    config.update_from_flattened_dict({key: setting.default for key, setting in SETTINGS.items()} | presets[preset])
    if config.train.num_epochs is None:
        config.train.num_epochs = config_dict.placeholder(int)  # a flag needs a type
    return config.lock()


def flat(config: ConfigDict) -> dict[str, Any]:
    """A configuration's values by dotted key."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        section = value.items() if isinstance(value, ConfigDict) else ()
        values |= {f"{key}.{name}": inner for name, inner in section} or {key: value}
    return values


def check_config(config: ConfigDict) -> None:
    """Raises: UserError, naming a key that is unknown, missing, or has a value out of range."""
    values = flat(config)
    for key in values:
        check_key(key)
    for key, setting in SETTINGS.items():
        if key not in values:
            raise UserError(f"the configuration lacks {key}; train.py --help lists all keys")
        if not _is_allowed(values[key], setting):
            raise UserError(f"{key} is {values[key]!r}; it must be {_allowed(setting)}")
    parse_window(config.profile)


def check_key(key: str) -> None:
    """Raises: UserError, if there is no such setting."""
    if key not in SETTINGS:
        near = difflib.get_close_matches(key, SETTINGS, 1)
        raise UserError(f"there is no setting {key}{f'; do you mean {near[0]}?' if near else ''}")


def _is_allowed(value: Any, setting: Setting) -> bool:
    if setting.choices:
        return value in setting.choices
    if isinstance(setting.default, str | bool) or value is None:
        return isinstance(value, type(setting.default))
    # A float may be written as an int; True is an int to Python.
    is_number = isinstance(value, float | int if isinstance(setting.default, float) else int)
    return is_number and not isinstance(value, bool) and setting.at_least <= value < setting.below


def _allowed(setting: Setting) -> str:
    """The values that a setting can have, in words."""
    if setting.choices:
        return f"one of {', '.join(setting.choices)}"
    if isinstance(setting.default, str | bool):
        return "text" if isinstance(setting.default, str) else "true or false"
    below = f", < {setting.below}" if setting.below < math.inf else ""
    return f"{'float' if isinstance(setting.default, float) else 'int'} >= {setting.at_least}{below}"


def reference() -> str:
    """All settings, a line each."""
    return "\n".join(
        f"  {key}={setting.default} ({_allowed(setting)}): {setting.meaning}" for key, setting in SETTINGS.items()
    )


def parse_window(window: str) -> range:
    """The steps of "START:STOP", which is exclusive; none for ""."""
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


def check_run(config: ConfigDict, total_steps: int, max_tokens: int, per_item: int = 1) -> None:
    """Raises: UserError, if warm-up is longer than the run, a row shorter than the data's `max_tokens`, or the
    objective needs other data than items of `per_item` conversations.
    """
    warmup, seq_len = config.optimizer.warmup_steps, config.data.seq_len
    if per_item == 1 and config.objective in ("dpo", "reward"):
        raise UserError(
            f"objective {config.objective} learns from pairs, and data.path holds none; prepare them with --format "
            "preference-jsonl"
        )
    if per_item == 2 and config.objective in ("sft", "grpo"):
        raise UserError(
            f"data.path holds pairs, and objective {config.objective} learns from conversations; use "
            "--config=configs/dpo.py or configs/reward.py"
        )
    if config.objective == "grpo":
        check_updates(config, total_steps)
    if warmup > total_steps:
        raise UserError(f"optimizer.warmup_steps {warmup} is longer than the run of {total_steps} steps")
    if seq_len < max_tokens:
        raise UserError(
            f"data.seq_len {seq_len} is below the data's max_tokens {max_tokens}; raise data.seq_len or prepare with "
            f"--max_tokens {seq_len}"
        )


def check_updates(config: ConfigDict, total_steps: int) -> None:
    """Raises: UserError, if a run could end, be saved or be cut into micro-batches amid the steps on its answers."""
    updates = config.grpo.updates
    for key, steps in (("train.max_steps", total_steps), ("train.save_interval", config.train.save_interval)):
        if steps % updates:
            raise UserError(f"{key} {steps} is not a multiple of grpo.updates {updates}; choose one")
    if config.train.grad_accumulation_steps != 1:
        raise UserError("objective grpo takes train.batch_size rows at a time; leave train.grad_accumulation_steps 1")


def check_model(seq_len: int, max_seq_len: int, n_heads: int, tensor: int) -> None:
    """Raises: UserError, if a row exceeds the model's context, or `tensor` devices can't divide its heads."""
    if seq_len > max_seq_len:
        raise UserError(f"data.seq_len {seq_len} is longer than the model's context {max_seq_len}")
    if n_heads % tensor:
        divisors = ", ".join(str(n) for n in range(1, n_heads + 1) if n_heads % n == 0)
        raise UserError(f"mesh.tensor {tensor} does not divide the model's {n_heads} heads; choose one of {divisors}")


def resolved(config: ConfigDict, total_steps: int, identity: dict[str, Any]) -> dict[str, Any]:
    """The content of `config.json`: the configuration, the number of steps, the run's identity, package versions."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    packages = {name: importlib.metadata.version(name) for name in names}
    packages["tinysft-jax"] = tinysft_jax.__version__  # it has no metadata where it is not installed
    settings = {"config": config.to_dict(), "total_steps": total_steps, "run": identity}
    return {"format_version": 1, **settings, "packages": packages}
