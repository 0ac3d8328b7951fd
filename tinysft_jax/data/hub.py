"""The data sets on the Hugging Face Hub that `prepare` knows, downloaded once."""

from pathlib import Path
from typing import NamedTuple

from tinysft_jax.data.description import SPLITS
from tinysft_jax.errors import UserError, reason


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
        from tinysft_jax.data import hub_file
    except ImportError:
        raise UserError(f"--hub needs the package huggingface-hub; install it, or {by_hand}") from None
    try:
        found = [hub_file.fetch(repository, name, revision) for name in names]
    except hub_file.FAILURES as error:
        raise UserError(f"the download failed ({reason(error)}); try again, or {by_hand}") from None
    return Download([(path, split) for (path, _), split in zip(found, SPLITS, strict=True)], found[0][1])
