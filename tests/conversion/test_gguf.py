"""GGUF files: what is written is read again, as the package `gguf` reads it, and what lies about itself is refused."""

import contextlib
import dataclasses
import json
import signal
import struct
from pathlib import Path
from random import Random

import jax
import numpy as np
import own_tokenizers
import pytest
from gguf_files import hostile, rewrite
from tiny_model import family, random_params

from tinysft_jax.checkpoints import load_tokenizer, open_model
from tinysft_jax.console import RunError, UserError
from tinysft_jax.conversion import gguf_file, gguf_tokenizer
from tinysft_jax.conversion.gguf import ROUND_OFF, read_gguf, write_gguf
from tinysft_jax.conversion.gguf_file import read_gguf_file
from tinysft_jax.parameters import ModelDescription, Params, pad_vocabulary, trim_vocabulary
from tinysft_jax.tokenizer import ChatTokenizer

gguf = pytest.importorskip("gguf")

NAMES = ("default", "llama", "qwen2", "qwen3")
RANKS = 300  # llama.cpp needs merges


def describe(name: str, tokenizer: ChatTokenizer | None = None, **changes) -> ModelDescription:
    tokenizer = tokenizer or ChatTokenizer("control", RANKS)
    config = family(name, vocab_size=tokenizer.vocab_size + 3, **changes)
    model = ModelDescription(config, **tokenizer.description(), source={}, trained_length=77)
    return dataclasses.replace(model, tokenizer_files=tokenizer.files)


def params_of(model: ModelDescription) -> Params:
    """Random parameters, with zeros in the rows that pad the vocabulary."""
    return pad_vocabulary(trim_vocabulary(random_params(model.config), model.config), model.config)


def written(path: Path, model: ModelDescription, dtype: str = "float32") -> Path:
    write_gguf(path, params_of(model), model, "A model", dtype)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file of each architecture."""
    directory = tmp_path_factory.mktemp("gguf")
    return {name: written(directory / f"{name}.gguf", describe(name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_the_model(files, name):
    model, (description, params) = describe(name), read_gguf(files[name])
    jax.tree.map(np.testing.assert_array_equal, params, params_of(model))
    assert dataclasses.replace(description, source={}) == model
    assert description.source == {"kind": "gguf", "file": f"{name}.gguf"}
    assert load_tokenizer(files[name]).fingerprint() == model.make_tokenizer().fingerprint()


@pytest.mark.parametrize("name", NAMES)
def test_the_package_reads_the_same(files, name):
    """Our parser and the package's: of what it wrote, all pairs and all tensors."""
    pairs, tensors = read_gguf_file(files[name])
    theirs = gguf.GGUFReader(files[name])
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = pairs.pop(key)
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    assert not pairs
    for tensor in theirs.tensors:
        ours = tensors.pop(tensor.name)
        assert ours.shape == tuple(tensor.shape.tolist()[::-1])
        np.testing.assert_array_equal(np.asarray(ours), gguf.dequantize(tensor.data, tensor.tensor_type))
    assert not tensors


@pytest.mark.parametrize("dtype", ROUND_OFF)
def test_each_encoding_rounds_as_it_says(tmp_path, dtype):
    """Norms are float32 in all; matrices of 30 columns have no whole blocks, and are float16 instead of q8_0."""
    model = describe("llama", dim=40 if dtype == "q8_0" else 32, head_dim=8, mlp_ratio=2.4)
    _, tensors = read_gguf_file(path := written(tmp_path / "a.gguf", model, dtype))
    encodings = {name: tensor.encoding.name for name, tensor in tensors.items()}
    assert encodings["blk.1.ffn_norm.weight"] == encodings["rope_freqs.weight"] == "F32"
    expected = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "F16"}[dtype]
    assert encodings["blk.0.attn_q.weight"] == expected
    if dtype == "q8_0":
        assert encodings["blk.0.ffn_down.weight"] == "Q8_0"
    _, params = read_gguf(path)
    ours = params_of(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, 0, ROUND_OFF[dtype] * np.abs(a).max()), ours, params)
    kernels = [each["blocks"]["mlp"]["w2"]["kernel"] for each in (ours, params)]
    assert np.array_equal(*kernels) == (dtype == "float32")


