"""Generates text: answers to a prompt or to a file of them, a chat, or five sample requests."""

import os
from argparse import Namespace

from tinysft_jax import console
from tinysft_jax.chat import check_not_blank
from tinysft_jax.console import UserError


def main() -> None:
    flags = _parse()
    import jax  # after the flags, because this takes a second

    from tinysft_jax import accelerator, distributed
    from tinysft_jax.checkpoints import open_model
    from tinysft_jax.sampling.batch import answer_file, read_requests
    from tinysft_jax.sampling.chat import Session, Shell
    from tinysft_jax.sampling.decode import Decoder
    from tinysft_jax.sampling.filters import SamplingOptions
    from tinysft_jax.sampling.text import print_answers, print_capabilities
    from tinysft_jax.sharding import make_mesh

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_length", "seed")
    options = SamplingOptions(**{name: getattr(flags, name) for name in names})
    distributed.check_devices()
    accelerator.keep_compiled()
    description, params = open_model(flags.checkpoint)
    tokenizer = description.make_tokenizer()
    mesh = make_mesh() if flags.input is not None and jax.device_count() > 1 else None
    decoder = Decoder(description.config, params, accelerator.default_dtype(), description.trained_length, mesh)
    if flags.input is not None:
        length = decoder.max_length(options)
        requests = read_requests(flags.input, tokenizer, description.config, flags.system, length)
        answer_file(decoder, tokenizer, options, requests, flags.output, flags.num_samples, flags.batch_size)
    elif flags.prompt is not None:
        print_answers(decoder, tokenizer, options, flags.prompt, flags.system, flags.num_samples)
    elif flags.test:
        print_capabilities(decoder, tokenizer, options, flags.system)
    else:
        Shell(Session(decoder, tokenizer, options, flags.system)).run()


def _parse(arguments: list[str] | None = None) -> Namespace:
    parser = console.Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a work directory, a model directory, a .pt file or a Hugging Face folder"
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", help="answer this; a model without a chat template continues it")
    mode.add_argument("--interactive", action="store_true", help="chat, line by line; /help lists the commands")
    mode.add_argument("--input", type=console.path, metavar="FILE", help="answer its conversations or prompts, in JSON")
    mode.add_argument("--test", action="store_true", help="answer five sample requests")
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
