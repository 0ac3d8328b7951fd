"""Downloads from the Hub, which a server on this machine stands for."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tinysft_jax.console import UserError
from tinysft_jax.data.sources import HUB_DATA_SETS, open_hub

REPOSITORY = "roneneldan/TinyStoriesInstruct"
PINNED = "ee050ed1f8720795be342921335e821856a2b42e"
RECORD = "Words: cat, hat\nSummary: A cat has hat {}.\nStory: \n\nOnce a cat had a hat. It was hat {}.\n<|endoftext|>\n"
FILES = {
    f"TinyStories-Instruct-{split}.txt": "".join(RECORD.format(i, i) for i in range(n)).encode()
    for split, n in (("train", 300), ("valid", 30))
}


class Handler(BaseHTTPRequestHandler):
    """As much of the Hub as a download needs."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        *repository, revision, name = self.path.removeprefix("/datasets/").replace("/resolve/", "/").split("/")
        known = "/".join(repository) == REPOSITORY and revision == PINNED and name in FILES
        content = FILES[name] if known else b""
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(content)))
        if known:
            self.send_header("X-Repo-Commit", revision)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "RevisionNotFound")
        self.end_headers()
        if self.command == "GET" and known:
            self.server.downloads.append(name)
            self.wfile.write(content)

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path: Path):
    """The server that stands for the Hub, and an empty cache; `downloads` are the files that were downloaded."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.downloads = True, []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def prepare(directory: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs the command, with a cache in `directory`."""
    command = [sys.executable, "-m", "tinysft_jax.data.prepare", f"--hub={REPOSITORY}", f"--output={directory}/data"]
    environment = os.environ | {"HF_HOME": str(directory / "home")} | environment
    return subprocess.run([*command, "--workers=1"], env=environment, capture_output=True, text=True, timeout=60)


def test_the_command_downloads_the_pinned_revision(hub, tmp_path: Path):
    done = prepare(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert hub.downloads == list(FILES)
    source = json.loads((tmp_path / "data" / "data.json").read_text())["source"]
    assert source["hub"] == {"repository": REPOSITORY, "commit": PINNED}
    assert source["files"] == {name: len(content) for name, content in FILES.items()}


def test_without_a_network_one_line_says_how_to_download_by_hand(tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    done = prepare(tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: the download failed")
    wanted = f"https://huggingface.co/datasets/{REPOSITORY}/tree/{PINNED} into a directory and give it to --input"
    assert all(text in done.stderr for text in (*FILES, wanted))
    assert not (tmp_path / "data").exists()


def test_cached_files_are_not_downloaded_again(hub):
    first = open_hub(REPOSITORY, "auto", 0.0, None)
    assert [(path.read_bytes(), split) for path, split in first.files] == [
        (content, split) for content, split in zip(FILES.values(), ("train", "valid"), strict=True)
    ]
    hub.downloads.clear()
    assert open_hub(REPOSITORY, "auto", 0.0, None) == first and not hub.downloads


def test_a_commit_that_is_gone_is_one_line(hub, monkeypatch):
    monkeypatch.setitem(HUB_DATA_SETS, REPOSITORY, ("TinyStories-Instruct-{}.txt", "0" * 40))
    with pytest.raises(UserError, match=r"the download failed \(404"):
        open_hub(REPOSITORY, "auto", 0.0, None)


def test_other_repositories_are_refused():
    with pytest.raises(UserError, match="--hub knows"):
        open_hub("someone/else", "auto", 0.0, None)


def test_without_the_package_the_error_names_the_files(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs the package huggingface-hub; .*TinyStories-Instruct-valid\.txt"):
        open_hub(REPOSITORY, "auto", 0.0, None)
