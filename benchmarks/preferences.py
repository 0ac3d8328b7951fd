"""Pairs of the demo's own answers, DPO and a reward model trained on them, and what each is worth on held-out requests.

`python benchmarks/preferences.py [--demo runs/demo --questions 1600 --cases 300 --keep DIR]`, after `make demo`. Prints
the share of stories that honour their conditions before and after, paired, and the reward model's ranking accuracy.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tinysft_jax import console
from tinysft_jax.training.log import read_metrics

HELD_OUT_STORIES = 13_000  # a twentieth of them is for validation: 300 requests for a story and more
CLEAR = 0.3  # a pair whose scores differ by this much


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=console.path, default=Path("runs/demo"), help="what `make demo` wrote")
    parser.add_argument("--questions", type=int, default=1600, help="to make pairs of")
    parser.add_argument("--cases", type=int, default=300, help="held-out requests")
    parser.add_argument("--keep", type=console.path, help="a directory for what is made; what is there is used again")
    flags = parser.parse_args()
    demo = flags.demo.resolve()
    with contextlib.ExitStack() as stack:
        work = flags.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(exist_ok=True)
        seconds = make(demo, work, flags.questions, flags.cases)
        figures = json.loads((work / "ranking" / "report.json").read_text())["tasks"]["preference"]
        report = (work / "report" / "report.md").read_text()
    print(report)
    chosen = [f"{line['dpo/val_chosen']:.1f}" for line in read_metrics(work / "dpo") if "dpo/val_chosen" in line]
    print(f"DPO, log-likelihood of the chosen answers against the start, nats, by evaluation: {', '.join(chosen)}")
    print(f"reward model, held-out pairs that differ by {CLEAR}: {figures['ranked_right']['model']}")
    print(json.dumps({"benchmark": "preferences", "questions": flags.questions, "seconds": seconds}))


def make(demo: Path, work: Path, questions: int, cases: int) -> dict[str, float]:
    """Runs the commands, each unless its output is there; returns their wall times."""
    sft, shared = demo / "sft", ("--tasks=story", "--num_samples=8", "--batch_size=64")
    pairs, held_pairs, held = work / "pairs.jsonl", work / "held_pairs.jsonl", work / "held"
    commands = {
        held: ("data.prepare", f"--embedded={HELD_OUT_STORIES}", "--bpe_ranks=8192"),
        pairs: (
            "preferences",
            f"--data={demo / 'tasks'}",
            f"--questions={questions}",
            "--least_difference=0.1",
            *shared,
        ),
        held_pairs: (
            *("preferences", f"--data={held}", f"--questions={cases}", f"--least_difference={CLEAR}"),
            *("--split=valid", "--seed=1", *shared),
        ),
        work / "pairs": ("data.prepare", f"--input={pairs}", f"--tokenizer={sft}", "--valid_fraction=0.06"),
        work / "held_pairs": ("data.prepare", f"--input={held_pairs}", f"--tokenizer={sft}", "--valid_fraction=0.999"),
        work / "dpo": ("train.py", "--config=configs/dpo.py:demo"),
        work / "reward": ("train.py", "--config=configs/reward.py:demo"),
        work / "ranking": (
            *("evaluation.run", f"--checkpoint={work / 'reward'}", f"--data={work / 'held_pairs'}", "--cases=100000"),
        ),
        work / "report": (
            *("evaluation.run", f"--checkpoint={work / 'dpo'}", f"--baseline={sft}", f"--judge={demo / 'pretrain'}"),
            *(f"--data={held}", "--tasks=story", f"--cases={cases}", "--batch_size=64"),
        ),
    }
    seconds = {}
    for output, (command, *options) in commands.items():
        if output.exists():
            continue
        program = [command] if command.endswith(".py") else ["-m", f"tinysft_jax.{command}", f"--output={output}"]
        if command == "train.py":
            options += [f"--workdir={output}", f"--config.init_from={sft}", f"--config.data.path={work / 'pairs'}"]
        if command == "preferences":
            options += [f"--checkpoint={sft}"]
        start = time.monotonic()
        output_of = None if command == "preferences" else subprocess.DEVNULL  # its pairs and their scores
        subprocess.run([sys.executable, *program, *options], check=True, stdout=output_of)
        seconds[output.name] = round(time.monotonic() - start, 1)
    return seconds


if __name__ == "__main__":
    console.run(main)
