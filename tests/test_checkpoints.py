"""The model directory, and that everything that takes a model takes it in every form."""

import importlib.util
import json
import runpy
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_model import make_model_directory, save_model

import tinysft_jax as tsft
from tinysft_jax import files
from tinysft_jax.checkpoints import load_description, load_model, open_model
from tinysft_jax.console import UserError
from tinysft_jax.conversion.huggingface import write_huggingface
from tinysft_jax.conversion.names import TORCH, huggingface_layout
from tinysft_jax.conversion.torch import write_torch_checkpoint
from tinysft_jax.data.store import PreparedData
from tinysft_jax.evaluation import run as evaluation
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription
from tinysft_jax.training.state import starting_model

CONFIG = GPTConfig(vocab_size=260, dim=16, n_layers=2, n_heads=2, max_seq_len=32)
DESCRIPTION = ModelDescription(CONFIG, "control", {"kind": "gpt2", "bpe_ranks": 256}, {"kind": "random"})


@pytest.fixture(scope="module")
def params():
    return nnx.to_pure_dict(nnx.state(GPT(CONFIG, rngs=nnx.Rngs(0))))


@pytest.fixture
def saved(tmp_path, params):
    save_model(tmp_path / "model", params, DESCRIPTION)
    return tmp_path / "model"


def edit_model_json(path, **changes):
    content = json.loads((path / "model.json").read_text()) | changes
    (path / "model.json").write_text(json.dumps(content))


def test_what_is_saved_is_loaded(saved, params):
    assert load_description(saved) == DESCRIPTION
    jax.tree.map(np.testing.assert_array_equal, open_model(saved)[1], params)
    assert load_model(saved).config == CONFIG


def test_version_1_is_read(fixtures):
    """Written by version 0.1.0; each array counts from 0."""
    description, params = open_model(fixtures / "model_version_1")
    assert description.chat_template == "control" and description.trained_length == 32
    embedding = params["tok_emb"]["embedding"]
    assert not embedding[260:].any()
    params["tok_emb"]["embedding"] = embedding[:260]
    for name in ("wq", "wk"):  # two heads of 4 features, which were interleaved
        kernel = params["blocks"]["attn"][name]["kernel"]
        assert kernel[0, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
        kernel.sort()
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf.ravel(), np.arange(leaf.size)), params)


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("model_version_1_random", "model_version_1_random"),
        ("model_version_2", "model_version_1_random"),
        ("model_version_3", "model_version_3"),
    ],
)
def test_a_model_of_any_version_computes_and_exports_the_same(fixtures, tmp_path, name, golden):
    """As a program of version 1 did, and as transformers does with a model that only version 3 can describe.

    Other than with 4 features in a head, a reordering is not its own inverse.
    """
    golden = np.load(fixtures / f"{golden}.golden.npz")
    logits = load_model(fixtures / name)(jnp.asarray(golden["tokens"]))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)
    description, params = open_model(fixtures / name)
    layouts = {"torch": TORCH, "huggingface": huggingface_layout(description.config)}
    tensors = {
        f"{form}.{key}": tensor
        for form in {key.partition(".")[0] for key in golden} & layouts.keys()
        for key, tensor in layouts[form].export_tensors(params, description.config).items()
    }
    for key in golden.keys() - {"tokens", "logits"}:  # of a folder, the embedding has the pad token's row besides
        np.testing.assert_array_equal(tensors[key], golden[key][: len(tensors[key])], err_msg=key)


def test_keys_of_a_later_version_are_not_taken_from_an_earlier_one(fixtures, tmp_path):
    """Its queries and keys would be reordered as those of another model."""
    for version in (1, 2):
        path = shutil.copytree(fixtures / f"model_version_{version}", tmp_path / f"{version}")
        shape = json.loads((path / "model.json").read_text())["model"]
        edit_model_json(path, model=shape | {"n_kv_heads": 1})
        with pytest.raises(UserError, match=r"'model' must have the keys vocab_size, .*, rope_theta, and no others$"):
            open_model(path)


def test_padding_rows_are_not_stored(saved):
    from orbax.checkpoint import v1 as ocp

    assert ocp.metadata(saved / "params").metadata["tok_emb"]["embedding"].shape == (260, 16)


def test_an_existing_directory_is_not_replaced_unasked(saved, params):
    before = (saved / "model.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="--overwrite"):
        save_model(saved, params, DESCRIPTION)
    assert (saved / "model.json").stat().st_mtime_ns == before
    save_model(saved, params, DESCRIPTION, overwrite=True)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format_version": 5}, "upgrade"),
        ({"format_version": "1"}, "no format_version"),
        ({"model": {"vocab_size": 260}}, "'model' must have the keys vocab_size, dim, .* and no others"),
        ({"model": [1]}, r"model is \[1\]; it must be an object"),
        ({"chat_template": "llama"}, "chat_template"),
        ({"trained_length": 33}, "trained_length is 33; it must be from 1 to the context, 32"),
        ({"trained_length": "long"}, "trained_length is 'long'"),
    ],
)
def test_a_description_that_cannot_be_is_refused(saved, changes, complaint):
    edit_model_json(saved, **changes)
    with pytest.raises(UserError, match=complaint):
        load_model(saved)


