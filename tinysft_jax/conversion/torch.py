"""The PyTorch project's checkpoints, read without running any code in them, and written."""

import dataclasses
import itertools
import math
import re
import struct
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Complex

from tinysft_jax.console import RunError, UserError, reason, shown
from tinysft_jax.conversion.names import EMBEDDING, HEAD, as_numpy, bare_name, check_names, collect_params, torch_names
from tinysft_jax.model import LARGEST_SIZE, GPTConfig
from tinysft_jax.parameters import ModelDescription, Params, parse_trained_length, trim_vocabulary
from tinysft_jax.tokenizer import GPT2_RANKS, ChatTokenizer

if TYPE_CHECKING:
    import torch

_BUFFER = re.compile(r"blocks\.\d+\.attn\.(freqs_cis|mask)")

# All that torch.load was seen to raise on damaged files (found by changing bytes at random).
_LOAD_ERRORS = (
    UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """What a `.pt` file of the model holds.

    Attributes:
      path: the file.
      parameters: the model's tensors, their names without those of wrappers.
      buffers: what PyTorch stores beside the parameters: each block's `freqs_cis` (rotary table) and `mask`.
      content: all of the file: beside the state, `config`, `step`, `loss`, `model_type`, ...
    """

    path: Path
    parameters: "dict[str, torch.Tensor]"
    buffers: "dict[str, torch.Tensor]"
    content: dict[Any, Any]

    def buffer(self, name: str) -> "torch.Tensor | None":
        """The matrix that every block has a copy of, or None if no block has it.

        Raises:
          UserError: if the copies differ.
        """
        copies = [tensor for key, tensor in self.buffers.items() if key.endswith(f".{name}")]
        if not copies:
            return None
        if copies[0].ndim != 2 or not all(copy.equal(copies[0]) for copy in copies):
            raise UserError(f"the blocks' {name} buffers are not copies of one matrix")
        return copies[0]


def open_torch_file(path: str | Path) -> TorchFile:
    """Opens a checkpoint, or a bare state dict of the model.

    Raises:
      UserError: if torch is not installed, or the file holds no state of this model.
    """
    path = Path(path)
    content = _load(path)
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    keys = [key for key in state if isinstance(key, str)] if isinstance(state, dict) else []
    if not any(bare_name(key) in torch_names(1) for key in keys):
        raise UserError(f"{path} is no checkpoint of this model: no model_state_dict with keys such as {EMBEDDING}")
    import torch

    parameters, buffers = {}, {}
    size = path.stat().st_size
    for key, tensor in state.items():
        name = bare_name(key) if isinstance(key, str) and key.isprintable() else shown(key)
        group = buffers if _BUFFER.fullmatch(name) else parameters
        if name in group:
            raise UserError(f"{path}: {name} occurs twice, under different names of wrappers")
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
            raise UserError(f"{path}: {name} is not a dense tensor")
        if group is parameters and not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {tensor.dtype}, not a floating-point tensor")
        if tensor.nbytes > size:  # repeated by strides of 0, a few bytes can stand for any number
            raise UserError(f"{path}: {name} has {tensor.nbytes:,} bytes, the whole file {size:,}")
        group[name] = tensor
    # The blocks may share one table; of the parameters, only the head is another's second name.
    total = sum(tensor.nbytes for name, tensor in parameters.items() if name != HEAD)
    if total > size:
        raise UserError(f"{path}: its parameters have {total:,} bytes, the whole file {size:,}: they share memory")
    return TorchFile(path, parameters, buffers, content)


def _load(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError("PyTorch checkpoints need torch: pip install -e '.[torch]'") from None
    try:
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"  # files of before torch 1.6 are no archives, and can't be mapped
        if is_archive:
            _check_archive(path)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None
    except MemoryError:
        raise UserError(f"{path} claims more memory than there is") from None
    except _LOAD_ERRORS as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} carries code ({found[1]!r}), which was not run; save it again with plain values only"
            ) from None
        raise UserError(f"{path} is not a PyTorch checkpoint, or is damaged or cut short; copy it again") from None


