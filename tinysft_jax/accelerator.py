"""What differs on an accelerator: whether there is one, the dtype that it is fast in, programs that are kept."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp


def is_present() -> bool:
    """Whether programs run on a GPU or TPU, and not on a CPU."""
    return jax.default_backend() != "cpu"


def default_dtype() -> jnp.dtype:
    """bfloat16 on accelerators; float32 on a CPU, which computes no faster in half precision."""
    return jnp.dtype(jnp.bfloat16 if is_present() else jnp.float32)


def keep_compiled() -> None:
    """On an accelerator, keeps compiled programs for the next process; call it before anything is compiled.

    They go to a directory of the user's cache. JAX's own variables change that: JAX_COMPILATION_CACHE_DIR, and
    JAX_ENABLE_COMPILATION_CACHE=false. Not on a CPU: a program with collectives can hang there once it comes from the
    disk, and one that was compiled on another machine may use instructions that this one lacks. Nor with several
    processes: the first one alone writes, and where the others have another disk, they would compile while it does not.
    """
    if is_present() and jax.process_count() == 1 and not jax.config.jax_compilation_cache_dir:
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # a user without a home, as in some containers
            return
        jax.config.update("jax_compilation_cache_dir", str(cache / "tinysft-jax" / "compiled"))
