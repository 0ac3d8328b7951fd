"""The server under load: many clients on the same cores, against `generate` in batches; and what a long prompt delays.

The model is that of `benchmarks/sampling.py`, with random weights. Rounds alternate between `generate` with as many
prompts at a time as the server has slots, clients that wait for whole answers, and clients that read streams; medians
count.

`python benchmarks/serving.py [--clients 64 --slots 16 --requests 128 --new 100 --rounds 3]`
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sampling import VOCAB_SIZE, TorchTwin, seconds

from tinysft_jax import console
from tinysft_jax.accelerator import default_dtype
from tinysft_jax.checkpoints import open_model
from tinysft_jax.sampling.decode import PIECES, Decoder
from tinysft_jax.sampling.filters import SamplingOptions

ROOT = Path(__file__).parents[1]
DIM, LAYERS, HEADS, CONTEXT, LONG_CONTEXT = 256, 4, 4, 512, 2048


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--new", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = load(Path(directory), flags) | {"long_prompt": long_prompt(Path(directory))}
    report(results, flags)
    print(json.dumps({"benchmark": "serving", **vars(flags), **results}))


def load(directory: Path, flags) -> dict[str, dict[str, float]]:
    """Tokens a second, and seconds to the first text."""
    draws = np.random.default_rng(0)
    prompts = [draws.integers(0, VOCAB_SIZE, n).tolist() for n in draws.integers(20, 300, flags.requests)]
    bodies = [
        {"prompt": ids, "max_tokens": flags.new, "seed": number, "stream_options": {"include_usage": True}}
        for number, ids in enumerate(prompts)
    ]
    path = write_model(directory / "model.pt", CONTEXT)
    description, params = open_model(path)
    decoder, options = Decoder(description.config, params, default_dtype()), SamplingOptions(flags.new, 1.0, 0)
    figures = {name: [] for name in ("generate", "whole", "streamed")}
    first = []
    with server(path, flags.slots, flags.clients) as port:
        for _ in range(flags.rounds + 1):  # in the first, programs are compiled
            took = seconds(lambda: decoder.generate(prompts, options, flags.slots))
            figures["generate"].append(flags.requests * flags.new / took)
            for name, streams in (("whole", False), ("streamed", True)):
                found = ask(port, flags.clients, bodies, streams)
                figures[name].append(sum(each["tokens"] for each in found["results"]) / found["seconds"])
            first += [each["first"] for each in found["results"]]
        alone = [each["first"] for each in ask(port, 1, bodies[:10], True)["results"]]
    rates = {name: float(np.median(values[1:])) for name, values in figures.items()}
    ratios = {
        name: float(np.median(np.divide(figures[name], figures["generate"])[1:])) for name in ("whole", "streamed")
    }
    first = first[flags.requests :]
    waits = {f"p{share}": float(np.percentile(first, share)) for share in (50, 99)} | {"alone": float(np.median(alone))}
    return {"tokens_per_second": rates, "ratio_to_generate": ratios, "first_token_s": waits}


def long_prompt(directory: Path, n_streams: int = 4, n_tokens: int = 1000) -> dict[str, float]:
    """The longest wait of running streams for their next text: without others, and while a long prompt joins them."""
    draws = np.random.default_rng(0)
    long, whole = [
        [{"prompt": draws.integers(0, VOCAB_SIZE, length).tolist(), "max_tokens": 1} for _ in range(5)]
        for length in (n_tokens, PIECES[0])
    ]
    short = [{"prompt": draws.integers(0, VOCAB_SIZE, 20).tolist(), "max_tokens": 300} for _ in range(n_streams)]
    with server(write_model(directory / "long.pt", LONG_CONTEXT), n_streams + 1, 8) as port:
        piece = min(each["first"] for each in ask(port, 1, whole, True)["results"])
        gaps = {}
        for name, bodies in (("alone", short), ("with_long_prompts", [*short, *long])):
            found = ask(port, n_streams + 1, bodies, True)["results"][:n_streams]
            joined = max(each["times"][1] for each in found)  # after the streams' own prompts
            gaps[name] = max(float(np.diff([time for time in each["times"] if time >= joined]).max()) for each in found)
    return gaps | {"piece": piece}


def write_model(path: Path, context: int) -> Path:
    torch.manual_seed(0)
    torch.save(TorchTwin(VOCAB_SIZE, DIM, LAYERS, HEADS, context).checkpoint(), path)
    return path


@contextlib.contextmanager
def server(path: Path, slots: int, queue: int) -> Iterator[int]:
    """Yields the port of a server that is ready."""
    command = [sys.executable, ROOT / "serve.py", f"--checkpoint={path}", f"--slots={slots}", f"--queue={queue}"]
    process = subprocess.Popen([*command, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(re.search(r"ready: http://[^ ]*:(\d+)", line) for line in process.stdout if "ready" in line)[1]
        yield int(port)
    finally:
        process.terminate()
        process.wait()


def ask(port: int, clients: int, requests: list[dict], stream: bool) -> dict:
    task = {"port": port, "clients": clients, "requests": requests, "stream": stream}
    command = [sys.executable, Path(__file__).with_name("serving_clients.py")]
    return json.loads(
        subprocess.run(command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True).stdout
    )


def report(results: dict[str, dict], flags) -> None:
    output = Console(width=120)
    rates, ratios = results["tokens_per_second"], results["ratio_to_generate"]
    table = Table(f"{flags.requests} prompts of 20 to 300 tokens, {flags.new} new ones", "tokens/s", "to generate")
    table.add_row(f"generate, {flags.slots} at a time", f"{rates['generate']:,.0f}", "")
    table.add_row(f"{flags.clients} clients, whole answers", f"{rates['whole']:,.0f}", f"{ratios['whole']:.2f}")
    table.add_row(f"{flags.clients} clients, streams", f"{rates['streamed']:,.0f}", f"{ratios['streamed']:.2f}")
    output.print(table)
    first, long = results["first_token_s"], results["long_prompt"]
    waits = (
        f"median {first['p50']:.2f} s, 99th percentile {first['p99']:.2f} s, of a lone client {first['alone']:.3f} s"
    )
    output.print(f"first token: {waits}")
    alone, beside, piece = (1e3 * long[name] for name in ("alone", "with_long_prompts", "piece"))
    output.print(
        f"longest wait of a stream: {alone:.0f} ms, beside prompts of 1,000 tokens {beside:.0f} ms; a piece of a "
        f"prompt and its first token take {piece:.0f} ms"
    )
    output.print(f"on {jax.devices()[0].device_kind}, {default_dtype().name}")


if __name__ == "__main__":
    console.run(main)
