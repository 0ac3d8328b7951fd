"""`sample.py` as a user runs it, on a tiny model with random weights."""

import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import make_model_directory

SCRIPT = Path(__file__).parent.parent / "sample.py"


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
    assert out.count("leave no room for an answer: 256 are the most") == 4
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
        (["--prompt=Hi", "--output=answers.jsonl"], "go together"),
        (["--input=prompts.jsonl"], "go together"),
        (["--interactive", "--num_samples=2"], "num_samples"),
        (["--prompt="], "empty"),
        (["--prompt= \n"], "--prompt is empty"),
        (["--prompt=\u200b\u00ad"], "--prompt is empty"),
        (["--prompt=Hi", "--system="], "--system is empty"),
        (["--prompt=Hi", "--system=\ufeff"], "--system is empty"),
        (["--interactive", "--system= "], "--system is empty"),
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
        assert (code, out) == (2, "") and "takes no system message" in err


def test_a_model_whose_tokenizer_is_unknown_is_refused(sample, fixtures):
    pytest.importorskip("torch")
    code, out, err = sample(f"--checkpoint={fixtures / 'sft_small.pt'}", "--prompt=Hi")
    assert (code, out) == (2, "") and "tokenizer" in err and err.count("\n") == 1


def test_a_file_of_requests(sample, chat_model, tmp_path):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "Hi"}\n{"prompt": "Ho"}\n{"prompt": "Hi"}\n')
    arguments = (f"--checkpoint={chat_model}", f"--input={source}", "--system=S", "--max_new_tokens=20")
    code, out, err = sample(*arguments, f"--output={output}", "--num_samples=2")
    assert (code, out) == (0, "") and re.fullmatch(r"answers 6/6  [0-9,]+ tokens/s\n", err)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [[message["content"] for message in line["messages"][:2]] for line in lines] == [
        ["S", text] for text in ("Hi", "Hi", "Ho", "Ho", "Hi", "Hi")
    ]
    assert len({line["messages"][2]["content"] for line in lines}) == 6, "each answer has its own random numbers"
    again = tmp_path / "again.jsonl"
    assert sample(*arguments, f"--output={again}", "--num_samples=2", "--temperature=0")[0] == 0
    assert len({json.loads(line)["messages"][2]["content"] for line in again.read_text().splitlines()}) == 2


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"prompt": "Hi"}\n{"prompt"\n', (), "prompts.jsonl:2: not valid JSON"),
        ('{"prompt": "' + "long " * 60 + '"}', (), "prompts.jsonl:1: the request has"),
        ("", (), "no requests"),
        ('{"prompt": "Hi"}', ("--output=prompts.jsonl",), "exists"),
        ('{"prompt": "Hi"}', ("--output=missing/answers.jsonl",), "no directory"),
        ('{"prompt": "Hi"}', ("--output=" + "x" * 300,), "File name too long"),
        ('{"prompt": "Hi"}', ("--batch_size=0",), "batch_size"),
        ('{"prompt": "Hi"}', ("--min_p=2",), "min_p"),
        ('{"prompt": "Hi"}', ("--repetition_penalty=0",), "repetition_penalty"),
    ],
    ids=str,
)
def test_mistakes_in_a_file_of_requests(sample, chat_model, tmp_path, monkeypatch, content, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(content)
    code, out, err = sample(
        f"--checkpoint={chat_model}", "--input=prompts.jsonl", "--output=answers.jsonl", "--system=S", *arguments
    )
    assert code == (3 if "too long" in message else 2) and out == ""
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_the_command_in_a_process_of_its_own(chat_model):
    """Two turns; text that is not UTF-8 is no traceback."""
    command = [sys.executable, SCRIPT, f"--checkpoint={chat_model}", "--interactive", "--max_new_tokens=20"]
    done = subprocess.run(command, input=b"Hi\n\xff\n/quit\nHi\n", capture_output=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout.splitlines()) >= 2


@pytest.fixture(scope="module")
def shorter_model(tmp_path_factory, chat_model) -> Path:
    """A model that was trained to 100 of its 256 positions."""
    path = tmp_path_factory.mktemp("models") / "shorter"
    shutil.copytree(chat_model, path)
    description = json.loads((path / "model.json").read_text()) | {"trained_length": 100}
    (path / "model.json").write_text(json.dumps(description))
    return path


def test_answers_end_where_the_models_training_did(sample, shorter_model):
    """A question takes 71 tokens with the default system message."""
    arguments = (f"--checkpoint={shorter_model}", "--temperature=0")
    code, out, err = sample(*arguments, "--prompt=Hi")
    assert code == 0 and "1 answer cut off at 100 tokens, the question's included" in err and "up to 256" in err
    code, longer, err = sample(*arguments, "--prompt=Hi", "--max_length=256")
    assert (code, err) == (0, "") and longer.startswith(out[:-1]) and len(longer) > 2 * len(out)
    assert sample(*arguments, "--prompt=Hi", "--max_new_tokens=5")[2] == ""
    code, _, err = sample(*arguments, "--prompt=Hi", "--max_length=257")
    assert code == 2 and "the model's context is 256" in err
    code, _, err = sample(*arguments, f"--prompt={'long ' * 10}")
    assert code == 2 and "it may end at 100 (see --max_length; the model's context is 256)" in err
    code, _, err = sample(*arguments, "--interactive", stdin="Hi\n/reset\nHi\n")
    assert code == 0 and err.count("1 answer cut off at 100 tokens") == 2


def test_a_file_of_requests_says_how_many_answers_were_cut_off(sample, shorter_model, tmp_path):
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text('{"prompt": "Hi"}\n{"prompt": "Ho"}\n')
    arguments = (f"--checkpoint={shorter_model}", f"--input={requests}")
    code, _, err = sample(*arguments, f"--output={output}")
    assert code == 0 and "2 answers cut off at 100 tokens" in err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["finish"] for answer in answers] == ["length", "length"]


def test_the_length_that_a_model_was_trained_to_is_generates_default(shorter_model):
    import tinysft_jax as tsft

    model = tsft.load_model(shorter_model)
    assert len(tsft.generate(model, [[1] * 40], max_new_tokens=200, temperature=0)[0]) == 60
    assert len(tsft.generate(model, [[1] * 40], max_new_tokens=200, temperature=0, max_length=120)[0]) == 80
