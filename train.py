"""Trains: `python train.py --config=configs/sft.py --workdir=DIR [--config.KEY=VALUE ...]`."""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from tinysft_jax import console, memory
from tinysft_jax.console import UserError

CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/, and after a colon its preset.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no launcher tells it.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the run, where no launcher tells it.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, from 0, where no launcher tells it.")
ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes", False, "Continue a run whose model, data or schedule are not what they were."
)
VERIFY = flags.DEFINE_bool("verify", False, "Compare the data with the hashes of its manifest first.")
WORKDIR = flags.DEFINE_string("workdir", None, "What the run writes; an existing one is continued.")


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(f"{__doc__}\n{flags.FLAGS.main_module_help()}")
        return
    try:
        extra = flags.FLAGS(sys.argv)[1:]
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise UserError(f"{error} (see configs/sft.py for the keys)") from None
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}; settings are given as --config.KEY=VALUE")
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError("--config=FILE and --workdir=DIR are needed, e.g. --config=configs/sft.py --workdir=runs/sft")
    file = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    if not file.is_file():
        raise UserError(f"there is no configuration {file}; this project's are configs/sft.py and configs/pretrain.py")
    memory.use_few_arenas()
    from tinysft_jax import distributed  # after the flags: importing JAX takes seconds
    from tinysft_jax.conversion.export import export_run, parse_export
    from tinysft_jax.training.loop import train

    config, workdir = CONFIG.value, Path(WORKDIR.value).expanduser()
    parse_export(config.get("export", ""))
    distributed.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    train(config, workdir, ACCEPT_CHANGES.value, VERIFY.value)

    def export() -> None:
        for line in export_run(workdir, config.export):
            print(line, file=sys.stderr)

    distributed.on_first(export)


if __name__ == "__main__":
    console.run(main)
