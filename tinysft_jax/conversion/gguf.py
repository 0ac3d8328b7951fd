"""Models in GGUF files, of llama.cpp's architectures `stablelm`, `llama`, `qwen2` and `qwen3`, read and written."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from tinysft_jax.bpe import TOKENIZER_JSON
from tinysft_jax.console import RunError, UserError, explained, named, shown
from tinysft_jax.conversion import gguf_tokenizer, tokenizer_files
from tinysft_jax.conversion.families import FAMILIES, family_of, read_config, write_config
from tinysft_jax.conversion.gguf_file import StoredTensor, import_gguf, read_gguf_file
from tinysft_jax.conversion.huggingface_tokenizer import recognise
from tinysft_jax.conversion.names import OWN_KEY, gguf_layout, own_entries
from tinysft_jax.gpt_config import GPTConfig, RopeScaling
from tinysft_jax.model import rotary_steps
from tinysft_jax.parameters import ModelDescription, Params, describe
from tinysft_jax.tokenizer import ChatTokenizer

# Names of `convert --dtype` → llama.cpp's.
ENCODINGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
# How far a value can move, relative to the largest of its tensor; in q8_0 by half of a 127th of its block's largest,
# whose scale is float16.
ROUND_OFF = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "q8_0": 1 / 200}
# Keys of config.json → keys here, which follow the architecture's name. The first ones a file must have.
_REQUIRED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_OPTIONAL = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "use_parallel_residual": "use_parallel_residual",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
}
_EPSILON = {
    "layer": {"layer_norm_eps": "attention.layer_norm_epsilon"},
    "rms": {"rms_norm_eps": "attention.layer_norm_rms_epsilon"},
}
# All that a file may say of these, if anything.
_FIXED = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "attention.causal": True,
}
_ROPE_FACTORS = "rope_freqs.weight"  # how much slower each pair of features turns; llama.cpp reads it in llama models


def read_gguf(path: Path) -> tuple[ModelDescription, Params]:
    """Reads a GGUF file, as `checkpoints.open_model` does."""
    with named(path):
        pairs, tensors = read_gguf_file(path)
        own = _own_entries(pairs)
        config = _read_config(pairs, tensors, own)
        source = {"kind": "gguf", "file": path.resolve().name}
        description = describe(config, _read_tokenizer(pairs, path), source, own)
        if config.rope_scaling:
            del tensors[_ROPE_FACTORS]
        return description, gguf_layout(config, pairs["general.architecture"]).import_tensors(tensors, config)


def read_gguf_tokenizer(path: Path) -> ChatTokenizer | None:
    """A file's tokenizer; None if it has none. Raises: UserError, if it can't be used."""
    return _read_tokenizer(read_gguf_file(path)[0], path)


def _read_tokenizer(pairs: dict[str, Any], path: Path) -> ChatTokenizer | None:
    kept, end_ids = gguf_tokenizer.to_files(pairs)
    if not kept:
        return None
    if recognised := recognise(json.loads(kept[TOKENIZER_JSON])):
        tokenizer = recognised[0]
        is_text = tokenizer.template is None and _own_entries(pairs).get("chat_template") == "text"
        return tokenizer.with_template("text") if is_text else tokenizer
    return tokenizer_files.from_files(kept, {"eos_token_id": end_ids}, path)


def _own_entries(pairs: dict[str, Any]) -> dict[str, Any]:
    """What this package has written for itself."""
    try:
        return own_entries({OWN_KEY: json.loads(pairs[OWN_KEY])})
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def _read_config(pairs: dict[str, Any], tensors: dict[str, StoredTensor], own: dict[str, Any]) -> GPTConfig:
    """The shape of the model, as its `config.json` would say it."""
    name = pairs.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"its architecture is {shown(name)}; this program's GPT can be {', '.join(FAMILIES)}")
    required = _REQUIRED | _EPSILON[FAMILIES[name].traits["norm"]]
    values = {key: _plain(value) for key, value in pairs.items() if key.startswith(f"{name}.")}
    content = {theirs: values.get(f"{name}.{key}") for theirs, key in required.items()}
    if missing := [f"{name}.{required[theirs]}" for theirs, value in content.items() if value is None]:
        raise UserError(f"it has no {', '.join(missing)}")
    content |= {theirs: value for theirs, key in _OPTIONAL.items() if (value := values.get(f"{name}.{key}"))}
    embedding, head = tensors.get("token_embd.weight"), tensors.get("output.weight")
    if embedding is None:
        raise UserError("it has no token_embd.weight")
    stated = {
        "model_type": name,
        "vocab_size": embedding.shape[0],
        "num_key_value_heads": content["num_attention_heads"],  # if the file doesn't say
        "head_dim": None,
        "tie_word_embeddings": head is None or head.equals(embedding),
        "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
        "partial_rotary_factor": 1.0,
    }
    config = read_config(stated | content)
    sizes = dict.fromkeys(("rope.dimension_count", "attention.value_length"), config.head_dim)
    for key, wanted in (_FIXED | sizes).items():
        if (value := values.get(f"{name}.{key}")) not in (None, wanted):
            raise UserError(f"its {name}.{key} is {shown(value)}, not {wanted}; this program's GPT can't be that")
    if (stored := tensors.get(_ROPE_FACTORS)) and name == "llama":
        return _with_rope_factors(config, np.asarray(stored), own)
    return config


def _with_rope_factors(config: GPTConfig, factors: np.ndarray, own: dict[str, Any]) -> GPTConfig:
    """The shape with Llama 3's scaling, which is stored as factors alone; the usual one, if it is not this package's.

    Raises: UserError, if the factors are others.
    """
    usual = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
    stated = own.get("rope_scaling") or {"factor": _plain(float(factors.max(initial=1))), **usual}
    try:
        config = dataclasses.replace(config, rope_scaling=RopeScaling(**stated))
        if np.allclose(_rope_factors(config), factors, rtol=1e-4):
            return config
    except (UserError, TypeError, ValueError):  # a part is missing or invalid, or there is another number of factors
        pass
    raise UserError(f"its {_ROPE_FACTORS} are not Llama 3's: positions scaled otherwise")


def _rope_factors(config: GPTConfig) -> np.ndarray:
    return np.asarray(rotary_steps(config) / rotary_steps(dataclasses.replace(config, rope_scaling=None)), np.float32)


def _plain(value: Any) -> Any:
    """An array, which no key may be, as a short list, and a float as it was meant before it became a float32."""
    if isinstance(value, np.ndarray):
        return value[:9].tolist()
    with np.errstate(over="ignore"):  # infinity is refused later
        return float(str(np.float32(value))) if isinstance(value, float) else value


def write_gguf(path: Path, params: Params, description: ModelDescription, title: str, dtype: str = "float32") -> None:
    """Writes a model, its embedding padded or not, and its tokenizer, if it is known, as a file for llama.cpp.

    `title` is the model's name, `dtype`, one of `ENCODINGS`, that of the matrices; norms and biases are float32. A
    matrix that has no whole blocks of q8_0 is float16.
    Raises: UserError, if llama.cpp has no architecture or no tokenizer for this model, or a value is too large.
    """
    gguf, config = import_gguf(), description.config
    name, pairs = family_of(config), to_pairs(description, title, dtype)
    writer = gguf.GGUFWriter(path, name)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in pairs.items():
        value = value.tolist() if isinstance(value, np.ndarray) else value
        add.get(type(value), writer.add_string)(key, value)
    for tensor_name, tensor in _tensors(params, config, name).items():
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ENCODINGS[dtype]]][0]
        whole = "F16" if tensor.shape[-1] % block else ENCODINGS[dtype]
        encoding = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else whole]
        with np.errstate(over="ignore"):
            stored = gguf.quantize(tensor, encoding)
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            raise UserError(f"{tensor_name} has values above 65,504, which float16 can't hold")
        writer.add_tensor(tensor_name, stored, raw_dtype=encoding)
    with explained(f"can't write {path}", RunError, (OSError, UserError)), contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        read_gguf_file(path)  # NumPy does not tell when the end of a small tensor could not be written


def to_pairs(description: ModelDescription, title: str, dtype: str = "float32") -> dict[str, Any]:
    """All of a file but its tensors and its architecture's name. Raises: UserError, as `write_gguf`."""
    config, own = description.config, {"trained_length": description.trained_length}
    if not isinstance(description.chat_template, dict):
        own["chat_template"] = description.chat_template
    if config.rope_scaling:
        own["rope_scaling"] = dataclasses.asdict(config.rope_scaling)
    file_type = import_gguf().LlamaFileType["ALL_F32" if dtype == "float32" else f"MOSTLY_{ENCODINGS[dtype]}"]
    pairs = {
        "general.name": title.encode(errors="replace").decode(),
        "general.file_type": int(file_type),
        "general.quantization_version": 2,
    }
    pairs |= _config_pairs(config, family_of(config))
    if description.tokenizer:
        pairs |= gguf_tokenizer.to_pairs(description.make_tokenizer(), config.vocab_size)
    return pairs | {OWN_KEY: json.dumps(own)}


def _config_pairs(config: GPTConfig, name: str) -> dict[str, Any]:
    """Raises: UserError, if llama.cpp has no such model."""
    if config.rope_scaling and name != "llama":
        raise UserError(f"llama.cpp scales the rotary positions of llama models, not of {name}")
    stated = write_config(config, "float32")
    keys = _REQUIRED | _OPTIONAL | _EPSILON[config.norm]
    pairs = {key: stated[theirs] for theirs, key in keys.items() if theirs in stated}
    sizes = dict.fromkeys(("rope.dimension_count", "attention.key_length", "attention.value_length"), config.head_dim)
    return {f"{name}.{key}": value for key, value in (pairs | sizes | {"vocab_size": config.vocab_size}).items()}


def _tensors(params: Params, config: GPTConfig, name: str) -> dict[str, np.ndarray]:
    """The tensors of a file by name, float32."""
    layout = gguf_layout(config, name)
    tensors = layout.export_tensors(params, config)
    if name == "stablelm":  # llama.cpp ties no head there
        tensors.setdefault(layout.head, tensors[layout.embedding])
    return tensors | ({_ROPE_FACTORS: _rope_factors(config)} if config.rope_scaling else {})