def _check_archive(path: Path) -> None:
    """Refuses compressed entries: torch writes none, maps them as if they were not, and small ones can be vast."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise UserError(f"{path} is compressed, which PyTorch's files are not; save it again with torch.save")


if TYPE_CHECKING:
    import torch

# Where this package's own files say what the PyTorch project's leave unsaid (`ModelDescription`'s keys).
LANGUAGE = "tinysft_jax"


def read_torch_checkpoint(path: str | Path, n_heads: int | None = None) -> tuple[ModelDescription, Params]:
    """Reads a checkpoint as a model of this package.

    Args:
      path: the `.pt` file.
      n_heads: the number of attention heads, for a file that doesn't tell.

    Returns:
      What the model is, and its parameters: nested dicts of float32 NumPy arrays, the table padded.

    Raises:
      UserError: if the file is no sound checkpoint of this model, or contradicts itself or `n_heads`.
    """
    file = open_torch_file(path)
    try:
        check_names(file.parameters, torch_names(_n_layers(file)), optional=HEAD)
        config, assumed = _infer_config(file, n_heads)
        description = _describe(file, config, assumed)
        params = _convert(file, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return description, params


def _describe(file: TorchFile, config: GPTConfig, assumed: dict[str, int | float]) -> ModelDescription:
    source = {"kind": "pytorch", "file": file.path.name}
    for key in ("step", "loss", "model_type"):
        value = file.content.get(key)
        if _is_plain(value):
            source[key] = value
    if assumed:
        source["assumed"] = assumed
    language = usual_language(config, file.content.get("model_type") == "sft")
    stated = file.content.get(LANGUAGE)
    stated = stated if isinstance(stated, dict) else {}
    if "tokenizer" in stated:
        language = ChatTokenizer.from_description(stated).description()
    return ModelDescription(config, **language, source=source, trained_length=parse_trained_length(stated, config))


def _is_plain(value: object) -> bool:
    """Whether a value is one that training writes, fit for `model.json`."""
    if isinstance(value, str):
        return value.isprintable() and len(value) <= 100
    return isinstance(value, int | float) and abs(value) < 2**63  # false for NaN too


def usual_language(config: GPTConfig, is_chat: bool) -> dict[str, Any]:
    """Chat template and tokenizer of the PyTorch project's own files, which name neither.

    A vocabulary as large as GPT-2's is taken for it, another is unknown.
    """
    tokenizer = {"kind": "gpt2", "bpe_ranks": GPT2_RANKS} if config.vocab_size > GPT2_RANKS else None
    return {"chat_template": "text" if is_chat else None, "tokenizer": tokenizer}


def _n_layers(file: TorchFile) -> int:
    layers = (re.match(r"blocks\.(\d{1,4})\.", name) for name in file.parameters)
    return max((int(layer[1]) for layer in layers if layer), default=0) + 1


def _infer_config(file: TorchFile, n_heads: int | None) -> tuple[GPTConfig, dict[str, int | float]]:
    """The model's shape, and those parts of it that nothing in the file tells and so are the defaults."""
    vocab_size, dim = _matrix_shape(file, EMBEDDING)
    hidden_dim, _ = _matrix_shape(file, "blocks.0.mlp.w1.weight")
    claims = {
        "its tensors": {"vocab_size": vocab_size, "dim": dim, "n_layers": _n_layers(file)},
        "its config": _stated_config(file),
        "--n_heads": {} if n_heads is None else {"n_heads": n_heads},
    }
    if (table := file.buffer("freqs_cis")) is not None:
        claims["freqs_cis"] = {"max_seq_len": len(table), "n_heads": _n_heads(table, dim)}
        theta = rope_theta(table)
        claims["freqs_cis"] |= {} if theta is None else {"rope_theta": theta}
    if (mask := file.buffer("mask")) is not None:
        claims["mask"] = {"max_seq_len": len(mask)}

    shape = {"mlp_ratio": claims["its config"].pop("mlp_ratio", mlp_ratio(dim, hidden_dim))}
    if int(dim * shape["mlp_ratio"]) != hidden_dim:
        raise UserError(f"mlp_ratio is {shape['mlp_ratio']} in its config, but w1 has {hidden_dim} rows for dim {dim}")
    for field in ("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len", "rope_theta"):
        values = {who: claim[field] for who, claim in claims.items() if field in claim}
        tolerance = 1e-5 if field == "rope_theta" else 0.0  # the table gives theta only nearly
        if any(not math.isclose(*pair, rel_tol=tolerance) for pair in itertools.combinations(values.values(), 2)):
            raise UserError(f"{field} is {', but '.join(f'{value} by {who}' for who, value in values.items())}")
        if values:
            shape[field] = next(iter(values.values()))
    if "n_heads" not in shape:
        raise UserError("the number of attention heads can't be determined from the file; convert it with --n_heads N")
    assumed = {field: getattr(GPTConfig, field) for field in ("max_seq_len", "rope_theta") if field not in shape}
    return GPTConfig(**shape, **assumed), assumed


