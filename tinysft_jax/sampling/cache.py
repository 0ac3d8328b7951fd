"""A cache that outlives an answer: what the next prompt has in common with it is not computed again."""

from collections.abc import Sequence

import jax.numpy as jnp

from tinysft_jax.model import LayerCache


class KeptCache:
    """The keys and values of one row of tokens, on the device.

    A prompt takes them over as far as it begins with the same ids, whatever became of the rest: slots behind a
    position are never seen. So going on, going back and starting anew are the same thing.

    Attributes:
      ids: the tokens whose keys and values are held.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Holds nothing."""
        self.ids: list[int] = []
        self._layers: list[LayerCache] = []

    def hold(self, ids: Sequence[int], layers: list[LayerCache]) -> None:
        """Holds the keys and values of these ids."""
        self.ids, self._layers = list(ids), layers

    def take(self, ids: Sequence[int], length: int) -> tuple[int, list[LayerCache]]:
        """Hands over what is held, to be written to, and holds nothing afterwards.

        Args:
          ids: a prompt, not empty.
          length: slots that are needed.

        Returns:
          How many of the prompt's first ids need not be computed (its last one always has to be, for what follows
          it), and the cache with at least so many slots; no layers if nothing is held.
        """
        layers, n_held = self._layers, 0
        for mine, yours in zip(self.ids, ids[:-1], strict=False):
            if mine != yours:
                break
            n_held += 1
        self.clear()
        return n_held, [tuple(_lengthened(part, length) for part in layer) for layer in layers]


def _lengthened(part, length: int):
    missing = length - part.shape[2]
    return part if missing <= 0 else jnp.pad(part, ((0, 0), (0, 0), (0, missing), (0, 0)))
