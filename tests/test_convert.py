"""The command `convert_torch_weights.py`, as a user runs it."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import LLAMA3, random_model
from families import save as save_folder
from safetensors.numpy import load_file
from tiers import slow
from tiny_model import make_model_directory
from torch_twin import TorchTwin, save, without_buffers

from tinysft_jax.checkpoints import load_description, load_model, open_model
from tinysft_jax.conversion import gguf, parity

torch = pytest.importorskip("torch")

COMMAND = Path(__file__).parents[1] / "convert_torch_weights.py"


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the command in this process: its exit code, standard output and standard error."""

    def run(**flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(COMMAND), *arguments(**flags)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(COMMAND), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def arguments(**flags) -> list[str]:
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items()]


def assert_one_line(result: tuple[int, str, str], code: int, *expected: str) -> None:
    assert result[0] == code
    assert result[2].startswith("error: ") and result[2].count("\n") == 1
    for part in expected:
        assert part in result[2]


def run_for_real(**flags) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, COMMAND, *arguments(**flags)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_command_converts_and_checks(fixtures, tmp_path):
    """A whole run in a process of its own: what is said, what is written, what it computes."""
    source, output = fixtures / "sft_small.pt", tmp_path / "new" / "model"
    code, out, err = run_for_real(input=source, output=output, check=True)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["shape", "parameters", "template", "check", "written"]
    assert "49,472" in out
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent in (tmp_path, output.parent, output)) == [
        "model",
        "model.json",
        "new",
        "params",
    ]
    golden = np.load(source.with_suffix(".golden.npz"))
    logits = load_model(output, dtype=jnp.float32)(jnp.asarray(golden["input_ids"]))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-5)
    assert json.loads((output / "model.json").read_text())["chat_template"] == "text"


@pytest.mark.slow
def test_command_refuses_a_truncated_file(fixtures, tmp_path):
    path = tmp_path / "cut.pt"
    path.write_bytes((fixtures / "sft_small.pt").read_bytes()[:100_000])
    assert_one_line(run_for_real(input=path, output=tmp_path / "new" / "model"), 2, str(path), "cut short")
    assert list(tmp_path.iterdir()) == [path]


def test_existing_output_is_refused_before_work_and_replaced_on_demand(convert, tmp_path):
    output = tmp_path / "model"
    first = save(TorchTwin(n_layers=1).checkpoint(), tmp_path / "1.pt")
    second = save(TorchTwin(n_layers=2).checkpoint(), tmp_path / "2.pt")
    assert convert(input=first, output=output)[0] == 0
    # The input does not even exist: the output is looked at first.
    assert_one_line(convert(input=tmp_path / "none.pt", output=output), 2, f"{output} exists", "--overwrite")
    # An input that can't be read costs nothing, even with --overwrite.
    assert_one_line(convert(input=tmp_path / "none.pt", output=output, overwrite=True), 2, "none.pt")
    assert load_description(output).config.n_layers == 1
    assert convert(input=second, output=output, overwrite=True)[0] == 0
    assert load_description(output).config.n_layers == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.pt", "2.pt", "model"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_overwrite_replaces_models_only(convert, tmp_path, kind):
    source = save(TorchTwin().checkpoint(), tmp_path / "a.pt")
    output = source if kind == "file" else tmp_path / "notes"
    if kind == "directory":
        output.mkdir()
        (output / "note.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    assert_one_line(convert(input=source, output=output, overwrite=True), 2, "not a directory with a model.json")
    assert sorted(tmp_path.rglob("*")) == before


def test_head_count_comes_from_the_flag_where_nothing_tells_it(convert, tmp_path):
    state = save(without_buffers(TorchTwin(n_heads=4).state_dict()), tmp_path / "a.pt")
    assert_one_line(convert(input=state, output=tmp_path / "model"), 2, "--n_heads")
    code, out, _ = convert(input=state, output=tmp_path / "model", n_heads=4, check=True)
    assert code == 0
    assert "assumed     max_seq_len 1024, rope_theta 10000" in out
    assert load_description(tmp_path / "model").config.n_heads == 4


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"weights": torch.ones(2)}, "no checkpoint of this model"),
        ({"model_state_dict": {"tok_emb.weight": torch.ones(4, 2)}}, "missing: blocks.0.ln_1.weight"),
    ],
)
def test_bad_checkpoint_leaves_nothing(convert, tmp_path, content, expected):
    source = save(content, tmp_path / "a.pt")
    assert_one_line(convert(input=source, output=tmp_path / "b" / "model"), 2, str(source), expected)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", ["sft_small", *slow("pretrained_small")])
