"""The PyTorch project's checkpoints, read without running any code in them, and written."""

import dataclasses
import functools
import math
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tinysft_jax.bpe import GPT2_RANKS
from tinysft_jax.console import RunError, UserError, explained, import_extra, named, shown
from tinysft_jax.conversion.names import OWN_KEY, TORCH, bare_name, mlp_ratio, own_entries
from tinysft_jax.gpt_config import LARGEST_SIZE, GPTConfig
from tinysft_jax.parameters import ModelDescription, Params, parse_trained_length
from tinysft_jax.tokenizer import ChatTokenizer

Tensors = dict[str, Any]  # name → torch.Tensor; torch is an extra, imported when it is needed
_torch = functools.partial(import_extra, "torch", "torch", "a PyTorch checkpoint")
_BUFFER = re.compile(r"blocks\.\d+\.attn\.(freqs_cis|mask)")
# What the file's `config` holds; the PyTorch project has no place for the other fields of a GPTConfig.
_CONFIG_KEYS = ("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len")
_SHAPE_KEYS = (*_CONFIG_KEYS, "mlp_ratio", "rope_theta")  # in which the PyTorch project's models differ
# The float32 mask, a number for each pair of positions, takes 1 GiB then.
LONGEST_CONTEXT = 16384


def open_torch_file(path: Path) -> tuple[Tensors, dict[Any, Any]]:
    """Opens a checkpoint, or a bare state dict of the model; returns the state's tensors, and the file's content.

    The tensors are memory-mapped, and have names without those of wrappers: the parameters, and the buffers that each
    block may have, `freqs_cis` (RoPE, complex64 `[max_seq_len, head_dim / 2]`) and `mask`. The content is the state,
    `config`, `step`, `loss`, `model_type`, ...
    """
    content = _load(path)
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    known = TORCH.paths(n_layers=1)
    if not isinstance(state, dict) or not any(isinstance(key, str) and bare_name(key) in known for key in state):
        raise UserError(f"{path} is no checkpoint of this model: it has no tensors such as {TORCH.embedding}")
    size = path.stat().st_size
    tensors: Tensors = {}
    for key, tensor in state.items():
        name = bare_name(key) if isinstance(key, str) and key.isprintable() else shown(key)
        if name in tensors:
            raise UserError(f"{path}: {name} occurs twice, under different names of wrappers")
        if fault := _tensor_fault(name, tensor, size):
            raise UserError(f"{path}: {name} {fault}")
        tensors[name] = tensor
    # Blocks may share their buffers. Of the parameters, only the head is another's second name.
    total = sum(tensor.nbytes for name, tensor in _parameters(tensors).items() if name != TORCH.head)
    if total > size:
        raise UserError(f"{path}: its parameters have {total:,} bytes, the whole file {size:,}: they share memory")
    return tensors, content


def _parameters(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not _BUFFER.fullmatch(name)}


def shared_buffer(tensors: Tensors, name: str) -> Any | None:
    """The matrix of which every block has a copy, or None. Raises: UserError, if the copies differ."""
    copies = [tensor for key, tensor in tensors.items() if key.endswith(f".attn.{name}")]
    if copies and (copies[0].ndim != 2 or not all(copy.equal(copies[0]) for copy in copies)):
        raise UserError(f"the blocks' {name} buffers are not copies of one matrix")
    return copies[0] if copies else None


def _tensor_fault(name: str, tensor: Any, file_size: int) -> str | None:
    torch = _torch()
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        return "is not a dense tensor"
    if not tensor.is_floating_point() and not _BUFFER.fullmatch(name):
        return f"is {tensor.dtype}, not a floating-point tensor"
    if tensor.nbytes > file_size:  # with strides of 0, a few bytes can stand for any number
        return f"has {tensor.nbytes:,} bytes, the whole file {file_size:,}"
    return None


def _load(path: Path) -> Any:
    torch = _torch()
    try:
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"  # files from before torch 1.6 are not, and can't be mapped
        if is_archive and _is_compressed(path):  # torch.load would map the compressed bytes
            raise UserError(f"{path} is compressed, which PyTorch's files are not; save it again with torch.save")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None
    except MemoryError:
        raise UserError(f"{path} claims more memory than there is") from None
    except Exception as error:  # damaged bytes raise anything
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} carries code ({found[1]!r}), which was not run; save it again with plain values only"
            ) from None
        raise UserError(f"{path} is not a PyTorch checkpoint, or is damaged or cut short; copy it again") from None


def _is_compressed(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    return any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries)


