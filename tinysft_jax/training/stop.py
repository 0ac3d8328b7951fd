"""Ctrl-C, SIGTERM and SIGHUP: the first asks a run to stop after its step, a second one ends the process at once."""

import contextlib
import os
import signal
import socket
import threading

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class StopRequest(contextlib.ExitStack):
    """In the block, the first signal is noted and the second ends the process."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.exit_code: int | None = None  # of the signal that all processes agreed to stop for
        self._mesh = mesh
        self._noted = 0  # exit code of this process's own signal
        self._vote: jax.Array | None = None

    def agreed(self) -> bool:
        """Whether the run stops here; the same answer in all processes at the same call.

        With several processes, each call starts a reduction over all devices and reads the result of the call before.
        So no device waits for it, and the processes stop one call late.
        """
        code = self._noted
        if jax.process_count() > 1:
            vote, self._vote = self._vote, _max_over_devices(self._mesh, self._noted)
            code = 0 if vote is None else int(vote)
        self.exit_code = code or None
        return code > 0

    def __enter__(self) -> "StopRequest":
        # Python runs signal handlers between two instructions of the main thread, which may be compiling for minutes.
        # So a thread reads the signals from a socket, and can end the process at any moment.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        thread = threading.Thread(target=_read_signals, args=(reader,), name="signals", daemon=True)
        thread.start()
        for close in (reader.close, thread.join, writer.close):  # in reverse: without a writer the thread ends
            self.callback(close)
        self.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False))
        for number in EXIT_CODES:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                self.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def _note(self, number: int, _frame) -> None:
        self._noted = self._noted or EXIT_CODES[number]


def _read_signals(reader: socket.socket) -> None:
    is_stopping = False
    while received := reader.recv(1):
        number = received[0]
        # A terminal and its shell both send SIGHUP, and some service managers send it after SIGTERM.
        if number not in EXIT_CODES or (is_stopping and number == signal.SIGHUP):
            continue
        if is_stopping:
            _say("left at once; the same command resumes from the last checkpoint")
            os._exit(EXIT_CODES[number])
        is_stopping = True
        _say("stopping after this step, with a checkpoint; once more to leave at once")


def _say(text: str) -> None:
    """Without the buffer of `sys.stderr`, whose lock the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _max_over_devices(mesh: Mesh, value: int) -> jax.Array:
    """The largest of the processes' values; not waited for."""
    each_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    values = jax.make_array_from_callback(
        (mesh.size,), each_device, lambda index: np.full(len(range(*index[0].indices(mesh.size))), value, np.int32)
    )
    return jax.jit(jax.numpy.max, out_shardings=NamedSharding(mesh, PartitionSpec()))(values)