def test_every_path_and_back(convert, fixtures, tmp_path, name):
    """.pt to Hugging Face to a model directory to .pt: each step checked by the command, nothing lost on the way."""
    source = fixtures / f"{name}.pt"
    steps = [("huggingface", "folder"), ("model", "model"), ("torch", "back.pt"), ("model", "model again")]
    for to, output in steps:
        code, _, err = convert(input=source, output=tmp_path / output, to=to, check=True)
        assert (code, err) == (0, "")
        source = tmp_path / output
    before, after = (torch.load(path, weights_only=True) for path in (fixtures / f"{name}.pt", tmp_path / "back.pt"))
    assert before.get("model_type") == after.get("model_type") and before["config"] == after["config"]
    for key, tensor in before["model_state_dict"].items():
        assert torch.equal(tensor, after["model_state_dict"][key])
    golden = np.load(fixtures / f"{name}.golden.npz")
    logits = load_model(source, dtype=jnp.float32)(jnp.asarray(golden["input_ids"]))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(output for _, output in steps)


@pytest.mark.parametrize("template", ["control", "text", None])
def test_a_folder_with_a_tokenizer_and_back(convert, tmp_path, template):
    """The pad token's row, which the folder has and the model doesn't, comes and goes; the command checks each step."""
    source = model = make_model_directory(tmp_path / "model", template)
    for to, output in (("huggingface", "1/stories"), ("model", "1/model"), ("huggingface", "2/stories")):
        code, out, err = convert(input=source, output=tmp_path / output, to=to, check=True)
        assert (code, err, "vocabulary 260," in out) == (0, "", True)
        source = tmp_path / output
    jax.tree.map(np.testing.assert_array_equal, open_model(model)[1], open_model(tmp_path / "1/model")[1])
    folders = [{path.name: path.read_bytes() for path in (tmp_path / f"{i}/stories").iterdir()} for i in (1, 2)]
    assert folders[0] == folders[1]
    table = load_file(tmp_path / "1/stories/model.safetensors")["model.embed_tokens.weight"]
    assert table.shape == (261, 32)


@pytest.mark.parametrize("template", ["control", "text", None])
def test_the_length_of_training_goes_along(convert, tmp_path, template):
    source = make_model_directory(tmp_path / "model", template)
    description = json.loads((source / "model.json").read_text()) | {"trained_length": 100}
    (source / "model.json").write_text(json.dumps(description))
    for to, output in (("huggingface", "folder"), ("torch", "a.pt"), ("model", "again")):
        assert convert(input=source, output=tmp_path / output, to=to)[0] == 0
        source = tmp_path / output
    assert json.loads((tmp_path / "again" / "model.json").read_text())["trained_length"] == 100
    assert json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())["model_max_length"] == 100
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["max_position_embeddings"] == 256


@pytest.mark.parametrize("to", ["model", "huggingface", "torch"])
def test_a_path_with_brackets_works_or_is_refused(convert, tmp_path, to):
    """Orbax takes them for a pattern; the other forms are written without it."""
    model = make_model_directory(tmp_path / "model", "control")
    output = tmp_path / "a[1]" / ("b*.pt" if to == "torch" else "b*")
    result = convert(input=model, output=output, to=to)
    if to == "model":
        assert_one_line(result, 2, "contains * [ ]", "choose another path")
        assert not (tmp_path / "a[1]").exists()
        (tmp_path / "a[1]").mkdir()
        output = Path(shutil.copytree(model, output))  # it can be read from there
    assert convert(input=output, output=tmp_path / "back")[0] == 0
    jax.tree.map(np.testing.assert_array_equal, open_model(model)[1], open_model(tmp_path / "back")[1])


