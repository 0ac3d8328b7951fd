"""Supervised tokens a second of fine-tuning on a CPU: this project against TRL's SFTTrainer.

Both train a model of SmolLM2-135M's shape from the same random weights, on the same token ids, with the same supervised
tokens and about the same number of positions a step. They take turns, a step each, in one process, so both see the same
machine; TRL once for each way it can fill a batch:

- bfd: whole conversations packed into rows; they don't see each other, as in this project;
- wrapped: one stream of tokens cut into rows: conversations see those before them, and may be cut;
- by length: a conversation a row, padded to the longest of a batch of about the same length.

`pip install trl`, then `python benchmarks/trl_sft.py [--dtype bfloat16 --seq_len 512 --positions 2048 --way bfd]`
"""

import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from train_step import packed
from training import make_step
from trl import SFTConfig, SFTTrainer

from tinysft_jax import console
from tinysft_jax.checkpoints import open_model
from tinysft_jax.data import prepare
from tinysft_jax.data.store import PreparedData, Split
from tinysft_jax.sharding import global_batch, make_mesh

# SmolLM2-135M's, in transformers' words.
SHAPE = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
WAYS = {
    "bfd": {"packing": True, "packing_strategy": "bfd"},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "by length": {"packing": False, "train_sampling_strategy": "group_by_length"},
}
WARM_UP = 2  # steps of each side that are not measured: the first compiles, or takes memory for the optimizer


@dataclasses.dataclass
class Tally:
    """What one side has done, by step."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)  # without padding

    def add(self, seconds: float, positions: int, tokens: int) -> None:
        self.seconds.append(seconds)
        self.positions.append(positions)
        self.tokens.append(tokens)

    def figures(self, supervised_share: float) -> dict[str, float]:
        """Rates are the fastest step's, as other programs disturb OpenMP's threads more than XLA's.

        `supervised_share` is that of the data's tokens: a few steps' own would vary by chance.
        """
        fastest = max(tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True))
        return {
            "fastest_step": min(self.seconds),
            "median_step": statistics.median(self.seconds),
            "padding": 1 - sum(self.tokens) / sum(self.positions),
            "tokens_per_second": fastest,
            "supervised_tokens_per_second": supervised_share * fastest,
        }


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq_len", type=int, default=512, help="of a packed row")
    parser.add_argument("--positions", type=int, default=2048, help="a step; a multiple of --seq_len")
    parser.add_argument("--steps", type=int, default=6, help="of each side to measure, for each way")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--way", choices=WAYS, action="append", help="of TRL to fill a batch (default: all)")
    parser.add_argument("--torch_compile", action="store_true", help="TRL's model")
    flags = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    results = {}
    with tempfile.TemporaryDirectory() as directory, jax.set_mesh(make_mesh()):
        model = random_model()
        model.save_pretrained(f"{directory}/model")
        prepare.main(["--embedded=3000", f"--output={directory}/data", "--workers=1", "--bpe_ranks=49000"])
        data = PreparedData(f"{directory}/data")
        split, totals = data.split("train"), data.description["splits"]["train"]
        share = totals["supervised_tokens"] / totals["tokens"]
        ours = OurLoop(f"{directory}/model", split, flags)
        for way in flags.way or WAYS:
            theirs, ours.tally = Tally(), Tally()
            make_trainer(model, split, TakeTurns(theirs, ours), settings(way, split, flags, directory)).train()
            results[way] = {"TRL": theirs.figures(share), "this project": ours.tally.figures(share)}
    report(results)
    print(json.dumps({"benchmark": "trl_sft", **vars(flags), "results": results}))


def random_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


class OurLoop:
    """This project's train step; a batch is built when it is needed."""

    def __init__(self, model: str, split: Split, flags):
        self.mesh, self.tally = make_mesh(), Tally()
        description, params = open_model(model)
        self.step, _, create = make_step(description.config, self.mesh, jnp.dtype(flags.dtype), params=params)
        self.state = create()
        self.batches = itertools.cycle(packed(split, flags.positions // flags.seq_len, flags.seq_len))
        for _ in range(WARM_UP):
            self.run()

    def run(self) -> None:
        start = time.perf_counter()
        batch = next(self.batches)
        self.state, metrics = self.step(self.state, global_batch(self.mesh, batch))
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - start
        self.tally.add(seconds, batch["tokens"].size, np.count_nonzero(batch["segment_ids"]))


class TakeTurns(transformers.TrainerCallback):
    """Measures the steps of TRL's trainer; between two of them the other side has one."""

    def __init__(self, tally: Tally, ours: OurLoop):
        self.tally, self.ours, self.positions, self.tokens = tally, ours, 0, 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step > WARM_UP:
            self.tally.add(time.perf_counter() - self.start, self.positions, self.tokens)
            self.ours.run()
        self.positions = self.tokens = 0
        self.start = time.perf_counter()


class CountingTrainer(SFTTrainer):
    """Counts what it trains on."""

    turns: TakeTurns

    def training_step(self, model, inputs, *args, **kwargs):
        self.turns.positions += inputs["input_ids"].numel()
        self.turns.tokens += int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum())
        return super().training_step(model, inputs, *args, **kwargs)


def settings(way: str, split: Split, flags, directory: str) -> SFTConfig:
    """The same optimizer as ours, and what makes TRL fastest: no gradient checkpointing, fused AdamW, no log."""
    rows, accumulation = flags.positions // flags.seq_len, 1
    if way == "bfd":  # TRL joins a batch to one row, and masks attention over all of it: slower than row by row
        rows, accumulation = 1, rows
    elif way == "by length":
        rows = round(flags.positions / split.lengths.mean())
    return SFTConfig(
        output_dir=f"{directory}/trl",
        max_steps=WARM_UP + flags.steps,
        max_length=flags.seq_len,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=flags.dtype == "bfloat16",
        torch_compile=flags.torch_compile,
        optim="adamw_torch_fused",
        learning_rate=2e-5,
        warmup_steps=500,
        adam_beta2=0.95,
        weight_decay=0.01,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **WAYS[way],
    )


def make_trainer(model: torch.nn.Module, split: Split, turns: TakeTurns, config: SFTConfig) -> SFTTrainer:
    """On the prepared token ids; a tokenizer is there for its pad token alone."""
    words = Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    data = labelled(split)
    trainer = CountingTrainer(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[turns])
    trainer.turns = turns
    return trainer


def labelled(split: Split) -> datasets.Dataset:
    """The conversations; a token's label is -100 where it is not supervised."""
    conversations = [split.conversation(i) for i in range(len(split))]
    tokens = [ids.astype(np.int32) for ids, _ in conversations]
    labels = [np.where(on, ids, -100) for ids, (_, on) in zip(tokens, conversations, strict=True)]
    return datasets.Dataset.from_dict({"input_ids": tokens, "labels": labels})


def report(results: dict[str, dict[str, dict[str, float]]]) -> None:
    columns = ("TRL's batches", "side", "fastest step", "median", "padding", "tokens/s", "supervised tokens/s", "ratio")
    table = Table(*columns)
    for way, sides in results.items():
        for side, row in sides.items():
            table.add_row(
                way,
                side,
                f"{row['fastest_step']:.2f} s",
                f"{row['median_step']:.2f} s",
                f"{row['padding']:.1%}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['supervised_tokens_per_second']:,.0f}",
                f"{row['tokens_per_second'] / sides['TRL']['tokens_per_second']:.2f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    console.run(main)
