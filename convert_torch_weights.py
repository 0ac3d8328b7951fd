"""Converts a PyTorch checkpoint into a model directory that `train.py` starts from and `sample.py` reads."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp

from tinysft_jax import cli, files
from tinysft_jax.errors import RunError
from tinysft_jax.interop.parity import measure_parity
from tinysft_jax.interop.torch_checkpoint import read_torch_checkpoint
from tinysft_jax.interop.torch_file import open_torch_file
from tinysft_jax.model_directory import (
    ModelDescription,
    load_model,
    model_parameter_shapes,
    trim_vocabulary,
    write_model,
)


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="CKPT", help="a .pt file")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="the directory to make")
    parser.add_argument("--to", choices=("model",), default="model", help="what to make")
    parser.add_argument("--n_heads", type=int, metavar="N", help="attention heads, where the file doesn't tell")
    parser.add_argument(
        "--check", action="store_true", help="compare logits with a float64 pass over the file's tensors"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args()

    files.check_output(args.output, args.overwrite, "model.json")
    description, params = read_torch_checkpoint(args.input, args.n_heads)
    report(description)
    with files.new_directory(args.output, args.overwrite) as directory:
        write_model(directory, params, description)
        if args.check:
            del params
            check(directory, args.input)
    print(f"written     {args.output}")


def report(description: ModelDescription) -> None:
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


def check(directory: Path, checkpoint: Path) -> None:
    """Compares what was written with the checkpoint.

    Raises:
      RunError: if they differ by more than round-off.
    """
    parity = measure_parity(load_model(directory, dtype=jnp.float32), open_torch_file(checkpoint))
    print(f"check       {parity}")
    if not parity.holds:
        raise RunError(f"the converted model does not compute what {checkpoint} does; nothing was written")


if __name__ == "__main__":
    cli.run(main)
