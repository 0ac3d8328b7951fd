"""What `sample.py` shows in a terminal or a pipe."""

import contextlib
import io
import itertools
import sys
from collections.abc import Generator, Iterable, Iterator

from tinysft_jax.errors import UserError
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.options import SamplingOptions
from tinysft_jax.sampling.session import ChatSession, encode_request, stream_text, text_options
from tinysft_jax.tokenizer import ChatTokenizer

HELP = "(/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer, /help shows this)"

_KITE = (
    "Mia had a red kite. One windy day the string broke, and the kite flew far over the hill. Mia was sad. Her friend "
    'Leo said, "Let us look for it together." They walked and walked, and at last they saw the kite in a small tree. '
    "Leo held Mia up, and she took it down. Mia was so happy that she let Leo fly the kite all afternoon."
)
_COOKIES = (
    "Tim saw a jar of cookies on the table. Mom said he could have one after dinner, but Tim did not want to wait. He "
    "ate five cookies, and then he told Mom that the dog did it. Soon his tummy hurt. Tim cried and told the truth. "
    'Mom hugged him and said, "Thank you for telling me." After that day Tim did not lie again.'
)
# What the model should have learnt, one request of each kind.
CAPABILITIES = {
    "summary": f"Please provide a brief summary of the following story: {_KITE}",
    "moral": f"What is the moral lesson of this story? {_COOKIES}",
    "use the words": "Write a short story that uses all of these words: boat, sing, brave",
    "main character": f"Based on this story, who is the main character? {_COOKIES}",
    "happy ending": f"Does this story have a happy ending? {_KITE}",
}


def print_answers(
    decoder: Decoder,
    tokenizer: ChatTokenizer,
    options: SamplingOptions,
    prompt: str,
    system: str | None = None,
    num_samples: int = 1,
) -> None:
    """Prints the answer to a prompt as it is made; several answers, made together, with numbers.

    A model without a chat template continues the prompt, which is printed before its continuation.

    Raises:
      UserError: if the prompt can't be answered.
    """
    options = text_options(options, tokenizer, decoder.config)
    ids = encode_request(tokenizer, prompt, system)
    opening = prompt if tokenizer.template is None else ""
    if num_samples == 1:
        _print_pieces(itertools.chain([opening], stream_text(decoder, tokenizer, ids, options)))
        return
    for number, answer in enumerate(decoder.generate([ids] * num_samples, options), start=1):
        print(f"[{number}] {opening}{tokenizer.decode(answer)}")


def print_capabilities(
    decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, system: str | None = None
) -> None:
    """Prints a request of each kind that the model should have learnt, and its answer."""
    options = text_options(options, tokenizer, decoder.config)
    requests = {kind: encode_request(tokenizer, text, system) for kind, text in CAPABILITIES.items()}
    context = decoder.config.max_seq_len
    fitting = [kind for kind, ids in requests.items() if len(ids) < context]
    answers = decoder.generate([requests[kind] for kind in fitting], options)
    texts = dict(zip(fitting, map(tokenizer.decode, answers), strict=True))
    for kind, text in CAPABILITIES.items():
        too_long = f"({len(requests[kind])} tokens are too long for the model's context of {context})"
        print(f"--- {kind}\nUser: {text}\nAssistant: {texts.get(kind, too_long)}\n")


def run_interactive(
    decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, system: str | None = None
) -> None:
    """Answers line after line, from a terminal or a pipe, until `/quit` or the end of the input.

    Lines are turns of one conversation; a model without a chat template continues each line by itself.
    """
    encode_request(tokenizer, "a", system)  # refuses a system message that can't be used before the first line
    session = ChatSession(decoder, tokenizer, options, system) if tokenizer.template else None
    options = text_options(options, tokenizer, decoder.config)
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            if session:
                session.reset()
            print("(forgotten)")
        elif line.startswith("/"):
            print(HELP)
        else:
            try:
                with contextlib.closing(_reply(decoder, tokenizer, options, session, line)) as pieces:
                    _print_pieces(pieces)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print(" (stopped)")


def _reply(
    decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, session: ChatSession | None, line: str
) -> Generator[str, None, None]:
    """Yields what to print after a line."""
    if session is None:
        pieces = stream_text(decoder, tokenizer, encode_request(tokenizer, line), options)
        yield line
    else:
        before = session.forgotten
        pieces = session.answer(line)
        if forgotten := session.forgotten - before:
            yield f"(the context is full; exchanges forgotten, oldest first: {forgotten})\n"
    yield from pieces


def _lines() -> Iterator[str]:
    """Yields lines that are not blank, as typed in (with history and editing) or as piped in."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte in a pipe is no reason to stop
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # not on every platform
            import readline  # noqa: F401  (importing it gives `input` its history)
        print(HELP)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(f"\n{HELP}")
            continue
        if line:
            yield line


def _print_pieces(pieces: Iterable[str]) -> None:
    """Prints text as it comes, and a line's end."""
    for text in pieces:
        print(text, end="", flush=True)
    print(flush=True)
