"""Files and directories that appear whole or not at all, JSON with format versions, and manifests."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinysft_jax.console import UserError, explained, shown
from tinysft_jax.locks import remove_abandoned, try_lock

MAX_TEXT_BYTES = 64 << 20
MAX_DEPTH = 200  # of JSON: deeper, functions that recurse into it fail
MODEL_CONTENT = ("model.json", "params", "tokenizer")


def check_output(path: Path, overwrite: bool, content: Sequence[str]) -> None:
    """Raises: UserError, if `path` exists, unless `overwrite` is set and all that is there will be replaced.

    `content` are the names in the new directory, first the file that identifies its kind; of a file, nothing.
    """
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise UserError(f"{path} exists; choose another --output or add --overwrite")
    if path.is_symlink() or not path.joinpath(*content[:1]).is_file():
        kind = f"directory with a {content[0]}" if content else "file"
        raise UserError(f"{path} is not a {kind}; --overwrite replaces nothing else")
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in content) if content else []
    if others:
        raise UserError(
            f"{path} holds {shown(others[0])}, which this command does not write, and --overwrite would delete it; "
            "move it away or choose another --output"
        )


def check_pattern_free(path: Path) -> None:
    """Raises: UserError, if orbax would take a part of a path for a pattern, or can't encode it."""
    whole = str(path.absolute().resolve())
    if found := sorted(set(re.findall(r"[*?\[\]\\\ud800-\udfff]", whole))):
        raise UserError(
            f"{whole} contains {' '.join(found)}, which orbax, the library that writes parameters, can't encode or "
            "takes for a pattern; choose another path"
        )


