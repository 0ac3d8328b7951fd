"""Converts models between PyTorch checkpoints, model directories and Hugging Face folders."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp

from tinysft_jax import console, distributed
from tinysft_jax.checkpoints import load_model, model_kind, open_model
from tinysft_jax.console import RunError, UserError
from tinysft_jax.conversion import export
from tinysft_jax.conversion.model_card import read_run
from tinysft_jax.conversion.parity import measure_huggingface_parity, measure_parity
from tinysft_jax.conversion.torch import open_torch_file
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription, make_model, model_parameter_shapes, trim_vocabulary


def main() -> None:
    args = _parser().parse_args()
    export.check_output(args.to, args.output, args.overwrite)
    if args.report and args.to != "huggingface":
        raise UserError("--report is for the model card, which only --to huggingface writes")
    distributed.check_devices()
    description, params = open_model(args.input, args.n_heads)
    run = read_run(args.input) if model_kind(args.input) == "work" else None
    print_model(description)
    print_notes(args.to, description)
    with export.new_output(args.to, args.output, args.overwrite) as path:
        export.write(args.to, path, params, description, args.output.resolve().name, run, args.report)
        if args.check:
            if args.to == "model":
                del params
                model = load_model(path, dtype=jnp.float32)
            else:
                model = make_model(description.config, params, dtype=jnp.float32)
                check(model, path, args.output)
            check(model, args.input, args.input)
    print(f"written     {args.output}")


def _parser() -> console.Parser:
    parser = console.Parser(description=__doc__)
    parser.add_argument(
        "--input",
        type=console.path,
        required=True,
        metavar="CKPT",
        help="a .pt file, model, work or Hugging Face directory",
    )
    parser.add_argument(
        "--output", type=console.path, required=True, metavar="OUT", help="a directory, or a .pt to make"
    )
    parser.add_argument("--to", choices=export.KINDS, default="model", help="what to make")
    parser.add_argument("--n_heads", type=int, metavar="N", help="attention heads, where a .pt doesn't tell")
    parser.add_argument(
        "--report", type=console.path, metavar="DIR", help="an evaluation of the model, for its model card"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare logits with a second forward pass over the foreign file's tensors"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser


def print_model(description: ModelDescription) -> None:
    config, assumed = description.config, description.source.get("assumed", {})
    sizes = jax.tree.leaves(trim_vocabulary(model_parameter_shapes(config), config))
    print(
        f"shape       vocabulary {config.vocab_size}, dim {config.dim}, {config.n_layers} layers, "
        f"{config.n_heads} heads, hidden {config.hidden_dim}, context {config.max_seq_len}, theta {config.rope_theta:g}"
    )
    if assumed:
        print(f"assumed     {', '.join(f'{key} {value:g}' for key, value in assumed.items())}: the file doesn't tell")
    print(f"parameters  {sum(math.prod(leaf.shape) for leaf in sizes):,}")
    print(f"template    {description.chat_template or 'none: the model completes plain text'}")


def print_notes(to: str, description: ModelDescription) -> None:
    """What does not get across."""
    config = description.config
    if to == "torch" and description.chat_template != "text":
        print(
            "note        the PyTorch project's generator writes markers as text; tune a model that is meant for it "
            "with --template text (of prepare)"
        )
    if to == "torch" and (config.hidden_dim, config.rope_theta) != (int(4.0 * config.dim), 10000.0):
        print(
            f"note        its config can't say hidden {config.hidden_dim} and theta {config.rope_theta:g}: build the "
            "PyTorch model with them"
        )
    if to == "huggingface" and description.tokenizer is None:
        print("note        the model's tokenizer is unknown: the folder holds none")
    if to == "model" and description.tokenizer is None and description.source.get("kind") == "huggingface":
        print("note        the folder has no tokenizer of this package's: the model's is unknown")


def check(model: GPT, path: Path, name: Path) -> None:
    """Compares a model with a `.pt` or a Hugging Face folder that it came from or was written as.

    Raises:
      RunError: if they differ by more than round-off.
    """
    if path.is_file():
        parity = measure_parity(model, open_torch_file(path))
    elif model_kind(path) == "huggingface":
        parity = measure_huggingface_parity(model, path)
    else:
        return  # a model directory: there is nothing foreign about it
    print(f"check       {parity}")
    if not parity.holds:
        raise RunError(f"the converted model does not compute what {name} does; nothing was written")


if __name__ == "__main__":
    console.run(main)
