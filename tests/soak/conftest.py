"""What the long tests share: data of the demo's kind, and a line of figures for each test."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tinysft_jax.data import prepare


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> Path:
    """Prepared as `make demo` does, of fewer stories."""
    output = tmp_path_factory.mktemp("demo") / "tasks"
    prepare.main(["--embedded=2000", f"--output={output}", "--bpe_ranks=8192", "--workers=2"])
    return output


@pytest.fixture
def figures(request) -> Callable[..., None]:
    """Prints what a test counted or measured, as one line of JSON."""
    return lambda **values: print(f"\nFIGURES {json.dumps({'test': request.node.name, **values})}", flush=True)
