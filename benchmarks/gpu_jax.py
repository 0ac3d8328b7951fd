"""The parts of gpu.py that run JAX in their own process."""

import functools
import itertools
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gpu_size import CPU, DETERMINISTIC, Cases, Row, Size
from jaxtyping import Array, Int32
from training import make_step

from tinysft_jax.accelerator import default_dtype
from tinysft_jax.attention.backends import BACKENDS, obstacle, segment_attention
from tinysft_jax.console import UserError
from tinysft_jax.conversion.torch import read_torch_checkpoint
from tinysft_jax.data.batches import BatchSource
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import PreparedData
from tinysft_jax.model import GPT
from tinysft_jax.parameters import make_model
from tinysft_jax.sampling.decode import CHUNK, Decoder
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sharding import global_batch, make_mesh
from tinysft_jax.training.log import peak_flops, train_flops

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
WARM_UP = 3  # calls before those that are measured
CHAIN = 4  # forward passes of attention in one program: one alone takes no longer than its launch
MOST_SEGMENTS = 12  # of a random row
FLOAT32_TOLERANCE = 2e-5  # of the largest logit


def device(size: Size, workspace: Path) -> Cases:
    yield "device", find_device


def find_device() -> Row:
    first = jax.devices()[0]
    row = {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()}
    row["compute_capability"] = str(getattr(first, "compute_capability", ""))
    row["memory_gib"] = ((first.memory_stats() or {}).get("bytes_limit", 0)) / 2**30  # what XLA may use of it
    if first.platform == "gpu" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
        row["driver"] = (answer.stdout.split() or [""])[0]
    return row


def matmul(size: Size, workspace: Path) -> Cases:
    def product() -> Row:
        a, b = jax.random.normal(jax.random.key(0), (2, size.matmul, size.matmul), jnp.bfloat16)
        seconds = seconds_a_call(jax.jit(jnp.matmul), a, b, calls=size.steps)
        return {"ms": 1e3 * seconds, "tflops": 2 * size.matmul**3 / seconds / 1e12}

    yield f"{size.matmul}^3, bfloat16", product


def seconds_a_call(function: Callable, *arguments, calls: int, rounds: int = 3) -> float:
    """Of the device: calls are queued, so their launch does not count. The median of rounds."""
    for _ in range(WARM_UP):
        jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def attention(size: Size, workspace: Path) -> Cases:
    corpus = packed(workspace, size.attention_rows, size.config.max_seq_len)[0]["segment_ids"]
    random = random_segments(size.attention_rows, size.config.max_seq_len)
    for (where, segment_ids), backend in itertools.product([("1 to 12", random), ("corpus", corpus)], BACKENDS):
        yield f"{backend}, segments: {where}", functools.partial(measure_attention, size, backend, segment_ids)


def random_segments(n_rows: int, seq_len: int) -> Int32[np.ndarray, "B T"]:
    """Rows of 1 to `MOST_SEGMENTS` consecutive segments of any lengths; every second row ends with padding."""
    random, rows = np.random.default_rng(0), np.zeros((n_rows, seq_len), np.int32)
    for i, row in enumerate(rows):
        n = 1 + i % MOST_SEGMENTS
        starts = np.sort(random.choice(np.arange(1, seq_len), n, replace=False))
        end = starts[-1] if i % 2 else seq_len
        row[:end] = 1 + np.searchsorted(starts[: n - 1], np.arange(end), side="right")
    return rows


def packed(workspace: Path, rows: int, seq_len: int) -> BatchSource:
    split = PreparedData(workspace / "data").split("train")
    return BatchSource(split, Packing(split.lengths, seq_len).epoch(), rows, seq_len)


