"""One server for these tests: what costs time here is compiling."""

from collections.abc import Iterator

import openai
import pytest
from serving_client import make_client
from serving_model import Running, run_server

from tinysft_jax.sampling import engine


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with run_server(n_slots=4, queue=12) as running:
        yield running


@pytest.fixture(scope="session")
def client(server) -> openai.OpenAI:
    return make_client(server)


@pytest.fixture
def token_by_token(monkeypatch):
    """Each token comes by itself, where several would come at a time."""
    monkeypatch.setattr(engine, "SECONDS_OF_RUN", 0)
