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
from tinysft_jax.console import UserError, explained
from tinysft_jax.sampling.decode import Decoder, check_prompt
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.kept_cache import KeptCache
from tinysft_jax.sampling.text import AnswerStream, Messages, encode_request, system_message, text_options
from tinysft_jax.tokenizer import ChatTokenizer

MAX_CHARACTERS = 1_000_000  # of a line; more than any context holds

HELP = """\
/help              shows this
/system TEXT       sets the system message; without TEXT, shows it
/reset             starts a new conversation
/retry             generates the last answer again
/undo              takes back the last question and its answer
/temperature T     sets the temperature; 0: greedy
/save FILE         writes the conversation, as a line of chat-jsonl
/load FILE         resumes a conversation from such a file
/quit              leaves, as Ctrl-D does; Ctrl-C stops an answer"""


def save_transcript(path: Path, messages: Messages, overwrite: bool = False) -> None:
    """Writes a conversation, whole or not at all; a UserError if the file exists or can't be written."""
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{path} exists; choose another name")
    with explained(f"can't write {path}", causes=(OSError, ValueError)):  # ValueError: a name that no file can have
        files.write_text(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def load_transcript(path: Path) -> Messages:
    """Reads a conversation with at least one answer, however its JSON is formatted; a UserError if there is none."""
    failure, causes = f"{path} is not one conversation in chat-jsonl", (UserError, ValueError, RecursionError)
    with explained(f"can't read {path}"), explained(failure, causes=causes):
        found = json.loads(files.read_text(path, "utf-8-sig"))
        if isinstance(found, list) and len(found) == 1:
            found = found[0]
        messages = chat.parse_chat(found, needs_answer=False)
        if all(message["role"] != "assistant" for message in messages):
            raise UserError("nothing is answered in it")
        return messages


class Session:
    """Questions and answers. Each prompt is the whole conversation; only what the cache does not hold is computed.

    A model without a chat template continues each text by itself.
    """

    def __init__(self, decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, system: str | None = None):
        self._decoder, self._tokenizer, self._kept = decoder, tokenizer, KeptCache()
        self.options = text_options(options, tokenizer, decoder.config)
        self.last: AnswerStream | None = None  # None before the first answer
        self._prompt_length = 0
        self.system: str | None = None  # None: the default one
        if system is not None:
            self.set_system(system)
        self.reset()

    @property
    def is_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self._tokenizer.template is not None

    def set_system(self, text: str) -> None:
        """Sets the system message of the whole conversation; a UserError if it can't be encoded or leaves no room."""
        shortest, length = encode_request(self._tokenizer, "a", text), self._decoder.max_length(self.options)
        check_prompt(shortest, "a question after this system message", self._decoder.config, length)
        self.system = text

    @property
    def note(self) -> str:
        """A line about the last answer's length; see `Decoder.note_on_length`."""
        if self.last is None:
            return ""
        return self._decoder.note_on_length([self._prompt_length + self.last.n_tokens], self.options)

    @property
    def transcript(self) -> Messages:
        """The whole conversation, as chat-jsonl has it."""
        return [*system_message(self.system), *self.messages]

    def reset(self) -> None:
        """Starts a new conversation with the same system message."""
        self.messages: Messages = []  # without the system message
        self.forgotten = 0  # exchanges, the oldest, that did not fit into the last prompt
        self._unanswered: str | None = None
        self._attempt = 0

    def resume(self, transcript: Messages) -> None:
        """Continues another conversation, which ends with an answer; a UserError, and no change, if it can't be."""
        if not self.is_chat:
            raise UserError("this model has no chat template, so there is no conversation to resume")
        if transcript[-1]["role"] != "assistant":
            raise UserError("the conversation ends without an answer; only one that ends with an answer can be resumed")
        self._tokenizer.encode_prompt([*transcript, {"role": "user", "content": "a"}])  # does the template take it?
        self.reset()
        self.messages, self.system = transcript, None
        if transcript[0]["role"] == "system":
            self.messages, self.system = transcript[1:], transcript[0]["content"]

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer to a message as it is generated; without a chat template, the message and what follows.

        What was yielded is remembered, even if the iterator is closed early. An exchange without any answer is not: no
        template has a place for it. Raises a UserError at once if the message can't be encoded or is too long.
        """
        return self._answer(text, self.messages, attempt=0)

    def retry(self) -> Iterator[str]:
        """Answers the last question again, with other random numbers, in place of its answer."""
        return self._answer(*self._last_question(), self._attempt + 1)

    def undo(self) -> str:
        """Forgets the last question and its answer, and returns the question."""
        question, self.messages = self._last_question()
        self._unanswered, self._attempt = None, 0
        return question

    def _last_question(self) -> tuple[str, Messages]:
        """The last question, and the messages before it."""
        if self._unanswered is not None:
            return self._unanswered, self.messages
        if not self.messages:
            raise UserError("there is no question yet")
        return self.messages[-2]["content"], self.messages[:-2]

    def _answer(self, text: str, history: Messages, attempt: int) -> Iterator[str]:
        prompt, forgotten = self._encode(history, text)
        stream = self._decoder.stream(prompt, self.options, self._kept, row=attempt)
        # No error is raised from here on.
        self.last, self._prompt_length = AnswerStream(self._tokenizer, stream), len(prompt)
        self.messages, self.forgotten = history, forgotten
        self._unanswered, self._attempt = text, attempt
        return self._remember(text, self.last)

    def _encode(self, history: Messages, text: str) -> tuple[list[int], int]:
        """The prompt, with as much of the history as fits, and how many exchanges are left out."""
        if not self.is_chat:
            return encode_request(self._tokenizer, text), 0
        # Room for an answer: a quarter of the positions is enough. A message that leaves less may still stand alone.
        length = self._decoder.max_length(self.options)
        longest = length - min(self.options.max_new_tokens, length // 4)
        question = {"role": "user", "content": text}
        for start in range(0, len(history) + 1, 2):
            messages = [*system_message(self.system), *history[start:], question]
            prompt = self._tokenizer.encode_prompt(messages).tolist()
            if len(prompt) <= longest:
                break
        return prompt, start // 2  # if it is too long even so, the decoder refuses it

    def _remember(self, question: str, pieces: AnswerStream) -> Iterator[str]:
        answer = ""
        try:
            if not self.is_chat:
                yield question
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


class Shell:
    """Answers the lines that are typed or piped in, and runs the commands, which begin with a slash."""

    def __init__(self, session: Session):
        self._session = session
        self._console = Console(highlight=False, markup=False)
        self._own_file: Path | None = None  # a file that was saved to or loaded from may be replaced
        self._told_forgotten = 0

    def run(self) -> None:
        """Answers until `/quit` or the end of the input."""
        for line in _lines():
            if line == "/quit":
                return
            try:
                if len(line) > MAX_CHARACTERS:
                    raise UserError(f"a line of over {MAX_CHARACTERS:,} characters is not answered")
                if line.startswith("/"):
                    name, _, argument = line.partition(" ")
                    self._command(name, argument.strip())
                else:
                    self._show(self._session.ask(line))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)

    def _command(self, name: str, argument: str) -> None:
        session = self._session
        match name:
            case "/help":
                print(HELP)
            case "/system":
                if argument or not session.is_chat:  # without a template the session refuses it
                    session.set_system(argument)
                print(f"(system: {session.system or 'the default one'})")
            case "/reset":
                session.reset()
                print("(a new conversation)")
            case "/retry":
                self._show(session.retry())
            case "/undo":
                print(f"(taken back: {session.undo()})")
            case "/temperature":
                if argument:
                    with explained("the temperature must be a number", causes=(ValueError,)):
                        session.options = dataclasses.replace(session.options, temperature=float(argument))
                print(f"(temperature: {session.options.temperature:g})")
            case "/save":
                self._save(_path(argument))
            case "/load":
                session.resume(load_transcript(_path(argument)))
                self._own_file = _path(argument)
                print(f"(loaded {len(session.messages)} messages)")
            case _:
                raise UserError(f"there is no command {name}; /help lists them")

    def _save(self, path: Path) -> None:
        if not self._session.is_chat:
            raise UserError("this model has no chat template, so there is no conversation to save")
        if not self._session.messages:
            raise UserError("there is no answer yet")
        save_transcript(path, self._session.transcript, overwrite=path == self._own_file)
        self._own_file = path
        print(f"(saved {len(self._session.messages)} messages)")

    def _show(self, pieces: Iterator[str]) -> None:
        """Prints an answer as it is generated, until it ends or Ctrl-C is pressed."""
        session = self._session
        if session.forgotten > self._told_forgotten:
            print(f"(the context is full; oldest exchanges that the model no longer sees: {session.forgotten})")
        self._told_forgotten = session.forgotten
        # Closing the iterator makes the session remember what was shown.
        with _ctrl_c_noted() as stopped, contextlib.closing(pieces):
            for text in pieces:
                print(text, end="", flush=True)
                if stopped.is_set():
                    break
        print(" (stopped)" if stopped.is_set() else "", flush=True)
        if session.note:
            print(session.note, file=sys.stderr)
        if self._console.is_terminal and session.last:
            rate, first = session.last.tokens_per_second, session.last.seconds_to_first
            speed = f", {rate:,.0f} tokens/s, first after {first:.2f} s" if rate else ""
            self._console.print(f"({session.last.n_tokens} tokens{speed})", style="dim")


def _path(name: str) -> Path:
    if not name:
        raise UserError("which file? Its name comes after the command")
    return Path(os.path.abspath(os.path.expanduser(name)))


@contextlib.contextmanager
def _ctrl_c_noted() -> Iterator[threading.Event]:
    """At a terminal, Ctrl-C within the block sets the event; pressed again, it ends the block, and the block alone."""
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


def _lines() -> Iterator[str]:
    """Yields lines that are not blank, as typed in (with history and editing) or as piped in."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 in a pipe is no reason to stop
    read_line = _typed_line if sys.stdin.isatty() else _piped_line
    if read_line is _typed_line:
        with contextlib.suppress(ImportError):  # not on every platform
            import readline  # noqa: F401  (importing it gives `input` its history)
        print("(/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves)")
    while line := read_line():
        if not chat.is_blank(line):
            yield line.strip()


def _typed_line() -> str:
    """A line with its end; empty at the end of the input."""
    try:
        return input("> ") + "\n"
    except EOFError:
        print()
        return ""
    except KeyboardInterrupt:
        print("\n(Ctrl-D leaves)")
        return "\n"


def _piped_line() -> str:
    """A line with its end, empty at the end of the input; the end of a line that is too long is dropped."""
    line = rest = sys.stdin.readline(MAX_CHARACTERS + 2)
    while len(rest) > MAX_CHARACTERS + 1 and not rest.endswith("\n"):
        rest = sys.stdin.readline(MAX_CHARACTERS + 2)
    return line
