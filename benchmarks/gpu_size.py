"""How much the parts of gpu.py run."""

import dataclasses
from collections.abc import Callable, Iterator

from tinysft_jax.gpt_config import GPTConfig

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
Row = dict[str, int | float | bool | str]  # figures by name
Cases = Iterator[tuple[str, Callable[[], Row]]]  # what a part measures, one after another


@dataclasses.dataclass(frozen=True)
class Size:
    config: GPTConfig
    data: tuple[str, ...]  # arguments of prepare
    matmul: int  # rows and columns
    attention_rows: int
    rows: tuple[int, ...]  # of train steps
    steps: int  # measured, of the train step and of attention
    contrast_rows: int | None  # of the step with layers scanned and unrolled
    train_rows: tuple[int, ...]  # of train.py's runs
    train_lines: int  # of metrics.jsonl that are measured
    flags: tuple[str, ...]  # XLA_FLAGS of train.py's runs
    starts: bool  # whether to measure the time to the first step
    streams: tuple[int, ...]
    prompt: int
    new: int  # tokens of an answer
    repeats: int
    resume: dict[str, int]  # settings of the runs that are compared
    torch_new: int


FULL = Size(
    config=GPTConfig(50_304, 768, 12, 12, 1024),
    data=("--embedded=3000",),
    matmul=8192,
    attention_rows=16,
    rows=(4, 32, 64),
    steps=20,
    contrast_rows=32,
    train_rows=(4, 32),
    train_lines=12,
    flags=("", DETERMINISTIC),
    starts=True,
    streams=(1, 16, 64, 256),
    prompt=300,
    new=256,
    repeats=3,
    resume={"model.n_layers": 4, "train.batch_size": 8, "train.max_steps": 120, "train.save_interval": 40},
    torch_new=24,
)
# The same model.
QUICK = dataclasses.replace(
    FULL,
    rows=(32,),
    steps=10,
    contrast_rows=None,
    train_rows=(32,),
    train_lines=4,
    flags=("",),
    starts=False,
    streams=(1, 64),
    repeats=1,
)
# Shows that everything runs; the figures mean nothing.
CPU = Size(
    config=GPTConfig(1152, 32, 2, 2, 256),
    data=("--embedded=60", "--bpe_ranks=1024", "--max_tokens=256", "--workers=1"),
    matmul=256,
    attention_rows=2,
    rows=(2,),
    steps=2,
    contrast_rows=2,
    train_rows=(2,),
    train_lines=2,
    flags=("",),
    starts=True,
    streams=(1,),
    prompt=130,
    new=20,
    repeats=1,
    resume={"model.n_layers": 4, "train.batch_size": 2, "train.max_steps": 30, "train.save_interval": 10},
    torch_new=2,
)
SIZES = {"full": FULL, "quick": QUICK, "cpu": CPU}
