"""Locks, which tell whether a process lives: the system releases them with the process, however that ends."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tinysft_jax.console import UserError


def take(descriptor: int) -> bool:
    """Locks an open file or directory until it is closed; False if another process has.

    Raises:
      OSError: if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def held(path: Path, refusal: str) -> Iterator[str]:
    """Holds a lock as long as the block runs; the system releases it with the process, however that ends.

    Args:
      path: the lock's file, which is there as long as it is held and says who holds it.
      refusal: what to say if another process does.

    Yields:
      What the user should know: that this file system has no locks. Empty otherwise.

    Raises:
      UserError: if another process holds it.
      OSError: if the file can't be written.
    """
    descriptor, note = _open_lock(path, refusal)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)
        yield note
    finally:
        path.unlink(missing_ok=True)  # while it is still locked
        os.close(descriptor)


def _open_lock(path: Path, refusal: str) -> tuple[int, str]:
    """A descriptor of the locked file, and a note if it could not be locked."""
    while True:
        descriptor, note = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), ""
        try:
            if not take(descriptor):
                holder = os.pread(descriptor, 300, 0).decode("utf-8", "replace").strip()
                os.close(descriptor)
                raise UserError(
                    f"{refusal}: {holder or 'it does not say which'}; wait for it, stop it, or use another directory"
                )
        except OSError as error:
            note = f"{path.parent} is on a file system without locks ({error.strerror}): nothing keeps two runs apart"
        # Whoever held it before may have removed the file between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, note
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Locks a file or directory until the descriptor is closed; None if another process has, or it can't be locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if take(descriptor):
            return descriptor
    os.close(descriptor)
    return None
