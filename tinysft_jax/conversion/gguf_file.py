"""GGUF files as they are stored: key-value pairs and tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the package `gguf` takes seconds
for the vocabulary of a small model, and hours for a file that lies about a length; so files are parsed here, and the
package decodes tensors and writes files.
"""

import functools
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinysft_jax.console import UserError, explained, import_extra, shown

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MOST_AXES = 4
import_gguf = functools.partial(import_extra, "gguf", "gguf", "a GGUF file")


class StoredTensor(NamedTuple):
    """A tensor in a file, which is decoded when NumPy makes an array of it."""

    data: np.ndarray  # its bytes
    encoding: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        block, size = import_gguf().GGML_QUANT_SIZES[self.encoding]
        rows = self.data.reshape(*self.shape[:-1], self.shape[-1] // block * size)
        with np.errstate(all="ignore"):  # what is not finite is refused later
            return np.asarray(import_gguf().dequantize(rows, self.encoding), dtype)

    def equals(self, other: "StoredTensor") -> bool:
        return self.encoding == other.encoding and np.array_equal(self.data, other.data)


def read_gguf_file(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The key-value pairs (arrays of numbers as NumPy arrays) and the tensors of a file, which stays on disk.

    Raises: UserError, if it can't be read, is damaged or cut short, or a tensor's encoding is unknown.
    """
    with explained("can't read it", causes=(OSError, ValueError)):  # a ValueError: it is empty
        data = np.memmap(path, np.uint8, "r")
    parser = _Parser(data)
    if bytes(parser.take(4)) != MAGIC:
        raise UserError("it is not a GGUF file")
    if (version := parser.number("<u4")) not in _VERSIONS:
        raise UserError(f"it is of version {version} of GGUF, or big-endian; only versions 2 and 3 are read")
    n_tensors, n_pairs = parser.number("<u8"), parser.number("<u8")
    pairs: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = parser.string()
        if key in pairs:
            raise UserError(f"it has the key {shown(key)} twice")
        pairs[key] = parser.value(parser.number("<u4"))
    if isinstance(n_parts := pairs.get("split.count"), int) and n_parts > 1:
        raise UserError("it is one of several parts; merge them with `llama-gguf-split --merge`")
    infos = [parser.tensor_info() for _ in range(n_tensors)]
    alignment = pairs.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise UserError(f"its general.alignment is {shown(alignment)}")
    start = -(-parser.at // alignment) * alignment
    tensors = {name: _tensor(data, name, shape, code, start + offset) for name, shape, code, offset in infos}
    if len(tensors) < len(infos):
        raise UserError("it has two tensors of one name")
    if (total := sum(tensor.data.nbytes for tensor in tensors.values())) > len(data):
        raise UserError(f"its tensors have {total:,} bytes, the whole file {len(data):,}: they share memory")
    return pairs, tensors


class _Parser:
    """Reads from the beginning of a file; never more than it holds, whatever lengths it states."""

    def __init__(self, data: np.ndarray):
        self._data, self.at = memoryview(data), 0

    def take(self, size: int) -> memoryview:
        if size > len(self._data) - self.at:
            raise UserError("it is damaged or cut short; copy it again")
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, dtype: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def string(self) -> str:
        (size,) = struct.unpack("<Q", self.take(8))
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError:
            raise UserError("a text in it is not UTF-8: it is damaged; copy it again") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise UserError(f"it has a value of the unknown type {kind}: it is damaged, or newer than this program")
        item, length = self.number("<u4"), self.number("<u8")
        if item == _STRING:
            return [self.string() for _ in range(length)]
        if item not in _SCALARS:
            raise UserError(f"it has an array of the type {item}, which is not read")
        return np.frombuffer(self.take(length * np.dtype(_SCALARS[item]).itemsize), _SCALARS[item])

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (the last axis is contiguous), code of the encoding, offset."""
        name, n_axes = self.string(), self.number("<u4")
        if n_axes > _MOST_AXES:
            raise UserError(f"its tensor {shown(name)} has {n_axes} axes: it is damaged; copy it again")
        shape = tuple(self.number("<u8") for _ in range(n_axes))[::-1]
        return name, shape, self.number("<u4"), self.number("<u8")


def _tensor(data: np.ndarray, name: str, shape: tuple[int, ...], code: int, start: int) -> StoredTensor:
    encoding, block, size = _encoding(code)
    if not block:
        raise UserError(f"its tensor {shown(name)} is quantised as {encoding}, which can't be read")
    if not shape or shape[-1] % block:
        raise UserError(f"its tensor {shown(name)} can't be {encoding.name} in the shape {list(shape)}")
    if start + (n_bytes := math.prod(shape) // block * size) > len(data):
        raise UserError(f"it ends before its tensor {shown(name)} does: it is cut short; copy it again")
    return StoredTensor(data[start : start + n_bytes], encoding, shape)


@functools.cache
def _encoding(code: int) -> tuple[Any, int, int]:
    """The encoding, its values in a block and their bytes; its name and zeros if it can't be decoded."""
    gguf = import_gguf()
    try:
        encoding = gguf.GGMLQuantizationType(code)
        block, size = gguf.GGML_QUANT_SIZES[encoding]
        gguf.dequantize(np.zeros((1, size), np.uint8), encoding)
        return encoding, block, size
    except NotImplementedError:
        return encoding.name, 0, 0
    except (ValueError, KeyError):
        return f"type {code}", 0, 0
