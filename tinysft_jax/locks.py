"""File locks. The system releases them with the process, however it ends, so they tell whether a process still runs."""

import contextlib
import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tinysft_jax.console import UserError


def take(descriptor: int) -> bool:
    """Locks an open file or directory until it is closed; False if it is locked, an OSError if there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def held(path: Path, refusal: str) -> Iterator[str]:
    """Holds a lock while the block runs; the file `path`, which names the process, exists only then.

    Yields a note for the user if the file system has no locks, else "". Raises a UserError that starts with `refusal`
    if another process holds the lock.
    """
    descriptor, note = _open_locked(path, refusal)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)
        yield note
    finally:
        path.unlink(missing_ok=True)  # while it is still locked
        os.close(descriptor)


def _open_locked(path: Path, refusal: str) -> tuple[int, str]:
    """A descriptor of the locked file, and the note of `held`."""
    while True:
        descriptor, note = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), ""
        try:
            if not take(descriptor):
                holder = os.pread(descriptor, 300, 0).decode("utf-8", "replace").strip() or "an unknown process"
                os.close(descriptor)
                raise UserError(f"{refusal}: {holder}; wait for it, stop it, or use another directory")
        except OSError as error:
            note = f"{path.parent} is on a file system without locks ({error.strerror}): nothing keeps two runs apart"
        # Between the two calls its last holder may have removed the file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, note
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Locks a file or directory until the returned descriptor is closed; None if it can't."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):
            if take(descriptor):
                return descriptor
        os.close(descriptor)
    return None


def remove_abandoned(parent: Path, names: str) -> None:
    """Removes the directories in `parent` that match a regular expression and that no running process has locked."""
    for path in parent.iterdir():
        if re.fullmatch(names, path.name) and path.is_dir() and (lock := try_lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