def measure_attention(size: Size, backend: str, segment_ids: Int32[np.ndarray, "B T"]) -> Row:
    config, dtype = size.config, default_dtype()
    if why := obstacle(backend, dtype, config.head_dim, config.max_seq_len):
        return {"not_run": why}
    shape = (4, *segment_ids.shape, config.n_heads, config.head_dim)
    q, k, v, d_out = jax.random.normal(jax.random.key(0), shape, dtype)
    ids = jnp.asarray(segment_ids)
    d_out *= (ids > 0)[:, :, None, None].astype(dtype)  # what padding computes is nobody's business

    # The ids are an argument: of a constant, the compiler would compute the mask.
    def forward(q, k, v, ids):
        return functools.reduce(lambda q, _: segment_attention(q, k, v, ids, backend), range(CHAIN), q)

    @jax.jit
    def both(q, k, v, d_out, ids):
        return out_and_gradients(lambda q, k, v: segment_attention(q, k, v, ids, backend), q, k, v, d_out)

    errors = relative_errors(both(q, k, v, d_out, ids), expected_of(q, k, v, d_out, ids), ids)
    return errors | {
        "forward_ms": 1e3 * seconds_a_call(jax.jit(forward), q, k, v, ids, calls=size.steps) / CHAIN,
        "forward_backward_ms": 1e3 * seconds_a_call(both, q, k, v, d_out, ids, calls=size.steps),
    }


def out_and_gradients(attend: Callable, q, k, v, d_out) -> tuple[jax.Array, ...]:
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)


@jax.jit
def expected_of(q, k, v, d_out, segment_ids: Int32[Array, "B T"]) -> tuple[jax.Array, ...]:
    """Output and gradients of the plain formula, in float32."""
    is_seen = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & jnp.tri(
        segment_ids.shape[1], dtype=bool
    )

    def formula(q, k, v):
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(is_seen, scores, -jnp.inf), axis=-1), v)

    with jax.default_matmul_precision("highest"):
        return out_and_gradients(formula, *(x.astype(jnp.float32) for x in (q, k, v, d_out)))


def relative_errors(found, expected, segment_ids: Int32[Array, "B T"]) -> dict[str, float]:
    """‖difference‖ / ‖expected‖ (Frobenius), padding apart."""
    is_token = (segment_ids > 0)[:, :, None, None]
    norms = {}
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        difference, y = (jnp.where(is_token, each, 0) for each in (x.astype(jnp.float32) - y, y))
        norms[f"error_{name}"] = float(jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(y.ravel()))
    return norms


def step(size: Size, workspace: Path) -> Cases:
    """With the flag, what train.py is compared with."""
    is_deterministic = DETERMINISTIC in os.environ.get("XLA_FLAGS", "").split()
    for rows in size.train_rows if is_deterministic else size.rows:
        name = f"{rows} rows, deterministic" if is_deterministic else f"{rows} rows"
        yield name, functools.partial(measure_step, size, workspace, rows)
    if size.contrast_rows and not is_deterministic:
        for way, scan_layers in (("scanned", "on"), ("unrolled", "off")):
            case = functools.partial(measure_step, size, workspace, size.contrast_rows, scan_layers)
            yield f"{size.contrast_rows} rows, {way}", case


def measure_step(size: Size, workspace: Path, rows: int, scan_layers: str = "auto") -> Row:
    config, mesh = size.config, make_mesh()
    source = packed(workspace, rows, config.max_seq_len)
    host = [source[i] for i in range(min(size.steps, len(source) - 1))]  # the last one may have empty rows
    with jax.set_mesh(mesh):
        train_step, _, create = make_step(config, mesh, default_dtype(), scan_layers=scan_layers)
        batches, state = [global_batch(mesh, batch) for batch in host], create()
        start = time.perf_counter()
        compiled = train_step.lower(state, batches[0]).compile()
        compile_s = time.perf_counter() - start
        for batch in itertools.islice(itertools.cycle(batches), WARM_UP):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for batch in itertools.islice(itertools.cycle(batches), size.steps):
            state, metrics = compiled(state, batch)
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - start) / size.steps
    run = list(itertools.islice(itertools.cycle(host), size.steps))
    tokens = float(np.mean([np.count_nonzero(batch["segment_ids"]) for batch in run]))
    supervised = float(np.mean([batch["weights"].sum() for batch in run]))
    row = {"ms": 1e3 * seconds, "tokens_per_second": tokens / seconds, "supervised_per_second": supervised / seconds}
    if peak := peak_flops():
        row["mfu"] = train_flops(config, tokens, supervised, config.max_seq_len) / seconds / peak
    loss = float(metrics["loss"])
    return row | {"peak_gib": peak_memory(compiled) / 2**30, "compile_s": compile_s, "loss": loss}


