"""GRPO of the demo's fine-tuned model: several seeds, and a fast run with and without fluency and length; and DPO's.

`python benchmarks/alignment.py [--demo runs/demo --seeds 3 --dpo DIR --keep DIR --plot docs/alignment.png]`, after
`make demo`. Asks the models for 300 held-out stories, greedily, and prints one table, paired with the fine-tuned model,
three answers of each, and the curves of the runs. `--dpo`: a run's work directory, as of `benchmarks/preferences.py`.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from matplotlib.figure import Figure

from tinysft_jax import console
from tinysft_jax.training.log import read_metrics

UNGUARDED = "words:1,sentence:1,dialogue:1,moral:1"  # all that rules check of a request, and nothing of what a story is
CURVES = {
    "reward/words": "words used",
    "fluency": "fluency (nats a token)",
    "length": "length (tokens)",
}


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=console.path, default=Path("runs/demo"), help="what `make demo` wrote")
    parser.add_argument("--seeds", type=int, default=3, help="of GRPO")
    parser.add_argument("--steps", type=int, help="of a run (default: the preset's)")
    parser.add_argument("--cases", type=int, default=300, help="held-out requests for a story")
    parser.add_argument("--dpo", type=console.path, help="a work directory to compare with")
    parser.add_argument("--keep", type=console.path, help="a directory for what is made; what is there is used again")
    parser.add_argument("--plot", type=console.path, help="a PNG file for the curves")
    flags = parser.parse_args()
    demo = flags.demo.resolve()
    with contextlib.ExitStack() as stack:
        work = flags.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(exist_ok=True)
        runs = {f"grpo-{seed}": [f"--config.seed={seed}"] for seed in range(flags.seeds)}
        # Ten times the learning rate, no penalty of divergence, and the last model is kept.
        fast = {"optimizer.learning_rate": 1e-3, "grpo.kl": 0.0, "train.eval_interval": 1000}
        runs["fast"] = [f"--config.{key}={value}" for key, value in fast.items()]
        runs["fast-unguarded"] = [*runs["fast"], f"--config.rewards={UNGUARDED}"]
        seconds = {name: train(demo, work / name, options, flags.steps) for name, options in runs.items()}
        evaluate(demo, work, [*([flags.dpo] if flags.dpo else []), *(work / name for name in runs)], flags.cases)
        logs = {name: read_metrics(work / name) for name in runs}
        print(progress(logs))
        if flags.plot:
            plot(logs, flags.plot)
    print(json.dumps({"benchmark": "alignment", "seconds": seconds}))


def train(demo: Path, workdir: Path, options: list[str], steps: int | None) -> float:
    """Runs GRPO unless it is done; returns its wall time."""
    start = time.monotonic()
    command = ["train.py", "--config=configs/grpo.py:demo", f"--workdir={workdir}"]
    command += [f"--config.init_from={demo / 'sft'}", f"--config.data.path={demo / 'tasks'}"]
    command += [f"--config.train.max_steps={steps}"] if steps else []
    subprocess.run([sys.executable, *command, *options], check=True, stdout=subprocess.DEVNULL)
    return round(time.monotonic() - start, 1)


def evaluate(demo: Path, work: Path, checkpoints: list[Path], cases: int) -> None:
    """Prints the report, with three answers of each model."""
    held = work / "held"
    if not held.exists():
        command = ["tinysft_jax.data.prepare", "--embedded=13000", "--bpe_ranks=8192", f"--output={held}"]
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    command = ["tinysft_jax.evaluation.run", *(f"--checkpoint={path}" for path in checkpoints)]
    command += [f"--baseline={demo / 'sft'}", f"--judge={demo / 'sft'}", f"--data={held}", "--tasks=story"]
    command += [f"--cases={cases}", "--batch_size=64", "--show=3", f"--output={work / 'report'}", "--overwrite"]
    subprocess.run([sys.executable, "-m", *command], check=True)


def progress(runs: dict[str, list[dict]]) -> str:
    """A table of the runs: the divergence at some steps, the largest gap, and the median seconds of a step's parts."""
    lines = []
    for name, log in runs.items():
        steps = [line for line in log if "grpo/train_kl" in line]
        kl = ", ".join(f"{line['grpo/train_kl']:.3f}" for line in steps if line["step"] % 5 == 0)
        seconds = [
            statistics.median(line[key] for line in steps if key in line)
            for key in ("grpo/seconds_sampling", "grpo/seconds_scoring", "grpo/seconds_training")
        ]
        gap = max(line["grpo/train_gap"] for line in steps)
        parts = " + ".join(f"{each:.1f}" for each in seconds)
        lines.append(f"{name:<16} kl by 5 steps: {kl}; largest gap {gap:.1e}; sampling + scoring + training: {parts} s")
    return "\n".join(lines)


def plot(runs: dict[str, list[dict]], path: Path) -> None:
    """Draws what the steps' answers are like, smoothed over ten steps."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for name, lines in runs.items():
            values = [line[f"grpo/train_{key}"] for line in lines if f"grpo/train_{key}" in line]
            smooth = [sum(values[max(i - 9, 0) : i + 1]) / (i + 1 - max(i - 9, 0)) for i in range(len(values))]
            axes.plot(range(1, len(values) + 1), smooth, label=name)
        axes.set(xlabel="step", title=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, format="png")


if __name__ == "__main__":
    console.run(main)
