import signal
import subprocess
import sys

import pytest

from tinysft_jax import cli
from tinysft_jax.errors import Interrupted, RunError, UserError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no\n  such thing"), 2, "error: no such thing\n"),
        (RunError("disk full"), 3, "error: disk full\n"),
        (Interrupted("saved", 130), 130, "saved\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, 0, ""),
    ],
)
def test_every_end_has_its_exit_code_and_at_most_one_line(error, code, line, capsys):
    def main():
        if error:
            raise error

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            cli.run(main)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == code
    assert capsys.readouterr().err == line


def test_a_wrong_flag_is_one_line(capsys):
    parser = cli.Parser(prog="thing")
    with pytest.raises(UserError, match=r"unrecognized arguments: --x \(see thing --help\)"):
        parser.parse_args(["--x"])


def test_help_shows_defaults_that_are_there():
    parser = cli.Parser(prog="thing")
    parser.add_argument("--must", required=True, help="needed")
    parser.add_argument("--top_k", type=int, default=0, help="how many")
    text = parser.format_help()
    assert "None" not in text and "how many (default: 0)" in text


def test_a_reader_that_leaves_early_is_no_error():
    program = "from tinysft_jax import cli; cli.run(lambda: [print('line') for _ in range(100_000)])"
    command = f'{sys.executable} -c "{program}" | head -1; exit ${{PIPESTATUS[0]}}'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "line\n", "")


def test_sigterm_cleans_up():
    program = (
        "import os, signal\nfrom tinysft_jax import cli\n"
        "def main():\n    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n    finally:\n        print('cleaned')\n"
        "cli.run(main)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (143, "cleaned\n", "terminated\n")