def test_block_encodings(tmp_path):
    """Q4_K and Q6_K by their definition, a value at a time; llama.cpp's own logits: test_llama_cpp.py."""
    rng = np.random.default_rng(0)
    for encoding, size in (("Q4_K", 144), ("Q6_K", 210)):
        block = rng.integers(0, 256, size, np.uint8)
        for at in {"Q4_K": (0, 2), "Q6_K": (208,)}[encoding]:
            block[at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        kind = gguf.GGMLQuantizationType[encoding]
        values = np.asarray(gguf_file.StoredTensor(block, kind, (1, 256)))[0]
        np.testing.assert_allclose(values, {"Q4_K": q4_k, "Q6_K": q6_k}[encoding](block), rtol=1e-5, atol=1e-6)


def q4_k(block: np.ndarray) -> list[float]:
    """Eight groups of 32 four-bit values, each with a six-bit scale and minimum."""
    scale, minimum = (float(block[i : i + 2].view(np.float16)[0]) for i in (0, 2))
    packed, values = block[4:16].astype(int), []
    for group in range(8):
        if group < 4:
            s, m = packed[group] & 63, packed[group + 4] & 63
        else:
            s = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
            m = packed[group + 4] >> 4 | (packed[group] >> 6) << 4
        four = block[16 + 32 * (group // 2) :][:32] >> 4 * (group % 2) & 15
        values += [scale * s * int(q) - minimum * m for q in four]
    return values


def q6_k(block: np.ndarray) -> list[float]:
    """Sixteen groups of 16 six-bit values around 32, each with an eight-bit scale."""
    low, high, scales = block[:128].astype(int), block[128:192].astype(int), block[192:208].view(np.int8)
    scale, values = float(block[208:210].view(np.float16)[0]), []
    for i in range(256):
        half, row, column = i // 128, i % 128 // 32, i % 32
        four = low[64 * half + 32 * (row % 2) + column] >> 4 * (row // 2) & 15
        two = high[32 * half + column] >> 2 * row & 3
        values.append(scale * int(scales[i // 16]) * ((four | two << 4) - 32))
    return values


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


def test_a_model_without_a_tokenizer(tmp_path):
    model = ModelDescription(family("llama"), None, None, {})
    description, _ = read_gguf(path := written(tmp_path / "a.gguf", model))
    assert description.tokenizer is None
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(path)


def test_the_head_is_tied_where_it_equals_the_embedding(files):
    """llama.cpp needs a head in stablelm, so it is written there."""
    assert "output.weight" in read_gguf_file(files["default"])[1] and read_gguf(files["default"])[0].config.tied_head
    assert not read_gguf(files["llama"])[0].config.tied_head
    assert "output.weight" not in read_gguf_file(files["qwen2"])[1]


@pytest.mark.parametrize("changes", [{"qkv_bias": True, "n_heads": 4, "n_kv_heads": 2}, {"tied_head": False}])
def test_options_of_stablelm(tmp_path, changes):
    model = describe("default", **changes)
    description, params = read_gguf(written(tmp_path / "a.gguf", model))
    assert description.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params, params_of(model))


def test_llama_3s_scaling_is_known_by_its_factors(tmp_path):
    """Files of others have no more than the factors."""
    usual = dataclasses.replace(family("llama").rope_scaling, factor=32.0, original_max_seq_len=8192)
    model = describe("llama", rope_scaling=usual, rope_theta=500_000.0, head_dim=64)
    path = written(tmp_path / "a.gguf", model)
    data = path.read_bytes()
    assert data.count(b"rope_scaling") == 1
    path.write_bytes(data.replace(b"rope_scaling", b"rope_scalinG"))
    assert read_gguf(path)[0].config == model.config


def test_what_llama_cpp_cannot_have_is_refused(tmp_path):
    scaled = family("llama").rope_scaling
    for name, changes, message in (("qwen2", {"rope_scaling": scaled}, "scales"), ("everything", {}, "no model")):
        with pytest.raises(UserError, match=message):
            write_gguf(tmp_path / "a.gguf", {}, describe(name, **changes), "A model")
    assert not list(tmp_path.iterdir())


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


def test_unused_ids_and_generation_marks(files):
    pairs, _ = read_gguf_file(files["default"])
    assert pairs["tokenizer.ggml.tokens"][-4:] == [
        "<|assistant|>",
        *(f"<|unused{id}|>" for id in range(RANKS + 4, RANKS + 7)),
    ]
    assert pairs["tokenizer.ggml.token_type"][-5:].tolist() == [3, 3, 5, 5, 5]
    assert "generation %}" not in pairs["tokenizer.chat_template"]


def edit(path: Path, out: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) >= 1
    out.write_bytes(data.replace(old, new, 1))
    return out


def number(key: str, value: int) -> bytes:
    return key.encode() + struct.pack("<II", 4, value)


def encoded_as(code: int) -> bytes:
    return b"ffn_up.weight" + struct.pack("<IQQI", 2, 32, 128, code)


LIES = {
    "magic": ("llama", b"GGUF", b"GGUX", "not a GGUF file"),
    "big-endian": ("llama", b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", "big-endian"),
    "architecture": ("llama", b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", "architecture is 'gemma'"),
    "layers": ("llama", number("block_count", 2), number("block_count", 2**31 - 1), "too few for"),
    "no layers": ("llama", b"block_count", b"block_counT", "it has no llama.block_count"),
    "partial rotation": ("llama", number("dimension_count", 8), number("dimension_count", 4), "dimension_count is 4"),
    "no whole blocks": ("llama", encoded_as(0), encoded_as(12), "can't be Q4_K in the shape"),
    "no known encoding": ("llama", encoded_as(0), encoded_as(99), "quantised as type 99, which"),
    "no readable encoding": ("llama", encoded_as(0), encoded_as(24), "quantised as I8, which"),
    "a pre-tokenizer": ("llama", b"gpt-2", b"gpt-9", "splits text as 'gpt-9'"),
    "eos": ("llama", number("eos_token_id", RANKS), number("eos_token_id", 2**31), "eos_token_id is 2147483648"),
    "rope factors": ("llama", b"rope_scaling", b"rope_scalinG", "not Llama 3's"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_named(files, tmp_path, lie):
    name, old, new, message = LIES[lie]
    path = edit(files[name], tmp_path / "a.gguf", old, new)
    with pytest.raises(UserError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_file_need_not_say(files, tmp_path):
    """Without a number of key heads there are as many as of queries; a key can't be there twice."""
    path = edit(files["default"], tmp_path / "a.gguf", b"head_count_kv", b"head_count_xx")
    assert read_gguf(path)[0].config == read_gguf(files["default"])[0].config
    path = edit(files["llama"], tmp_path / "b.gguf", b"llama.attention.key_length", b"llama.rope.dimension_count")
    with pytest.raises(UserError, match=r"the key 'llama.rope.dimension_count' twice"):
        read_gguf(path)


def test_a_file_that_is_cut_short(files, tmp_path):
    data = files["default"].read_bytes()
    for size in (0, 3, 10, 24, 100, 5000, len(data) // 2, len(data) - 40):
        (tmp_path / "a.gguf").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut short|can't read it|not a GGUF"):
            read_gguf(tmp_path / "a.gguf")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [[1, 2], ["a", "b"], "x", 1e300, True])
def test_values_of_other_types(files, tmp_path, value):
    """Every key, with a value of a type that it doesn't have: a model, or one line."""
    pairs, _ = read_gguf_file(files["llama"])
    for key in [*pairs, "split.count", "llama.expert_count", "tokenizer.ggml.eot_token_id"]:
        if key != "general.architecture":
            with contextlib.suppress(UserError):
                read_gguf(rewrite(files["llama"], tmp_path / "a.gguf", {key: value}))


def test_tensors_that_share_bytes(tmp_path):
    """A small file could stand for any number of parameters."""
    data = written(tmp_path / "a.gguf", describe("llama", n_layers=6, mlp_ratio=80.0)).read_bytes()
    start = data.index(b"token_embd.weight") - 8
    infos, at = bytearray(data), start
    for _ in range(struct.unpack("<Q", data[8:16])[0]):
        (n_bytes,) = struct.unpack_from("<Q", data, at)
        (n_axes,) = struct.unpack_from("<I", data, at + 8 + n_bytes)
        at += 8 + n_bytes + 4 + 8 * n_axes + 4 + 8
        infos[at - 8 : at] = bytes(8)
    (tmp_path / "a.gguf").write_bytes(infos[: at + 400_000])
    with pytest.raises(UserError, match="they share memory"):
        read_gguf(tmp_path / "a.gguf")


def test_a_long_token_takes_no_time(own_gguf, tmp_path):
    _, path = own_gguf("tinyllama")
    tokens = read_gguf_file(path)[0]["tokenizer.ggml.tokens"]
    with pytest.raises(UserError, match="a token of 1,000,000 characters"):
        load_tokenizer(
            rewrite(path, tmp_path / "a.gguf", {"tokenizer.ggml.tokens": [*tokens[:-4], "a" * 10**6, *tokens[-3:]]})
        )


def test_positions_scaled_otherwise(files, tmp_path):
    """llama.cpp takes a factor alone as linear scaling, and Llama 3's factors in llama models only."""
    with pytest.raises(UserError, match=r"rope.scaling.factor is 4.0"):
        read_gguf(rewrite(files["qwen2"], tmp_path / "a.gguf", {"qwen2.rope.scaling.factor": 4.0}))
    with pytest.raises(UserError, match=r"unexpected: rope_freqs"):
        read_gguf(rewrite(files["qwen2"], tmp_path / "a.gguf", {}, {"rope_freqs.weight": np.ones(8, np.float32)}))


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


def test_a_title_that_is_no_unicode(tmp_path):
    model = describe("default")
    write_gguf(tmp_path / "a.gguf", params_of(model), model, "a\udcff")
    assert read_gguf_file(tmp_path / "a.gguf")[0]["general.name"] == "a?"


def test_a_value_that_float16_cannot_hold(tmp_path):
    model = describe("default")
    params = jax.tree.map(lambda leaf: leaf * 1e6, params_of(model))
    with pytest.raises(UserError, match=r"values above 65,504"):
        write_gguf(tmp_path / "a.gguf", params, model, "A model", "float16")


def test_a_full_disk(files, tmp_path):
    """Wherever it is full, even in the last, small tensor, there is one error."""
    resource, model = pytest.importorskip("resource"), describe("default")
    params, size = params_of(model), files["default"].stat().st_size
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for room in (0, 1000, size // 2, size - 300, size - 4):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            with pytest.raises(RunError, match="can't write"):
                write_gguf(tmp_path / "a.gguf", params, model, "A model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_hostile_files(files, tmp_path, name):
    """Fifty of each architecture are refused in one line, or are a model."""
    refused = 0
    for seed in range(50):
        (tmp_path / "a.gguf").write_bytes(hostile(Random(f"{name} {seed}"), files[name].read_bytes()))
        try:
            read_gguf(tmp_path / "a.gguf")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert refused > 20


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


def test_a_file_without_a_suffix(files, tmp_path):
    """As Ollama keeps them."""
    path = tmp_path / "sha256-0123"
    path.write_bytes(files["qwen2"].read_bytes())
    assert open_model(path)[0].config == read_gguf(files["qwen2"])[0].config
