"""`serve.py` as a user runs it, on a tiny model with random weights."""

import contextlib
import http.client
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import make_model_directory

SCRIPT = Path(__file__).parent.parent / "serve.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nowhere"], "nowhere does not exist"),
        (["--checkpoint=m", "--slots=0"], "--slots is 0; it must be 1 or more"),
        (["--checkpoint=m", "--queue=-1"], "--queue is -1"),
        (
            ["--checkpoint=m", "--host=0.0.0.0"],
            "lets other machines in: give a key in TINYSFT_API_KEY or --api_key, or say",
        ),
        (["--checkpoint=m", "--host=0.0.0.0", "--api_key= "], "the key must be one or more ASCII characters"),
        (["--checkpoint=m", "--api_key=clé"], "the key must be one or more ASCII characters"),
        (["--checkpoint=m", "--api_key=a", "--no_auth"], "exclude each other"),
        (["--checkpoint=m", "--host=no.such.host.invalid", "--no_auth"], "can't listen on no.such.host.invalid"),
        (["--checkpoint=m", "--port=99999"], "can't listen on 127.0.0.1, port 99999"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    code, error = run_here(arguments, monkeypatch, capsys)
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_port_in_use_is_one_line(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = run_here(["--checkpoint=m", f"--port={port}"], monkeypatch, capsys)
    assert code == 2 and f"port {port}: Address already in use" in error and error.count("\n") == 1


def run_here(arguments: list[str], monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--port=0", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code, capsys.readouterr().err


@contextlib.contextmanager
def serving(model: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """The process, once it is ready, and its port. It takes the key from the environment: "secret"."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, f"--checkpoint={model}", "--port=0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TINYSFT_API_KEY": "secret"},
    )
    try:
        for line in iter(process.stdout.readline, ""):
            if ready := re.match(r"ready: http://127\.0\.0\.1:(\d+)/v1 ", line):
                break
        yield process, int(ready[1])
    finally:
        process.kill()
        process.communicate()


def events(port: int) -> Iterator[dict]:
    """The events of a chat's stream, as they come."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    body = {"messages": [{"role": "user", "content": "go on"}], "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_running_answers_end_before_the_server_does(tmp_path, number, code):
    """They are too long for the time that is left, so they are cut off, with a reason."""
    model = make_model_directory(tmp_path / "model", "control", context=8192)
    with serving(model) as (process, port):
        streams, ends, begun = [events(port) for _ in range(16)], [], []

        def read(stream: Iterator[dict]) -> None:
            begun.append(next(stream))
            ends.append([*stream][-1]["choices"][0]["finish_reason"])

        threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        while len(begun) < 16:
            time.sleep(0.1)
        start = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        seconds = time.monotonic() - start
        for thread in threads:
            thread.join()
        assert ends == 16 * ["length"] and 8 < seconds < 12
        assert process.stderr.read() in ("terminated\n", "interrupted\n")


@pytest.mark.slow
def test_a_server_without_work_leaves_at_once(tmp_path):
    with serving(make_model_directory(tmp_path / "model", "control")) as (process, _):
        start = time.monotonic()
        process.terminate()
        assert process.wait(timeout=60) == 143 and time.monotonic() - start < 3