@pytest.mark.parametrize("to", ["model", "huggingface"])
def test_overwrite_spares_what_is_not_the_commands_own(convert, tmp_path, to):
    model = make_model_directory(tmp_path / "model", "control")
    assert convert(input=model, output=tmp_path / "out", to=to)[0] == 0
    (tmp_path / "out" / ".git").mkdir()
    assert_one_line(
        convert(input=model, output=tmp_path / "out", to=to, overwrite=True), 2, "'.git'", "would delete it"
    )
    (tmp_path / "out" / ".git").rmdir()
    assert convert(input=model, output=tmp_path / "out", to=to, overwrite=True)[0] == 0


def test_both_sides_are_checked(convert, fixtures, tmp_path):
    """The file that is read, and the one that is written."""
    _, out, _ = convert(input=fixtures / "sft_small.pt", output=tmp_path / "f", to="huggingface", check=True)
    assert out.count("check       128 positions") == 2
    assert (tmp_path / "f" / "README.md").read_text().count("# f\n") == 1


@pytest.mark.parametrize("template, noted", [("control", True), (None, True), ("text", False)])
def test_note_about_the_markers_of_the_pytorch_project(convert, tmp_path, template, noted):
    model = make_model_directory(tmp_path / "model", template)
    code, out, _ = convert(input=model, output=tmp_path / "a.pt", to="torch")
    assert code == 0 and ("--template text" in out) == noted
    assert "--template" not in convert(input=model, output=tmp_path / "b", to="huggingface")[1]


def test_model_directory_is_copied(convert, tmp_path):
    model = make_model_directory(tmp_path / "model", "control")
    assert convert(input=model, output=tmp_path / "copy", check=True)[0] == 0
    (one, params), (other, other_params) = open_model(model), open_model(tmp_path / "copy")
    assert one == other
    jax.tree.map(np.testing.assert_array_equal, params, other_params)


@pytest.mark.parametrize(
    ("to", "output", "compared"), [("model", "b", "a.pt"), ("huggingface", "b", "b"), ("torch", "b.pt", "b.pt")]
)
def test_output_that_fails_its_check_is_not_written(convert, tmp_path, monkeypatch, to, output, compared):
    monkeypatch.setattr(parity, "TOLERANCE", 0.0)
    source = save(TorchTwin().checkpoint(), tmp_path / "a.pt")
    result = convert(input=source, output=tmp_path / output, to=to, check=True)
    assert_one_line(result, 3, f"does not compute what {tmp_path / compared} does; nothing was written")
    assert list(tmp_path.iterdir()) == [source]


def test_flags_are_checked(convert, tmp_path):
    assert_one_line(convert(input="a.pt"), 2, "--output")
    assert_one_line(convert(input="a.pt", output=tmp_path / "m", n_heads="x"), 2, "--n_heads")
    assert_one_line(convert(input=tmp_path, output=tmp_path / "m"), 2, "directory")
    source = save(TorchTwin().checkpoint(), tmp_path / "a.pt")
    assert_one_line(convert(input=source, output=tmp_path / "b", to="torch"), 2, "ends in .pt")
    assert_one_line(convert(input=source, output=tmp_path / "b", to="onnx"), 2, "--to")
    assert_one_line(convert(input=source, output=source, to="torch"), 2, "exists", "--overwrite")
    assert_one_line(convert(input=source, output=tmp_path / "b", report=tmp_path), 2, "--report")
    assert_one_line(convert(input=source, output=tmp_path / "b", to="huggingface", report=tmp_path), 2, "report.md")
    model = make_model_directory(tmp_path / "model", "control")
    assert_one_line(convert(input=model, output=tmp_path / "b", n_heads=2), 2, "--n_heads is for .pt files")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "model"]


