"""`sample.py` as a user runs it, on a tiny model with random weights."""

import io
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

from tinysft_jax.model import GPT, GPTConfig
from tinysft_jax.model_directory import ModelDescription, save_model
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.tokenizer import ChatTokenizer

SCRIPT = Path(__file__).parent.parent / "sample.py"


def make_model_directory(path: Path, template: str | None) -> Path:
    tokenizer = ChatTokenizer(template, bpe_ranks=256)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=256)
    params = nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0))))
    description = tokenizer.description()
    save_model(path, params, ModelDescription(config, description["chat_template"], description["tokenizer"], {}))
    return path


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("models") / "chat", "control")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("models") / "text", None)


@pytest.fixture
def sample(monkeypatch, capsys):
    """Runs the script in this process: exit code, stdout, stderr."""

    def run(*arguments, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


def test_numbered_answers_differ_and_repeat_with_the_seed(sample, chat_model):
    arguments = (f"--checkpoint={chat_model}", "--prompt=Hi", "--num_samples=3", "--max_new_tokens=20")
    code, out, err = sample(*arguments)
    assert (code, err) == (0, "")
    numbered = re.fullmatch(r"(?s)\[1\] (.*)\n\[2\] (.*)\n\[3\] (.*)\n", out)
    assert numbered and len(set(numbered.groups())) == 3
    assert sample(*arguments)[1] == out
    assert sample(*arguments, "--seed=1")[1] != out


def test_greedy_answers_are_all_the_same(sample, chat_model):
    arguments = (f"--checkpoint={chat_model}", "--prompt=Hi", "--max_new_tokens=20", "--temperature=0")
    one, three = sample(*arguments)[1], sample(*arguments, "--num_samples=3")[1]
    assert one.strip() and three == f"[1] {one}[2] {one}[3] {one}"


def test_a_model_without_template_continues_the_prompt(sample, text_model):
    arguments = (f"--checkpoint={text_model}", "--max_new_tokens=20", "--temperature=0")
    code, out, err = sample(*arguments, "--prompt=Once upon")
    assert (code, err) == (0, "") and out.startswith("Once upon") and len(out) > len("Once upon\n")
    assert sample(*arguments, "--interactive", stdin="Once upon\n")[1] == out


def test_the_system_message_reaches_the_model(sample, chat_model):
    arguments = (f"--checkpoint={chat_model}", "--prompt=Hi", "--max_new_tokens=20", "--temperature=0")
    assert sample(*arguments)[1] != sample(*arguments, "--system=Be brief.")[1]


def test_capability_cases(sample, chat_model):
    """Each request is shown; those that don't fit this model's context of 256 bytes say so."""
    code, out, err = sample(f"--checkpoint={chat_model}", "--test", "--max_new_tokens=20")
    assert (code, err) == (0, "")
    assert out.count("User: ") == out.count("Assistant: ") == 5
    assert out.count("too long for the model's context of 256") == 4
    assert "uses all of these words" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=Hi", "--temperature=-1"], "temperature"),
        (["--prompt=Hi", "--temperature=nan"], "temperature"),
        (["--prompt=Hi", "--top_p=1.5"], "top_p"),
        (["--prompt=Hi", "--top_k=-1"], "top_k"),
        (["--prompt=Hi", "--max_new_tokens=-1"], "max_new_tokens"),
        (["--prompt=Hi", "--num_samples=0"], "num_samples"),
        (["--interactive", "--num_samples=2"], "num_samples"),
        (["--prompt="], "empty"),
        (["--prompt=Hi", "--system="], "empty"),
        (["--prompt=Hi", "--test"], "not allowed with"),
        ([], "required"),
        (["--prompt=" + "long " * 60], "tokens"),
        (["--prompt=Hi", "--checkpoint=/nowhere"], "/nowhere"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(sample, chat_model, arguments, message):
    code, out, err = sample(f"--checkpoint={chat_model}", *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_no_system_message_without_a_template(sample, text_model):
    for mode in ("--prompt=Hi", "--interactive", "--test"):
        code, out, err = sample(f"--checkpoint={text_model}", mode, "--system=S", stdin="Hi\n")
        assert (code, out) == (2, "") and "--system" in err


def test_a_model_whose_tokenizer_is_unknown_is_refused(sample, fixtures):
    code, out, err = sample(f"--checkpoint={fixtures / 'sft_small.pt'}", "--prompt=Hi")
    assert (code, out) == (2, "") and "tokenizer" in err and err.count("\n") == 1


def test_a_piped_chat(sample, chat_model):
    """A message that is too long is an error line, and the chat goes on; nothing is read after /quit."""
    lines = ["Hi", "", "x" * 300, "/help", "/reset", "Hi", "/quit", "Hi"]
    code, out, err = sample(
        f"--checkpoint={chat_model}", "--interactive", "--temperature=0", "--max_new_tokens=20", stdin="\n".join(lines)
    )
    assert code == 0
    assert err.count("\n") == 1 and "tokens" in err
    answer = re.fullmatch(r"(?s)(.+)\n\(/reset .*\)\n\(forgotten\)\n(.+)\n", out)
    assert answer and answer[1] == answer[2], "after /reset the same question has the same answer"


def test_a_full_context_forgets_the_oldest_exchange(sample, chat_model):
    out = sample(f"--checkpoint={chat_model}", "--interactive", "--system=S", "--max_new_tokens=60", stdin="Hi\n" * 4)[
        1
    ]
    assert "exchanges forgotten, oldest first: 1)" in out


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(sample, chat_model, monkeypatch):
    stream, prompts = Decoder.stream, []

    def interrupted(self, prompt, options):
        prompts.append(prompt)
        yield from itertools.islice(stream(self, prompt, options), 1)
        if len(prompts) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "stream", interrupted)
    arguments = (f"--checkpoint={chat_model}", "--interactive", "--max_new_tokens=20")
    code, out, err = sample(*arguments, stdin="Hi\nHi\n")
    assert (code, err) == (0, "") and out.count(" (stopped)\n") == 1
    assert len(prompts[1]) > len(prompts[0]) + 3, "the second turn holds what was said in the first"


def test_the_command_in_a_process_of_its_own(chat_model):
    """Two turns; text that is not UTF-8 is no traceback."""
    command = [sys.executable, SCRIPT, f"--checkpoint={chat_model}", "--interactive", "--max_new_tokens=20"]
    done = subprocess.run(command, input=b"Hi\n\xff\n/quit\nHi\n", capture_output=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout.splitlines()) >= 2
