"""A conversation with a model: the session, the shell around it, and its transcript in a file."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from tinysft_jax import chat, files
from tinysft_jax.chat import is_blank
from tinysft_jax.console import UserError, reason
from tinysft_jax.sampling.decode import Decoder, KeptCache
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.text import AnswerStream, Messages, encode_request, system_message, text_options
from tinysft_jax.tokenizer import ChatTokenizer


def save_transcript(path: Path, messages: Messages, overwrite: bool = False) -> None:
    """Writes a conversation, whole or not at all.

    Raises:
      UserError: if the file exists (without `overwrite`) or can't be written.
    """
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{path} exists; choose another name")
    try:
        files.write_text(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"can't write {path}: {reason(error)}") from None


def load_transcript(path: Path) -> Messages:
    """Reads a conversation that holds an answer, however its JSON is laid out.

    Raises:
      UserError: if the file is not chat-jsonl with one such conversation.
    """
    try:
        found = json.loads(files.read_text(path, "utf-8-sig"))
        if isinstance(found, list) and len(found) == 1:
            found = found[0]
        messages = chat.parse_chat(found, needs_answer=False)
        if all(message["role"] != "assistant" for message in messages):
            raise UserError("nothing is answered in it")
        return messages
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not one conversation in chat-jsonl: {error}") from None


class Session:
    """Questions and answers; each prompt is a function of what was said, and only what is new in it is computed.

    A model without a chat template continues each text by itself.

    Attributes:
      options: how to draw the next answer; of `text_options`.
      messages: what was said, without the system message: user and assistant in turn.
      forgotten: how many exchanges, the oldest, did not fit into the last prompt.
      last: the last answer's stream; None before the first.
      opening: what to show before the last answer: without a chat template, the text that it continues.
    """

    def __init__(self, decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, system: str | None = None):
        """Begins a conversation.

        Raises:
          UserError: if the system message can't be used.
        """
        self._decoder, self._tokenizer, self._kept = decoder, tokenizer, KeptCache()
        self.options = text_options(options, tokenizer, decoder.config)
        self.last: AnswerStream | None = None
        self._prompt_length = 0
        self.opening = ""
        self._system: str | None = None
        if system is not None:
            self.system = system
        self.reset()

    @property
    def is_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self._tokenizer.template is not None

    @property
    def system(self) -> str | None:
        """The system message; None: the one that models are trained with. A new one holds for all that was said.

        Raises:
          UserError: when it is set, if the template can't take it.
        """
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        if not self.is_chat:
            raise UserError("this model has no chat template, so it takes no system message")
        shortest = self._encode([*system_message(text), {"role": "user", "content": "a"}])
        self._decoder.check_prompt(shortest, "a question after this system message", self.options)
        self._system = text

    @property
    def note(self) -> str:
        """What the user should know of the last answer; see `Decoder.note_on_length`."""
        if self.last is None:
            return ""
        return self._decoder.note_on_length([self._prompt_length + self.last.n_tokens], self.options)

    @property
    def transcript(self) -> Messages:
        """The whole conversation, as chat-jsonl has it."""
        return [*system_message(self._system), *self.messages]

    def reset(self) -> None:
        """Begins anew, with the same system message."""
        self.messages: Messages = []
        self.forgotten = 0
        self._unanswered: str | None = None
        self._attempt = 0

    def resume(self, transcript: Messages) -> None:
        """Goes on with another conversation.

        Args:
          transcript: an optional system message, then user and assistant in turn; an answer comes last.

        Raises:
          UserError: if it is none; the present conversation stays.
        """
        if not self.is_chat:
            raise UserError("this model has no chat template, so it has no conversation to go on with")
        if transcript[-1]["role"] != "assistant":
            raise UserError("the conversation ends without an answer; only one that ends with an answer can go on")
        self._encode([*transcript, {"role": "user", "content": "a"}])  # refuses what the template can't lay out
        self.reset()
        self.messages, self._system = transcript, None
        if transcript[0]["role"] == "system":
            self.messages, self._system = transcript[1:], transcript[0]["content"]

    def ask(self, text: str) -> Iterator[str]:
        """Says something to the model, and yields its answer as it is made.

        What was yielded is remembered, even if the answer is broken off (by closing the iterator). An exchange
        without any answer is not: no template has a place for it.

        Raises:
          UserError: at once, if the message can't be encoded or is too long on its own.
        """
        return self._answer(text, self.messages, attempt=0)

    def retry(self) -> Iterator[str]:
        """Has the last question answered again, with other random numbers, in place of its answer.

        Raises:
          UserError: if there is none.
        """
        if self._unanswered is not None:
            return self._answer(self._unanswered, self.messages, self._attempt + 1)
        if not self.messages:
            raise UserError("there is no question yet to answer again")
        return self._answer(self.messages[-2]["content"], self.messages[:-2], self._attempt + 1)

    def undo(self) -> str:
        """Forgets the last question and its answer, and returns the question.

        Raises:
          UserError: if there is none.
        """
        question, self._unanswered, self._attempt = self._unanswered, None, 0
        if question is not None:
            return question
        if not self.messages:
            raise UserError("there is no question yet to take back")
        question, self.messages = self.messages[-2]["content"], self.messages[:-2]
        return question

    def _answer(self, text: str, history: Messages, attempt: int) -> Iterator[str]:
        prompt, forgotten = self._fit(history, {"role": "user", "content": text})
        stream = self._decoder.stream(prompt, self.options, self._kept, row=attempt)
        # From here on nothing is refused.
        self._prompt_length = len(prompt)
        self.last, self.messages, self.forgotten = AnswerStream(self._tokenizer, stream), history, forgotten
        self._unanswered, self._attempt, self.opening = text, attempt, "" if self.is_chat else text
        return self._remember(text, self.last)

    def _fit(self, history: Messages, question: dict[str, str]) -> tuple[list[int], int]:
        """Encodes what the context has room for: the question, and before it as much of the history as possible.

        Returns:
          The prompt, and how many exchanges had to be left out.
        """
        if not self.is_chat:
            return self._encode([question]), 0
        # An answer of a quarter of the room is enough; a message that leaves less may still stand alone.
        room = self._decoder.max_length(self.options)
        longest = room - min(self.options.max_new_tokens, room // 4)
        for start in range(0, len(history) + 1, 2):
            prompt = self._encode([*system_message(self._system), *history[start:], question])
            if len(prompt) <= longest:
                break
        return prompt, start // 2  # if it is too long even so, the decoder says so

    def _encode(self, messages: Messages) -> list[int]:
        if self.is_chat:
            return self._tokenizer.encode_prompt(messages).tolist()
        return encode_request(self._tokenizer, messages[-1]["content"])

    def _remember(self, question: str, pieces: AnswerStream) -> Iterator[str]:
        answer = ""
        try:
            for text in pieces:
                answer += text
                yield text
        finally:
            if self._tokenizer.template == "text":
                # Markers are plain text there: what follows one would be taken for another turn.
                for marker in (*chat.ROLE_MARKERS.values(), chat.END_OF_TEXT):
                    answer = answer.partition(marker)[0]
            if not chat.is_blank(answer):
                exchange = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                self.messages, self._unanswered = self.messages + exchange, None


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
