"""Ctrl-C and SIGTERM: the first asks a run to stop after its step, the second ends it at once."""

import os
import signal
from types import FrameType

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopRequest:
    """Within the block, notes the first signal instead of dying of it.

    Attributes:
      exit_code: what to leave with; None as long as the run goes on.
    """

    def __init__(self):
        self.exit_code: int | None = None
        self._noted: int | None = None  # this process's own signal
        self._vote: jax.Array | None = None

    def agreed(self, mesh: Mesh) -> bool:
        """Whether the run stops here: with several processes, all get the same answer at the same call.

        Each call puts a question to all devices and takes the answer to the call before: so a device's work is never
        waited for while there is nothing else for it to do, and the processes stop one call late.
        """
        if jax.process_count() == 1:
            self.exit_code = self._noted
        else:
            answer, self._vote = self._vote, _highest(mesh, self._noted or 0)
            self.exit_code = None if answer is None else int(answer) or None
        return self.exit_code is not None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None:
            os._exit(EXIT_CODES[number])  # asked twice: what is half-written is aside, and finished files stay
        self._noted = EXIT_CODES[number]


def _highest(mesh: Mesh, value: int) -> jax.Array:
    """The largest of the processes' values, on its way."""
    each_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    values = jax.make_array_from_callback(
        (mesh.size,), each_device, lambda index: np.full(len(range(*index[0].indices(mesh.size))), value, np.int32)
    )
    return jax.jit(jax.numpy.max, out_shardings=NamedSharding(mesh, PartitionSpec()))(values)
