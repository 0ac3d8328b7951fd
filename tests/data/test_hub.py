"""Downloads from the Hub, over a connection to this machine that breaks."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tinysft_jax.console import UserError
from tinysft_jax.data.sources import download

REPOSITORY = "roneneldan/TinyStoriesInstruct"
PINNED = "ee050ed1f8720795be342921335e821856a2b42e"
NEWER = "0123456789abcdef0123456789abcdef01234567"
RECORD = "Words: cat, hat\nSummary: A cat has hat {}.\nStory: \n\nOnce a cat had a hat. It was hat {}.\n<|endoftext|>\n"
FILES = {
    f"TinyStories-Instruct-{split}.txt": "".join(RECORD.format(i, i) for i in range(n)).encode()
    for split, n in (("train", 3000), ("valid", 30))
}


class Hub(ThreadingHTTPServer):
    """Enough of the Hub. Attributes say how it fails; `requests` are (method, name, range)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, str, str | None]] = []
        self.breaks = 0  # so many of the next downloads end halfway
        self.damage = b""
        self.files = FILES

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        *repository, revision, name = self.path.removeprefix("/datasets/").replace("/resolve/", "/").split("/")
        if "/".join(repository) != REPOSITORY or revision not in (PINNED, "main") or name not in self.server.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.server.requests.append((self.command, name, self.headers["Range"]))
        content = self.server.files[name]
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.headers["Range"] else 0
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", NEWER if revision == "main" else revision)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            content = self.server.damage + content[len(self.server.damage) :]
            if self.server.breaks:
                self.server.breaks -= 1
                self.wfile.write(content[start : start + (len(content) - start) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                self.wfile.write(content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path: Path):
    """A Hub on this machine that `download` asks."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as other tests have it
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def prepare(url: str, directory: Path, *flags: str) -> subprocess.CompletedProcess:
    """Runs the command against a Hub, with a cache in `directory`."""
    arguments = ["--hub", REPOSITORY, "--output", directory / "data", "--workers=1", *flags]
    return subprocess.run(
        [sys.executable, "-m", "tinysft_jax.data.prepare", *map(str, arguments)],
        # Other tests are offline.
        env=os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(directory / "home"), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_downloads_the_pinned_revision_over_a_connection_that_breaks(hub: Hub, tmp_path: Path):
    hub.breaks = 1
    done = prepare(hub.url, tmp_path)
    assert done.returncode == 0, done.stderr
    half = len(FILES["TinyStories-Instruct-train.txt"]) // 2
    assert [request for request in hub.requests if request[0] == "GET"] == [
        ("GET", "TinyStories-Instruct-train.txt", "bytes=0-"),
        ("GET", "TinyStories-Instruct-train.txt", f"bytes={half}-"),
        ("GET", "TinyStories-Instruct-valid.txt", "bytes=0-"),
    ]
    source = json.loads((tmp_path / "data" / "data.json").read_text())["source"]
    assert source["hub"] == {"repository": REPOSITORY, "commit": PINNED}
    assert source["files"] == {name: len(content) for name, content in FILES.items()}
    found = {path.name: path.read_bytes() for path in (tmp_path / "home").rglob("*.txt")}
    assert found == FILES
    assert not list((tmp_path / "home").rglob("*.partial"))


def test_without_a_network_one_line_names_the_files(tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        done = prepare(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: the download failed")
    wanted = f"https://huggingface.co/datasets/{REPOSITORY}/tree/{PINNED} into a directory and give it to --input"
    assert all(text in done.stderr for text in (*FILES, wanted))
    assert not (tmp_path / "data").exists()


def test_a_download_goes_on_where_a_killed_process_left_it(hub: Hub, tmp_path: Path):
    name, content = next(iter(FILES.items()))
    partial = tmp_path / "home" / "tinysft-jax" / REPOSITORY.replace("/", "--") / PINNED / f"{name}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content[:1000])
    assert download(REPOSITORY).files[0][0].read_bytes() == content
    assert ("GET", name, "bytes=1000-") in hub.requests


def test_what_is_there_is_not_asked_for_again(hub: Hub):
    first = download(REPOSITORY)
    hub.requests.clear()
    assert download(REPOSITORY) == first and not hub.requests
    assert first.commit == PINNED and [split for _, split in first.files] == ["train", "valid"]


def test_a_branch_is_resolved_to_its_commit(hub: Hub):
    found = download(REPOSITORY, "main")
    assert found.commit == NEWER and all(NEWER in path.parts for path, _ in found.files)


def test_a_damaged_file_is_not_kept(hub: Hub, tmp_path: Path):
    hub.damage = b"damaged"
    with pytest.raises(UserError, match=r"TinyStories-Instruct-train\.txt arrived damaged"):
        download(REPOSITORY)
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    hub.damage = b""
    assert download(REPOSITORY).files[0][0].read_bytes() == FILES["TinyStories-Instruct-train.txt"]


def test_a_missing_file_or_revision_is_one_line(hub: Hub):
    with pytest.raises(UserError, match=r"the download failed \(404"):
        download(REPOSITORY, "no-such-branch")


def test_other_repositories_are_refused():
    with pytest.raises(UserError, match="--hub knows"):
        download("someone/else")


def test_without_the_package_the_error_names_the_files(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "tinysft_jax.data.hub_file", raising=False)
    monkeypatch.delattr("tinysft_jax.data.hub_file", raising=False)
    with pytest.raises(UserError, match=r"needs the package huggingface-hub; .*TinyStories-Instruct-valid\.txt"):
        download(REPOSITORY)