def test_parameters_of_another_shape_are_named(saved):
    shape = json.loads((saved / "model.json").read_text())["model"]
    edit_model_json(saved, model=shape | {"dim": 32})
    with pytest.raises(UserError, match=r"blocks.attn.wk.kernel is float32\[2, 16, 16\], not float32\[2, 32, 16\]"):
        load_model(saved)


def test_missing_parts_are_named(saved, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    shutil.rmtree(saved / "params")
    with pytest.raises(UserError, match="params"):
        load_model(saved)
    (saved / "model.json").unlink()
    with pytest.raises(UserError, match=r"no model.json"):
        load_model(saved)


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> Path:
    """One model in every form (`.pt`: with torch), and `pickled`, a folder without safetensors."""
    path = tmp_path_factory.mktemp("forms")
    description, params = open_model(make_model_directory(path / "model", "control", ends=True))
    shutil.copytree(path / "model", path / "work" / "models" / "5")
    files.link(path / "work" / "model", path / "work" / "models" / "5")
    files.write_json(path / "work" / "config.json", {"format_version": 1, "config": {}})
    if importlib.util.find_spec("torch"):
        write_torch_checkpoint(path / "model.pt", params, description)
    (path / "huggingface").mkdir()
    write_huggingface(path / "huggingface", params, description)
    for name in ("sharded", "pickled"):
        shutil.copytree(path / "huggingface", path / name)
        (path / name / "model.safetensors").unlink()
    tensors = load_file(path / "huggingface" / "model.safetensors")
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, path / "sharded" / shard)
    files.write_json(path / "sharded" / "model.safetensors.index.json", {"weight_map": shards})
    (path / "pickled" / "pytorch_model.bin").touch()
    return path


def run_script(name: str, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *flags])
        runpy.run_path(str(Path(__file__).parents[1] / name))["main"]()


# Each uses a model, given its path, prepared data and an output, and leaves its parameters or its answers.
def use_load_model(path, data, output):
    return nnx.to_pure_dict(nnx.state(tsft.load_model(path)))


def use_load_tokenizer(path, data, output):
    return tsft.load_tokenizer(path).description()


def use_init_from(path, data, output):
    return starting_model(str(path), {}, PreparedData(data))[1]


def use_convert(path, data, output):
    run_script("convert_torch_weights.py", f"--input={path}", f"--output={output}")
    return open_model(output)[1]


def use_sample(path, data, output):
    output.with_suffix(".jsonl").write_text('{"prompt": "Hi"}')
    flags = (f"--input={output.with_suffix('.jsonl')}", f"--output={output}", "--temperature=0", "--max_new_tokens=9")
    run_script("sample.py", f"--checkpoint={path}", *flags)
    return json.loads(output.read_text())["messages"]


def use_evaluation(path, data, output):
    evaluation.main([f"--checkpoint={path}", f"--data={data}", f"--output={output}", "--cases=2"])
    return (output / "answers.jsonl").read_text()


@pytest.fixture(scope="module")
def expected() -> dict:
    """By use, the result with the model directory."""
    return {}


USES = [use_load_model, use_load_tokenizer, use_init_from, use_convert, use_sample, use_evaluation]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("form", ["work", "model.pt", "huggingface", "sharded"])
def test_what_takes_a_model_takes_it_in_every_form(forms, chat_data, tmp_path, expected, use, form):
    if form == "model.pt":
        pytest.importorskip("torch")
    if use not in expected:
        expected[use] = use(forms / "model", chat_data, tmp_path / "expected")
    jax.tree.map(np.testing.assert_array_equal, use(forms / form, chat_data, tmp_path / "out"), expected[use])


def test_a_folder_of_an_old_transformers_is_no_run(tmp_path):
    """Its config.json, like a run's, has no model_type."""
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="a model of type None; this program's GPT can be of the types"):
        open_model(tmp_path)


@pytest.mark.parametrize("use", [use for use in USES if use is not use_load_tokenizer])  # which needs no weights
def test_a_folder_with_only_pickled_weights_is_refused_as_that(forms, chat_data, tmp_path, use):
    with pytest.raises(UserError, match=r"pickled: it has no model.safetensors; pickled weights are not read"):
        use(forms / "pickled", chat_data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
