"""The model directory: `model.json`, which says what the model is, and `params/`, its parameters (orbax).

The table of embeddings is stored without its padding rows, so that a reader needs to know nothing of them.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from tinysft_jax import files, processes
from tinysft_jax.errors import RunError, UserError, reason, shown
from tinysft_jax.model import GPT, LARGEST_SIZE, GPTConfig
from tinysft_jax.quiet import ORBAX_ERRORS, alone, quiet_orbax

FORMAT_VERSION = 1

Params = dict[str, Any]  # nested dicts of arrays; the keys are listed in `model_parameter_shapes`


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """What `model.json` says.

    Attributes:
      config: the model's shape.
      chat_template: "control", "text", or None for a model that completes plain text.
      tokenizer: `{"kind": "gpt2", "bpe_ranks": N}`, or None where it is not known.
      source: where the parameters came from, for people.
      trained_length: tokens of the longest sequence that it was trained on, as far as that is known; else its context.
    """

    config: GPTConfig
    chat_template: str | None
    tokenizer: dict[str, Any] | None
    source: dict[str, Any]
    trained_length: int | None = None

    def __post_init__(self):
        if self.trained_length is None:
            object.__setattr__(self, "trained_length", self.config.max_seq_len)

    def to_json(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        return {"format_version": FORMAT_VERSION, "model": content.pop("config"), **content}

    @classmethod
    def from_json(cls, content: dict[str, Any], where: Path) -> "ModelDescription":
        """Raises: UserError, if a part is missing or can't be."""
        shape, source = content.get("model"), content.get("source", {})
        known = dataclasses.fields(GPTConfig)
        if not isinstance(shape, dict) or not isinstance(source, dict):
            raise UserError(f"{where}: 'model' and 'source' must be objects")
        assumed = source.get("assumed", {})
        if not (isinstance(assumed, dict) and assumed.items() <= shape.items()):
            raise UserError(f"{where}: 'source.assumed' must be an object of entries of 'model', not {shown(assumed)}")
        names = sorted(field.name for field in known)
        if sorted(shape) != names:
            raise UserError(f"{where}: 'model' must have exactly the keys {', '.join(names)}")
        try:
            config = GPTConfig(**{field.name: _number(field, shape[field.name]) for field in known})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        template, tokenizer = content.get("chat_template"), content.get("tokenizer")
        if template not in ("control", "text", None):
            raise UserError(f"{where}: chat_template {shown(template)} is not 'control', 'text' or null")
        if not isinstance(tokenizer, dict | None):
            raise UserError(f"{where}: 'tokenizer' must be an object or null")
        try:
            length = parse_trained_length(content, config)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return cls(config, template, tokenizer, source, length)


def parse_trained_length(content: dict[str, Any], config: GPTConfig) -> int | None:
    """A description's `trained_length`, or None if it has none.

    Raises:
      UserError: if it can't be.
    """
    length, context = content.get("trained_length"), config.max_seq_len
    if length is not None and (type(length) is not int or not 1 <= length <= context):
        raise UserError(f"trained_length is {shown(length)}; it must be from 1 to the context, {context}")
    return length


def _number(field: dataclasses.Field, value: Any) -> int | float:
    """A field of a GPTConfig as JSON has it, where 4.0 may stand as 4."""
    if field.type is float and type(value) is int and abs(value) <= LARGEST_SIZE:
        return float(value)
    if type(value) is not field.type:
        raise UserError(f"model.{field.name} is {shown(value)}; it must be a positive {field.type.__name__}")
    return value


def save_model(path: Path, params: Params, description: ModelDescription, overwrite: bool = False) -> None:
    """Writes a model directory, whole or not at all.

    Args:
      path: the directory to make.
      params: a GPT's parameters as a pure dict, the table with or without its padding rows.
      description: what the model is.
      overwrite: replace what is at `path`.

    Raises:
      UserError: if `path` exists (without `overwrite`) or can't be written.
    """
    files.check_pattern_free(Path(path))
    with files.new_directory(Path(path), overwrite) as directory:
        write_model(directory, params, description)


def write_model(directory: Path, params: Params, description: ModelDescription) -> None:
    """Fills an existing empty directory. With several processes, all call it, and the first writes `model.json`.

    Raises:
      RunError: if the disk is full, say.
    """
    try:
        ocp.save(directory.resolve() / "params", trim_vocabulary(params, description.config))
    except (ValueError, OSError) as error:  # tensorstore's own errors are ValueErrors
        raise RunError(f"can't write {directory}: {reason(error)}") from None
    if processes.is_first():
        files.write_json(directory / "model.json", description.to_json())


