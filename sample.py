"""Lets a model speak: answers to a prompt, a chat, or one request of each kind that it should have learnt."""

from tinysft_jax import cli
from tinysft_jax.errors import UserError
from tinysft_jax.sampling.options import SamplingOptions


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a model directory, a work directory or a .pt file")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", help="answer this; a model without a chat template continues it")
    mode.add_argument("--interactive", action="store_true", help="chat, line by line")
    mode.add_argument("--test", action="store_true", help="show what the model can do, one request of each kind")
    parser.add_argument("--system", help="the system message (default: the one the model was trained with)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="length of an answer, at most")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the most likely token")
    parser.add_argument("--top_k", type=int, default=50, help="draw among the k most likely tokens; 0: off")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest this probable; 1: off")
    parser.add_argument("--num_samples", type=int, default=1, help="answers to --prompt")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same answers")
    args = parser.parse_args()
    if args.num_samples < 1:
        raise UserError(f"--num_samples is {args.num_samples}; it must be 1 or more")
    if args.num_samples > 1 and args.prompt is None:
        raise UserError("--num_samples goes with --prompt")
    if args.prompt == "" or args.system == "":
        raise UserError(f"{'--prompt' if args.prompt == '' else '--system'} is empty")

    options = SamplingOptions(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)

    # Only now what takes seconds to import.
    from tinysft_jax.model import default_dtype
    from tinysft_jax.model_directory import make_model, read_model
    from tinysft_jax.sampling import console
    from tinysft_jax.sampling.decode import Decoder
    from tinysft_jax.tokenizer import ChatTokenizer

    description, params = read_model(args.checkpoint)
    tokenizer = ChatTokenizer.from_description(description.to_json())
    decoder = Decoder(make_model(description.config, params, dtype=default_dtype()))
    if args.prompt is not None:
        console.print_answers(decoder, tokenizer, options, args.prompt, args.system, args.num_samples)
    elif args.test:
        console.print_capabilities(decoder, tokenizer, options, args.system)
    else:
        console.run_interactive(decoder, tokenizer, options, args.system)


if __name__ == "__main__":
    cli.run(main)
