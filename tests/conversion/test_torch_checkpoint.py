"""Checkpoints as users have them, and as they should not be."""

import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_twin import TorchTwin, save, without_buffers

from tinysft_jax.console import UserError
from tinysft_jax.conversion.names import TORCH, mlp_ratio
from tinysft_jax.conversion.torch import open_torch_file, read_torch_checkpoint, rope_theta
from tinysft_jax.parameters import make_model, model_parameter_shapes, trim_vocabulary

torch = pytest.importorskip("torch")


def assert_same_params(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def without(key: str) -> Callable[[dict], Any]:
    def remove(mapping: dict) -> None:
        del mapping[key]

    return remove


@pytest.fixture(scope="module")
def twin() -> TorchTwin:
    return TorchTwin()


@pytest.fixture(scope="module")
def plain(twin, tmp_path_factory):
    """What an ordinary checkpoint of the twin is read as."""
    return read_torch_checkpoint(save(twin.checkpoint(), tmp_path_factory.mktemp("twin") / "plain.pt"))


@pytest.mark.parametrize("name", ["pretrained_small", "pretrained_compiled", "sft_small"])
def test_fixture_is_read(fixtures, name):
    """Shape and parameters are the file's, each tensor where `TORCH` says and nothing besides."""
    path = fixtures / f"{name}.pt"
    description, params = read_torch_checkpoint(path)
    content = torch.load(path, weights_only=True)
    config = description.config
    assert {key: getattr(config, key) for key in content["config"]} == content["config"]
    assert (config.mlp_ratio, config.rope_theta) == (4.0, 10000.0)
    assert description.chat_template == ("text" if name == "sft_small" else None)
    assert description.tokenizer is None
    model_type = {"model_type": "sft"} if name == "sft_small" else {}
    assert description.source == {"kind": "pytorch", "file": path.name, "step": 1234, "loss": 1.5} | model_type

    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model_parameter_shapes(config))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == shapes
    assert not params["tok_emb"]["embedding"][config.vocab_size :].any()
    trimmed = trim_vocabulary(params, config)
    tensors = without_buffers(open_torch_file(path)[0])
    views = TORCH.views(trimmed, config.n_layers)
    assert set(views) | {"head.weight"} == set(tensors)
    for key, view in views.items():
        if key.endswith((".wq.weight", ".wk.weight")):  # heads of interleaved pairs there, of two halves here
            view = view.reshape(config.n_heads, 2, -1, config.dim).swapaxes(1, 2).reshape(view.shape)
        np.testing.assert_array_equal(view, tensors[key].numpy())
    assert sum(tensors[key].numel() for key in views) == sum(leaf.size for leaf in jax.tree.leaves(trimmed))


@pytest.mark.parametrize("hidden, theta, n_heads", [(41, 10000.0, 2), (64, 500.0, 4), (176, 123456.7, 1)])
def test_unusual_shape_computes_the_same(tmp_path, hidden, theta, n_heads):
    """Hidden size and theta stand in no config; the logits show that they were found."""
    twin = TorchTwin(hidden=hidden, theta=theta, n_heads=n_heads, max_seq_len=40)
    description, params = read_torch_checkpoint(save(twin.checkpoint(), tmp_path / "a.pt"))
    config = description.config
    assert (config.hidden_dim, config.rope_theta, config.n_heads) == (hidden, theta, n_heads)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, 40), dtype=np.int32)
    with torch.no_grad():
        expected = twin(torch.from_numpy(tokens)).numpy()
    model = make_model(config, params, dtype=jnp.float32)
    np.testing.assert_allclose(model(jnp.asarray(tokens)), expected, atol=2e-5)


@pytest.mark.parametrize(
    "before, inside",
    [
        ("_orig_mod.", ""),
        ("module._orig_mod.module.", ""),
        ("", "_orig_mod."),  # blocks that were compiled one by one
        ("module.", "_checkpoint_wrapped_module."),
        ("_fsdp_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod."),
        ("_fpw_module.module.", "_fpw_module."),
    ],
)
def test_names_of_wrappers_change_nothing(tmp_path, twin, plain, before, inside):
    """Of the whole model, of blocks, and of parts of blocks."""
    content = twin.checkpoint()
    content["model_state_dict"] = {
        before + re.sub(r"(blocks\.\d\.|attn\.|w1\.)", rf"\g<1>{inside}", key): tensor
        for key, tensor in content["model_state_dict"].items()
    }
    description, params = read_torch_checkpoint(save(content, tmp_path / "plain.pt"))
    assert description == plain[0]
    assert_same_params(params, plain[1])


