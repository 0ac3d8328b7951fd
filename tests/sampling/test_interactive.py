"""`sample.py --interactive`, driven through a pipe and through a pseudo-terminal."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_model import make_decoder, make_model_directory, make_tokenizer

from tinysft_jax.sampling.chat import HELP, Session, Shell, load_transcript
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions

SCRIPT = Path(__file__).parents[2] / "sample.py"
# Of a context of 256: three exchanges fit, and caches have 128 or 256 slots; more shapes would be more to compile.
N_NEW = 60
COMMANDS = ("help", "system", "reset", "retry", "undo", "temperature", "save", "load", "quit")


@pytest.fixture(scope="module")
def speaker() -> Decoder:
    return make_decoder(ends=False)


@pytest.fixture
def shell(speaker, monkeypatch, capsys, tmp_path):
    """Runs a session over piped lines: its lines on stdout, and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*lines: str, template: str | None = "control") -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        options = SamplingOptions(N_NEW, temperature=1.0)
        Shell(Session(speaker, make_tokenizer(template), options, system="s" if template else None)).run()
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return run


def test_lines_are_turns_until_quit(shell):
    """Blank lines are none; and a pipe is not told how fast it was."""
    out, err = shell("Hi", "", "\u200b\ufeff \u00ad", "Ho", "/quit", "Ha")
    assert len(out) == 2 and all(re.fullmatch(f"[a-z ]{{{N_NEW}}}", line) for line in out) and err == ""
    assert shell("Hi", "Ho")[0] == out


def test_help_lists_all_commands(shell):
    assert shell("/help") == (HELP.splitlines(), "")
    assert re.findall(r"^/(\w+)", HELP, re.MULTILINE) == list(COMMANDS)


def test_reset_begins_anew_and_retry_makes_another_answer(shell):
    out, _ = shell("Hi", "/retry", "/retry", "/reset", "Hi")
    assert out[3] == "(a new conversation)" and out[4] == out[0] and len({*out[:3]}) == 3


def test_undo_takes_the_question_back(shell):
    out, _ = shell("Hi", "Ho", "/undo", "Ho")
    assert out[2] == "(taken back: Ho)" and out[3] == out[1]


def test_the_system_message_and_the_temperature_are_shown_and_set(shell):
    out, err = shell("/system", "/system Be brief.", "/temperature", "/temperature 0", "Hi", "/retry")
    assert out[:4] == ["(system: s)", "(system: Be brief.)", "(temperature: 1)", "(temperature: 0)"] and err == ""
    assert out[4] == out[5], "greedy"


def test_mistakes_are_one_line_each_and_the_session_goes_on(shell, tmp_path):
    (tmp_path / "mine").write_text("mine")
    bad = [
        *("/foo", "/Help", "/retry", "/undo", "/save", "/save x.jsonl", "/load", "/load missing", "/load mine"),
        *("/temperature hot", "/temperature -1", "/temperature nan", f"/system {'x' * 300}", "y" * 300),
    ]
    out, err = shell(*bad, "/temperature", "/system", "Hi", "/save mine", "/save missing/x")
    assert err.count("\n") == len(bad) + 2 and all(line.startswith("error: ") for line in err.splitlines())
    assert out[:2] == ["(temperature: 1)", "(system: s)"] and len(out) == 3
    assert (tmp_path / "mine").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_saved_conversation_goes_on_where_it_was(shell, tmp_path):
    first, _ = shell("/system q", "Hi", "/save chat.jsonl", "Ho")
    assert first[2] == "(saved 2 messages)"
    saved = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in saved] == ["q", "Hi", first[1]]
    second, err = shell("What", "/load chat.jsonl", "Ho", "/save chat.jsonl", "/save chat.jsonl")
    assert second[1] == "(loaded 2 messages)" and second[2] == first[3]
    assert err == "" and len(load_transcript(tmp_path / "chat.jsonl")) == 5, "its own file may be replaced"
    _, err = shell("Hi", "/save chat.jsonl")
    assert "exists" in err and len(load_transcript(tmp_path / "chat.jsonl")) == 5, "another session's may not"


