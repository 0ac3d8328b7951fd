"""Opens `.pt` files: no code in them is run, and their tensors are mapped rather than read."""

import dataclasses
import re
import struct
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError  # only to catch it: nothing is unpickled here
from typing import TYPE_CHECKING, Any

from tinysft_jax.errors import UserError, shown
from tinysft_jax.interop.torch_names import EMBEDDING, HEAD, bare_name, torch_names

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
