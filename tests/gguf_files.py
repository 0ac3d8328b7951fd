"""GGUF files of tiny models, and such that were damaged, or lie about what they hold."""

import dataclasses
import struct
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tiny_model import family, random_params

from tinysft_jax.conversion.gguf import write_gguf
from tinysft_jax.conversion.gguf_file import read_gguf_file
from tinysft_jax.parameters import ModelDescription, Params, pad_vocabulary, trim_vocabulary
from tinysft_jax.tokenizer import ChatTokenizer

RANKS = 300  # llama.cpp needs merges
_NUMBERS = [0, 1, 2, 3, 7, 8, 9, 12, 14, 31, 97, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1]


def describe(name: str, tokenizer: ChatTokenizer | None = None, **changes) -> ModelDescription:
    tokenizer = tokenizer or ChatTokenizer("control", RANKS)
    config = family(name, vocab_size=tokenizer.vocab_size + 3, **changes)
    model = ModelDescription(config, **tokenizer.description(), source={}, trained_length=77)
    return dataclasses.replace(model, tokenizer_files=tokenizer.files)


def params_of(model: ModelDescription) -> Params:
    """Random parameters, with zeros in the rows that pad the vocabulary."""
    return pad_vocabulary(trim_vocabulary(random_params(model.config), model.config), model.config)


def written(path: Path, model: ModelDescription, dtype: str = "float32") -> Path:
    write_gguf(path, params_of(model), model, "A model", dtype)
    return path


def hostile(draw: Random, data: bytes) -> bytes:
    """A file that was cut short, has other bits, or other numbers, most of them in its header."""
    header = data.rfind(b"weight") + 40  # its end, nearly
    kind = draw.choice(["cut", "bits", "numbers", "numbers", "key"])
    if kind == "cut":
        return data[: draw.choice([draw.randrange(len(data)), draw.randrange(header)])]
    changed = bytearray(data)
    if kind == "key":  # a pair or a tensor is no longer there, and an unknown one is
        places = [i for i in range(header) if data[i : i + 1].isalpha() and data[i - 1 : i] in (b".", b"_")]
        changed[draw.choice(places)] ^= 0x20
        return bytes(changed)
    for _ in range(draw.randint(1, 3)):
        if kind == "bits":
            changed[draw.randrange(header)] ^= 1 << draw.randrange(8)
        else:
            # Where a number stands that is small, so most likely a length, a type or a size.
            places = [i for i in range(4, header) if data[i] > 0 and not any(data[i + 1 : i + 4])]
            at, value = draw.choice(places), draw.choice(_NUMBERS)
            changed[at : at + 4] = struct.pack("<I", value)
            if draw.random() < 0.2:
                changed[at : at + 8] = struct.pack("<Q", draw.choice([2**32, 2**40, 2**62, 2**64 - 1]))
    return bytes(changed)


def rewrite(path: Path, out: Path, pairs: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> Path:
    """Writes a file again as `out`, with other key-value pairs and more tensors, all float32."""
    import gguf  # an extra

    own, stored = read_gguf_file(path)
    own |= pairs
    writer = gguf.GGUFWriter(out, own.pop("general.architecture"))
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float64, str: writer.add_string}
    for key, value in own.items():
        kinds.get(type(value), writer.add_array)(key, value.tolist() if isinstance(value, np.ndarray) else value)
    for name, tensor in {**stored, **(tensors or {})}.items():
        writer.add_tensor(name, np.asarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