def test_foreign_folder_is_refused_with_the_reason(convert, tmp_path):
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text('{"model_type": "gemma"}')
    assert_one_line(convert(input=tmp_path / "gemma", output=tmp_path / "b"), 2, "'gemma'", "stablelm, llama")


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    """A random model of transformers; no tokenizer."""
    return save_folder(random_model("llama", rope_parameters=LLAMA3), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("dtype", ["bfloat16", *slow("float32")])
def test_a_model_of_another_family_and_back(convert, llama_folder, tmp_path, dtype):
    """What is written in bfloat16 is compared with the rounded model, what was read with the model itself."""
    code, out, err = convert(input=llama_folder, output=tmp_path / "model", check=True)
    assert (code, err) == (0, "") and "4 heads that share 2 of keys" in out
    flags = {"output": tmp_path / "folder", "to": "huggingface", "dtype": dtype, "check": True}
    code, out, err = convert(input=llama_folder, **flags)
    assert (code, err, out.count("check       ")) == (0, "", 2)
    code, out, err = convert(input=tmp_path / "model", overwrite=True, **flags)
    assert (code, err, out.count("check       ")) == (0, "", 1)
    for name, tensor in load_file(llama_folder / "model.safetensors").items():
        written = load_file(tmp_path / "folder" / "model.safetensors")[name]
        assert written.dtype.name == dtype
        np.testing.assert_array_equal(written, tensor.astype(written.dtype))
    assert "| architecture | LlamaForCausalLM |" in (tmp_path / "folder" / "README.md").read_text()


def test_a_pytorch_checkpoint_of_another_family_is_refused(convert, llama_folder, tmp_path):
    result = convert(input=llama_folder, output=tmp_path / "a.pt", to="torch")
    assert_one_line(
        result, 2, "the PyTorch project has no such model, with n_kv_heads 2, norm 'rms'", "tied_head False"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to, output", [("model", "a"), ("torch", "a.pt"), ("huggingface", "a")])
def test_not_every_form_has_every_dtype(convert, llama_folder, tmp_path, to, output):
    flags = {"input": llama_folder, "output": tmp_path / output, "to": to}
    held = "float32, bfloat16" if to == "huggingface" else "float32"
    assert_one_line(convert(**flags, dtype="q8_0"), 2, f"--to {to} can't hold q8_0; it holds {held}")
    assert_one_line(convert(**flags, dtype="int4"), 2, "--dtype", "float32", "bfloat16", "q8_0")


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_to_gguf_and_back(convert, llama_folder, tmp_path, dtype):
    """Of a model without a tokenizer; the file is compared with what was written."""
    pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    code, out, _ = convert(input=llama_folder, output=path, to="gguf", dtype=dtype, check=True)
    assert code == 0 and "weights differ by at most" in out
    assert ("0.0e+00" in out) == (dtype == "float32")
    assert convert(input=path, output=tmp_path / "model")[0] == 0
    assert open_model(tmp_path / "model")[0].config == open_model(llama_folder)[0].config


def test_weights_that_gguf_changed_are_not_written(convert, llama_folder, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setitem(gguf.ROUND_OFF, "q8_0", 1e-9)
    result = convert(input=llama_folder, output=tmp_path / "a.gguf", to="gguf", dtype="q8_0", check=True)
    assert_one_line(result, 3, "more than q8_0 rounds: nothing was written")
    assert not list(tmp_path.iterdir())


def test_a_chat_model_in_bfloat16(convert, tmp_path):
    """The pad token's row is the mean of the rounded rows, so that it is the same each time."""
    source = make_model_directory(tmp_path / "model", "control")
    for output in ("1", "2"):
        flags = {"output": tmp_path / output, "to": "huggingface", "dtype": "bfloat16", "check": True}
        assert convert(input=source, **flags)[0] == 0
        source = tmp_path / output
    one, two = (load_file(tmp_path / output / "model.safetensors") for output in ("1", "2"))
    for name, tensor in one.items():
        np.testing.assert_array_equal(two[name], tensor)
    assert one["model.embed_tokens.weight"].shape == (261, 32)
