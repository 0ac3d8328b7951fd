"""Models with their own tokenizer and template, from a Hugging Face folder through training and back."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from own_tokenizers import make_tokenizer, write_folder
from runs import arrays, losses, stop_at, tiny_config

from tinysft_jax import files
from tinysft_jax.bpe import FileBpe
from tinysft_jax.checkpoints import load_model, load_tokenizer, open_model
from tinysft_jax.console import Interrupted, UserError
from tinysft_jax.conversion.huggingface import write_huggingface
from tinysft_jax.data import prepare
from tinysft_jax.data.batches import batches
from tinysft_jax.data.mixture import open_parts
from tinysft_jax.data.store import PreparedData
from tinysft_jax.evaluation import run as evaluation
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription, make_model
from tinysft_jax.sampling.chat import Session
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.tokenizer import KEPT, ChatTokenizer
from tinysft_jax.training import loop
from tinysft_jax.training.state import starting_model

GPT2 = ("--bpe_ranks", "300", "--workers", "1", "--max_tokens", "96")
LLAMA = {"norm": "rms", "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 128, "tied_head": False}


def make_folder(folder: Path, tokenizer: ChatTokenizer, seed: int = 0, spare_rows: int = 5) -> Path:
    """A llama with random weights, and rows that no token has."""
    folder.mkdir()
    config = GPTConfig(vocab_size=tokenizer.vocab_size + spare_rows, **LLAMA)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(seed)))))
    description = ModelDescription(config, **tokenizer.description(), source={}, tokenizer_files=tokenizer.files)
    write_huggingface(folder, params, description)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    words = ["cat", "dog", "tree", "sun", "big", "red"]
    turns = [(f"Say {a} {b}", f" {b} and {a}!\n") for a in words for b in words]
    lines = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def prepare_with(model: Path, chats: Path, output: Path, *flags: str) -> PreparedData:
    arguments = ["--input", str(chats), "--output", str(output), "--tokenizer", str(model), "--max_tokens", "96"]
    prepare.main([*arguments, "--valid_fraction", "0.2", "--workers", "1", *flags])
    return PreparedData(output)


@pytest.fixture(scope="module")
def qwen(chats, tmp_path_factory) -> Path:
    """A directory with a folder, `model`, and data prepared for it, `data`."""
    directory = tmp_path_factory.mktemp("qwen")
    make_folder(directory / "model", make_tokenizer("qwen3", directory / "tokenizer"))
    prepare_with(directory / "model", chats, directory / "data")
    return directory


def train(workdir: Path, model: Path, data: Path) -> Path:
    changes = {"train__max_steps": 6, "train__eval_interval": 6, "train__eval_batch_size": 8}
    loop.train(tiny_config(data, init_from=str(model), data__seq_len=96, **changes), workdir)
    return workdir


@pytest.fixture(scope="module")
def work(qwen, tmp_path_factory) -> Path:
    """A run of 6 steps from the folder."""
    return train(tmp_path_factory.mktemp("run") / "work", qwen / "model", qwen / "data")


def test_a_run_resumes_to_the_same_bits(qwen, work, tmp_path, monkeypatch):
    stop_at(3, monkeypatch)
    with pytest.raises(Interrupted):
        train(tmp_path / "work", qwen / "model", qwen / "data")
    monkeypatch.undo()
    train(tmp_path / "work", qwen / "model", qwen / "data")
    assert load_tokenizer(tmp_path / "work").fingerprint() == load_tokenizer(work).fingerprint()
    assert losses(tmp_path / "work") == losses(work) and losses(work)[6] < losses(work)[1] - 0.2
    resumed = arrays((tmp_path / "work" / "model").resolve() / "params")
    for name, array in arrays((work / "model").resolve() / "params").items():
        assert np.array_equal(array, resumed[name]), name


def test_a_fine_tuned_folder_comes_back(qwen, work, tmp_path):
    description, params = open_model(work)
    tok = description.make_tokenizer()
    assert tok.fingerprint() == load_tokenizer(qwen / "model").fingerprint() == load_tokenizer(work).fingerprint()
    decoder = Decoder(description.config, params, np.float32, description.trained_length)
    session = Session(decoder, tok, SamplingOptions(20, 0.0))
    answer = "".join(session.ask("Say cat dog"))
    prompt = tok.encode_prompt([{"role": "user", "content": "Say cat dog"}])
    (ids,) = decoder.generate([prompt], session.options)
    assert session.options.stop_ids == (360,) and {358, 359, 361, 362} <= set(session.options.forbidden_ids)
    assert 360 not in session.options.forbidden_ids
    assert answer == tok.decode(ids) and not {359, 361, 362} & set(ids)

    (tmp_path / "out").mkdir()
    write_huggingface(tmp_path / "out", params, description)
    kept = {name for name in KEPT if (qwen / "model" / name).exists()}
    assert {"tokenizer.json", "chat_template.jinja"} <= kept
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (qwen / "model" / name).read_bytes()
    again, same = open_model(tmp_path / "out")
    assert dataclasses.replace(again, source={}) == dataclasses.replace(description, source={})
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.slow
def test_a_model_is_evaluated_against_its_start(qwen, work, tmp_path):
    """The one before training answers in the same template."""
    pytest.importorskip("rouge_score")
    models = [f"--checkpoint={work}", f"--baseline={qwen / 'model'}"]
    flags = evaluation._parse([*models, f"--data={qwen / 'data'}", f"--output={tmp_path / 'e'}"])
    _, cases, answers = evaluation.evaluate(flags, open_parts(flags.data))
    assert cases and all(case.question.startswith("Say ") for case in cases)
    assert all(case.ground_truth.endswith("!\n") and case.ground_truth[0] == " " for case in cases)
    nll = {speaker: sum(answer.nll for answer in given) for speaker, given in answers.items()}
    assert nll["model"] < nll["baseline"]


def test_a_base_model_learns_controls_markers(chats, tmp_path):
    base = make_folder(tmp_path / "base", make_tokenizer("llama3", tmp_path / "tokenizer", template=None), spare_rows=1)
    data = prepare_with(base, chats, tmp_path / "data")
    n_tokens = len(data.tokenizer.bpe.token_bytes)
    assert data.description["chat_template"] == "control" and data.tokenizer.vocab_size == n_tokens + 3
    description, params = starting_model(str(base), {}, data)
    assert description.config.vocab_size == n_tokens + 3
    assert {len(params[table]["embedding"]) for table in ("tok_emb", "head")} == {description.config.padded_vocab_size}
    (tmp_path / "out").mkdir()
    write_huggingface(tmp_path / "out", params, description)
    chat = [{"role": "user", "content": "Say <|user|>"}, {"role": "assistant", "content": "cat"}]
    expected = data.tokenizer.encode_chat(chat)[0].tolist()
    assert load_tokenizer(tmp_path / "out").encode_chat(chat)[0].tolist() == expected
    ids = jax.numpy.array([expected], np.int32)
    np.testing.assert_array_equal(load_model(tmp_path / "out")(ids), make_model(description.config, params)(ids))


def test_new_rows_are_means_of_their_markers_pieces(chats, tmp_path):
    base = make_folder(tmp_path / "base", make_tokenizer("llama3", tmp_path / "tokenizer", template=None), spare_rows=0)
    data = prepare_with(base, chats, tmp_path / "data")
    old, (_, new) = open_model(base)[1], starting_model(str(base), {}, data)
    for table in ("tok_emb", "head"):
        pieces = data.tokenizer.encode_text("<|assistant|>")
        row = new[table]["embedding"][data.tokenizer.control_ids["<|assistant|>"]]
        np.testing.assert_allclose(row, old[table]["embedding"][pieces].mean(axis=0), rtol=1e-6)


def test_data_and_model_that_do_not_fit_are_refused_before_anything_else(qwen, chats, tmp_path):
    other = make_folder(tmp_path / "other", make_tokenizer("llama3", tmp_path / "tokenizer"))
    prepare_with(other, chats, tmp_path / "data")
    prepare.main(["--input", str(chats), "--output", str(tmp_path / "gpt2"), *GPT2])
    for data in (tmp_path / "data", tmp_path / "gpt2"):
        with pytest.raises(UserError, match=r"prepare the data with --tokenizer .*model$"):
            train(tmp_path / "work", qwen / "model", data)
    changed = shutil.copytree(qwen / "model", tmp_path / "changed")
    template = (changed / "chat_template.jinja").read_text()
    (changed / "chat_template.jinja").write_text(template.replace("assistant\\n", "assistant:\\n"))
    with pytest.raises(UserError, match=r"has its own chat template, the data another model's; .*--tokenizer"):
        train(tmp_path / "work", changed, qwen / "data")
    assert not (tmp_path / "work").exists()


def test_a_template_that_shows_the_day_fits_on_other_days(chats, tmp_path, monkeypatch):
    llama = make_folder(tmp_path / "llama", make_tokenizer("llama3", tmp_path / "tokenizer"))
    prepare_with(llama, chats, tmp_path / "data")
    content = json.loads((tmp_path / "data" / "data.json").read_text())
    today = content["chat_template"]["begin"]
    assert "Today Date: " in today
    old = json.loads(json.dumps(content).replace(today.split("Today Date: ")[1][:11], "01 Jan 2020"))
    tokenizer = ChatTokenizer.from_description(old, load_tokenizer(tmp_path / "data").files)
    (tmp_path / "data" / "data.json").write_text(json.dumps(old | {"tokenizer_hash": tokenizer.fingerprint()}))
    files.write_manifest(tmp_path / "data")
    description, _ = starting_model(str(llama), {}, PreparedData(tmp_path / "data"))
    assert "01 Jan 2020" in description.chat_template["begin"] and "01 Jan 2020" not in today


@pytest.mark.parametrize("flags", [("--bpe_ranks", "300"), ("--template", "control")])
def test_a_models_tokenizer_excludes_other_choices(qwen, chats, tmp_path, flags):
    with pytest.raises(UserError, match="leave out --template, --bpe_ranks"):
        prepare_with(qwen / "model", chats, tmp_path / "data", *flags)


def test_a_changed_tokenizer_is_refused(qwen, tmp_path):
    data = shutil.copytree(qwen / "data", tmp_path / "data")
    path = data / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match="another one, or damaged; prepare the data again"):
        PreparedData(data)
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        PreparedData(data)


def test_plain_text_in_a_models_vocabulary(qwen, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    data = prepare_with(
        qwen / "model", tmp_path / "a.txt", tmp_path / "data", "--format", "text", "--valid_fraction", "0"
    )
    assert data.tokenizer.template is None
    ids, supervised = data.split("train").conversation(0)
    assert data.tokenizer.decode(ids).endswith("<|im_end|>") and supervised[1:].all()


def test_ids_beyond_16_bits(chats, tmp_path):
    folder = write_folder("qwen3", tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    size = max(content["model"]["vocab"].values()) + 1
    content["model"]["vocab"] |= {f"ź{i}": size + i for i in range(70_000)}
    shift = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<think>": 3, "</think>": 4}
    for token in content["added_tokens"]:
        token["id"] = size + 70_000 + shift[token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").touch()  # only the tokenizer is read
    data = prepare_with(folder, chats, tmp_path / "data")
    assert isinstance(data.tokenizer.bpe, FileBpe) and data.tokenizer.vocab_size > 70_000
    assert data.description["dtype"] == "uint32"
    data.verify()
    ids, supervised = data.split("train").conversation(0)
    assert ids.dtype == np.uint32 and ids.max() >= 70_000
    assert data.tokenizer.decode(np.asarray(ids)[supervised]).endswith("<|im_end|>")
    batch = next(iter(batches(tmp_path / "data", split="train", batch_size=2, seq_len=128, seed=0)))
    assert batch["tokens"].dtype == np.int32 and batch["tokens"].max() >= 70_000