def _stated_config(file: TorchFile) -> dict[str, int | float]:
    """The entries of the file's `config` that say what its tensors say too."""
    config = file.content.get("config", {})
    if not isinstance(config, dict | None):
        raise UserError(f"its config is a {type(config).__name__}, not a dict")
    stated = {}
    for field in dataclasses.fields(GPTConfig):
        value = config.get(field.name) if config else None
        if value is None:
            continue
        kinds = (int, float) if field.type is float else (int,)
        if type(value) not in kinds or not 0 < value <= LARGEST_SIZE:
            raise UserError(f"{field.name} is {shown(value)} in its config, not a positive number below 2^31")
        stated[field.name] = field.type(value)
    return stated


def _matrix_shape(file: TorchFile, name: str) -> tuple[int, int]:
    shape = tuple(file.parameters[name].shape)
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{name} has shape {list(shape)}, which is no matrix")
    return shape


def mlp_ratio(dim: int, hidden_dim: int) -> float:
    """The ratio that gives exactly `hidden_dim` where a model computes int(dim * ratio)."""
    ratio = hidden_dim / dim
    while int(dim * ratio) < hidden_dim:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _n_heads(table: "torch.Tensor", dim: int) -> int:
    head_dim = 2 * table.shape[1]
    if not head_dim or dim % head_dim:
        raise UserError(f"freqs_cis has shape {list(table.shape)}, which fits no head size that divides dim {dim}")
    return dim // head_dim


def rope_theta(table: "torch.Tensor") -> float | None:
    """The base of a rotary table exp(i position theta^(-2k / head_dim)), or None if the table doesn't tell.

    Raises:
      UserError: if it is another table (of scaled positions, say).
    """
    n_positions, half = table.shape
    if not table.is_complex() or n_positions < 2 or half < 2:  # a cast to bfloat16 leaves only the cosines
        return None
    turns = table.cfloat().numpy().astype(np.complex128)
    angles = np.angle(turns[1])
    if (angles > 0).all():
        exact = float(angles[0] / angles[-1]) ** (half / (half - 1))
        # Float32 tables give theta to 2e-7: the shortest decimal in that range is what was meant.
        theta = next(short for n in range(1, 18) if math.isclose(short := float(f"{exact:.{n}g}"), exact, rel_tol=1e-6))
        if np.abs(_rotary_table(n_positions, half, theta) - turns).max() < 1e-6 * max(n_positions, 1000):
            return theta
    raise UserError("freqs_cis is no plain rotary table exp(i position theta^(-2k / head_dim))")


def _rotary_table(n_positions: int, half: int, theta: float) -> Complex[np.ndarray, "T half"]:
    return np.exp(1j * np.outer(np.arange(n_positions), theta ** -(np.arange(half) / half)))


