"""The README of a Hugging Face folder: what the model is, how to use it, how it was trained."""

import json
import math
import os
import shutil
import string
from pathlib import Path
from typing import Any, NamedTuple

from tinysft_jax import chat, files
from tinysft_jax.console import UserError, explained
from tinysft_jax.conversion.families import FAMILIES, family_of
from tinysft_jax.parameters import ModelDescription, count_parameters

CARD_CONTENT = ("README.md", "loss.png", "evaluation.png")
_ASSETS = Path(__file__).parents[1] / "assets"
# In metrics.jsonl, after the objective's name and a slash: what is measured of the best model, and of it at the end.
_VAL, _FINAL = "val_", "final_val_"
_DATA_KEYS = ("format", "tasks", "source", "max_tokens", "splits")
# Settings that are not about training, or are in the card's first table.
_OMITTED = ("model", "mesh", "wandb", "export", "profile")


class RunRecord(NamedTuple):
    """A run, as far as its work directory tells."""

    settings: dict[str, Any]  # the configuration
    data: dict[str, Any] | None  # what `data.json` of the prepared data set says of it, if it can be read
    step: int | None  # of the best model, if it is known
    metrics: dict[str, int | float]  # the best model's validation losses, and on how many packed rows
    plot: Path  # the loss curves, if the file exists

    @property
    def loss(self) -> float:
        """The best model's validation loss over all tasks; NaN if it is unknown."""
        losses = (self.metrics.get(f"{self.objective}/{prefix}loss") for prefix in (_FINAL, _VAL))
        return next((loss for loss in losses if loss is not None), math.nan)

    @property
    def objective(self) -> str:
        """What was minimised; runs from before there was a choice don't say."""
        return str(self.settings.get("objective", "sft"))


def read_run(workdir: Path) -> RunRecord:
    settings = files.read_json(workdir / "config.json", "a work directory", format_version=1).get("config")
    if not isinstance(settings, dict):
        raise UserError(f"{workdir / 'config.json'}: 'config' is not what a run writes; copy it again")
    try:
        description = Path(settings["data"]["path"]) / "data.json"
        content = files.read_json(description, "a prepared data set", format_version=4)
        data = {key: content[key] for key in _DATA_KEYS}
    except (UserError, KeyError, TypeError):
        data = None
    best = workdir / "model"  # a link to models/<step>
    name = os.path.basename(os.readlink(best)) if best.is_symlink() else ""
    step = int(name) if name.isdecimal() else None
    lines = files.read_json_lines(workdir / "metrics.jsonl")
    run = RunRecord(settings, data, step, {}, workdir / "loss.png")
    names = tuple(f"{run.objective}/{prefix}" for prefix in (_VAL, _FINAL))
    # The final evaluation sees more rows than the one by which the model was chosen.
    final = [line for line in lines if f"{names[1]}rows" in line]
    for line in final or [line for line in lines if line.get("step") == step]:
        run.metrics.update(
            {key: of for key, of in line.items() if key.startswith(names) and isinstance(of, int | float)}
        )
    return run


def write_card(
    directory: Path, title: str, description: ModelDescription, run: RunRecord | None = None, report: Path | None = None
) -> None:
    """Writes `README.md`, and the plots that it shows, into a Hugging Face folder.

    `title` is the model's name, `run` the run that trained it, `report` the output of `tinysft_jax.evaluation.run`.
    """
    config, template = description.config, description.chat_template
    facts = {
        "title": title,
        "parameters": f"{count_parameters(config):,}",
        "architecture": FAMILIES[family_of(config)].architecture,
        "shape": f"{config.n_layers}, {config.dim}, {config.n_heads}, {config.hidden_dim}",
        "context": f"{config.max_seq_len:,}",
        "vocabulary": f"{config.vocab_size:,}",
        "template": template if isinstance(template, str) else "its own" if template else "none",
        "system": chat.DEFAULT_SYSTEM,
    }
    pages = ["model_card.md"]
    if description.tokenizer:
        from_files = description.tokenizer_files
        facts["special"] = f"`{description.make_tokenizer().bpe.eot}`" + ("" if from_files else " or `<|pad|>`")
        pages += [f"model_card_{'plain' if not template else 'files' if from_files else template}.md"]
    parts = [string.Template((_ASSETS / page).read_text(encoding="utf-8")).substitute(facts) for page in pages]
    if run:
        parts += [*_training(run), *_figure(directory, "loss", run.plot)]
    if report:
        parts += [_evaluation(report), *_figure(directory, "evaluation", report / "report.png")]
    files.write_text(directory / "README.md", "\n\n".join(part.strip() for part in parts) + "\n")


def _figure(directory: Path, name: str, plot: Path) -> list[str]:
    if not plot.is_file():
        return []
    shutil.copyfile(plot, directory / f"{name}.png")
    return [f"![{name}]({name}.png)"]


def _training(run: RunRecord) -> list[str]:
    parts = ["## Data", _json_block(run.data)] if run.data else []
    settings = {key: value for key, value in run.settings.items() if key not in _OMITTED}
    # Of paths, only the names: the rest is private.
    if "init_from" in settings:
        settings["init_from"] = Path(str(settings["init_from"])).name
    if isinstance(data := settings.get("data"), dict) and "path" in data:
        settings["data"] = data | {"path": Path(str(data["path"])).name}
    parts += ["## Training", _json_block(settings)]
    if run.step is not None:
        parts += [f"This is the model of step {run.step:,}, the best by validation loss."]
    return parts + ([_json_block(run.metrics)] if run.metrics else [])


def _json_block(content: dict[str, Any]) -> str:
    return f"```json\n{json.dumps(content, indent=2, ensure_ascii=False)}\n```"


def _evaluation(report: Path) -> str:
    """The report in Markdown, with each heading one level deeper."""
    with explained(f"{report} is not an evaluation: can't read its report.md"):
        text = (report / "report.md").read_text(encoding="utf-8")
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines())
