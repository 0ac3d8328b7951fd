"""One server for these tests: what costs time here is compiling."""

from collections.abc import Iterator

import pytest
from serving_model import Running, run_server


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with run_server(n_slots=4, queue=12) as running:
        yield running
