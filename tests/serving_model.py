"""A server of a tiny model, in this process, and requests to it without a client's help."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import uvicorn
from tiny_model import make_config, make_params, make_tokenizer

from tinysft_jax.parameters import ModelDescription
from tinysft_jax.sampling.engine import Engine
from tinysft_jax.serving.server import make_app, make_server


class Running(NamedTuple):
    url: str
    engine: Engine
    server: uvicorn.Server

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextlib.contextmanager
def run_server(
    template: str | None = "control", ends: bool = True, starts_engine: bool = True, **options
) -> Iterator[Running]:
    """A model that generates letters; with `ends`, answers of some ten tokens.

    An engine that is not started takes requests, and never answers them.
    """
    config, language = make_config(), make_tokenizer(template).description()
    description = ModelDescription(config, language["chat_template"], language["tokenizer"], {})
    options = {"n_slots": 4, "queue": 12} | options
    app, engine = make_app((description, make_params(config, ends)), "letters", **options)
    server, listener = make_server(app, engine), socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if starts_engine:
        engine.start()
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert not starts_engine or engine.is_ready.wait(120)
        yield Running(f"http://127.0.0.1:{port}", engine, server)
    finally:
        server.should_exit = True
        thread.join()
        if starts_engine:
            engine.close()
        assert engine.failure is None


class Response(NamedTuple):
    status: int
    headers: dict[str, str]  # with names in small letters
    body: bytes

    @property
    def error(self) -> dict[str, str | None]:
        """What the body says is wrong."""
        return json.loads(self.body)["error"]


def send(server: Running, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Response:
    """One request on a connection of its own; a body that is neither bytes nor an iterator of them becomes JSON."""
    headers = {"content-type": "application/json"} | (headers or {})
    if body is not None and not isinstance(body, bytes | Iterator):
        body = json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return Response(
            response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        )


def post(server: Running, path: str, body: Any, **headers: str) -> Response:
    return send(server, "POST", f"/v1/{path}", body, headers)
