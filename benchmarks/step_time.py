"""Where a train step's time goes, by part of the model, from a profile of the compiled step.

`python benchmarks/step_time.py [--dim 256 --n_layers 4 --n_heads 4 --seq_len 1024 --rows 4 --steps 5]`
"""

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table
from training import make_step

from tinysft_jax import console
from tinysft_jax.accelerator import default_dtype
from tinysft_jax.attention import blocks
from tinysft_jax.data import prepare
from tinysft_jax.data.batches import BatchSource
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import PreparedData
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.sharding import global_batch, make_mesh
from tinysft_jax.training import loss

VOCAB_SIZE = 50_304

# A part of the model, and what the name of its operations in JAX matches; the first that matches counts.
PARTS = {
    "head and loss": loss.SCOPE,
    "attention": blocks.SCOPE,
    "products with layers' weights": r"while/body.*(dot_general|ni,no->io)",
    "rest of the layers": r"while/body",
    "embedding": r"take|gather|scatter",
    "optimizer, clipping, the rest": "",
}


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--n_layers", type=int, default=4)
    parser.add_argument("--n_heads", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="to profile, after one that compiles")
    flags = parser.parse_args()
    config = GPTConfig(VOCAB_SIZE, flags.dim, flags.n_layers, flags.n_heads, flags.seq_len)
    with tempfile.TemporaryDirectory() as directory:
        prepare.main(["--embedded=500", f"--output={directory}/data", "--workers=1"])
        split = PreparedData(f"{directory}/data").split("train")
        source = BatchSource(split, Packing(split.lengths, flags.seq_len).epoch(), flags.rows, flags.seq_len)
        parts = profile(config, source, flags.steps, Path(directory))
    total = sum(parts.values())
    table = Table("part", "share", "ms a step", caption="Time in each operation itself, on all threads.")
    for part, seconds in parts.most_common():
        table.add_row(part, f"{seconds / total:.0%}", f"{1e3 * seconds / flags.steps:,.0f}")
    Console(width=120).print(table)
    shares = {part: round(seconds / total, 3) for part, seconds in parts.most_common()}
    print(json.dumps({"benchmark": "step_time", **vars(flags), "shares": shares}))


def profile(config: GPTConfig, source: BatchSource, steps: int, directory: Path) -> Counter[str]:
    """Seconds in each part over all steps."""
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        step, _, create = make_step(config, mesh, default_dtype())
        state = create()
        compiled = step.lower(state, global_batch(mesh, source[0])).compile()
        state, _ = compiled(state, global_batch(mesh, source[0]))
        with jax.profiler.trace(directory / "trace"):
            for i in range(1, steps + 1):
                state, metrics = compiled(state, global_batch(mesh, source[i]))
                jax.block_until_ready(metrics)
    return time_by_part(compiled.as_text(), next((directory / "trace").rglob("*.xplane.pb")))


def time_by_part(hlo: str, trace: Path) -> Counter[str]:
    """Sums each operation's own time, by the part that its name in the compiled program tells."""
    names = dict(re.findall(r'%([\w.-]+) = .*op_name="([^"]*)"', hlo))
    own: Counter[str] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            own += own_time([(event.start_ns, event.duration_ns, event.name) for event in line.events])
    parts: Counter[str] = Counter()
    for name, nanoseconds in own.items():
        if name in names:
            parts[next(part for part, pattern in PARTS.items() if re.search(pattern, names[name]))] += nanoseconds / 1e9
    return parts


def own_time(events: list[tuple[float, float, str]]) -> Counter[str]:
    """Nanoseconds by name, without what passed in events inside (a loop's body, say)."""
    own: Counter[str] = Counter()
    open_events: list[tuple[float, str]] = []  # (end, name), each within the one before
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_events and open_events[-1][0] <= start:
            open_events.pop()
        own[name] += duration
        if open_events:
            own[open_events[-1][1]] -= duration
        open_events.append((start + duration, name))
    return own


if __name__ == "__main__":
    console.run(main)