def read_torch_checkpoint(path: Path, n_heads: int | None = None) -> tuple[ModelDescription, Params]:
    """Reads a PyTorch checkpoint, as `checkpoints.open_model` does; it must not contradict itself or `n_heads`."""
    tensors, content = open_torch_file(path)
    with named(path):
        TORCH.check_names(_parameters(tensors), _n_layers(tensors))
        config, assumed = _infer_config(tensors, content, n_heads)
        description = _describe(path, content, config, assumed)
        # Views of the mapped file, if it is in float32.
        arrays = {name: tensor.detach().float().numpy() for name, tensor in _parameters(tensors).items()}
        return description, TORCH.import_tensors(arrays, config)


def _describe(path: Path, content: dict[Any, Any], config: GPTConfig, assumed: dict[str, Any]) -> ModelDescription:
    source = {"kind": "pytorch", "file": path.name}
    source |= {key: content[key] for key in ("step", "loss", "model_type") if _is_plain(content.get(key))}
    source |= {"assumed": assumed} if assumed else {}
    stated = own_entries(content)
    fields = _default_tokenizer(config, is_chat=content.get("model_type") == "sft")
    if "tokenizer" in stated:
        fields = ChatTokenizer.from_description(stated).description()
    return ModelDescription(config, **fields, source=source, trained_length=parse_trained_length(stated, config))


def _is_plain(value: object) -> bool:
    """Whether `model.json` can hold a value."""
    if isinstance(value, str):
        return value.isprintable() and len(value) <= 100
    return isinstance(value, int | float) and abs(value) < 2**63  # false for NaN


def _default_tokenizer(config: GPTConfig, is_chat: bool) -> dict[str, Any]:
    """Chat template and tokenizer of the PyTorch project's own files, which name neither.

    A vocabulary as large as GPT-2's is taken for GPT-2's; a smaller one is unknown.
    """
    tokenizer = {"kind": "gpt2", "bpe_ranks": GPT2_RANKS} if config.vocab_size > GPT2_RANKS else None
    return {"chat_template": "text" if is_chat else None, "tokenizer": tokenizer}


def _n_layers(tensors: Tensors) -> int:
    layers = (re.match(r"blocks\.(\d{1,4})\.", name) for name in tensors)
    return max((int(layer[1]) for layer in layers if layer), default=0) + 1


def _infer_config(
    tensors: Tensors, content: dict[Any, Any], n_heads: int | None
) -> tuple[GPTConfig, dict[str, int | float]]:
    """The model's shape, and those parts of it that nothing in the file says, which get the defaults."""
    for name in (TORCH.embedding, "blocks.0.mlp.w1.weight"):
        if len(shape := tensors[name].shape) != 2 or 0 in shape:
            raise UserError(f"{name} has shape {list(shape)}, which is not a matrix's")
    vocab_size, dim = tensors[TORCH.embedding].shape
    hidden_dim = len(tensors["blocks.0.mlp.w1.weight"])
    stated, mask = _stated_config(content), shared_buffer(tensors, "mask")
    claims = {
        "its tensors": {"vocab_size": vocab_size, "dim": dim, "n_layers": _n_layers(tensors)},
        "its config": stated,
        "--n_heads": {"n_heads": n_heads},
        "freqs_cis": _rotary_claims(shared_buffer(tensors, "freqs_cis"), dim),
        "mask": {} if mask is None else {"max_seq_len": len(mask)},
    }
    shape = {"mlp_ratio": stated.get("mlp_ratio", mlp_ratio(dim, hidden_dim))}
    if int(dim * shape["mlp_ratio"]) != hidden_dim:
        raise UserError(f"mlp_ratio is {shape['mlp_ratio']} in its config, but w1 has {hidden_dim} rows for dim {dim}")
    for field in (*_CONFIG_KEYS, "rope_theta"):
        values = {who: claim[field] for who, claim in claims.items() if claim.get(field) is not None}
        if not values:
            continue
        shape[field] = next(iter(values.values()))
        tolerance = 1e-5 if field == "rope_theta" else 0.0  # float32 angles don't give theta exactly
        if not all(math.isclose(value, shape[field], rel_tol=tolerance) for value in values.values()):
            raise UserError(f"{field} is {', but '.join(f'{value} by {who}' for who, value in values.items())}")
    if "n_heads" not in shape:
        raise UserError("the number of attention heads can't be determined from the file; convert it with --n_heads N")
    assumed = {field: getattr(GPTConfig, field) for field in ("max_seq_len", "rope_theta") if field not in shape}
    return GPTConfig(**shape, **assumed), assumed


def _stated_config(content: dict[Any, Any]) -> dict[str, int | float]:
    """The entries of the file's `config` that say something about the shape."""
    config = {} if content.get("config") is None else content["config"]
    if not isinstance(config, dict):
        raise UserError(f"its config is a {type(config).__name__}, not a dict")
    stated = {name: config[name] for name in _SHAPE_KEYS if config.get(name) is not None}
    for name, value in stated.items():
        if type(value) not in (int, float) or not 0 < value <= LARGEST_SIZE:
            raise UserError(f"{name} is {shown(value)} in its config, not a positive number below 2^31")
    return stated


