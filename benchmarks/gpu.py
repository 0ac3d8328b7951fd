"""What this project does on the accelerator that is here, in minutes and without a network; on a CPU a tiny model.

Each part runs in processes of its own, so one that fails, hangs or runs out of memory leaves the others alone. One
device is used. Compiled programs share a cache; JAX_COMPILATION_CACHE_DIR keeps it, which makes a second run shorter.

`python benchmarks/gpu.py [--quick] [--only=PART ...] [--output=gpu.json]`
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from gpu_size import DETERMINISTIC, SIZES, Row
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinysft_jax import console, files
from tinysft_jax.console import RunError, UserError

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "torch", "tokamax")


class Part(NamedTuple):
    what: str
    seconds: int  # at most, of each process
    flags: tuple[str, ...] = ("",)  # XLA_FLAGS beside the user's, a process for each
    is_quick: bool = True


PARTS = {
    "matmul": Part("one large product: what the device reaches", 60),
    "attention": Part("attention alone; errors: relative, against the formula in float32", 180),
    "step": Part("the train step; batches on the device", 240, ("", DETERMINISTIC)),
    "train": Part("train.py; share: of the bare step's tokens/s", 300),
    "sampling": Part("sampling", 240),
    "parity": Part("logits against those of the PyTorch project, relative to the largest", 120),
    "resume": Part(f"train.py's bits under {DETERMINISTIC}", 300, is_quick=False),
    "pytorch": Part("PyTorch, the same model shape and data", 300, is_quick=False),
}
# By name: the figure, our part, and how PyTorch's case begins.
RATIOS = {
    "supervised tokens/s, against the reference style": ("supervised_per_second", "step", "reference style"),
    "tokens/s, against packed rows": ("tokens_per_second", "step", "packed"),
    "tokens/s of one stream": ("tokens_per_second", "sampling", "sampling"),
}
Rows = list[dict[str, Any]]


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and steps; no resume, no pytorch")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=console.path, default=Path("gpu.json"), help="a JSON file of all figures")
    flags = parser.parse_args()
    if not flags.output.parent.is_dir():
        raise UserError(f"{flags.output.parent} is not a directory; choose another --output")
    parts = flags.only or [name for name, part in PARTS.items() if part.is_quick or not flags.quick]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tinysft-gpu-", ignore_cleanup_errors=True) as directory:
        workspace = Path(directory)
        device = find_device(workspace)
        size = "cpu" if device["platform"] == "cpu" else "quick" if flags.quick else "full"
        environ = make_environ(workspace, device)
        prepare(workspace, size)
        report: dict[str, Any] = {"benchmark": "gpu", "size": size, **describe(device), "parts": {}}
        report["settings"] = dataclasses.asdict(SIZES[size])
        for name in parts:
            report["parts"][name] = run_part(name, size, workspace, environ)
            report |= {"ratios": compare(report["parts"]), "seconds": time.monotonic() - start}
            files.write_json(flags.output, report)
    show(report)
    print(f"{flags.output}: all figures; {report['seconds']:,.0f} s")


def make_environ(workspace: Path, device: Row) -> dict[str, str]:
    environ = {"TORCHINDUCTOR_CACHE_DIR": str(workspace / "inductor")} | base_environ()
    if device["platform"] != "cpu" or device["count"] == 1:  # programs for several CPU devices can't be kept
        environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workspace / "cache"))
    return environ


def base_environ() -> dict[str, str]:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"CUDA_VISIBLE_DEVICES": "0"} | os.environ | {"PYTHONPATH": paths}


def find_device(workspace: Path) -> Row:
    """Asks a process of its own: this one must not hold the device."""
    (row, *_) = run_process("device", "cpu", workspace, base_environ(), 120)
    if "error" in row:
        raise RunError(f"JAX finds no device: {row['error']}")
    return row


def prepare(workspace: Path, size: str) -> None:
    command = [sys.executable, "-m", "tinysft_jax.data.prepare", f"--output={workspace / 'data'}"]
    done = subprocess.run([*command, *SIZES[size].data], env=base_environ(), capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"the data can't be prepared: {(done.stderr.strip().splitlines() or [''])[-1]}")


def describe(device: Row) -> Row:
    """What the figures depend on."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {key: value for key, value in device.items() if key != "case"},
        "versions": versions | {"python": platform.python_version()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def run_part(name: str, size: str, workspace: Path, environ: dict[str, str]) -> Rows:
    part, rows = PARTS[name], []
    for flags in part.flags:
        start = time.monotonic()
        xla_flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        rows += run_process(name, size, workspace, environ | {"XLA_FLAGS": xla_flags}, part.seconds)
        print(f"{name} {flags}".strip() + f": {time.monotonic() - start:.0f} s", file=sys.stderr)
    return rows


def run_process(name: str, size: str, workspace: Path, environ: dict[str, str], seconds: int) -> Rows:
    """A part's rows; the last one has an error if the process failed or had to be ended."""
    path, log = workspace / "rows.jsonl", workspace / f"{name}.log"
    path.unlink(missing_ok=True)
    command, failure = [sys.executable, str(Path(__file__).with_name("gpu_part.py")), name, size, str(workspace)], ""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output, start_new_session=True)
    try:
        if code := process.wait(seconds):
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            failure = f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"
    except subprocess.TimeoutExpired:
        failure = f"ended after {seconds} s; the last case did not finish"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        process.wait()
    rows = files.read_json_lines(path)
    return [*rows, {"case": name, "error": failure}] if failure or not rows else rows


