"""GGUF files: what is written is read again, as the package `gguf` reads it, and what lies about itself is refused."""

import contextlib
import dataclasses
import signal
import struct
from pathlib import Path
from random import Random

import jax
import numpy as np
import pytest
from gguf_files import RANKS, describe, hostile, params_of, rewrite, written
from tiny_model import family

from tinysft_jax.checkpoints import load_tokenizer, open_model
from tinysft_jax.console import RunError, UserError
from tinysft_jax.conversion import gguf_file
from tinysft_jax.conversion.gguf import ROUND_OFF, read_gguf, write_gguf
from tinysft_jax.conversion.gguf_file import read_gguf_file
from tinysft_jax.parameters import ModelDescription

gguf = pytest.importorskip("gguf")

NAMES = ("default", "llama", "qwen2", "qwen3")


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


def test_positions_scaled_otherwise(files, tmp_path):
    """llama.cpp takes a factor alone as linear scaling, and Llama 3's factors in llama models only."""
    with pytest.raises(UserError, match=r"rope.scaling.factor is 4.0"):
        read_gguf(rewrite(files["qwen2"], tmp_path / "a.gguf", {"qwen2.rope.scaling.factor": 4.0}))
    with pytest.raises(UserError, match=r"unexpected: rope_freqs"):
        read_gguf(rewrite(files["qwen2"], tmp_path / "a.gguf", {}, {"rope_freqs.weight": np.ones(8, np.float32)}))


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


def test_a_file_without_a_suffix(files, tmp_path):
    """As Ollama keeps them."""
    path = tmp_path / "sha256-0123"
    path.write_bytes(files["qwen2"].read_bytes())
    assert open_model(path)[0].config == read_gguf(files["qwen2"])[0].config