@pytest.mark.parametrize(
    "change",
    [without("config"), lambda content: content.update(config=None), lambda content: content["config"].clear()]
    + [lambda content, key=key: content["config"].pop(key) for key in TorchTwin().config],
)
def test_the_tensors_replace_a_missing_config(tmp_path, twin, plain, change):
    content = twin.checkpoint()
    change(content)
    description, params = read_torch_checkpoint(save(content, tmp_path / "plain.pt"))
    assert description == plain[0]
    assert_same_params(params, plain[1])


def test_the_config_replaces_missing_buffers(tmp_path, twin, plain):
    """Only theta is told by nothing then: it is the default, and the source says so."""
    content = twin.checkpoint()
    content["model_state_dict"] = without_buffers(content["model_state_dict"])
    description, params = read_torch_checkpoint(save(content, tmp_path / "plain.pt"))
    assert description.config == plain[0].config
    assert description.source == plain[0].source | {"assumed": {"rope_theta": 10000.0}}
    assert_same_params(params, plain[1])


def test_bare_state_dict_with_given_heads(tmp_path, twin, plain):
    """The least that can be read; a head that is stored once only is no loss."""
    state = without_buffers(twin.state_dict())
    del state["head.weight"]
    description, params = read_torch_checkpoint(save(state, tmp_path / "bare.pt"), n_heads=2)
    assert (description.config.n_heads, description.config.max_seq_len) == (2, 1024)
    assert description.source["assumed"] == {"max_seq_len": 1024, "rope_theta": 10000.0}
    assert_same_params(params, plain[1])


def test_config_entries_of_other_projects(tmp_path):
    """A config that does tell theta and ratio is believed (where its tensors agree); foreign entries are ignored."""
    twin = TorchTwin(hidden=42, theta=12345.678)
    content = twin.checkpoint()
    content["config"] |= {"mlp_ratio": 2.66, "rope_theta": 12345.678, "dropout": 0.0}
    config = read_torch_checkpoint(save(content, tmp_path / "a.pt"))[0].config
    assert (config.mlp_ratio, config.hidden_dim, config.rope_theta) == (2.66, 42, 12345.678)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_become_float32(tmp_path, twin, plain, dtype):
    content = twin.checkpoint()
    content["model_state_dict"] = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in content["model_state_dict"].items()
    }
    description, params = read_torch_checkpoint(save(content, tmp_path / "plain.pt"))
    assert description == plain[0]
    assert_same_params(params, jax.tree.map(lambda x: torch.from_numpy(x).to(dtype).float().numpy(), plain[1]))


@pytest.mark.filterwarnings("ignore:Casting complex")
def test_rotary_table_that_lost_its_sines(tmp_path, plain):
    """`module.to(torch.bfloat16)` casts the table too: it still tells the head count, but no theta."""
    content = TorchTwin().to(torch.bfloat16).checkpoint()
    assert not content["model_state_dict"]["blocks.0.attn.freqs_cis"].is_complex()
    description, _ = read_torch_checkpoint(save(content, tmp_path / "a.pt"))
    assert description.config == plain[0].config
    assert description.source["assumed"] == {"rope_theta": 10000.0}


def test_file_of_an_old_torch(tmp_path, twin, plain):
    path = save(twin.checkpoint(), tmp_path / "plain.pt", _use_new_zipfile_serialization=False)
    description, params = read_torch_checkpoint(path)
    assert description == plain[0]
    assert_same_params(params, plain[1])


def test_gpt2_vocabulary_is_recognised(tmp_path):
    twin = TorchTwin(vocab_size=50257, dim=2, n_layers=1, n_heads=1)
    description, _ = read_torch_checkpoint(save(twin.checkpoint(), tmp_path / "a.pt"))
    assert description.tokenizer == {"kind": "gpt2", "bpe_ranks": 50256}


def test_source_holds_only_json(tmp_path, twin):
    content = twin.checkpoint() | {"loss": float("nan"), "step": torch.tensor(3)}
    description, _ = read_torch_checkpoint(save(content, tmp_path / "a.pt"))
    assert description.source == {"kind": "pytorch", "file": "a.pt"}


