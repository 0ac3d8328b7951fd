"""Files and directories that appear whole or not at all."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinysft_jax.console import UserError, shown
from tinysft_jax.locks import try_lock

# More than any file of settings has.
MAX_TEXT_BYTES = 64 << 20
MAX_DEPTH = 200


# What a model directory holds.
MODEL_CONTENT = ("model.json", "params")


def check_output(path: Path, overwrite: bool, content: Sequence[str]) -> None:
    """Refuses an output directory that must not be replaced, before any work is done.

    Args:
      path: the directory to make.
      overwrite: whether one that exists may be replaced.
      content: the names of what is about to be made in it; the first is a file that tells that it is of that kind.

    Raises:
      UserError: if `path` exists, and `overwrite` is not set, or it is something else or holds something else.
    """
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise UserError(f"{path} exists; choose another --output or add --overwrite")
    if path.is_symlink() or not (path / content[0]).is_file():
        raise UserError(f"{path} is not a directory with a {content[0]}; --overwrite replaces nothing else")
    if others := sorted(entry.name for entry in path.iterdir() if entry.name not in content):
        raise UserError(
            f"{path} holds {shown(others[0])}, which this command does not make, and --overwrite would delete it; "
            "move it away or choose another --output"
        )


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool = False, content: Sequence[str] = MODEL_CONTENT) -> Iterator[Path]:
    """Yields an empty directory that becomes `path` when the block ends, and vanishes if it fails.

    What a process that was killed left aside is removed first. The lock on such a directory tells that its process
    lives; the system releases it with the process, however that ends.

    Args: as of `check_output`.

    Raises:
      UserError: if `path` must not be replaced, or can't be written.
    """
    check_output(path, overwrite, content)
    aside, lock = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial", None
    try:
        _make(aside, path)
        lock = try_lock(aside)
        yield aside
        check_output(path, overwrite, content)  # once more: another process may have been faster
        replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make(aside: Path, path: Path) -> None:
    """Makes the directory that is to become `path`, and removes what was abandoned on the way there before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        aside.mkdir()
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from None


@contextlib.contextmanager
def maybe_new_directory(path: Path) -> Iterator[None]:
    """Makes a directory, with those above it, if there is none; those that are empty at the end are removed again."""
    made = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for each in made:
                each.rmdir()


def check_pattern_free(path: Path) -> None:
    """Refuses an output path in which orbax would take a part for a pattern: what it writes could not be read.

    Raises:
      UserError: naming the characters.
    """
    whole = str(path.absolute().resolve())
    if found := sorted(set(whole) & set("*?[]\\")):
        raise UserError(
            f"{whole} contains {' '.join(found)}, which orbax, the library that writes parameters, takes for a "
            "pattern; choose another path"
        )
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise UserError(f"{whole} is not UTF-8, and orbax, the library that writes parameters, needs that") from None


def _remove_abandoned(path: Path) -> None:
    """Removes what `new_directory` and `replace` left beside `path` in processes that were killed."""
    # What `path` was before is kept until there is another one.
    kinds = "partial|old" if path.exists() else "partial"
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(?:{kinds})")
    for found in path.parent.iterdir():
        if name.fullmatch(found.name) and found.is_dir() and (lock := try_lock(found)) is not None:
            shutil.rmtree(found, ignore_errors=True)
            os.close(lock)


@contextlib.contextmanager
def new_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields where to write a file that becomes `path` when the block ends, and vanishes if it fails.

    Raises:
      UserError: if `path` exists (without `overwrite`), is no file, or can't be written.
    """
    check_output_file(path, overwrite)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from None
    try:
        yield aside
        check_output_file(path, overwrite)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_output_file(path: Path, overwrite: bool) -> None:
    """Refuses an output file that must not be replaced, before any work is done.

    Raises:
      UserError: if `path` exists, and `overwrite` is not set or it is no file.
    """
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise UserError(f"{path} exists; choose another --output or add --overwrite")
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path} is not a file; --overwrite replaces nothing else")


def replace(new: Path, path: Path) -> None:
    """Renames the directory `new` to `path`; what was there is removed after that.

    Between the two renames nothing is at `path`; where that matters, `link` is the way.
    """
    if path.exists():
        old = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(path)


def link(path: Path, target: Path) -> None:
    """Points the symbolic link `path` at `target` (relative, if it is beside it) in one step."""
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.link"
    aside.symlink_to(os.path.relpath(target, path.parent))
    os.replace(aside, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is never seen half-written."""
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        # Half a surrogate pair, as in the name of a file that is not UTF-8, becomes `\udcff`, which is right in JSON.
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object, indented, that is never seen half-written."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Reads a text file that is small if it is what it should be.

    Raises:
      OSError: if it can't be read, or is a pipe or device, which might never end.
      ValueError: if it is over 64 MiB or not in this encoding.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "not a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"longer than {MAX_TEXT_BYTES >> 20} MiB")
    return content.decode(encoding)


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
        content = json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not {what}: it has no {path.name}") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if _is_deeper(content, MAX_DEPTH):
        raise UserError(f"{path} is nested more than {MAX_DEPTH} levels deep")
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(f"{path} has no format_version; is {path.parent} {what}?")
    if version > format_version:
        raise UserError(
            f"{path} has format_version {shown(version)}, this program knows up to {format_version}; "
            "upgrade tinysft-jax"
        )
    return content


