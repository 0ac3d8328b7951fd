"""One file of a data set on the Hugging Face Hub.

The Hub's client forgets what it has of a file when it is interrupted. Of 2.7 GB over a connection that breaks, the
beginning should not be lost: here, a download that was cut short or whose process was killed goes on where it was.
"""

import fcntl
import os
import re
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from tinysft_jax import files
from tinysft_jax.console import progress

# The last is all that can go wrong with a connection.
FAILURES = (OSError, ValueError, HTTPError)
# How often in a row a connection may fail before anything came over it.
ATTEMPTS = 3

_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(repository: str, name: str, revision: str) -> tuple[Path, str]:
    """Downloads a file of a data set, or finds it where it was downloaded before, by this program or the Hub's own.

    A commit's file that is here already needs no network.

    Returns:
      Where it is, and the commit that it is of.

    Raises:
      One of FAILURES.
    """
    cached = try_to_load_from_cache(repository, name, revision=revision, repo_type="dataset")
    if isinstance(cached, str) and revision in Path(cached).parts:
        return Path(cached), revision
    cache = Path(constants.HF_HOME) / "tinysft-jax" / repository.replace("/", "--")
    if (cache / revision / name).exists():
        return cache / revision / name, revision
    url = hf_hub_url(repository, name, repo_type="dataset", revision=revision)
    metadata = get_hf_file_metadata(url)
    if metadata.commit_hash is None or not metadata.size:
        raise ValueError(f"{url} is not answered by a Hugging Face Hub")
    path = cache / metadata.commit_hash / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(url, path, metadata.size, metadata.etag or "")
    return path, metadata.commit_hash


def _download(url: str, path: Path, size: int, tag: str) -> None:
    """Downloads what is not yet in the file beside `path`, checks the whole, and renames it.

    Args:
      url: of the file.
      path: where it will be.
      size: of the file, in bytes.
      tag: of a large file its SHA-256; of a small one another hash.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is downloading {path.name}") from None
        if file.tell() > size:
            file.truncate(0)
        failed = 0
        with progress(f"downloading {path.name}", size, "MB", file.tell()) as show:
            while (begun := file.seek(0, os.SEEK_END)) < size:
                try:
                    _append_rest(url, file, begun, show)
                except FAILURES:
                    # While something arrives, it will all be here in the end.
                    failed = 0 if file.tell() > begun else failed + 1
                    if failed == ATTEMPTS:
                        raise
                    time.sleep(failed)
        file.flush()
        if file.tell() != size or (_SHA256.fullmatch(tag) and files.sha256(partial) != tag):
            partial.unlink()
            raise ValueError(f"{path.name} arrived damaged")
        partial.rename(path)


def _append_rest(url: str, file: BinaryIO, begun: int, show: Callable[[int, int | float], None]) -> None:
    """Appends what comes after the first `begun` bytes to a file that holds these."""
    # Compressed, the bytes to go on from would not be those of the file.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={begun}-"}
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if response.status_code != HTTPStatus.PARTIAL_CONTENT:
            file.truncate(0)  # it comes from the start
        for chunk in response.iter_bytes():
            file.write(chunk)
            show(file.tell(), (file.tell() - begun) / 1e6)
