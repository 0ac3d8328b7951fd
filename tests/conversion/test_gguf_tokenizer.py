"""Tokenizers in GGUF files: those of other models too, and what llama.cpp would have otherwise."""

import json
from pathlib import Path

import own_tokenizers
import pytest
from gguf_files import RANKS, describe, rewrite, written

from tinysft_jax.checkpoints import load_tokenizer, open_model
from tinysft_jax.console import UserError
from tinysft_jax.conversion import gguf_tokenizer
from tinysft_jax.conversion.gguf import read_gguf, write_gguf
from tinysft_jax.conversion.gguf_file import read_gguf_file
from tinysft_jax.tokenizer import ChatTokenizer

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", ["smollm2", "llama3", "qwen3", "tinyllama"])
def test_tokenizers_of_other_models(tmp_path, own_gguf, kind):
    """The ids of texts and conversations, and what else a tokenizer has."""
    ours, path = own_gguf(kind)
    theirs = load_tokenizer(path)
    parts = ("template", "vocab_size", "eot_id", "stop_ids", "control_ids")
    assert [getattr(theirs, part) for part in parts] == [getattr(ours, part) for part in parts]
    assert theirs.bpe.special_ids == ours.bpe.special_ids and theirs.bpe.bos == ours.bpe.bos
    for text in own_tokenizers.mixed_texts(300):
        assert theirs.encode_text(text) == ours.encode_text(text)
        messages = [{"role": "user", "content": f"Hi{text}"}, {"role": "assistant", "content": "b"}]
        assert theirs.encode_chat(messages)[0].tolist() == ours.encode_chat(messages)[0].tolist()
    assert open_model(path)[0].make_tokenizer().fingerprint() == theirs.fingerprint()


@pytest.fixture(scope="module")
def own_gguf(tmp_path_factory):
    """Makes a file with the tokenizer of another model."""

    def make(kind: str) -> tuple[ChatTokenizer, Path]:
        directory = tmp_path_factory.mktemp(kind)
        tokenizer = own_tokenizers.make_tokenizer(kind, directory / "folder")
        return tokenizer, written(directory / "a.gguf", describe("llama", tokenizer))

    return make


def test_added_tokens_that_are_text(tmp_path):
    """Without Qwen's template its `<think>` is no special token."""
    ours = own_tokenizers.make_tokenizer("qwen3", tmp_path / "folder", None)
    theirs = load_tokenizer(written(tmp_path / "a.gguf", describe("qwen2", ours)))
    assert theirs.bpe.special_ids == ours.bpe.special_ids and "<think>" not in theirs.bpe.special_ids


@pytest.mark.parametrize("template", ["text", None])
def test_templates_without_tokens(tmp_path, template):
    model = describe("default", ChatTokenizer(template, RANKS))
    assert read_gguf(written(tmp_path / "a.gguf", model))[0].chat_template == template


def test_a_control_template_on_another_models_tokenizer(tmp_path):
    tokenizer = own_tokenizers.make_tokenizer("llama3", tmp_path / "folder", None).with_template("control")
    again = load_tokenizer(written(tmp_path / "a.gguf", describe("llama", tokenizer)))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a cat"}]
    assert again.encode_chat(messages)[0].tolist() == tokenizer.encode_chat(messages)[0].tolist()


def test_a_tokenizer_without_merges_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs a tokenizer with merges"):
        write_gguf(tmp_path / "a.gguf", {}, describe("default", ChatTokenizer("control", 256)), "A model")


def test_a_tokenizer_that_llama_cpp_would_run_otherwise_is_refused(tmp_path):
    folder = own_tokenizers.write_folder("llama3", tmp_path / "folder")
    content = json.loads((folder / "tokenizer.json").read_text())
    split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    for regex, message in (
        (split["Regex"].replace("{1,3}", "{1,2}"), "no name for how"),
        (split["Regex"], "other ids"),
    ):
        split["Regex"] = regex
        if message == "other ids":
            content["normalizer"] = {"type": "Replace", "pattern": {"String": "…"}, "content": "..."}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        tokenizer = own_tokenizers.read_tokenizer(folder, {})
        with pytest.raises(UserError, match=message):
            gguf_tokenizer.to_pairs(tokenizer, tokenizer.vocab_size)


def test_unused_ids_and_generation_marks(tmp_path):
    pairs, _ = read_gguf_file(written(tmp_path / "a.gguf", describe("default")))
    assert pairs["tokenizer.ggml.tokens"][-4:] == [
        "<|assistant|>",
        *(f"<|unused{id}|>" for id in range(RANKS + 4, RANKS + 7)),
    ]
    assert pairs["tokenizer.ggml.token_type"][-5:].tolist() == [3, 3, 5, 5, 5]
    assert "generation %}" not in pairs["tokenizer.chat_template"]


def test_a_long_token_takes_no_time(own_gguf, tmp_path):
    _, path = own_gguf("tinyllama")
    tokens = read_gguf_file(path)[0]["tokenizer.ggml.tokens"]
    with pytest.raises(UserError, match="a token of 1,000,000 characters"):
        load_tokenizer(
            rewrite(path, tmp_path / "a.gguf", {"tokenizer.ggml.tokens": [*tokens[:-4], "a" * 10**6, *tokens[-3:]]})
        )