def compare(parts: dict[str, Rows]) -> Rows:
    """Adds to train.py's rows their share of the bare step's rate; returns the ratios to PyTorch."""
    steps = {row["case"]: row for row in parts.get("step", ())}
    for row in parts.get("train", ()):
        rate = steps.get(row["case"], {}).get("tokens_per_second")
        if rate and "tokens_per_second" in row:
            row["share_of_step"] = row["tokens_per_second"] / rate
    ratios = []
    for name, (figure, part, start) in RATIOS.items():
        for theirs in [row for row in parts.get("pytorch", ()) if row["case"].startswith(start) and figure in row]:
            case = theirs["case"].rpartition(", ")[2]  # the same number of rows or streams
            for ours in [row for row in parts.get(part, ()) if row["case"] == case and figure in row]:
                values = {"ours": ours[figure], "pytorch": theirs[figure], "ratio": ours[figure] / theirs[figure]}
                ratios.append({"case": f"{name}, {case}", **values})
    return ratios


def show(report: dict[str, Any]) -> None:
    out = Console(width=120)
    device, versions = report["device"], report["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    out.print(f"{device['kind']}{driver}; {named}; size: {report['size']}", highlight=False, soft_wrap=True)
    tables = {f"{name}: {PARTS[name].what}": rows for name, rows in report["parts"].items()}
    for title, rows in (tables | {"ratios": report["ratios"]}).items():
        show_table(out, title, rows)


def show_table(out: Console, title: str, rows: Rows) -> None:
    """A row for each case with figures, and a line below for each without."""
    notes = {row["case"]: row.get("error") or row.get("not_run") for row in rows}
    rows = [row for row in rows if not notes[row["case"]]]
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "case"))
    if rows or any(notes.values()):
        out.print(f"\n{title}", style="bold", soft_wrap=True, highlight=False)
    if rows:
        table = Table("case")
        for key in keys:
            table.add_column(key.replace("_per_second", "/s").replace("_", " "), justify="right")
        for row in rows:
            table.add_row(row["case"], *(shown(key, row[key]) if key in row else "–" for key in keys))
        out.print(table)
    for case, note in notes.items():
        if note:
            out.print(Text(f"  {case}: {note}"), soft_wrap=True)


def shown(key: str, value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if key in ("mfu", "share_of_step", "same_argmax"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    console.run(main)
