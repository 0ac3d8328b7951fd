import jax
import jax.numpy as jnp
import pytest

from tinysft_jax import accelerator, console


@pytest.fixture
def without_cache():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_an_accelerator_keeps_what_it_compiled(without_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    accelerator.keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None, "on a CPU"
    monkeypatch.setattr(accelerator, "is_present", lambda: True)
    accelerator.keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "tinysft-jax" / "compiled")


def test_a_directory_that_is_asked_for_is_kept(without_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(accelerator, "is_present", lambda: True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))  # what JAX_COMPILATION_CACHE_DIR does
    accelerator.keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_the_default_dtype_is_what_a_device_is_fast_in(monkeypatch):
    assert accelerator.default_dtype() == jnp.float32
    monkeypatch.setattr(accelerator, "is_present", lambda: True)
    assert accelerator.default_dtype() == jnp.bfloat16


EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 GiB.\nmore"
UNTUNED = "UNIMPLEMENTED: FissionBackend does not support a default config"


@pytest.mark.parametrize("message", [EXHAUSTED, UNTUNED])
def test_too_little_memory_is_one_line(monkeypatch, capsys, message):
    def main():
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(SystemExit) as exit_:
        console.run(main)
    assert exit_.value.code == 3
    line = capsys.readouterr().err
    assert line.startswith(f"error: not enough memory: {message.splitlines()[0]}; if another process holds the GPU's")
    assert line.count("\n") == 1


def test_other_errors_of_the_device_are_not_hidden():
    def main():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        console.run(main)
