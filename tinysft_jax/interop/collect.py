"""Builds this package's parameters from a file of another project's tensors."""

from collections.abc import Callable, Collection, Mapping

import jax
import numpy as np

from tinysft_jax.errors import UserError
from tinysft_jax.interop.torch_names import Place
from tinysft_jax.model import GPTConfig
from tinysft_jax.model_directory import Params, model_parameter_shapes, pad_vocabulary, trim_vocabulary

_MOST_LISTED = 20


def check_names(found: Collection[str], wanted: Collection[str], optional: str) -> None:
    """Raises: UserError, if names are missing, or there are others than `wanted` and `optional`."""
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted and name != optional],
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
        raise UserError(f"its state is not this model's; {listed}")


def collect_params(
    config: GPTConfig,
    places: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> Params:
    """The parameters, copied tensor by tensor, so that no more than one lies in memory twice.

    Args:
      config: the shape.
      places: where each tensor belongs.
      shapes: of the file's tensors.
      read: a tensor's values as float32, by name.

    Returns:
      Nested dicts of float32 NumPy arrays, the table padded.

    Raises:
      UserError: if a shape is not the model's, or a value is not finite.
    """
    wanted = trim_vocabulary(model_parameter_shapes(config), config)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), wanted)
    views = {name: place.view(params) for name, place in places.items()}
    wrong = [
        f"{name} has shape {list(shapes[name])}, not {list(view.shape)}"
        for name, view in views.items()
        if tuple(shapes[name]) != view.shape
    ]
    if wrong:
        raise UserError("; ".join(wrong))
    for name, view in views.items():
        view[...] = read(name)
        if not (finite := np.isfinite(view)).all():
            first = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise UserError(f"{name} has {(~finite).sum()} values that are not finite, the first at {list(first)}")
    return pad_vocabulary(params, config)


def _listed(names: list[str]) -> str:
    """The first of them, each up to a length, and how many there are besides."""
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(name[:100] for name in names[:_MOST_LISTED]) + more
