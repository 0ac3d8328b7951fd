"""What a work directory tells of the run that made its best model."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from tinysft_jax import files
from tinysft_jax.data.description import read_description
from tinysft_jax.errors import UserError
from tinysft_jax.training.metrics import ALL_TASKS, FINAL, FINAL_ROWS, read_metrics


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run, as far as its work directory tells.

    Attributes:
      settings: the configuration, by dotted key.
      packages: name → version.
      data: `data.json` of the prepared data set, or None if it can't be read (any more).
      step: at which the best model was saved, or None.
      losses: its validation losses, by metric name: of the final evaluation, or where there was none, of its step.
      rows: of the validation split that the final evaluation saw, or None.
      plot: the curves, or None.
    """

    settings: dict[str, Any]
    packages: dict[str, str]
    data: dict[str, Any] | None
    step: int | None
    losses: dict[str, float]
    rows: int | None
    plot: Path | None


def read_run(path: Path) -> RunRecord | None:
    """The record of a work directory; None if `path` is no work directory.

    Raises:
      UserError: if its `config.json` is damaged or from a newer program.
    """
    if not (path / "config.json").is_file() or (path / "model.json").exists():
        return None
    content = files.read_json(path / "config.json", "a work directory", format_version=1)
    config, packages = content.get("config", {}), content.get("packages", {})
    if not isinstance(config, dict) or not isinstance(packages, dict) or not all(map(_is_text, packages.values())):
        raise UserError(f"{path / 'config.json'}: 'config' or 'packages' is not what a run writes; copy it again")
    settings = _flat(config)
    step = _best_step(path)
    metrics = read_metrics(path)
    final = next((line for line in metrics if isinstance(line.get(FINAL_ROWS), int)), {})
    lines = [final] if final else [line for line in metrics if line.get("step") == step]
    return RunRecord(
        settings=settings,
        packages=packages,
        data=_data(settings.get("data.path")),
        step=step,
        losses={
            key: value
            for line in lines
            for key, value in line.items()
            if key.startswith((ALL_TASKS, FINAL)) and isinstance(value, float)
        },
        rows=final.get(FINAL_ROWS),
        plot=path / "loss.png" if (path / "loss.png").is_file() else None,
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _best_step(path: Path) -> int | None:
    """`model` is a link to `models/<step>`."""
    name = os.path.basename(os.readlink(path / "model")) if (path / "model").is_symlink() else ""
    return int(name) if name.isdecimal() else None


def _data(path: object) -> dict[str, Any] | None:
    try:
        return read_description(Path(str(path)))
    except UserError:
        return None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