@given(dim=st.integers(1, 5000), hidden=st.integers(1, 20000))
def test_mlp_ratio_gives_back_the_hidden_size(dim, hidden):
    assert int(dim * mlp_ratio(dim, hidden)) == hidden


@given(theta=st.floats(1.5, 1e7).map(lambda x: float(f"{x:.5g}")), half=st.integers(2, 64))
def test_theta_is_read_exactly_from_a_float32_table(theta, half):
    angles = torch.outer(torch.arange(8).float(), 1.0 / theta ** (torch.arange(half).float() / half))
    assert rope_theta(torch.polar(torch.ones_like(angles), angles)) == theta


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[3, 8], tensor[11, 0] = torch.nan, torch.inf
    return tensor


# Each: what is done to a checkpoint, and what the error must name.
STATE_FAULTS = {
    "missing": (without("blocks.1.ln_2.bias"), ["missing: blocks.1.ln_2.bias"]),
    "two missing": (lambda s: (s.pop("ln_f.bias"), s.pop("tok_emb.weight")), ["missing: tok_emb.weight, ln_f.bias"]),
    "a whole layer missing": (
        lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.0.")],
        ["blocks.0.ln_1.weight", "blocks.0.attn.wo.weight", "blocks.0.mlp.w3.weight"],
    ),
    "unexpected": (
        lambda s: s.update({"pos_emb.weight": torch.ones(2), "blocks.0.attn.wq.bias": torch.ones(16)}),
        ["unexpected: pos_emb.weight, blocks.0.attn.wq.bias"],
    ),
    "wrong shape": (
        lambda s: s.update({"blocks.1.attn.wk.weight": torch.ones(16, 8)}),
        ["blocks.1.attn.wk.weight has shape [16, 8], not [16, 16]"],
    ),
    "table no matrix": (lambda s: s.update({"tok_emb.weight": torch.ones(70)}), ["tok_emb.weight has shape [70]"]),
    "nan": (
        lambda s: s.update({"blocks.1.mlp.w2.weight": poisoned(s["blocks.1.mlp.w2.weight"])}),
        ["blocks.1.mlp.w2.weight has 2 values that are not finite, the first at [3, 8]"],
    ),
    "head differs": (
        lambda s: s.update({"head.weight": s["head.weight"] + 1e-3}),
        ["head.weight differs from tok_emb.weight"],
    ),
    "integer": (lambda s: s.update({"ln_f.bias": torch.ones(16, dtype=torch.int64)}), ["ln_f.bias is torch.int64"]),
    "no tensor": (lambda s: s.update({"ln_f.bias": 3}), ["ln_f.bias is not a dense tensor"]),
    "with a wrapper's name and without": (
        lambda s: s.update({"blocks.1._orig_mod.ln_1.bias": s["blocks.1.ln_1.bias"]}),
        ["blocks.1.ln_1.bias occurs twice, under different names of wrappers"],
    ),
    "layers with other tables": (
        lambda s: s.update({"blocks.1.attn.freqs_cis": s["blocks.1.attn.freqs_cis"][:-1]}),
        ["freqs_cis"],
    ),
    "contexts differ": (
        lambda s: s.update({f"blocks.{i}.attn.mask": torch.ones(8, 8) for i in range(2)}),
        ["max_seq_len is 12 by its config, but 12 by freqs_cis, but 8 by mask"],
    ),
    "scaled positions": (
        lambda s: s.update({f"blocks.{i}.attn.freqs_cis": s["blocks.0.attn.freqs_cis"] ** 0.5 for i in range(2)}),
        ["freqs_cis is not exp(i position theta^(-2k / head_dim))"],
    ),
    "table of another model": (
        lambda s: s.update({f"blocks.{i}.attn.freqs_cis": torch.ones(12, 3).cfloat() for i in range(2)}),
        ["freqs_cis has shape [12, 3]", "dim 16"],
    ),
}


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_unsound_state_is_refused(tmp_path, twin, fault):
    change, expected = STATE_FAULTS[fault]
    content = twin.checkpoint()
    change(content["model_state_dict"])
    assert_refused(save(content, tmp_path / "a.pt"), expected)


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"vocab_size": 71}, ["vocab_size is 70 by its tensors, but 71 by its config"]),
        ({"dim": 32}, ["dim is 16 by its tensors, but 32 by its config"]),
        ({"n_layers": 3}, ["n_layers is 2 by its tensors, but 3 by its config"]),
        ({"n_heads": 4}, ["n_heads is 4 by its config, but 2 by freqs_cis"]),
        ({"max_seq_len": 24}, ["max_seq_len is 24 by its config, but 12 by freqs_cis, but 12 by mask"]),
        ({"rope_theta": 10100.0}, ["rope_theta is 10100.0 by its config, but 10000.0 by freqs_cis"]),
        ({"mlp_ratio": 3.0}, ["mlp_ratio is 3.0", "64"]),
        ({"dim": "16"}, ["dim is '16' in its config"]),
        ({"dim": True}, ["dim is True in its config"]),
        ({"mlp_ratio": float("nan")}, ["mlp_ratio is nan in its config"]),
    ],
)
def test_config_that_contradicts_the_tensors_is_refused(tmp_path, twin, entry, expected):
    content = twin.checkpoint()
    content["config"] |= entry
    assert_refused(save(content, tmp_path / "a.pt"), expected)


