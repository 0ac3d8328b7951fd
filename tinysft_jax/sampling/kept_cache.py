"""The cache of a conversation, kept from one prompt to the next."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tinysft_jax.model import LayerCache


@dataclasses.dataclass
class KeptCache:
    """The cache of one row of tokens, kept for the next prompt.

    A prompt reuses the slots of the ids that it begins with, whatever follows them: later slots are never read. So
    continuing, going back and starting over are one operation.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    layers: list[LayerCache] = dataclasses.field(default_factory=list)

    def take(self, ids: Sequence[int], n_slots: int) -> tuple[int, list[LayerCache]]:
        """Hands over the cache, lengthened to at least `n_slots` slots, and keeps nothing.

        Also returns how many of the prompt's first ids it holds, without the last one: to predict what follows, that
        must be computed again.
        """
        layers, n_kept = self.layers, n_shared(self.ids, ids[:-1])
        self.ids, self.layers = [], []
        return n_kept, lengthen(layers, n_slots)


def n_shared(mine: Sequence[int], yours: Sequence[int]) -> int:
    """How many ids both begin with."""
    differs = (i for i, (a, b) in enumerate(zip(mine, yours, strict=False)) if a != b)
    return next(differs, min(len(mine), len(yours)))


def lengthen(layers: list[tuple[jax.Array, jax.Array]], n_slots: int) -> list[tuple[jax.Array, jax.Array]]:
    """The cache with empty slots behind its own, if it has fewer than `n_slots`."""
    if not layers or (missing := n_slots - layers[0][0].shape[2]) <= 0:
        return layers
    return jax.tree.map(lambda part: jnp.pad(part, ((0, 0), (0, 0), (0, missing), (0, 0))), layers)
