"""One part of gpu.py, in a process of its own: `gpu_part.py PART SIZE WORKSPACE` writes WORKSPACE/rows.jsonl.

A case that fails is a row with the error. A row is written as soon as it is measured: so a part that is killed leaves
what it has.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path

from gpu_size import SIZES

from tinysft_jax.console import reason

MODULES = {"train": "gpu_runs", "resume": "gpu_runs", "pytorch": "gpu_torch"}  # elsewhere gpu_jax


def main() -> None:
    part, size, workspace = sys.argv[1], SIZES[sys.argv[2]], Path(sys.argv[3])
    cases = getattr(importlib.import_module(MODULES.get(part, "gpu_jax")), part)
    for name, case in cases(size, workspace):
        try:
            row = case()
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {reason(error)}"}
        with (workspace / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"case": name, **row}) + "\n")


if __name__ == "__main__":
    main()
