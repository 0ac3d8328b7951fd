"""benchmarks/gpu.py runs all its parts; here on a CPU, with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RATES = {"tokens_per_second", "supervised_per_second"}

# Of each part, the figures of each case; "not_run" is why a backend can't run here.
EXPECTED = {
    "matmul": {"256^3, bfloat16": {"ms", "tflops"}},
    "attention": {
        f"{backend}, segments: {where}": figures
        for where in ("1 to 12", "corpus")
        for backend, figures in {
            "tokamax": {"not_run"},
            "cudnn": {"not_run"},
            "xla": {"error_out", "error_dq", "error_dk", "error_dv", "forward_ms", "forward_backward_ms"},
        }.items()
    },
    "step": {
        f"2 rows{way}": {"ms", "peak_gib", "compile_s", "loss", *RATES}
        for way in ("", ", scanned", ", unrolled", ", deterministic")
    },
    "train": {"2 rows": {"first_step_s", "share_of_step", *RATES}, "2 rows, second start": {"first_step_s"}},
    "sampling": {
        "1 stream": {"tokens_per_second", "step_ms", "first_call_s"},
        "1 stream, read as it is generated": {"tokens_per_second", "first_token_ms", "first_call_s"},
    },
    "parity": {
        f"pretrained_compiled, {dtype}": {"largest_difference", "same_argmax"} for dtype in ("float32", "bfloat16")
    },
    "resume": {
        "killed and resumed": {"killed_after_step", "same_arrays", "same_metric_lines"},
        "two runs": {"same_arrays", "same_metric_lines"},
    },
    "pytorch": {
        "reference style, 2 rows": {"ms", "compile_s", *RATES},
        "packed, segments ignored, 2 rows": {"ms", "compile_s", *RATES},
        "sampling, 1 stream": {"tokens_per_second"},
    },
}


def run(arguments: list[str], output: Path, *paths: Path) -> tuple[dict, str]:
    """The JSON file, and what was printed."""
    environ = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # one device, and programs that are compiled quickly
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))),
    }
    command = [sys.executable, "benchmarks/gpu.py", f"--output={output}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done.stdout


@pytest.mark.slow
def test_all_parts_have_their_figures(tmp_path):
    report, _ = run([], tmp_path / "gpu.json")
    found = {
        part: {row["case"]: row.keys() - {"case"} if "error" not in row else row["error"] for row in rows}
        for part, rows in report["parts"].items()
    }
    assert found == EXPECTED
    errors = [row[key] for row in report["parts"]["attention"] for key in row if key.startswith("error_")]
    assert max(errors) < 1e-5
    assert len(report["ratios"]) == 3
    assert report["device"]["platform"] == "cpu" and report["versions"]["jax"]


@pytest.mark.slow
def test_a_part_that_fails_leaves_the_others_alone(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    report, printed = run(["--only=pytorch", "--only=matmul"], tmp_path / "gpu.json", tmp_path)
    parts = report["parts"]
    assert parts["pytorch"] == [{"case": "pytorch", "error": "exit code 1: ImportError: no torch here"}]
    assert "tflops" in parts["matmul"][0]
    assert "pytorch: exit code 1: ImportError: no torch here" in printed
