"""A server of a tiny model, in this process."""

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from tiny_model import make_config, make_params, make_tokenizer

from tinysft_jax.parameters import ModelDescription
from tinysft_jax.sampling.engine import Engine
from tinysft_jax.serving.server import listen, make_app, make_server


class Running(NamedTuple):
    url: str
    engine: Engine


@contextlib.contextmanager
def run_server(template: str | None = "control", ends: bool = True, **options) -> Iterator[Running]:
    """A model that generates letters; with `ends`, answers of some ten tokens."""
    config, language = make_config(), make_tokenizer(template).description()
    description = ModelDescription(config, language["chat_template"], language["tokenizer"], {})
    app, engine = make_app(description, make_params(config, ends), "letters", **options)
    server, listener = make_server(app, engine), listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    engine.start()
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert engine.is_ready.wait(120)
        yield Running(f"http://127.0.0.1:{port}", engine)
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
        assert engine.failure is None


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with run_server(n_slots=4, queue=12) as running:
        yield running