def test_config_that_is_none_is_refused(tmp_path, twin):
    assert_refused(save(twin.checkpoint() | {"config": torch.ones(2)}, tmp_path / "a.pt"), ["its config is a Tensor"])


def test_given_heads_that_contradict_the_file_are_refused(tmp_path, twin):
    path = save(twin.checkpoint(), tmp_path / "a.pt")
    assert_refused(path, ["n_heads is 2 by its config, but 4 by --n_heads"], n_heads=4)


def test_unknown_head_count_is_refused(tmp_path, twin):
    path = save(without_buffers(twin.state_dict()), tmp_path / "a.pt")
    assert_refused(path, ["heads can't be determined", "--n_heads"])
    assert_refused(path, ["16", "3"], n_heads=3)
    assert_refused(path, ["n_heads", "0"], n_heads=0)


@pytest.mark.parametrize(
    "content",
    [{"a": torch.ones(2)}, {"model_state_dict": {}}, {"model_state_dict": None}, [1, 2], torch.ones(3), {}],
)
def test_other_torch_files_are_refused(tmp_path, content):
    assert_refused(save(content, tmp_path / "a.pt"), ["no checkpoint of this model"])


@pytest.mark.parametrize("data", [b"", b"hello, this is text", b"PK", b"\x80\x02", b"\0" * 100, b"\x80\x04\x95"])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    assert_refused(path, ["not a PyTorch checkpoint"])


def test_truncated_file_is_refused(tmp_path, fixtures):
    data = (fixtures / "sft_small.pt").read_bytes()
    for size in (10, len(data) // 2, len(data) - 1):
        path = tmp_path / "a.pt"
        path.write_bytes(data[:size])
        assert_refused(path, ["cut short"])


def test_missing_file_and_directory_are_refused(tmp_path):
    assert_refused(tmp_path / "none.pt", ["No such file"])
    assert_refused(tmp_path, ["directory"])


class RunsCode:
    """Unpickling it would make a directory."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, twin, zipped):
    trace = tmp_path / "code was run"
    content = twin.checkpoint() | {"loss": RunsCode(trace)}
    path = save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    assert_refused(path, ["carries code", "mkdir"])
    assert not trace.exists()
    # Proof that the file is what it pretends to be: read carelessly, it does run.
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_damage_anywhere_is_no_crash(tmp_path):
    """Changed, lost and cut bytes: what torch raises for them is always told in one line."""
    content = {"model_state_dict": {"tok_emb.weight": torch.ones(3, 2)}, "config": {"dim": 2}, "step": 1}
    files = [save(content, tmp_path / f"{z}.pt", _use_new_zipfile_serialization=z).read_bytes() for z in (True, False)]
    rng, path, refused = random.Random(0), tmp_path / "damaged.pt", 0
    for i in range(600):
        data = bytearray(files[i % 2])
        at = rng.randrange(len(data))
        if i % 3:
            data[at] = rng.randrange(256)
        else:
            del data[at : rng.choice([at + 1, at + 20, len(data)])]
        path.write_bytes(data)
        try:
            open_torch_file(path)
        except UserError:
            refused += 1
    assert refused > 300


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[torch\]'"):
        read_torch_checkpoint(tmp_path / "a.pt")


def assert_refused(path: Path, expected: list[str], n_heads: int | None = None) -> None:
    with pytest.raises(UserError) as caught:
        read_torch_checkpoint(path, n_heads)
    message = str(caught.value)
    assert "\n" not in message
    for part in [str(path), *expected]:
        assert part in message
