"""What is shown of a long piece of work."""

import pytest

from tinysft_jax import console as module
from tinysft_jax.console import describe, progress


def test_a_line_says_how_far_how_fast_and_how_long():
    line = describe(0.0, 0.25, 5_000_000, "tokens", 10.0)
    assert line == "25%, 5,000,000 tokens, 500,000 tokens/s, 0:00:30 left"


def test_what_was_there_at_the_start_does_not_make_it_look_faster():
    assert describe(0.5, 0.75, 100, "MB", 10.0) == "75%, 100 MB, 10 MB/s, 0:00:10 left"
    assert describe(0.5, 0.5, 0, "MB", 10.0).endswith("unknown left")


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 3), (1e6, 0)])
def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch, capsys, seconds, lines):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", seconds)
    with progress("preparing", 100, "tokens") as show:
        for place in (10, 50, 100):
            show(place, 10.0 * place)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == lines
    assert all(line.startswith("preparing: ") and line.endswith(" left") for line in printed)
    assert [line.split()[1] for line in printed] == ["10%,", "50%,", "100%,"][:lines]
