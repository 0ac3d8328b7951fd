"""`sample.py --interactive`: a conversation line by line, from a terminal or a pipe."""

import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from tinysft_jax.chat import is_blank
from tinysft_jax.errors import UserError
from tinysft_jax.sampling.session import Session
from tinysft_jax.sampling.text import AnswerStream
from tinysft_jax.sampling.transcript import load_transcript, save_transcript

# More than any context holds.
MAX_CHARACTERS = 1_000_000

HELP = """\
/help              shows this
/system TEXT       sets the system message; without TEXT, shows it
/reset             begins a new conversation
/retry             makes the last answer again
/undo              takes back the last question and its answer
/temperature T     sets the temperature; 0 always takes the most likely token
/save FILE         writes the conversation, as a line of chat-jsonl
/load FILE         goes on with a conversation from such a file
/quit              leaves, as Ctrl-D does; Ctrl-C stops an answer"""


class Shell:
    """Answers what is typed, and obeys the commands that begin with a slash."""

    def __init__(self, session: Session):
        self._session = session
        self._console = Console(highlight=False, markup=False)
        self._own_file: Path | None = None  # what was saved to or loaded from may be replaced
        self._told_forgotten = 0
        self._commands = {
            "/help": lambda _: print(HELP),
            "/system": self._set_system,
            "/reset": self._reset,
            "/retry": lambda _: self._show(self._session.retry()),
            "/undo": lambda _: print(f"(taken back: {self._session.undo()})"),
            "/temperature": self._set_temperature,
            "/save": self._save,
            "/load": self._load,
        }

    def run(self) -> None:
        """Goes on until `/quit` or the end of the input."""
        for line in _lines():
            if line == "/quit":
                return
            try:
                if len(line) > MAX_CHARACTERS:
                    raise UserError(f"a line of over {MAX_CHARACTERS:,} characters is not answered")
                self._obey(line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)

    def _obey(self, line: str) -> None:
        if not line.startswith("/"):
            self._show(self._session.ask(line))
            return
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            raise UserError(f"there is no command {name}; /help lists them")
        self._commands[name](argument.strip())

    def _show(self, pieces: Iterator[str]) -> None:
        """Prints an answer as it is made, until it ends or Ctrl-C is pressed."""
        if self._session.forgotten > self._told_forgotten:
            print(f"(the context is full; oldest exchanges that the model no longer sees: {self._session.forgotten})")
        self._told_forgotten = self._session.forgotten
        print(self._session.opening, end="", flush=True)
        # Closing the iterator makes the session remember what was shown.
        with _ctrl_c_noted() as stopped, contextlib.closing(pieces):
            for text in pieces:
                print(text, end="", flush=True)
                if stopped.is_set():
                    break
        print(" (stopped)" if stopped.is_set() else "", flush=True)
        if self._session.note:
            print(self._session.note, file=sys.stderr)
        if self._console.is_terminal and self._session.last:
            self._console.print(_figures(self._session.last), style="dim")

    def _set_system(self, text: str) -> None:
        if text or not self._session.is_chat:  # without a template there is none, which the session says
            self._session.system = text
        print(f"(system: {self._session.system or 'the default one'})")

    def _reset(self, _: str) -> None:
        self._session.reset()
        print("(a new conversation)")

    def _set_temperature(self, text: str) -> None:
        options = self._session.options
        if text:
            try:
                options = dataclasses.replace(options, temperature=float(text))
            except ValueError:
                raise UserError(f"the temperature is a number, not {text!r}") from None
        self._session.options = options
        print(f"(temperature: {options.temperature:g})")

    def _save(self, name: str) -> None:
        if not self._session.is_chat:
            raise UserError("this model has no chat template, so there is no conversation to save")
        if not self._session.messages:
            raise UserError("nothing was said yet")
        path = _path(name)
        save_transcript(path, self._session.transcript, overwrite=path == self._own_file)
        self._own_file = path
        print(f"(saved {len(self._session.messages)} messages)")

    def _load(self, name: str) -> None:
        path = _path(name)
        self._session.resume(load_transcript(path))
        self._own_file = path
        print(f"(loaded {len(self._session.messages)} messages)")


def _path(name: str) -> Path:
    if not name:
        raise UserError("which file? Its name comes after the command")
    return Path(os.path.abspath(os.path.expanduser(name)))


def _figures(answer: AnswerStream) -> str:
    """How long the answer is and how fast it came."""
    figures = [f"{answer.n_tokens} tokens"]
    if (rate := answer.tokens_per_second) is not None:
        figures.append(f"{rate:,.0f} tokens/s")
    if (seconds := answer.seconds_to_first) is not None:
        figures.append(f"first after {seconds:.2f} s")
    return f"({', '.join(figures)})"


@contextlib.contextmanager
def _ctrl_c_noted() -> Iterator[threading.Event]:
    """At a terminal, Ctrl-C within the block sets the event, so that nothing is torn.

    Pressed again, it ends the block at once, and the block alone.
    """
    noted, previous = threading.Event(), signal.getsignal(signal.SIGINT)

    def note(*_) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    if sys.stdin.isatty():
        signal.signal(signal.SIGINT, note)
    try:
        yield noted
    except KeyboardInterrupt:
        if not noted.is_set():
            raise
    finally:
        signal.signal(signal.SIGINT, previous)


def _piped_line() -> str:
    """A line of a pipe; one that is too long is read up to where that is known, and its rest is dropped.

    Raises:
      EOFError: if there is none.
    """
    line = sys.stdin.readline(MAX_CHARACTERS + 2)
    if not line:
        raise EOFError
    rest = line
    while len(rest) > MAX_CHARACTERS + 1 and not rest.endswith("\n"):
        rest = sys.stdin.readline(MAX_CHARACTERS + 2)
    return line


def _lines() -> Iterator[str]:
    """Yields lines that are not blank, as typed in (with history and editing) or as piped in."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte in a pipe is no reason to stop
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # not on every platform
            import readline  # noqa: F401  (importing it gives `input` its history)
        print("(/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves)")
    while True:
        try:
            line = input("> ").strip() if terminal else _piped_line().strip()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n(Ctrl-D leaves)")
            continue
        if not is_blank(line):
            yield line
