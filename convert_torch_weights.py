"""Converts models between PyTorch checkpoints, model directories, Hugging Face folders and GGUF files."""

from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tinysft_jax import console, distributed, export
from tinysft_jax.checkpoints import model_kind, open_model
from tinysft_jax.console import RunError, UserError
from tinysft_jax.conversion.gguf import ROUND_OFF
from tinysft_jax.conversion.huggingface import rounded
from tinysft_jax.conversion.model_card import read_run
from tinysft_jax.conversion.parity import measure_parity
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription, Params, count_parameters, make_model


def main() -> None:
    args = _parse()
    export.check_output(args.to, args.output, args.overwrite)
    if args.report and args.to != "huggingface":
        raise UserError("--report is for the model card, which only --to huggingface writes")
    if args.dtype and args.dtype not in (known := export.DTYPES.get(args.to, ())):
        raise UserError(f"--to {args.to} can't hold {args.dtype}; it holds {', '.join(known) or 'float32'}")
    distributed.check_devices()
    description, params = open_model(args.input, args.n_heads)
    source = model_kind(args.input)
    run = read_run(args.input) if source == "work" else None
    print_model(description)
    print_notes(args.to, description)
    with export.new_output(args.to, args.output, args.overwrite) as path:
        dtype = args.dtype or "float32"
        export.write(args.to, path, params, description, args.output.resolve().name, run, args.report, dtype)
        if args.check:
            config = description.config
            if args.to == "model":
                del params
                _, params = open_model(path)
            elif args.to == "gguf":
                check_rounding(params, open_model(path)[1], dtype)
            else:
                written = rounded(params, dtype) if args.to == "huggingface" else params
                check(make_model(config, written, dtype=jnp.float32), path, args.output)
                del written
            if source in ("torch", "huggingface"):
                check(make_model(config, params, dtype=jnp.float32), args.input, args.input)
    print(f"written     {args.output}")


def _parse(arguments: list[str] | None = None) -> Namespace:
    parser = console.Parser(description=__doc__)
    parser.add_argument(
        "--input",
        type=console.path,
        required=True,
        metavar="CKPT",
        help="a .pt or .gguf file, or a model, work or Hugging Face directory",
    )
    parser.add_argument(
        "--output", type=console.path, required=True, metavar="OUT", help="a new directory, or a new .pt or .gguf file"
    )
    parser.add_argument("--to", choices=export.KINDS, default="model", help="the form of OUT")
    parser.add_argument(
        "--dtype",
        choices=dict.fromkeys(sum(export.DTYPES.values(), ())),
        help="of the tensors in a Hugging Face folder or a GGUF file (default: float32)",
    )
    parser.add_argument("--n_heads", type=int, metavar="N", help="attention heads, for a .pt file that doesn't say")
    parser.add_argument("--report", type=console.path, metavar="DIR", help="an evaluation, for the model card")
    parser.add_argument("--check", action="store_true", help="compare logits with an independent forward pass")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser.parse_args(arguments)


def print_model(description: ModelDescription) -> None:
    config, assumed = description.config, description.source.get("assumed", {})
    shared = f" that share {config.n_kv_heads} of keys" if config.n_kv_heads < config.n_heads else ""
    print(
        f"shape       vocabulary {config.vocab_size}, dim {config.dim}, {config.n_layers} layers, "
        f"{config.n_heads} heads{shared}, hidden {config.hidden_dim}, context {config.max_seq_len}, "
        f"theta {config.rope_theta:g}"
    )
    if assumed:
        print(f"assumed     {', '.join(f'{key} {value:g}' for key, value in assumed.items())}: the file doesn't say")
    print(f"parameters  {count_parameters(config):,}")
    template = description.chat_template
    own = "the model's own"
    print(f"template    {own if isinstance(template, dict) else template or 'none: the model completes plain text'}")


def print_notes(to: str, description: ModelDescription) -> None:
    """What the output can't express."""
    config, notes = description.config, []
    if to == "torch" and description.chat_template != "text":
        notes += [
            "the PyTorch project's generator writes markers as text; fine-tune a model for it on data prepared with "
            "--template text"
        ]
    if to == "torch" and (config.hidden_dim, config.rope_theta) != (int(4.0 * config.dim), 10000.0):
        shape = f"hidden {config.hidden_dim} and theta {config.rope_theta:g}"
        notes += [f"its config has no keys for {shape}: build the PyTorch model with them"]
    if description.tokenizer is None and {"huggingface", "gguf"} & {to, description.source.get("kind")}:
        notes += ["the model's tokenizer is unknown: OUT has none"]
    for note in notes:
        print(f"note        {note}")


def check(model: GPT, path: Path, name: Path) -> None:
    """Compares a model with the `.pt` or Hugging Face folder that it came from or was written as.

    Raises:
      RunError: if they differ by more than round-off.
    """
    parity = measure_parity(model, path)
    print(f"check       {parity}")
    if not parity.holds:
        raise RunError(f"the converted model does not compute what {name} does; nothing was written")


def check_rounding(params: Params, written: Params, dtype: str) -> None:
    """Compares parameters with what a GGUF file holds. Raises: RunError, if they differ by more than its rounding."""

    def error(ours: np.ndarray, theirs: np.ndarray) -> float:
        return float(np.abs(ours - theirs).max() / (np.abs(ours).max() or 1))

    largest = max(jax.tree.leaves(jax.tree.map(error, params, written)))
    print(f"check       weights differ by at most {largest:.1e} of the largest of their tensor")
    if not largest <= ROUND_OFF[dtype]:
        raise RunError(f"that is more than {dtype} rounds: nothing was written")


if __name__ == "__main__":
    console.run(main)
