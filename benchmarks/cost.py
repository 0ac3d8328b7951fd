"""FLOPs and memory traffic a supervised token, and temporary memory, with each idea of the train step switched off.

Everything is counted from the compiled train step; nothing runs. The conversations are the embedded corpus's.

`python benchmarks/cost.py [--dim 768 --n_layers 12 --n_heads 12 --seq_len 1024 --rows 8]`
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from unittest import mock

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from compiled import compile_train_step
from rich.console import Console
from rich.table import Table

from tinysft_jax import attention, console
from tinysft_jax.attention import BLOCK, SCOPE, first_key_blocks
from tinysft_jax.data import prepare
from tinysft_jax.data.batches import BatchSource
from tinysft_jax.data.packing import PackingPlan, plan_epoch
from tinysft_jax.data.store import PreparedData, Split
from tinysft_jax.model import GPTConfig, head_logits
from tinysft_jax.sharding import make_mesh
from tinysft_jax.training import step
from tinysft_jax.training import step as loss

VOCAB_SIZE = 50_260  # GPT-2's and three control tokens
Result = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Variant:
    packed: bool = True  # else a conversation a row
    head: str = "chunks"  # of supervised positions; "at once": all supervised ones; "everywhere": all positions
    attention_blocks: bool = True  # else the whole square of scores
    remat: str = "none"


OURS, REFERENCE = "this project", "reference style"
VARIANTS = {
    OURS: Variant(),
    "without packing": Variant(packed=False),
    "head everywhere": Variant(head="everywhere"),
    "head without chunks": Variant(head="at once"),
    "whole-square attention": Variant(attention_blocks=False),
    REFERENCE: Variant(packed=False, head="everywhere", attention_blocks=False),
    f"{OURS}, remat dots": Variant(remat="dots"),
    f"{OURS}, remat full": Variant(remat="full"),
    "head everywhere, remat full": Variant(head="everywhere", remat="full"),
    f"{REFERENCE}, remat full": Variant(packed=False, head="everywhere", attention_blocks=False, remat="full"),
}


@dataclasses.dataclass(frozen=True)
class Batches:
    """What the batches of an epoch hold, on average."""

    supervised: float  # tokens of a batch
    most_supervised: int  # in any batch
    turns: dict[str, float]  # of the loops that depend on the batch


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--n_layers", type=int, default=12)
    parser.add_argument("--n_heads", type=int, default=12)
    parser.add_argument("--seq_len", type=int, default=1024, help="of a packed row, and the reference's context")
    parser.add_argument("--rows", type=int, default=8, help="a step")
    parser.add_argument("--stories", type=int, default=3000, help="of the embedded corpus")
    flags = parser.parse_args()
    config = GPTConfig(VOCAB_SIZE, flags.dim, flags.n_layers, flags.n_heads, flags.seq_len)
    with tempfile.TemporaryDirectory() as directory:
        prepare.main([f"--embedded={flags.stories}", f"--output={directory}/data", "--workers=1"])
        split = PreparedData(f"{directory}/data").split("train")
        batches = {packed: describe(split, packed, flags.rows, flags.seq_len) for packed in (True, False)}
    results = {}
    for name, variant in VARIANTS.items():
        print(f"compiling: {name}", flush=True)
        results[name] = measure(config, flags.rows, variant, batches[variant.packed])
    ratios = {
        "(a) FLOPs a supervised token, this project to reference style": quotient(results, "flops", OURS, REFERENCE),
        "(b) temporary memory with remat full, this project to head everywhere": quotient(
            results, "temporary_bytes", f"{OURS}, remat full", "head everywhere, remat full"
        ),
    }
    report(results, ratios)
    print(
        json.dumps(
            {
                "benchmark": "cost",
                **vars(flags),
                "compiled_for": jax.default_backend(),
                "supervised_tokens_a_step": {
                    "packed": batches[True].supervised,
                    "one conversation a row": batches[False].supervised,
                },
                "turns": {"packed": batches[True].turns, "one conversation a row": batches[False].turns},
                "results": results,
                "ratios": ratios,
            }
        )
    )


def describe(split: Split, packed: bool, rows: int, seq_len: int) -> Batches:
    """All batches of an epoch but the last, which may not be full."""
    if packed:
        plan = plan_epoch(split.lengths, seq_len)
    else:
        order = np.random.default_rng(0).permutation(len(split)).astype(np.uint32)
        plan = PackingPlan(order, np.arange(len(order) + 1))
    source = BatchSource(split, plan, rows, seq_len)
    supervised, key_blocks = [], []
    for i in range(len(source) - 1):
        batch = source[i]
        supervised.append(int(batch["weights"].sum()))
        segments = batch["segment_ids"].reshape(rows, -1, BLOCK).swapaxes(0, 1)
        key_blocks.append(np.mean(np.arange(1, len(segments) + 1) - first_key_blocks(segments)))
    chunks = np.ceil(np.array(supervised) / loss.CHUNK)
    turns = {loss.SCOPE: float(chunks.mean()), SCOPE: float(np.mean(key_blocks))}
    return Batches(float(np.mean(supervised)), max(supervised), turns)


def measure(config: GPTConfig, rows: int, variant: Variant, batches: Batches) -> Result:
    """FLOPs and bytes are a supervised token's; the temporary memory is the step's."""
    heads: dict[str, Callable] = {
        "chunks": loss.supervised_nll,
        "at once": functools.partial(nll_at_once, capacity=batches.most_supervised),
        "everywhere": nll_everywhere,
    }
    attend = attention.block_attention if variant.attention_blocks else whole_square_attention
    with (
        mock.patch.object(step, "supervised_nll", heads[variant.head]),
        mock.patch.object(attention, "block_attention", attend),
    ):
        compiled, _ = compile_train_step(config, make_mesh(), rows, variant.remat)
    counts = hlo.count(compiled.as_text(), batches.turns)
    return {
        "flops": counts["flops"] / batches.supervised,
        "bytes": counts["bytes"] / batches.supervised,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def whole_square_attention(q, k, v, segment_ids) -> jax.Array:
    """All scores of a layer at once, where the mask is nothing to skip by."""
    positions = jnp.arange(q.shape[1])
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (positions[:, None] >= positions[None, :])[None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")


def nll_everywhere(hidden, embedding, targets, weights, vocab_size: int) -> jax.Array:
    """The loss from logits at every position."""
    nll = optax.losses.softmax_cross_entropy_with_integer_labels(head_logits(hidden, embedding, vocab_size), targets)
    return jnp.sum(weights * nll)


def nll_at_once(hidden, embedding, targets, weights, vocab_size: int, capacity: int) -> jax.Array:
    """The loss from logits at supervised positions, room for `capacity` of them at a time."""
    chosen = jnp.argsort(weights.reshape(-1) == 0, stable=True)[:capacity]
    hidden = hidden.reshape(weights.size, -1)[chosen]
    return nll_everywhere(hidden, embedding, targets.reshape(-1)[chosen], weights.reshape(-1)[chosen], vocab_size)


def quotient(results: dict[str, Result], key: str, one: str, other: str) -> float:
    return results[one][key] / results[other][key]


def report(results: dict[str, Result], ratios: dict[str, float]) -> None:
    table = Table(
        *(
            "train step",
            "MFLOP a supervised token",
            "ratio",
            "MB a supervised token",
            "ratio",
            "temporary MiB",
            "ratio",
        ),
        caption=(
            f"Compiled for {jax.default_backend()}. Temporary memory is what XLA sets aside for intermediate values "
            "beside parameters and optimizer state. A CPU computes bfloat16 products in float32 and schedules for "
            "speed, so it takes more than a GPU would; compare the rows."
        ),
    )
    for name, result in results.items():
        cells = [name]
        for key, unit in (("flops", 1e6), ("bytes", 1e6), ("temporary_bytes", 2**20)):
            cells += [f"{result[key] / unit:,.0f}", f"{quotient(results, key, name, REFERENCE):.2f}"]
        table.add_row(*cells)
    Console(width=120).print(table)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")


if __name__ == "__main__":
    console.run(main)
