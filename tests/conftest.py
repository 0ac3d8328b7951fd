"""Set up before anything imports JAX: eight virtual CPU devices, a shared compilation cache, checked annotations."""

import os
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# Commands that tests start in processes of their own compile the same programs: let them share.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "tinysft-jax-tests-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Started in the background of a script, or by nohup, this process ignores these; what it starts would do so, too.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

from jaxtyping import install_import_hook  # noqa: E402

# Where arrays have shapes. Elsewhere it costs more than it finds: the story generator alone is slowed five times.
install_import_hook(
    [f"tinysft_jax.{name}" for name in ("model", "linear", "attention", "training", "sampling")], "beartype.beartype"
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# The machine may be slow and busy: a slow example is no failure, and the same examples run each time.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

FIXTURES = Path(__file__).parent / "fixtures"
RECORDS = Path(__file__).parent / "records"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """PyTorch checkpoints with random weights and what the PyTorch project computes from them."""
    return FIXTURES


@pytest.fixture(scope="session")
def records() -> Path:
    """Sample records and what a correct parser makes of them."""
    return RECORDS


@pytest.fixture(scope="module", autouse=True)
def drop_compiled_programs():
    """After each module. Each takes memory maps, and beyond 65,530 of them (Linux's default) XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def one_device():
    """For a module's tests, as a mesh of eight takes seconds to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory) -> Path:
    """A small prepared data set of random chats: 256 + 4 ids, at most 64 tokens each."""
    import json
    import random

    from tinysft_jax.data import prepare

    directory = tmp_path_factory.mktemp("chats")
    words, draw = ["a", "big", "red", "dog", "ran", "to", "see", "the", "little", "cat"], random.Random(0)

    def text(longest: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, longest)))

    # The default system message alone has as many bytes as a row has tokens.
    chats = [
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": text(8)},
            {"role": "assistant", "content": text(4)},
        ]
        for _ in range(300)
    ]
    lines = directory / "chats.jsonl"
    lines.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    output = directory / "prepared"
    options = ["--bpe_ranks=256", "--max_tokens=64", "--valid_fraction=0.1", "--workers=1"]
    prepare.main([f"--input={lines}", f"--output={output}", *options])
    return output


@pytest.fixture(scope="session")
def pair_data(tmp_path_factory) -> Path:
    """A small prepared data set of random pairs: 256 + 4 ids, at most 32 tokens a conversation."""
    import json
    import random

    from tinysft_jax.data import prepare

    directory, draw = tmp_path_factory.mktemp("pairs"), random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(shortest, longest))) + draw.choice("xyz")

    # The chosen ones say "good", so that there is something to learn.
    pairs = [
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"{i}"}],
            "chosen": f"good {text(0, 8)}",
            "rejected": text(1, 12),
        }
        for i in range(300)
    ]
    lines, output = directory / "pairs.jsonl", directory / "prepared"
    lines.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    options = ["--bpe_ranks=256", "--max_tokens=32", "--valid_fraction=0.1", "--workers=1"]
    prepare.main([f"--input={lines}", f"--output={output}", *options])
    return output