def _beside(path: Path, kind: str = "partial") -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields where to write a file or link that replaces `path` in one step at the end of the block."""
    partial = _beside(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool = False, content: Sequence[str] = MODEL_CONTENT) -> Iterator[Path]:
    """Yields an empty directory that becomes `path` at the end of the block, and is removed if the block fails.

    See `check_output`. What killed processes left behind is removed first; running ones have locked their directories.
    """
    check_output(path, overwrite, content)
    partial = _beside(path)
    with explained(f"can't write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A process may have been killed between the two renames: keep the old directory until there is a new one.
        kinds = "partial|old" if path.exists() else "partial"
        remove_abandoned(path.parent, rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.({kinds})")
        partial.mkdir()
    lock = try_lock(partial)
    try:
        yield partial
        check_output(path, overwrite, content)  # again: another process may have written it meanwhile
        old = path.rename(_beside(path, "old")) if path.exists() else None
        partial.rename(path)
        if old:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def new_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields where to write a file that becomes `path` at the end of the block, and is removed if the block fails."""
    check_output(path, overwrite, content=())
    with atomic(path) as partial:
        with explained(f"can't write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
        yield partial
        check_output(path, overwrite, content=())  # again: another process may have written it meanwhile


@contextlib.contextmanager
def maybe_new_directory(path: Path) -> Iterator[None]:
    """Makes a directory and its parents where they are missing; those still empty at the end are removed again."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for each in missing:
                each.rmdir()


def link(path: Path, target: Path) -> None:
    """Points the symbolic link `path` at `target` in one step, by a relative path."""
    with atomic(path) as partial:
        partial.symlink_to(os.path.relpath(target, path.parent))


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step."""
    with atomic(path) as partial:
        # The surrogates of a file name that is not UTF-8 become `\udcff`, which JSON reads back.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an indented JSON object in one step."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Reads a text file. Raises an OSError for a pipe or a device, a ValueError above 64 MiB or in another encoding."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"longer than {MAX_TEXT_BYTES >> 20} MiB")
    return content.decode(encoding)


def read_json(path: Path, what: str, format_version: int | None) -> dict[str, Any]:
    """Reads a JSON object. Raises: UserError, if it can't; if there is no such file, its directory is not `what`.

    The object must have a `format_version` up to this one; None: it needs none.
    """
    with explained(f"can't read {path}"), explained(f"{path} is not valid JSON", causes=(ValueError, RecursionError)):
        if not path.exists():
            raise UserError(f"{path.parent} is not {what}: it has no {path.name}")
        content = json.loads(read_text(path))
    if _is_deeper(content, MAX_DEPTH):
        raise UserError(f"{path} is nested more than {MAX_DEPTH} levels deep")
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    version = content.get("format_version")
    if format_version is None:
        return content
    if type(version) is not int or version < 1:
        raise UserError(f"{path} has no format_version; is {path.parent} {what}?")
    if version > format_version:
        raise UserError(
            f"{path} has format_version {shown(version)}, this program knows up to {format_version}; "
            "upgrade tinysft-jax"
        )
    return content


def _is_deeper(content: Any, levels: int) -> bool:
    if not isinstance(content, dict | list):
        return False
    parts = content.values() if isinstance(content, dict) else content
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a log, a JSON object a line, if there is one. Unfinished lines of killed processes are left out."""
    objects = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            objects.append(json.loads(line))
    return [each for each in objects if isinstance(each, dict)]


def write_json_lines(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Writes a JSON object a line, in one step."""
    write_text(path, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path) -> None:
    """Writes `manifest.json`: the size in bytes and the SHA-256 of every other file below `directory`."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    entries = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }
    write_json(directory / "manifest.json", {"format_version": 1, "files": entries})


def find_damage(directory: Path, hashes: bool = True, needed: Iterable[str] = ()) -> str | None:
    """What is wrong with the first file that is not as its directory's manifest says; None if all are.

    Without `hashes`, only the sizes are compared. The manifest must list the `needed` files, in POSIX form. No file
    outside the directory is opened.
    """
    try:
        entries = read_json(directory / "manifest.json", "complete", format_version=1).get("files")
    except UserError as error:
        return str(error)
    if not entries or not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        return "manifest.json lists no files"
    if missing := next((name for name in needed if name not in entries), None):
        return f"manifest.json does not list {missing}"
    root = os.path.realpath(directory)
    for read in (False, True) if hashes else (False,):  # all sizes before the first hash: they cost nothing
        for name, entry in entries.items():
            if fault := _find_fault(directory / name, root, entry, read):
                return f"{name if name.isprintable() and len(name) <= 300 else shown(name)} {fault}"
    return None


def _find_fault(path: Path, root: str, entry: dict[str, Any], read: bool) -> str | None:
    """How a file below `root` differs from its entry in the manifest."""
    try:
        if not Path(os.path.realpath(path)).is_relative_to(root):
            return "lies outside the directory"
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "is not a regular file"  # reading a pipe might never end
        if status.st_size != entry.get("bytes"):
            return f"has {status.st_size} bytes, its manifest says {shown(entry.get('bytes'))}"
        if read and sha256(path) != entry.get("sha256"):
            return "has other content than its manifest says"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"can't be read ({getattr(error, 'strerror', None) or error})"
    return None


# What a JSON value must be, in words, and its test.
Kind = tuple[str, Callable[[Any], bool]]
# The keys that an object must have; it may have others.
Schema = dict[str, "Kind | Schema"]

TEXT: Kind = ("text", lambda value: isinstance(value, str))
TEXT_OR_NULL: Kind = ("text or null", lambda value: isinstance(value, str | None))
TEXTS: Kind = ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value))
NUMBER: Kind = ("a whole number", lambda value: type(value) is int)
REAL_OR_NULL: Kind = ("a number or null", lambda value: type(value) in (int, float, type(None)))
COUNT: Kind = ("a whole number from 0 to 2^63 - 1", lambda value: type(value) is int and 0 <= value < 2**63)
SIZE: Kind = ("a whole number from 0 to 2^31 - 1", lambda value: type(value) is int and 0 <= value < 2**31)


def check(value: Any, wanted: Schema | Kind, name: str = "it") -> None:
    """Raises: UserError, naming the first part of a JSON value (keys with dots between) that is not as `wanted`."""
    if isinstance(wanted, tuple):
        kind, is_kind = wanted
        if not is_kind(value):
            raise UserError(f"{name} is {shown(value)}; it must be {kind}")
        return
    if not isinstance(value, dict):
        raise UserError(f"{name} is {shown(value)}; it must be an object")
    for key, inner in wanted.items():
        inner_name = key if name == "it" else f"{name}.{key}"
        if key not in value:
            raise UserError(f"it lacks {inner_name!r}")
        check(value[key], inner, inner_name)
