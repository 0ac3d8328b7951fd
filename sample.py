"""Generates text: answers to a prompt or to a file of them, a chat, or one request of each kind it should know."""

import os
import sys
from argparse import Namespace

import jax

from tinysft_jax import console, distributed
from tinysft_jax.chat import check_not_blank
from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import UserError
from tinysft_jax.model import default_dtype
from tinysft_jax.sampling.batch import answer_file, read_requests
from tinysft_jax.sampling.chat import Session, Shell
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.text import AnswerStream, encode_request, text_options
from tinysft_jax.sharding import make_mesh
from tinysft_jax.tokenizer import ChatTokenizer

KITE = (
    "Mia had a red kite. One windy day the string broke, and the kite flew far over the hill. Mia was sad. Her friend "
    'Leo said, "Let us look for it together." They walked and walked, and at last they saw the kite in a small tree. '
    "Leo held Mia up, and she took it down. Mia was so happy that she let Leo fly the kite all afternoon."
)
COOKIES = (
    "Tim saw a jar of cookies on the table. Mom said he could have one after dinner, but Tim did not want to wait. He "
    "ate five cookies, and then he told Mom that the dog did it. Soon his tummy hurt. Tim cried and told the truth. "
    'Mom hugged him and said, "Thank you for telling me." After that day Tim did not lie again.'
)
# What the model should have learned, one request of each kind.
CAPABILITIES = {
    "summary": f"Please provide a brief summary of the following story: {KITE}",
    "moral": f"What is the moral lesson of this story? {COOKIES}",
    "use the words": "Write a short story that uses all of these words: boat, sing, brave",
    "main character": f"Based on this story, who is the main character? {COOKIES}",
    "happy ending": f"Does this story have a happy ending? {KITE}",
}


def main() -> None:
    flags = _parse()
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_length", "seed")
    options = SamplingOptions(**{name: getattr(flags, name) for name in names})
    distributed.check_devices()
    description, params = open_model(flags.checkpoint)
    tokenizer = ChatTokenizer.from_description(description.to_json())
    mesh = make_mesh() if flags.input is not None and jax.device_count() > 1 else None
    decoder = Decoder(description.config, params, default_dtype(), description.trained_length, mesh)
    if flags.input is not None:
        length = decoder.max_length(options)
        requests = read_requests(flags.input, tokenizer, description.config, flags.system, length)
        answer_file(decoder, tokenizer, options, requests, flags.output, flags.num_samples, flags.batch_size)
    elif flags.prompt is not None:
        print_answers(decoder, tokenizer, options, flags)
    elif flags.test:
        print_capabilities(decoder, tokenizer, options, flags.system)
    else:
        Shell(Session(decoder, tokenizer, options, flags.system)).run()


def print_answers(decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, flags: Namespace) -> None:
    """Prints the answer to `--prompt` as it is generated; several answers, generated together, with numbers.

    A model without a chat template continues the prompt, which is printed before its continuation.
    """
    options = text_options(options, tokenizer, decoder.config)
    ids = encode_request(tokenizer, flags.prompt, flags.system)
    opening = flags.prompt if tokenizer.template is None else ""
    if flags.num_samples == 1:
        answer = AnswerStream(tokenizer, decoder.stream(ids, options))
        print(opening, end="")
        for text in answer:
            print(text, end="", flush=True)
        print(flush=True)
        lengths = [len(ids) + answer.n_tokens]
    else:
        answers = decoder.generate([ids] * flags.num_samples, options)
        for number, answer in enumerate(answers, start=1):
            print(f"[{number}] {opening}{tokenizer.decode(answer)}")
        lengths = [len(ids) + len(answer) for answer in answers]
    if note := decoder.note_on_length(lengths, options):
        print(note, file=sys.stderr)


def print_capabilities(
    decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, system: str | None
) -> None:
    """Prints a request of each kind, and its answer."""
    options = text_options(options, tokenizer, decoder.config)
    requests = {kind: encode_request(tokenizer, text, system) for kind, text in CAPABILITIES.items()}
    length = decoder.max_length(options)
    fitting = [kind for kind, ids in requests.items() if len(ids) < length]
    answers = dict(zip(fitting, decoder.generate([requests[kind] for kind in fitting], options), strict=True))
    for kind, text in CAPABILITIES.items():
        answer = f"({len(requests[kind])} tokens leave no room for an answer: {length} are the most)"
        if kind in answers:
            answer = tokenizer.decode(answers[kind])
        print(f"--- {kind}\nUser: {text}\nAssistant: {answer}\n")
    lengths = [len(requests[kind]) + len(answer) for kind, answer in answers.items()]
    if note := decoder.note_on_length(lengths, options):
        print(note, file=sys.stderr)


def _parse(arguments: list[str] | None = None) -> Namespace:
    parser = console.Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a work directory, a model directory, a .pt file or a Hugging Face folder"
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", help="answer this; a model without a chat template continues it")
    mode.add_argument("--interactive", action="store_true", help="chat, line by line; /help lists the commands")
    mode.add_argument("--input", type=console.path, metavar="FILE", help="answer its conversations or prompts, in JSON")
    mode.add_argument("--test", action="store_true", help="answer one request of each kind that it should know")
    add = parser.add_argument
    add("--output", type=console.path, metavar="FILE", help="where the answers to --input go")
    add("--system", help="the system message (default: the one the model was trained with)")
    add("--max_new_tokens", type=int, default=200, help="length of an answer, at most")
    add("--max_length", type=int, help="tokens of question and answer, at most (default: the model's trained length)")
    add("--temperature", type=float, default=0.7, help="0: greedy")
    add("--top_k", type=int, default=50, help="draw among the k most likely tokens; 0: off")
    add("--top_p", type=float, default=1.0, help="draw among the most likely of this probability together; 1: off")
    add(
        "--min_p",
        type=float,
        default=0.0,
        help="draw among those at least this fraction as likely as the first; 0: off",
    )
    add("--repetition_penalty", type=float, default=1.0, help="above 1 avoids tokens that occurred; 1: off")
    add("--num_samples", type=int, default=1, help="answers to --prompt, or to each request of --input")
    add("--batch_size", type=int, default=32, help="answers generated together for --input; memory grows with it")
    add("--seed", type=int, default=0, help="the same seed gives the same answers")
    flags = parser.parse_args(arguments)
    for name in ("num_samples", "batch_size"):
        if (value := getattr(flags, name)) < 1:
            raise UserError(f"--{name} is {value}; it must be 1 or more")
    if flags.num_samples > 1 and flags.prompt is None and flags.input is None:
        raise UserError("--num_samples goes with --prompt or --input")
    for name in ("prompt", "system"):
        if (text := getattr(flags, name)) is not None:
            check_not_blank(text, f"--{name}")
    if (flags.input is None) != (flags.output is None):
        raise UserError("--input and --output go together")
    if flags.output is not None:
        if os.path.exists(flags.output):
            raise UserError(f"{flags.output} exists; choose another --output or delete it")
        if not flags.output.parent.is_dir():
            raise UserError(f"there is no directory {flags.output.parent} for --output")
    return flags


if __name__ == "__main__":
    console.run(main, needs_stdout=True)