@pytest.mark.parametrize("kind", ["qwen3", "tinyllama"])
def test_special_ids_as_other_programs_write_them(own_gguf, tmp_path, kind):
    """What ends a text may be called an ordinary or a user's token; padding may be any token, or -1."""
    ours, path = own_gguf(kind)
    pairs, _ = read_gguf_file(path)
    for type_ in (1, 4):
        types = pairs["tokenizer.ggml.token_type"].copy()
        types[ours.eot_id] = type_
        for pad in (pairs["tokenizer.ggml.tokens"].index("a"), 2**32 - 1):
            changes = {"tokenizer.ggml.token_type": types, "tokenizer.ggml.padding_token_id": pad}
            theirs = load_tokenizer(rewrite(path, tmp_path / "a.gguf", changes))
            assert theirs.encode_text("a </s> cat") == ours.encode_text("a </s> cat")
            assert theirs.bpe.special_ids == ours.bpe.special_ids and theirs.stop_ids == ours.stop_ids


def test_more_ends_and_names_without_a_token(tmp_path):
    """A folder's settings may name a token that its vocabulary lacks, and several that end an answer."""
    folder = own_tokenizers.write_folder("qwen3", tmp_path / "folder")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "[PAD]"}))
    end = own_tokenizers.read_tokenizer(folder, {}).bpe.special_ids["<|endoftext|>"]
    ours = own_tokenizers.read_tokenizer(folder, {"eos_token_id": [end]})
    theirs = load_tokenizer(written(tmp_path / "a.gguf", describe("qwen2", ours)))
    assert theirs.stop_ids == ours.stop_ids and len(ours.stop_ids) == 2


def pairs_of(kind: str, folder: Path) -> dict:
    tokenizer = own_tokenizers.make_tokenizer(kind, folder)
    return gguf_tokenizer.to_pairs(tokenizer, tokenizer.vocab_size)


def content_of(pairs: dict) -> dict:
    return json.loads(gguf_tokenizer.to_files(pairs)[0]["tokenizer.json"])


def test_what_llama_cpp_assumes(tmp_path):
    """Without a word of it, Llama 3's and SentencePiece's tokenizers begin a text with BOS, and the latter a space."""
    llama3, sentencepiece, qwen = (pairs_of(kind, tmp_path / kind) for kind in ("llama3", "tinyllama", "qwen3"))
    for pairs, begins in ((llama3, True), (sentencepiece, True), (qwen, False)):
        pairs.pop("tokenizer.ggml.add_bos_token")
        pairs.setdefault("tokenizer.ggml.bos_token_id", 0)
        assert ("post_processor" in content_of(pairs)) == begins
    assert content_of(llama3)["model"]["ignore_merges"] and not content_of(qwen)["model"]["ignore_merges"]
    kinds = [step["type"] for step in content_of(sentencepiece)["normalizer"]["normalizers"]]
    assert kinds == ["Prepend", "Replace"]
    spaceless = content_of(sentencepiece | {"tokenizer.ggml.add_space_prefix": False})["normalizer"]["normalizers"]
    assert [step["type"] for step in spaceless] == ["Replace"]


def test_types_of_tokens(tmp_path):
    """Bytes are of a kind of their own in SentencePiece, and the unknown token."""
    pairs = pairs_of("tinyllama", tmp_path / "folder")
    types = dict(zip(pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"].tolist(), strict=True))
    assert (types["<unk>"], types["<s>"], types["<0x0A>"], types["a"]) == (2, 3, 6, 1)


def test_the_end_of_a_text_is_the_tokenizers_own(tmp_path):
    """Also where the files name none, and config.json does."""
    folder = own_tokenizers.write_folder("qwen3", tmp_path / "folder", None)
    (folder / "tokenizer_config.json").write_text("{}")
    content = json.loads((folder / "tokenizer.json").read_text())
    end = next(token["id"] for token in content["added_tokens"] if token["content"] == "<|im_end|>")
    tokenizer = own_tokenizers.read_tokenizer(folder, {"eos_token_id": end})
    assert gguf_tokenizer.to_pairs(tokenizer, tokenizer.vocab_size)["tokenizer.ggml.eos_token_id"] == end


def test_white_space_around_generation_marks_stays(tmp_path):
    folder = own_tokenizers.write_folder("qwen3", tmp_path / "folder", None)
    (folder / "chat_template.jinja").write_text("a {%- generation -%} b {% endgeneration %} c")
    tokenizer = own_tokenizers.read_tokenizer(folder, {})
    template = gguf_tokenizer.to_pairs(tokenizer, tokenizer.vocab_size)["tokenizer.chat_template"]
    assert template == "a {#- -#} b {# #} c"


@pytest.mark.parametrize("part", ["beginning of a text", "text after a special token", "merges"])
def test_parts_that_llama_cpp_has_otherwise(tmp_path, part):
    folder = own_tokenizers.write_folder("tinyllama", tmp_path / "folder", None)
    content = json.loads((folder / "tokenizer.json").read_text())
    if part == "beginning of a text":  # two tokens
        begin = content_of(pairs_of("tinyllama", tmp_path / "other") | {"tokenizer.ggml.add_bos_token": True})
        content["post_processor"] = begin["post_processor"]
        content["post_processor"]["single"].insert(0, content["post_processor"]["single"][0])
    elif part == "merges":
        content["model"]["merges"].pop()
    else:
        content["normalizer"] = None
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        content["pre_tokenizer"] = metaspace
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = own_tokenizers.read_tokenizer(folder, {})
    with pytest.raises(UserError, match=part):
        gguf_tokenizer.to_pairs(tokenizer, tokenizer.vocab_size)


def test_a_token_twice_is_refused(tmp_path):
    pairs = pairs_of("qwen3", tmp_path / "folder")
    pairs["tokenizer.ggml.tokens"][5] = pairs["tokenizer.ggml.tokens"][6]
    with pytest.raises(UserError, match="no list of different texts"):
        gguf_tokenizer.to_files(pairs)