def _convert(file: TorchFile, config: GPTConfig) -> Params:
    shapes = {name: tuple(tensor.shape) for name, tensor in file.parameters.items()}
    params = collect_params(config, torch_names(config.n_layers), shapes, lambda name: as_numpy(file.parameters[name]))
    table = params["tok_emb"]["embedding"][: config.vocab_size]
    if HEAD in file.parameters and not np.array_equal(as_numpy(file.parameters[HEAD]), table):
        raise UserError(f"{HEAD} differs from {EMBEDDING}; in this model they are one parameter")
    return params


if TYPE_CHECKING:
    import torch

# What that project's `config` holds; the rest of a shape it has by default, or finds nowhere.
CONFIG_KEYS = ("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len")

# Its mask, float32 with a row and a column for every position, takes 1 GiB then.
LONGEST_CONTEXT = 16384


def write_torch_checkpoint(path: Path, params: Params, description: ModelDescription) -> None:
    """Writes a `.pt` that the PyTorch project loads with `weights_only=True` and a strict `load_state_dict`.

    Args:
      path: the file to write.
      params: a GPT's parameters, the table with or without its padding rows.
      description: what the model is.

    Raises:
      UserError: if torch is not installed, or the context is too long for a file that holds a mask.
      RunError: if the disk is full, say.
    """
    if description.config.max_seq_len > LONGEST_CONTEXT:
        raise UserError(
            f"a PyTorch checkpoint holds a mask of max_seq_len x max_seq_len numbers, so it can't be of a model with "
            f"max_seq_len {description.config.max_seq_len:,}, above {LONGEST_CONTEXT:,}; convert it --to huggingface"
        )
    try:
        import torch
    except ImportError:
        raise UserError("PyTorch checkpoints need torch: pip install -e '.[torch]'") from None
    content = torch_content(params, description)
    try:
        with path.open("wb") as file:  # given a path, torch.save would put its name into the file
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # its archive writer's errors are RuntimeErrors
        raise RunError(f"can't write {path}: {reason(error)}") from None


def torch_content(params: Params, description: ModelDescription) -> dict[str, Any]:
    """What a checkpoint holds.

    `step` and `loss` are those of the checkpoint that the model was read from, else 0 and NaN. A tokenizer or template
    other than that project's is named under a key of this package's, so that nothing is lost on the way back.
    """
    config, source = description.config, description.source
    is_chat = description.chat_template is not None
    language = {"chat_template": description.chat_template, "tokenizer": description.tokenizer}
    unknown = language | {"tokenizer": None}
    stated = {} if language in (usual_language(config, is_chat), unknown) else language
    if description.trained_length < config.max_seq_len:
        stated = stated | {"trained_length": description.trained_length}
    return {
        "model_state_dict": torch_state(params, config),
        "optimizer_state_dict": {},
        "step": source.get("step", 0),
        "loss": source.get("loss", math.nan),
        "config": {key: getattr(config, key) for key in CONFIG_KEYS},
        **({"model_type": "sft"} if is_chat else {}),
        **({LANGUAGE: stated} if stated else {}),
    }


def torch_state(params: Params, config: GPTConfig) -> "dict[str, torch.Tensor]":
    """The state dict, in that project's order; the buffers, alike in all blocks, lie in memory and file once."""
    import torch

    params = jax.tree.map(np.asarray, trim_vocabulary(params, config))
    buffers = {
        "freqs_cis": _torch_rotary_table(config),
        "mask": torch.ones(config.max_seq_len, config.max_seq_len).tril(),
    }
    state = {}
    for name, place in torch_names(config.n_layers).items():
        if name.endswith(".attn.wq.weight"):
            state |= {f"blocks.{place.layer}.attn.{buffer}": table for buffer, table in buffers.items()}
        # A copy: saved as a view, a tensor brings along all the memory that it is a view of.
        state[name] = torch.from_numpy(np.array(place.view(params), order="C"))
    return state | {HEAD: state[EMBEDDING]}


def _torch_rotary_table(config: GPTConfig) -> "torch.Tensor":
    """exp(i position theta^(-2k / head_dim)), complex64 `[max_seq_len, head_dim / 2]`, rounded as PyTorch rounds."""
    import torch

    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angles = torch.outer(torch.arange(config.max_seq_len).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)
