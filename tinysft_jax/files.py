"""Files and directories that appear whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinysft_jax.errors import UserError


def check_output(path: Path, overwrite: bool) -> None:
    """Refuses an output path that is taken, before any work is done.

    Raises:
      UserError: if `path` exists and `overwrite` is not set.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --output or add --overwrite")


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory that becomes `path` when the block ends, and vanishes if it fails.

    Raises:
      UserError: if `path` exists and `overwrite` is not set, or can't be written.
    """
    check_output(path, overwrite)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from None
    try:
        yield aside
        replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace(new: Path, path: Path) -> None:
    """Renames `new` to `path`; what was there goes only once the new one is in place."""
    if path.is_dir() and not path.is_symlink():
        old = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old)
    else:
        os.replace(new, path)


def link(path: Path, target: Path) -> None:
    """Points the symbolic link `path` at `target` (relative, if it is beside it) in one step."""
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.link"
    aside.symlink_to(os.path.relpath(target, path.parent))
    os.replace(aside, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is never seen half-written."""
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object, indented, that is never seen half-written."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str, format_version: int) -> dict[str, Any]:
    """Reads a JSON object that carries a `format_version`.

    Args:
      path: the file.
      what: what it should be, for the error ("a model directory").
      format_version: the newest version that the caller understands.

    Raises:
      UserError: if the file is missing, not such an object, or from a newer program.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not {what}: it has no {path.name}") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(f"{path} has no format_version; is {path.parent} {what}?")
    if version > format_version:
        raise UserError(
            f"{path} has format_version {version}, this program knows up to {format_version}; upgrade tinysft-jax"
        )
    return content


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path) -> None:
    """Writes `manifest.json`: size in bytes and SHA-256 of every other file below `directory`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    entries = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    write_json(directory / "manifest.json", {"format_version": 1, "files": entries})