def test_a_full_context_is_told_once_an_exchange(shell):
    out, _ = shell(*["Hi"] * 5, "/retry")
    assert [line for line in out if "context is full" in line] == [
        f"(the context is full; oldest exchanges that the model no longer sees: {n})" for n in (1, 2)
    ]


def test_without_template_each_line_is_continued(shell):
    out, err = shell("Once", "/retry", "/save x", "/load x", "/system s", "/system", template=None)
    assert all(line.startswith("Once") and len(line) == 4 + N_NEW for line in out[:2]) and out[0] != out[1]
    assert err.count("\n") == 4 and err.count("no chat template") == 3 and "can't read" in err


class Terminal:
    """A process at a pseudo-terminal of its own."""

    def __init__(self, *command: str):
        self._master, slave = pty.openpty()
        login = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
        self.process = subprocess.Popen([sys.executable, "-c", login, *command], stdin=slave, env=environment)
        os.close(slave)
        self._unread = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read_until(self, pattern: str, seconds: float = 60) -> str:
        """What was shown up to the pattern's end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self._unread)):
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self._master], [], [], left)[0]:
                raise AssertionError(f"{pattern!r} did not come; there is {self._unread[-2000:]!r}")
            try:
                self._unread += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # closed at the other end
                raise AssertionError(f"ended before {pattern!r}; there is {self._unread[-2000:]!r}") from None
        shown, self._unread = self._unread[: found.end()], self._unread[found.end() :]
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.mark.slow
def test_a_chat_at_a_terminal(tmp_path):
    """Answers of up to 4,000 tokens, of which a context of 4,096 holds one."""
    model = make_model_directory(tmp_path / "model", "control", context=4096, ends=False)
    saved, prompt = tmp_path / "chat.jsonl", r"(?:\x1b\[0m)?\r?\n(?:\x1b\[\?2004h)?> "
    options = ["--interactive", f"--checkpoint={model}", "--system=s", "--max_new_tokens=4000", "--temperature=1"]
    terminal = Terminal(sys.executable, str(SCRIPT), *options)
    try:
        terminal.read_until("/help lists the commands.*" + prompt)
        terminal.type("Hi\r")
        terminal.read_until(r"[a-z ]{8}")
        terminal.type("\x03")
        shown = terminal.read_until(r" \(stopped\)\r\n.*tokens/s, first after [0-9.]+ s\)" + prompt)
        assert "\x1b[2m" in shown, "the figures are dim"
        terminal.type("Hou\x7f\r")  # edited on the way
        shown = terminal.read_until(r"\([0-9]+ tokens, .*\)" + prompt)
        assert "stopped" not in shown and "context is full" not in shown
        terminal.type("/retry\r")
        shown = terminal.read_until(r"\([0-9]+ tokens, .*\)" + prompt)
        assert "stopped" not in shown
        terminal.type(f"/save {saved}\r")
        terminal.read_until(r"\(saved 4 messages\)" + prompt)
        terminal.type("Ha\r")
        terminal.read_until(r"the context is full; .*: [12]\)\r\n[a-z ]{8}")
        terminal.type("\x03")
        terminal.read_until(r" \(stopped\)")
        terminal.read_until(prompt)
        terminal.type("never mind")
        terminal.read_until("never mind")  # by now, the line is being read
        time.sleep(0.2)
        terminal.type("\x03")
        terminal.read_until(r"\(Ctrl-D leaves\)" + prompt)
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()
    transcript = load_transcript(saved)
    assert [message["content"] for message in transcript[::2]] == ["s", *(m["content"] for m in transcript[2::2])]
    assert [message["content"] for message in transcript if message["role"] == "user"] == ["Hi", "Ho"]


@pytest.mark.slow
def test_ctrl_c_ends_a_piped_session(tmp_path):
    model = make_model_directory(tmp_path / "model", "control", context=4096, ends=False)
    options = ["--interactive", f"--checkpoint={model}", "--system=s", "--max_new_tokens=4000"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write(b"Hi\n" * 1000)
    process.stdin.flush()
    assert process.stdout.read(8)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"interrupted\n")
