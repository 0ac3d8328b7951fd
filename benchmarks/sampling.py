"""Generated tokens a second: this project against a PyTorch loop with the same weights; and what the filters cost.

The loop works like the PyTorch project's generator: for each new token the whole text so far goes through the model,
with logits at every position. Ours keeps keys and values, and loops on the device. The fastest of several
measurements counts, for both: what else runs on the machine only adds to them.

`python benchmarks/sampling.py [--dim 256 --n_layers 4 --n_heads 4 --prompt 300 --new 100 --batch 16 --repeats 5]`
"""

import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tinysft_jax import console
from tinysft_jax.accelerator import default_dtype
from tinysft_jax.checkpoints import open_model
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from torch_twin import TorchTwin  # the same model in PyTorch, with its fused attention

VOCAB_SIZE = 50_304
TEMPERATURE, TOP_K = 0.7, 50
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # PyTorch's
FILTERS = {
    "greedy": {"temperature": 0.0, "top_k": 0},
    "no filter": {"temperature": TEMPERATURE, "top_k": 0},
    "top-k 50": {"temperature": TEMPERATURE, "top_k": TOP_K},
    "top-p 0.9": {"temperature": TEMPERATURE, "top_k": 0, "top_p": 0.9},
    "top-k 50, top-p 0.9": {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": 0.9},
    "min-p 0.05": {"temperature": TEMPERATURE, "top_k": 0, "min_p": 0.05},
    "top-k 50, penalty 1.2": {"temperature": TEMPERATURE, "top_k": TOP_K, "repetition_penalty": 1.2},
}


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--n_layers", type=int, default=4)
    parser.add_argument("--n_heads", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=100, help="new tokens of a prompt")
    parser.add_argument("--batch", type=int, default=16, help="prompts at a time, beside one")
    parser.add_argument("--repeats", type=int, default=5, help="the fastest counts")
    flags = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for PyTorch, too
    context = 1 << (flags.prompt + flags.new - 1).bit_length()
    twin = TorchTwin(VOCAB_SIZE, flags.dim, flags.n_layers, flags.n_heads, context)
    with tempfile.TemporaryDirectory() as directory:
        torch.save(twin.checkpoint(), f"{directory}/twin.pt")
        description, params = open_model(f"{directory}/twin.pt")
    decoder = Decoder(description.config, params, default_dtype())
    prompts = np.random.default_rng(0).integers(0, VOCAB_SIZE, (flags.batch, flags.prompt)).tolist()
    twin = twin.to(DEVICE)
    if DEVICE == "cuda":
        twin = twin.bfloat16()  # as ours computes there
    results = {"torch": torch_rates(twin, prompts, flags.new)}
    results["ours"] = our_rates(decoder, prompts, flags.new, flags.repeats)
    results["step_ms"] = {
        "one_stream": step_times(decoder, prompts[:1], flags.new, flags.repeats),
        "batch": step_times(decoder, prompts, flags.new, flags.repeats),
    }
    one = results["torch"]["one_stream"]
    results["ratio"] = {key: results["ours"][key] / one for key in ("one_stream", "batch")}
    results["top_p_to_top_k"] = {
        key: times["top-p 0.9"] / times["top-k 50"] for key, times in results["step_ms"].items()
    }
    report(results, flags.batch)
    print(json.dumps({"benchmark": "sampling", **vars(flags), "dtype": default_dtype().name, **results}))


@torch.inference_mode()
def torch_rates(model: TorchTwin, prompts: list[list[int]], n_new: int) -> dict[str, float]:
    """Tokens a second: of one stream from the fastest token of each tenth of the answer, of the batch from the fastest
    token of the tenth in the middle, where a text has its mean length."""
    n_batch = max(n_new // 10, 1)
    texts = torch.tensor(prompts, device=DEVICE)
    middle = torch.randint(VOCAB_SIZE, (len(prompts), (n_new - n_batch) // 2), device=DEVICE)
    one = torch_token_seconds(model, texts[:1], n_new)
    batch = torch_token_seconds(model, torch.cat([texts, middle], dim=1), n_batch)
    tenths = np.array_split(one, min(10, n_new))
    return {
        "one_stream": 1 / float(np.mean([tenth.min() for tenth in tenths])),
        "batch": len(prompts) / min(batch),
    }


def torch_token_seconds(model: TorchTwin, ids: torch.Tensor, n_new: int) -> list[float]:
    """Times each token of top-k sampling that computes the whole text again for it."""
    times = []
    for _ in range(n_new):
        start = time.perf_counter()
        logits = model(ids)[:, -1].float() / TEMPERATURE
        kth = torch.topk(logits, TOP_K).values[:, -1:]
        probabilities = torch.softmax(logits.masked_fill(logits < kth, -torch.inf), dim=-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def our_rates(decoder: Decoder, prompts: list[list[int]], n_new: int, repeats: int) -> dict[str, float]:
    options = SamplingOptions(n_new, TEMPERATURE, TOP_K)
    calls = {
        "one_stream": lambda: decoder.generate(prompts[:1], options),
        "batch": lambda: decoder.generate(prompts, options),
        "first_token": lambda: next(decoder.stream(prompts[0], options)),
    }
    compiling = {name: seconds(call) for name, call in calls.items()}
    fastest = {name: min(seconds(call) for _ in range(repeats)) for name, call in calls.items()}
    return {
        "one_stream": n_new / fastest["one_stream"],
        "batch": n_new * len(prompts) / fastest["batch"],
        "first_token_s": fastest["first_token"],
        "compile_s": {name: compiling[name] - fastest[name] for name in calls},
    }


def step_times(decoder: Decoder, prompts: list[list[int]], n_new: int, repeats: int) -> dict[str, float]:
    """Milliseconds of one more token for all rows under each filter: those of many tokens less those of one."""
    calls = {
        (name, n): functools.partial(decoder.generate, prompts, SamplingOptions(n, **filters))
        for name, filters in FILTERS.items()
        for n in (1, n_new)
    }
    for call in calls.values():
        call()  # compiles
    # In turn, so that a busy minute of the machine meets all.
    rounds = [{key: seconds(call) for key, call in calls.items()} for _ in range(repeats)]
    fastest = {key: min(times[key] for times in rounds) for key in calls}
    return {name: 1e3 * (fastest[name, n_new] - fastest[name, 1]) / (n_new - 1) for name in FILTERS}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report(results: dict[str, dict], batch: int) -> None:
    console = Console(width=120)
    ours, theirs = results["ours"], results["torch"]
    table = Table("tokens/s", "PyTorch loop", "this project", "ratio to the loop's one stream")
    for key, name in (("one_stream", "one stream"), ("batch", f"{batch} streams")):
        table.add_row(name, f"{theirs[key]:,.1f}", f"{ours[key]:,.0f}", f"{results['ratio'][key]:.1f}")
    console.print(table)
    console.print(
        f"first token after {ours['first_token_s'] * 1e3:.0f} ms; compiling took "
        + ", ".join(f"{value:.1f} s ({name.replace('_', ' ')})" for name, value in ours["compile_s"].items())
    )
    table = Table("a step under", "1 stream, ms", f"{batch} streams, ms")
    for name in FILTERS:
        table.add_row(name, *(f"{times[name]:.2f}" for times in results["step_ms"].values()))
    table.add_row("top-p to top-k", *(f"{ratio:.2f}" for ratio in results["top_p_to_top_k"].values()))
    console.print(table)


if __name__ == "__main__":
    console.run(main)