def peak_memory(compiled: jax.stages.Compiled) -> int:
    """Bytes that the program needs, state and batch included. What the process has used at most is no program's own."""
    need = compiled.memory_analysis()
    shared = need.alias_size_in_bytes  # the new state takes the old one's place
    return need.argument_size_in_bytes + need.output_size_in_bytes + need.temp_size_in_bytes - shared


def sampling(size: Size, workspace: Path) -> Cases:
    params = nnx.to_pure_dict(nnx.state(GPT(size.config, rngs=nnx.Rngs(0))))
    decoder = Decoder(size.config, params, default_dtype())
    for n in size.streams:
        yield f"{n} streams" if n > 1 else "1 stream", functools.partial(measure_streams, size, decoder, n)
    yield "1 stream, read as it is generated", functools.partial(measure_reader, size, decoder)


def make_prompts(size: Size, n: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, size.config.vocab_size, (n, size.prompt)).tolist()


def measure_streams(size: Size, decoder: Decoder, n: int) -> Row:
    """A step's time is the difference of two lengths of answers, in caches of the same length."""
    prompts, more = make_prompts(size, n), size.new + CHUNK  # on a GPU, steps are made by the chunk
    first_call, _ = timed(lambda: decoder.generate(prompts, SamplingOptions(size.new), n))
    times = {}
    for n_new in (size.new, more):
        call = functools.partial(decoder.generate, prompts, SamplingOptions(n_new), n)
        times[n_new] = statistics.median(timed(call)[0] for _ in range(size.repeats))
    answers = decoder.generate(prompts, SamplingOptions(size.new), n)
    return {
        "tokens_per_second": sum(map(len, answers)) / times[size.new],
        "step_ms": 1e3 * (times[more] - times[size.new]) / CHUNK,
        "first_call_s": first_call,
    }


def measure_reader(size: Size, decoder: Decoder) -> Row:
    (prompt,), options = make_prompts(size, 1), SamplingOptions(size.new)
    first_call, _ = timed(lambda: list(decoder.stream(prompt, options)))
    whole = [timed(lambda: sum(map(len, decoder.stream(prompt, options)))) for _ in range(size.repeats)]
    first = [timed(lambda: next(decoder.stream(prompt, options)))[0] for _ in range(size.repeats)]
    return {
        "tokens_per_second": statistics.median(tokens / seconds for seconds, tokens in whole),
        "first_token_ms": 1e3 * statistics.median(first),
        "first_call_s": first_call,
    }


def timed(call: Callable):
    """Seconds, and the result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def parity(size: Size, workspace: Path) -> Cases:
    """What the PyTorch project computed in float32, and the same in two dtypes here."""
    paths = sorted(FIXTURES.glob("*.pt"))
    for path, dtype in itertools.product(paths[:1] if size is CPU else paths, ("float32", "bfloat16")):
        yield f"{path.stem}, {dtype}", functools.partial(measure_parity, path, dtype)


def measure_parity(path: Path, dtype: str) -> Row:
    description, params = read_torch_checkpoint(path)
    golden = np.load(path.with_suffix(".golden.npz"))
    model = make_model(description.config, params, dtype=jnp.dtype(dtype))
    logits = np.asarray(jax.jit(lambda ids: model(ids))(jnp.asarray(golden["input_ids"])))
    expected = golden["logits"]
    row = {"largest_difference": float(np.abs(logits - expected).max() / np.abs(expected).max())}
    if dtype == "float32" and not row["largest_difference"] <= FLOAT32_TOLERANCE:
        raise UserError(f"logits differ by {row['largest_difference']:.1e} of the largest, not {FLOAT32_TOLERANCE:.0e}")
    return row | {"same_argmax": float((logits.argmax(-1) == expected.argmax(-1)).mean())}
