"""The process: one thread for the engine, one for the web; how both end."""

import os
import socket
import sys

import uvicorn
from starlette.types import ASGIApp

from tinysft_jax import accelerator
from tinysft_jax.parameters import ModelDescription, Params
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.engine import Engine
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.text import text_options
from tinysft_jax.serving import app
from tinysft_jax.serving.app import Served
from tinysft_jax.serving.calls import Reader
from tinysft_jax.serving.metrics import Metrics

GRACE_SECONDS = 10.0  # for running answers, once the server is told to stop
MAX_CONNECTIONS = 512


class _Server(uvicorn.Server):
    engine: Engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called when a signal has come: no new connections, and running answers may end."""
        self.engine.finish_within(GRACE_SECONDS)
        await super().shutdown(sockets)


def make_app(
    model: tuple[ModelDescription, Params], name: str, n_slots: int, queue: int, max_length: int | None = None, **access
) -> tuple[ASGIApp, Engine]:
    """The application and its engine, which is not started yet; `access` is of `Served`.

    Raises: UserError, if the model can't be served.
    """
    description, params = model
    tokenizer, dtype = description.make_tokenizer(), accelerator.default_dtype()
    decoder = Decoder(description.config, params, dtype, description.trained_length)
    options = text_options(SamplingOptions(max_length=max_length), tokenizer, description.config)
    engine = Engine(decoder, options, n_slots, queue)
    reader = Reader(decoder, tokenizer, options, name, n_slots + queue)
    return app.make_app(Served(name, engine, reader, tokenizer, Metrics(engine, n_slots), **access)), engine


def make_server(application: ASGIApp, engine: Engine) -> uvicorn.Server:
    """A server that runs on a socket; it and the engine end together."""
    quiet = {"log_level": "error", "access_log": False, "server_header": False}
    limits = {"limit_concurrency": MAX_CONNECTIONS, "timeout_graceful_shutdown": int(GRACE_SECONDS) + 1}
    server = _Server(uvicorn.Config(application, lifespan="off", ws="none", **quiet, **limits))
    server.engine = engine
    return server


def serve(application: ASGIApp, engine: Engine, listener: socket.socket, line: str) -> None:
    """Serves until Ctrl-C or SIGTERM; says `line` when the engine is ready. Raises what the engine fails with."""
    server = make_server(application, engine)
    engine.start(on_ready=lambda: print(line, flush=True), on_end=lambda: setattr(server, "should_exit", True))
    try:
        server.run([listener])
    finally:
        if not engine.close(seconds=2.0):
            # A thread that compiles can't be stopped, and the interpreter must not end beside it.
            print("stopped while the model was being compiled", file=sys.stderr, flush=True)
            os._exit(130)
    if engine.failure is not None:
        raise engine.failure