def load_description(path: Path) -> ModelDescription:
    """Reads `model.json`.

    Raises:
      UserError: if `path` is not a model directory, or one of a newer program.
    """
    where = Path(path) / "model.json"
    return ModelDescription.from_json(files.read_json(where, "a model directory", FORMAT_VERSION), where)


def load_params(path: Path, config: GPTConfig) -> Params:
    """Reads the parameters to host memory, the table padded as in memory. Each process reads for itself.

    Returns:
      Nested dicts of float32 NumPy arrays.

    Raises:
      UserError: if parameters are missing, unreadable or of other shapes than `config` says.
    """
    directory = Path(path).resolve() / "params"
    wanted = model_parameter_shapes(config)
    try:
        with quiet_orbax(), alone():
            if not ocp.is_orbax_checkpoint(directory):
                raise UserError(f"{path} has no readable params/; convert or copy the model again")
            stored = ocp.metadata(directory).metadata
            if not isinstance(stored, dict):
                raise UserError(f"{directory} holds no parameters; convert or copy the model again")
            differences = _differences(stored, trim_vocabulary(wanted, config))
            if differences:
                raise UserError(f"{directory} does not fit model.json: {'; '.join(differences[:5])}")
            params = ocp.load(directory, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored))
    except ORBAX_ERRORS as error:
        raise UserError(f"can't read {directory}: {reason(error)}") from None
    return pad_vocabulary(params, config)


def load_model(path: str | Path, **options) -> GPT:
    """Reads a model directory, a work directory (its best model so far) or a PyTorch checkpoint (`.pt`).

    Args:
      path: what to read.
      **options: of `GPT`: dtype, attention, remat.

    Raises:
      UserError: if it can't be read; one line says why.
    """
    description, params = read_model(path)
    return make_model(description.config, params, trained_length=description.trained_length, **options)


def read_model(path: str | Path) -> tuple[ModelDescription, Params]:
    """The description and host parameters of what `load_model` takes."""
    path = Path(path).expanduser()
    if path.is_file():
        from tinysft_jax.interop.torch_checkpoint import read_torch_checkpoint  # needs torch, an extra

        return read_torch_checkpoint(path)
    path = model_directory(path)
    description = load_description(path)
    return description, load_params(path, description.config)


def model_directory(path: Path) -> Path:
    """The model directory that `path` is, or that it holds if it is a work directory.

    Raises:
      UserError: if there is none.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a model directory, a work directory or a .pt file")
    if not (path / "model.json").exists() and (path / "config.json").exists():
        if (path / "model.safetensors").exists():
            raise UserError(
                f"{path} is a Hugging Face folder; convert it first: "
                f"convert_torch_weights.py --input {path} --output DIR"
            )
        if not (path / "model").exists():
            raise UserError(f"{path} has no model yet: its run has not got far enough")
        return path / "model"
    return path


def make_model(config: GPTConfig, params: Params, **options) -> GPT:
    """A GPT with these parameters, the table padded (see `pad_vocabulary`)."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), **options)))
    return nnx.merge(graph, jax.tree.map(jax.numpy.asarray, params))


def model_parameter_shapes(config: GPTConfig) -> Params:
    """The parameters' dicts with shapes and dtypes in place of arrays, the table padded."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))))


def trim_vocabulary(params: Params, config: GPTConfig) -> Params:
    """The parameters (or their shapes) without the table's padding rows."""

    def trim(table):
        if isinstance(table, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((config.vocab_size, *table.shape[1:]), table.dtype)
        return table[: config.vocab_size]

    return params | {"tok_emb": {"embedding": trim(params["tok_emb"]["embedding"])}}


def pad_vocabulary(params: Params, config: GPTConfig) -> Params:
    """The parameters with zero rows added to the table, up to `config.padded_vocab_size`."""
    table = np.asarray(params["tok_emb"]["embedding"])
    padded = np.zeros((config.padded_vocab_size, config.dim), table.dtype)
    padded[: len(table)] = table
    return params | {"tok_emb": {"embedding": padded}}


def _differences(stored: Params, wanted: Params) -> list[str]:
    """What distinguishes two trees of shapes, a line each."""
    have, want = (
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
        for leaves in (jax.tree_util.tree_leaves_with_path(tree) for tree in (stored, wanted))
    )
    lines = [f"{key} is missing" for key in want.keys() - have.keys()]
    lines += [f"{key} is unknown" for key in have.keys() - want.keys()]
    for key in want.keys() & have.keys():
        if tuple(have[key].shape) != tuple(want[key].shape) or have[key].dtype != want[key].dtype:
            lines.append(
                f"{key} is {have[key].dtype}{list(have[key].shape)}, not {want[key].dtype}{list(want[key].shape)}"
            )
    return sorted(lines)
