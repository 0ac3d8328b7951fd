"""Whether a run that continues is the run that began."""

import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tinysft_jax import files
from tinysft_jax.data.dataset import PreparedData
from tinysft_jax.data.packing import Packing
from tinysft_jax.errors import RunError, UserError
from tinysft_jax.schema import COUNT, NUMBER, REAL_OR_NULL, Kind, Schema, check
from tinysft_jax.training.config import flat
from tinysft_jax.training.optimizer import warmup_cosine
from tinysft_jax.training.state import RANDOM

TOTAL_STEPS = "steps"
FORMAT_VERSION = 1  # of what a checkpoint says besides arrays

_COUNTS: Kind = ("two whole numbers", lambda value: isinstance(value, list) and [*map(type, value)] == [int, int])
_PROGRESS: Schema = {
    "format_version": NUMBER,
    "run": {TOTAL_STEPS: COUNT},
    "best_loss": REAL_OR_NULL,
    "best_step": COUNT,
    "evaluated_step": NUMBER,
    "eval_rows": COUNT,
    "skipped_steps": _COUNTS,
    "model": {},
}


def check_progress(progress: Any, where: Path) -> None:
    """Looks at what a checkpoint says besides arrays.

    Raises:
      RunError: if it is of a newer program, or says what can't be.
    """
    try:
        check(progress, {"format_version": NUMBER})
        if progress["format_version"] > FORMAT_VERSION:
            raise UserError("it is of a newer program; upgrade tinysft-jax")
        check({"eval_rows": 0} | progress, _PROGRESS)  # which programs before did not write
    except UserError as error:
        raise RunError(f"can't continue from {where}: {error}") from None


def run_identity(config: ConfigDict, data: PreparedData, packing: Packing, total_steps: int) -> dict[str, Any]:
    """What must not change when a run continues: its model, its data and their order, the arithmetic of a step.

    Returns:
      JSON, by name.
    """
    values = flat(config)
    is_random = config.init_from in ("", RANDOM)
    shape = {key: value for key, value in values.items() if key.startswith("model.")} if is_random else {}
    return {
        "init_from": config.init_from,
        **shape,
        "data": files.sha256(data.directory / "manifest.json")[:16],
        "chat_template": data.description["chat_template"],
        "tokenizer": data.description["tokenizer"],
        "seed": config.seed,
        "data.seq_len": config.data.seq_len,
        "packing": packing.fingerprint,
        "train.batch_size": config.train.batch_size,
        **{key: value for key, value in values.items() if key.startswith("optimizer.")},
        TOTAL_STEPS: total_steps,
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What distinguishes two identities, other than that the run is longer."""
    keys = dict.fromkeys((*now, *before))
    if before.get(TOTAL_STEPS, 0) <= now[TOTAL_STEPS]:
        del keys[TOTAL_STEPS]
    return [
        f"{key} was {_shown(before, key)}, now {_shown(now, key)}"
        for key in keys
        if before.get(key) != now.get(key)
        and not (key == "init_from" and _start(before.get(key)) == _start(now.get(key)))
    ]


def _start(init_from: Any) -> str:
    """What `init_from` means, however it is written."""
    if init_from in ("", RANDOM):
        return RANDOM
    return os.path.realpath(os.path.expanduser(str(init_from)))


def what_more_steps_do(config: ConfigDict, before: int, now: int, step: int) -> str:
    """How the learning rate goes on in a run of `now` steps that was one of `before`, `step` of them done."""
    rates = [
        float(warmup_cosine(config.optimizer.learning_rate, config.optimizer.warmup_steps, total)(step))
        for total in (now, before)
    ]
    return (
        f"the run is longer than it was, {now:,} steps instead of {before:,}: the learning rate of step {step + 1:,} "
        f"is {rates[0]:.2e} instead of {rates[1]:.2e}, and falls to 0 at step {now:,}"
    )


def _shown(identity: dict[str, Any], key: str) -> str:
    value = identity.get(key, "")
    return "empty" if value == "" else str(value)
