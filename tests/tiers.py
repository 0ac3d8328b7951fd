"""What `make test` leaves to `make test-all`."""

import pytest


def slow(*cases: object) -> list:
    """Cases of a parametrized test that only `make test-all` runs."""
    return [pytest.param(case, marks=pytest.mark.slow, id=str(case)) for case in cases]