def _rotary_claims(freqs_cis: Any | None, dim: int) -> dict[str, int | float | None]:
    if freqs_cis is None:
        return {}
    length, half = freqs_cis.shape
    if not half or dim % (2 * half):
        raise UserError(f"freqs_cis has shape [{length}, {half}], which fits no head size that divides dim {dim}")
    return {"max_seq_len": length, "n_heads": dim // (2 * half), "rope_theta": rope_theta(freqs_cis)}


def rope_theta(freqs_cis: Any) -> float | None:
    """The base of exp(i position theta^(-2k / head_dim)), None if it can't be determined.

    Raises: UserError, if `freqs_cis` is something else (of scaled positions, say).
    """
    length, half = freqs_cis.shape
    if not freqs_cis.is_complex() or length < 2 or half < 2:  # a cast to bfloat16 leaves only the cosines
        return None
    rotations = freqs_cis.cfloat().numpy().astype(np.complex128)
    angles = np.angle(rotations[1])
    if (angles > 0).all():
        exact = float(angles[0] / angles[-1]) ** (half / (half - 1))
        # Float32 angles give theta to 2e-7: the shortest decimal in that range is what was meant.
        theta = next(short for n in range(1, 18) if math.isclose(short := float(f"{exact:.{n}g}"), exact, rel_tol=1e-6))
        expected = np.exp(1j * np.outer(np.arange(length), theta ** -(np.arange(half) / half)))
        if np.abs(expected - rotations).max() < 1e-6 * max(length, 1000):
            return theta
    raise UserError("freqs_cis is not exp(i position theta^(-2k / head_dim)); only plain RoPE can be converted")


def check_architecture(config: GPTConfig) -> None:
    """Raises: UserError, if the PyTorch project has no model of this shape."""
    wanted = {field.name: field.default for field in dataclasses.fields(config) if field.name not in _SHAPE_KEYS}
    wanted |= {"n_kv_heads": config.n_heads, "head_dim": config.dim / config.n_heads}
    found = {name: getattr(config, name) for name in wanted}
    if differing := [f"{name} {shown(value)}" for name, value in found.items() if value != wanted[name]]:
        raise UserError(
            f"the PyTorch project has no such model, with {', '.join(differing)}; a Hugging Face folder can hold it"
        )


def write_torch_checkpoint(path: Path, params: Params, description: ModelDescription) -> None:
    """Writes a model, its embedding padded or not, as a `.pt` file.

    The PyTorch project loads it with `weights_only=True` and a strict `load_state_dict`.
    """
    check_architecture(description.config)
    if description.config.max_seq_len > LONGEST_CONTEXT:
        raise UserError(
            f"a PyTorch checkpoint holds a mask of max_seq_len x max_seq_len numbers, too many for max_seq_len "
            f"{description.config.max_seq_len:,}, above {LONGEST_CONTEXT:,}; convert it --to huggingface"
        )
    torch, is_chat = _torch(), description.chat_template is not None
    fields, stated = {"chat_template": description.chat_template, "tokenizer": description.tokenizer}, {}
    if description.tokenizer is not None and fields != _default_tokenizer(description.config, is_chat):
        stated |= fields
    if description.trained_length < description.config.max_seq_len:
        stated["trained_length"] = description.trained_length
    content = {
        "model_state_dict": _state_dict(params, description.config),
        "optimizer_state_dict": {},
        "step": description.source.get("step", 0),
        "loss": description.source.get("loss", math.nan),
        "config": {key: getattr(description.config, key) for key in _CONFIG_KEYS},
        **({"model_type": "sft"} if is_chat else {}),
        **({OWN_KEY: stated} if stated else {}),
    }
    # The errors of torch's archive writer are RuntimeErrors. Given a path, torch.save would put its name into the file.
    with explained(f"can't write {path}", RunError, (OSError, RuntimeError)), path.open("wb") as file:
        torch.save(content, file)


def _state_dict(params: Params, config: GPTConfig) -> Tensors:
    """The state dict, in the PyTorch project's order. The buffers of all blocks share their memory."""
    torch = _torch()
    # As the PyTorch project rounds.
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angles = torch.outer(torch.arange(config.max_seq_len).float(), frequencies)
    buffers = {
        "freqs_cis": torch.polar(torch.ones_like(angles), angles),
        "mask": torch.ones(config.max_seq_len, config.max_seq_len).tril(),
    }
    state = {}
    for name, tensor in TORCH.export_tensors(params, config).items():
        if name.endswith(".wq.weight"):
            state |= {name.replace("wq.weight", buffer): value for buffer, value in buffers.items()}
        state[name] = torch.from_numpy(tensor)
    return state | {TORCH.head: state[TORCH.embedding]}
