"""The README of a Hugging Face folder: what the model is, how to talk to it, and what is known of its training."""

import dataclasses
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from tinysft_jax import chat, files
from tinysft_jax.console import UserError
from tinysft_jax.conversion.huggingface_tokenizer import PAD
from tinysft_jax.data.store import read_description
from tinysft_jax.parameters import ModelDescription, model_parameter_shapes, trim_vocabulary
from tinysft_jax.training.log import ALL_TASKS, FINAL, FINAL_ROWS, read_metrics


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


_LOSS_PLOT, _REPORT_PLOT = "loss.png", "evaluation.png"
CARD_CONTENT = ("README.md", _LOSS_PLOT, _REPORT_PLOT)
# Settings that say nothing of the model: where and how the run wrote; and its shape, which stands above.
_UNTOLD = (
    "model.",
    "wandb.",
    "profile",
    "export",
    "mesh.",
    "train.log_interval",
    "train.save_interval",
    "train.keep_checkpoints",
)

_PATHS = ("data.path", "init_from")  # of which the name is told: where they lay is nobody else's business

_CHAT = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
messages = [{"role": "user", "content": "Write a short story that uses all of these words: cat, tree, happy"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

Without a system message the chat template puts its own first: "SYSTEM"

Prompts of different lengths are padded on the left. To fine-tune further, `apply_chat_template` with
`return_dict=True, return_assistant_tokens_mask=True` marks the answers, each with its end (in TRL:
`assistant_only_loss=True`).
"""
_COMPLETION = """\
```python
from transformers import pipeline

print(pipeline("text-generation", "PATH")("Once upon a time")[0]["generated_text"])
```

This model has no chat template: it completes plain text.
"""
_CONTROL_WARNING = """\
**Content can forge markers.** Here a text that spells `<|user|>`, `<|assistant|>`, `<|system|>`, `<|endoftext|>` or
`<|pad|>` is encoded as that token, in `apply_chat_template` too, so whoever writes a part of a message can pretend to
be another speaker. Only `split_special_tokens=True` keeps content from forging markers. For text that you don't
trust, encode each content so, and put the control tokens between:

```python
def encode_prompt(messages):
    ids = []
    for message in messages:  # begin with a system message
        ids.append(tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"))
        ids += tokenizer(message["content"], split_special_tokens=True, add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] if message["role"] == "assistant" else []
    return [*ids, tokenizer.convert_tokens_to_ids("<|assistant|>")]
```
"""
_TEXT_WARNING = """\
**Content can forge markers.** The role markers of this model are plain text, so a text that spells `<|user|>`,
`<|assistant|>` or `<|system|>` can't be told from them: refuse such content. `<|endoftext|>` and `<|pad|>` are control
tokens; only `split_special_tokens=True` keeps content from forging them.
"""
_PLAIN_WARNING = """\
**Content can forge markers.** A text that spells `<|endoftext|>` or `<|pad|>` is encoded as that control token; only
`split_special_tokens=True` keeps content from forging it.
"""


def write_card(
    directory: Path, title: str, description: ModelDescription, run: RunRecord | None = None, report: Path | None = None
) -> None:
    """Writes `README.md` and the plots that it shows.

    Args:
      directory: the Hugging Face folder.
      title: the model's name.
      description: what the model is.
      run: that made it, where it is known.
      report: what `tinysft_jax.evaluation.run` wrote about it, where there is one.

    Raises:
      UserError: if `report` is no such directory.
    """
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- tinysft-jax", "---"]
    parts = ["\n".join(front), f"# {title}", _shape(description)]
    if description.tokenizer is not None:
        parts += [_use(title, description.chat_template)]
    if run:
        parts += _training(run)
        if run.plot:
            shutil.copyfile(run.plot, directory / _LOSS_PLOT)
    if report:
        parts += [_evaluation(report)]
        if (report / "report.png").is_file():
            shutil.copyfile(report / "report.png", directory / _REPORT_PLOT)
            parts += [f"![what the evaluation measured]({_REPORT_PLOT})"]
    files.write_text(directory / "README.md", "\n\n".join(part.strip() for part in parts) + "\n")


def _shape(description: ModelDescription) -> str:
    config, vocabulary = description.config, f"{description.config.vocab_size:,} tokens"
    if description.tokenizer is not None:
        vocabulary += f", and `{PAD}` for padding, which is in this folder only"
    leaves = jax.tree.leaves(trim_vocabulary(model_parameter_shapes(config), config))
    rows = {
        "parameters": f"{sum(math.prod(leaf.shape) for leaf in leaves):,}",
        "architecture": "StableLM: LayerNorm with biases, rotary positions, SwiGLU, a tied head",
        "layers, dim, heads, hidden": f"{config.n_layers}, {config.dim}, {config.n_heads}, {config.hidden_dim}",
        "context": f"{config.max_seq_len:,} tokens",
        "vocabulary": vocabulary,
        "chat template": description.chat_template or "none",
    }
    return "Made with tinysft-jax.\n\n" + _table(rows)


def _use(title: str, template: str | None) -> str:
    example = _CHAT.replace("SYSTEM", chat.DEFAULT_SYSTEM) if template else _COMPLETION
    warning = {"control": _CONTROL_WARNING, "text": _TEXT_WARNING, None: _PLAIN_WARNING}[template]
    return f"## Use\n\n{example.replace('PATH', title)}\n{warning}"


def _training(run: RunRecord) -> list[str]:
    parts = []
    if run.data:
        parts += ["## Data", _table(_data_rows(run.data))]
    parts += ["## Training"]
    if run.step is not None:
        parts += [
            f"The model of step {run.step:,}, the best by validation loss." if run.losses else f"Step {run.step:,}."
        ]
    if run.rows is not None:
        parts += [f"Evaluated on {run.rows:,} packed rows of the validation split:"]
    if run.losses:
        parts += [_table({key.removeprefix("sft/"): f"{value:.4f}" for key, value in sorted(run.losses.items())})]
    if run.plot:
        parts += [f"![loss]({_LOSS_PLOT})"]
    told = {
        key: value for key, value in run.settings.items() if value not in (None, "") and not key.startswith(_UNTOLD)
    }
    told |= {key: Path(str(told[key])).name for key in _PATHS if key in told}
    parts += ["### Settings", _table(told)]
    if run.packages:
        parts += ["Packages: " + ", ".join(f"{name} {version}" for name, version in run.packages.items()) + "."]
    return parts


def _data_rows(data: dict[str, Any]) -> dict[str, Any]:
    rows = {key: data[key] for key in ("format", "tasks", "max_tokens") if key in data}
    rows |= {f"source: {key}": value for key, value in data.get("source", {}).items() if value is not None}
    for split, totals in data.get("splits", {}).items():
        counts = [f"{totals[key]:,} {key.replace('_', ' ')}" for key in _COUNTS if key in totals]
        rows[split] = ", ".join(counts)
    return rows


_COUNTS = ("conversations", "tokens", "supervised_tokens")


def _evaluation(report: Path) -> str:
    """The report in Markdown, its headings a level lower."""
    try:
        text = (report / "report.md").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't read {report / 'report.md'}: {error.strerror}; is {report} an evaluation?") from None
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines())


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())])


def _cell(value: Any) -> str:
    """A value in a cell: lists and objects in words, nothing that would end the cell."""
    if isinstance(value, dict):
        value = ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    elif isinstance(value, list):
        value = ", ".join(map(_cell, value))
    elif isinstance(value, float):
        value = f"{value:g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
