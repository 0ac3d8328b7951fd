"""The train and valid file of a data set on the Hugging Face Hub, downloaded once.

The Hub's own client starts again from the beginning in a new process. Of 2.7 GB over a connection that breaks, the
beginning should not be lost: a download that was cut short, or whose process was killed, goes on where it was.
"""

import fcntl
import re
from pathlib import Path
from typing import NamedTuple

from tinysft_jax import files
from tinysft_jax.data.dataset import SPLITS
from tinysft_jax.errors import UserError, reason

_SHA256 = re.compile(r"[0-9a-f]{64}")


class _DataSet(NamedTuple):
    name: str  # of the files, with a place for the split
    revision: str  # the commit that is taken unless another one is asked for


_DATA_SETS = {
    "roneneldan/TinyStoriesInstruct": _DataSet(
        "TinyStories-Instruct-{split}.txt", "ee050ed1f8720795be342921335e821856a2b42e"
    ),
    "roneneldan/TinyStories": _DataSet("TinyStoriesV2-GPT4-{split}.txt", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"),
}


class Download(NamedTuple):
    """What was downloaded.

    Attributes:
      files: each with its split.
      commit: of the repository.
    """

    files: list[tuple[Path, str | None]]
    commit: str


def download(repository: str, revision: str | None = None) -> Download:
    """Downloads the train and valid file of a data set, or finds them where they were downloaded before.

    Args:
      repository: one of those that this program knows the files of.
      revision: a commit, branch or tag; None for the commit that this program was made with.

    Raises:
      UserError: if they can't be had; says how to do without.
    """
    if repository not in _DATA_SETS:
        raise UserError(
            f"--hub knows {' and '.join(_DATA_SETS)}, not {repository}; download its files and give them to --input"
        )
    name, pinned = _DATA_SETS[repository]
    revision = revision or pinned
    names = [name.format(split=split) for split in SPLITS]
    url = f"https://huggingface.co/datasets/{repository}/tree/{revision}"
    by_hand = f"download {' and '.join(names)} from {url} into a directory and give it to --input"
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"--hub needs the package huggingface-hub; install it, or {by_hand}") from None
    # Its base of all that can go wrong in a request; the reset of a connection is no OSError.
    failures = (OSError, ValueError, huggingface_hub.errors.HTTPError)
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        found = [_fetch(repository, name, revision, failures) for name in names]
    except failures as error:
        raise UserError(f"the download failed ({reason(error)}); try again, or {by_hand}") from None
    except _Busy as busy:
        raise UserError(f"another process is downloading {busy}; wait for it, or {by_hand}") from None
    return Download([(path, split) for (path, _), split in zip(found, SPLITS, strict=True)], found[0][1])


class _Busy(Exception):
    """Another process has locked the file."""


def _fetch(repository: str, name: str, revision: str, failures: tuple[type[Exception], ...]) -> tuple[Path, str]:
    """A file, and the commit that it is of. A commit's file that is here already needs no network."""
    import huggingface_hub
    from huggingface_hub import constants

    cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision, repo_type="dataset")
    if isinstance(cached, str) and revision in Path(cached).parts:
        return Path(cached), revision
    cache = Path(constants.HF_HOME) / "tinysft-jax" / repository.replace("/", "--")
    if (cache / revision / name).exists():
        return cache / revision / name, revision
    url = huggingface_hub.hf_hub_url(repository, name, repo_type="dataset", revision=revision)
    metadata = huggingface_hub.get_hf_file_metadata(url)
    if metadata.commit_hash is None:
        raise ValueError(f"{url} is not answered by a Hugging Face Hub")
    path = cache / metadata.commit_hash / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _resume(url, path, metadata.size, metadata.etag, failures)
    return path, metadata.commit_hash


def _resume(
    url: str, path: Path, size: int | None, etag: str | None, failures: tuple[type[Exception], ...]
) -> None:
    """Downloads what is not yet in the file beside `path`, checks the whole, and renames it."""
    from huggingface_hub.file_download import http_get

    partial = path.with_name(f"{path.name}.partial")
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _Busy(path.name) from None
        if size is not None and file.tell() > size:
            file.truncate(0)
        while True:
            before = file.seek(0, 2)
            try:
                # Compressed, the bytes to go on from would be other ones than those in the file.
                headers = {"Accept-Encoding": "identity"}
                http_get(url, file, resume_size=before, headers=headers, expected_size=size)
                break
            except failures:
                file.flush()
                if file.seek(0, 2) <= before:
                    raise
        file.flush()
        # The tag of a large file is its SHA-256; that of a small one is another hash.
        if etag and _SHA256.fullmatch(etag) and files.sha256(partial) != etag:
            partial.unlink()
            raise ValueError(f"{path.name} arrived damaged")
        partial.rename(path)
