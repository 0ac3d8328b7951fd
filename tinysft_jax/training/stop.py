"""Ctrl-C, SIGTERM and a closed terminal: the first asks a run to stop after its step, another one ends it at once."""

import contextlib
import os
import signal
import socket
import threading
from types import FrameType

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class StopRequest:
    """Within the block, notes the first signal instead of dying of it, and leaves at the second.

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
        # Python runs its handlers between two instructions of the main thread, which may be compiling for minutes. So
        # a thread counts the signals, and it can leave at any moment.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous = {
            number: signal.signal(number, self._note)
            for number in EXIT_CODES
            # Under nohup, a closed terminal is no reason to stop.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        self._counter = threading.Thread(target=self._count, name="signals", daemon=True)
        self._counter.start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()  # which ends the thread
        self._counter.join()
        self._reader.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = self._noted or EXIT_CODES[number]

    def _count(self) -> None:
        asked = False
        while received := self._reader.recv(1):
            if (code := EXIT_CODES.get(received[0])) is None:
                continue
            if asked and received[0] == signal.SIGHUP:
                continue  # terminal and shell both send it, and some service managers do after SIGTERM
            if asked:
                # What is half-written is aside, and finished files stay.
                _say("left at once; the same command continues from the last checkpoint")
                os._exit(code)
            asked = True
            _say("stopping after this step, with a checkpoint; once more to leave at once")


def _say(text: str) -> None:
    """Without the buffer of `sys.stderr`, whose lock the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _highest(mesh: Mesh, value: int) -> jax.Array:
    """The largest of the processes' values, on its way."""
    each_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    values = jax.make_array_from_callback(
        (mesh.size,), each_device, lambda index: np.full(len(range(*index[0].indices(mesh.size))), value, np.int32)
    )
    return jax.jit(jax.numpy.max, out_shardings=NamedSharding(mesh, PartitionSpec()))(values)