def _is_deeper(content: Any, depth: int) -> bool:
    """Whether JSON is nested so deeply; what walks it by recursion would fail at some depth."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(depth):
        parts = (value.values() if isinstance(value, dict) else value for value in level)
        level = [part for part in itertools.chain.from_iterable(parts) if isinstance(part, dict | list)]
    return bool(level)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a log: a JSON object a line. Of a missing file there are none.

    Other lines are left out: a process that is killed leaves its last line unfinished.
    """
    objects = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            objects.append(json.loads(line))
    return [each for each in objects if isinstance(each, dict)]


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


def find_damage(directory: Path, hashes: bool = True, needed: Iterable[str] = ()) -> str | None:
    """Compares a directory with its manifest. No file outside the directory is opened.

    Args:
      directory: in which `write_manifest` wrote.
      hashes: whether to read every file and compare its SHA-256, not only its size.
      needed: files, in POSIX form, that the manifest must list; up to the first that is missing there.

    Returns:
      What is wrong with the first file that is not what it was; None if all are.
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
    checks = (_size_fault, _hash_fault) if hashes else (_size_fault,)
    # All places and sizes before the first hash: they cost nothing.
    for check in checks:
        for name, entry in entries.items():
            try:
                # Also where it leads by links.
                is_inside = Path(os.path.realpath(directory / name)).is_relative_to(root)
                fault = check(directory / name, entry) if is_inside else "lies outside the directory"
            except FileNotFoundError:
                fault = "is missing"
            except (OSError, ValueError) as error:
                fault = f"can't be read ({getattr(error, 'strerror', None) or error})"
            if fault:
                return f"{name if name.isprintable() and len(name) <= 300 else shown(name)} {fault}"
    return None


def _size_fault(path: Path, entry: dict[str, Any]) -> str | None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"  # a pipe, say, that nobody writes to
    size, claimed = status.st_size, entry.get("bytes")
    return None if size == claimed else f"has {size} bytes, its manifest says {shown(claimed)}"


def _hash_fault(path: Path, entry: dict[str, Any]) -> str | None:
    return None if sha256(path) == entry.get("sha256") else "has other content than its manifest says"


# What a value must be, in words, and whether it is that.
Kind = tuple[str, Callable[[Any], bool]]
# Objects hold at least these keys; there may be others.
Schema = dict[str, "Kind | Schema"]

TEXT: Kind = ("text", lambda value: isinstance(value, str))
TEXT_OR_NULL: Kind = ("text or null", lambda value: isinstance(value, str | None))
NUMBER: Kind = ("a whole number", lambda value: type(value) is int)
REAL_OR_NULL: Kind = ("a number or null", lambda value: type(value) in (int, float, type(None)))
COUNT: Kind = ("a whole number from 0 to 2^63 - 1", lambda value: type(value) is int and 0 <= value < 2**63)
SIZE: Kind = ("a whole number from 0 to 2^31 - 1", lambda value: type(value) is int and 0 <= value < 2**31)


def check(value: Any, wanted: Schema | Kind, name: str = "") -> None:
    """Compares a value with the form that it must have.

    Args:
      value: JSON.
      wanted: its form.
      name: where the value stands, as keys with dots between; empty for the whole.

    Raises:
      UserError: naming a key that is missing or whose value is of another kind.
    """
    if isinstance(wanted, tuple):
        kind, is_kind = wanted
        if not is_kind(value):
            raise UserError(f"{name} is {shown(value)}; it must be {kind}")
        return
    if not isinstance(value, dict):
        raise UserError(f"{name or 'it'} is {shown(value)}; it must be an object")
    for key, inner in wanted.items():
        path = f"{name}.{key}" if name else key
        if key not in value:
            raise UserError(f"it lacks {path!r}")
        check(value[key], inner, path)
