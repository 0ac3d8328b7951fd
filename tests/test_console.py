"""What all commands share: how they end, what they print, and how they show progress."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rich.console

from tinysft_jax import console
from tinysft_jax.console import Interrupted, Progress, RunError, UserError


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
            console.run(main)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == code
    assert capsys.readouterr().err == line


def test_a_wrong_flag_is_one_line(capsys):
    parser = console.Parser(prog="thing")
    with pytest.raises(UserError, match=r"unrecognized arguments: --x \(see thing --help\)"):
        parser.parse_args(["--x"])


def test_help_shows_defaults_that_are_there():
    parser = console.Parser(prog="thing")
    parser.add_argument("--must", required=True, help="needed")
    parser.add_argument("--top_k", type=int, default=0, help="how many")
    text = parser.format_help()
    assert "None" not in text and "how many (default: 0)" in text


def shell(program: str, redirection: str, **arguments) -> subprocess.CompletedProcess:
    """A program in Python, with what the shell puts behind its command line; exits as the program does."""
    command = f'{sys.executable} -c "$PROGRAM" {redirection}; exit ${{PIPESTATUS[0]}}'
    environ = os.environ | {"PROGRAM": f"import sys\nfrom tinysft_jax import console\n{program}"}
    return subprocess.run(["bash", "-c", command], env=environ, capture_output=True, text=True, timeout=60, **arguments)


TALKS = """
def main():
    for stream in (sys.stdout, sys.stderr) * 50_000:
        print("line", file=stream)
    with open(OUTPUT, "w") as file:
        file.write("done")
"""


@pytest.mark.parametrize(
    "redirection", ["2>&1 | head -1", "| head -1", ">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full 2>&1"]
)
def test_no_command_depends_on_who_reads_along(tmp_path, redirection):
    """What a command writes is in files; its output may be cut short, closed, or go to a disk that is full."""
    output = tmp_path / "output"
    result = shell(f"OUTPUT = {str(output)!r}\n{TALKS}\nconsole.run(main)", redirection)
    assert result.returncode == 0 and "Error" not in result.stderr
    assert output.read_text() == "done"


def test_a_closed_stream_does_not_write_into_files(tmp_path):
    """The next file to be opened would get the number of standard output."""
    program = "import os\ndef main():\n    with open(OUTPUT, 'w') as file:\n        os.system('echo hello')\n"
    output = tmp_path / "output"
    assert shell(f"OUTPUT = {str(output)!r}\n{program}\nconsole.run(main)", ">&- 2>&-").returncode == 0
    assert output.read_text() == ""


def test_a_command_that_is_for_its_output_ends_with_its_reader():
    prints = "def main():\n    while True:\n        print('line')\nconsole.run(main, needs_stdout=True)"
    result = shell(prints, "| head -1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "line\n", "")
    shows = prints.replace("print(", "from rich.console import Console; Console().print(")
    result = shell(shows, "| head -1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "line\n", "")
    result = shell(prints, "> /dev/full")
    assert result.returncode == 3 and result.stderr.startswith("error: can't write to standard output: No space left")


STOPS = """
import os, signal
def main():
    try:
        os.kill(os.getpid(), NUMBER)
        print("went on")
    finally:
        print("cleaned")
"""


@pytest.mark.parametrize(("name", "code", "line"), [("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "hung up")])
def test_what_stops_a_command_lets_it_clean_up(name, code, line):
    result = shell(f"{STOPS}\nNUMBER = signal.{name}\nconsole.run(main)", "")
    assert (result.returncode, result.stdout, result.stderr) == (code, "cleaned\n", f"{line}\n")


def test_under_nohup_a_closed_terminal_stops_nothing():
    result = shell(f"{STOPS}\nNUMBER = signal.SIGHUP\nsignal.signal(NUMBER, signal.SIG_IGN)\nconsole.run(main)", "")
    assert (result.returncode, result.stdout) == (0, "went on\ncleaned\n")


@pytest.mark.parametrize(
    "command", ["train.py --config=configs/sft.py --workdir=x", "sample.py --checkpoint=x --prompt=a"]
)
def test_a_platform_that_is_not_there_is_one_line(command):
    environ = os.environ | {"JAX_PLATFORMS": "cuda"}
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, *command.split()], cwd=root, env=environ, capture_output=True, text=True)
    assert result.returncode == 2 and "JAX can't use the platform of JAX_PLATFORMS=cuda: " in result.stderr
    assert result.stderr.count("\n") == 1 and not (root / "x").exists()


def test_importing_errors_is_cheap():
    program = "print([name for name in ('jax', 'numpy', 'rich') if name in sys.modules])"
    assert shell(program, "").stdout == "[]\n"


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, in seconds, at its only index."""
    now = [0.0]
    for module in (time, rich.console):
        monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_progress_is_lines(clock, capsys):
    with Progress("preparing", 1000, done=100) as progress:
        for seconds, done in ((5, 200), (10, 300), (12, 350), (22, 700)):
            clock[0] = seconds
            progress.update(done, f"[{done}] tokens")
        progress.update(1000, always=True)
        progress.say("[a line] " + "x" * 200)
    assert capsys.readouterr().err.splitlines() == [
        "preparing 300/1,000  [300] tokens  0:00:35 left",
        "preparing 700/1,000  [700] tokens  0:00:11 left",
        "preparing 1,000/1,000",
        "[a line] " + "x" * 200,
    ]


def test_time_left_does_not_count_what_was_before_the_first_update(clock, capsys):
    with Progress("step", 4e9, percent=True) as progress:
        for seconds, done in ((100, 1e9), (110, 1.5e9), (120, 2e9)):
            clock[0] = seconds
            progress.update(done, always=done == 2e9)
    assert capsys.readouterr().err.splitlines()[-1] == "step 50%  0:00:40 left"


def test_in_a_terminal_progress_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for quiet in (False, True):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("TERM", "xterm")
        with Progress("compiling", 8, quiet=quiet) as progress:
            progress.update(3, "[loss] 1.5")
            progress.update(4)
            progress.say("a line")
        shown = sys.stderr.getvalue()
        if quiet:
            assert shown == ""
        else:
            assert "a line" in shown and "4/8" in shown and "[loss] 1.5" in shown.rpartition("4/8")[2]
