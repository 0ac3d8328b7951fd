"""Near-valid input, thousands of times: it is understood or refused in one line, and never takes long.

Each test says how many inputs it tried. `FUZZ_INPUTS` changes how many that are.
"""

import copy
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import families
import gguf_files
import hostile_chats
import jax
import numpy as np
import own_tokenizers
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import family, make_config, make_tokenizer, random_params
from torch_twin import TorchTwin, save

from tinysft_jax import chat, files
from tinysft_jax.checkpoints import load_description, load_tokenizer
from tinysft_jax.console import RunError, UserError
from tinysft_jax.conversion.gguf import read_gguf, write_gguf
from tinysft_jax.conversion.huggingface import read_huggingface
from tinysft_jax.conversion.tokenizer_files import read_tokenizer
from tinysft_jax.conversion.torch import read_torch_checkpoint
from tinysft_jax.data import prepare
from tinysft_jax.data.batches import BatchSource
from tinysft_jax.data.encode import Encoder
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.sources import open_input
from tinysft_jax.data.store import SPLITS, PreparedData
from tinysft_jax.parameters import ModelDescription, model_parameter_shapes
from tinysft_jax.sampling.batch import read_requests
from tinysft_jax.sampling.chat import load_transcript
from tinysft_jax.tasks.make import TASK_NAMES, make_tasks
from tinysft_jax.tasks.records import parse_record, split_records
from tinysft_jax.tokenizer import ChatTokenizer, write_files

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.soak

N_INPUTS = int(os.environ.get("FUZZ_INPUTS", "10000"))
LONGEST_SECONDS = 10.0

MARKERS = [*chat.ROLE_MARKERS.values(), chat.END_OF_TEXT]
TEXT = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(codec=None), max_size=10),  # lone surrogates as well
    st.lists(st.sampled_from([*MARKERS, "<|", "|>", " ", "\n", "\x00", "\ufeff", "cat", "\ud800"]), max_size=6).map(
        "".join
    ),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.sampled_from([10**30, -(10**400), 2**31, 2**63, 1e308, 5e-324]),
    st.floats(),
    TEXT,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ROLES = st.one_of(st.sampled_from(["system", "user", "assistant"]), VALUES)
HOSTILE_BYTES = [
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\\ud800",
    b"\\u0000",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
]
HOSTILE_BYTES += [
    b",",
    b":",
    b"\n",
    b"\r",
    b"\\",
    b"NaN",
    b"1e400",
    b"-0",
    b"null",
    b"9" * 5000,
    b"[" * 1200,
    b" " * 1000,
]


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes], pieces: list[bytes]) -> bytes:
    """Bytes of which up to four stretches were lost, doubled or replaced."""
    content = draw(contents)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 12)))
        kept = content[start:end]
        new = draw(st.sampled_from(pieces) | st.binary(max_size=4) | st.sampled_from([b"", kept + kept]))
        content = content[:start] + new + content[end:]
    return content


@st.composite
def altered(draw: st.DrawFn, original: dict[str, Any]) -> dict[str, Any]:
    """A JSON object in which up to three entries, at any depth, were lost, added or replaced."""
    content = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        inner = content
        while deeper := [value for value in inner.values() if isinstance(value, dict) and value]:
            if not draw(st.booleans()):
                break
            inner = draw(st.sampled_from(deeper))
        key = draw(st.sampled_from(sorted(inner)) if inner and draw(st.integers(0, 9)) else st.text(max_size=8))
        if draw(st.integers(0, 4)):
            inner[key] = draw(VALUES)
        else:
            inner.pop(key, None)
    return content


@pytest.fixture
def fuzz(capsys, request):
    """Runs a function on inputs, and tells how many there were."""

    def run(inputs: st.SearchStrategy, act: Callable[[Any], object]) -> None:
        seconds: list[float] = []
        refused = 0

        @settings(
            max_examples=N_INPUTS,
            deadline=None,
            derandomize=False,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def try_one(value: Any) -> None:
            nonlocal refused
            start = time.perf_counter()
            try:
                act(value)
            except (UserError, RunError) as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 5000
            seconds.append(time.perf_counter() - start)
            assert seconds[-1] < LONGEST_SECONDS

        try_one()
        assert len(seconds) >= N_INPUTS and refused < len(seconds), "some inputs are valid"
        with capsys.disabled():
            print(
                f"\n{request.node.name}: {len(seconds):,} inputs, {refused:,} refused, {sum(seconds):.1f} s in the "
                f"program, the slowest {max(seconds):.3f} s"
            )

    return run


RECORDS = st.lists(
    st.sampled_from(
        [
            *("Features: Dialogue, Twist\n", "Words: dog, run, big\n", "Summary: A dog ran.\n", "Story:\n", "Story: "),
            *("Random sentence: The dog ran.\n", 'Once there was a dog. It ran. "Hi," said Tim.\n', "<|endoftext|>\n"),
            *(
                "Moral: be kind.\n",
                "Story",
                ":",
                ",,",
                "\r",
                "\r\n",
                "\ufeff",
                " Story:",
                "<|endoftext",
                "\x0c",
                "\u2028",
            ),
        ]
    )
    | st.text(max_size=10),
    max_size=20,
)


def test_records(fuzz):
    def act(parts: list[str]) -> None:
        lines = "".join(parts).splitlines(keepends=True)
        for text in split_records(lines):
            assert "<|endoftext|>" not in text and text.strip()
            if record := parse_record(text):
                assert record.story.strip()
                for conversation in make_tasks(record, seed=0):
                    assert conversation.task in TASK_NAMES
                    chat.check_messages(conversation.messages, needs_answer=True)

    fuzz(RECORDS, act)


CHATS = [
    {"prompt": "Hi", "completion": "Ho"},
    {"messages": [{"role": "user", "content": "Hi <|user|>"}, {"role": "assistant", "content": "Ho"}]},
    {
        "messages": [
            {"role": role, "content": "caf\u00e9 \U0001f431"}
            for role in ("system", "user", "assistant", "user", "assistant")
        ]
    },
]
LINES = st.lists(
    st.sampled_from(CHATS).map(lambda line: json.dumps(line, ensure_ascii=False).encode()), max_size=4
).map(b"\n".join)


@pytest.mark.parametrize("bad_items", ["stop", "skip"])
def test_jsonl(fuzz, tmp_path, bad_items):
    path, tokenizer = tmp_path / "chats.jsonl", make_tokenizer("control")
    encoder = Encoder("chat-jsonl", tokenizer, max_tokens=128, seed=0, bad_items=bad_items)

    def act(content: bytes) -> None:
        path.write_bytes(content)
        items = list(open_input(path, "auto", 0.5, None))
        _, ledger = encoder.encode(items)
        assert ledger.read.total() == len(items)
        assert ledger.kept + ledger.left_out.total() + ledger.skipped.total() == len(items)

    fuzz(damaged(LINES, HOSTILE_BYTES), act)


@pytest.mark.parametrize("kind", hostile_chats.KINDS)
def test_forms(fuzz, tmp_path, kind):
    """Of each form, in lines and in parquet: with parts missing, doubled or of other types, damaged, lying files."""
    pytest.importorskip("pyarrow")

    def act(seed: int) -> None:
        outcome = hostile_chats.outcome(hostile_chats.write(Random(seed), kind, tmp_path))
        if outcome != "kept":
            raise UserError(outcome)

    fuzz(st.integers(0, 2**63), act)


CONVERSATIONS = st.one_of(
    st.lists(
        st.fixed_dictionaries({"role": ROLES, "content": VALUES}, optional={"name": VALUES})
        | st.dictionaries(TEXT, VALUES),
        max_size=5,
    ),
    st.builds(
        lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)],
        st.lists(TEXT, min_size=1, max_size=6),
    ),
)


@pytest.mark.parametrize("template", ["control", "text"])
def test_encode_chat(fuzz, template):
    tokenizer = ChatTokenizer(template, 512)

    def act(messages: list[dict[str, Any]]) -> None:
        ids, supervised = tokenizer.encode_chat(messages)
        roles = [message["role"] for message in messages]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        n_controls = 0 if template == "text" else len(roles) + (roles[0] != "system")
        assert (ids >= tokenizer.eot_id).sum() == n_controls + len(answers)
        assert tokenizer.decode(ids[supervised]) == "".join(answer + chat.END_OF_TEXT for answer in answers)

    fuzz(CONVERSATIONS, act)


def test_parse_chat(fuzz):
    tokenizer = ChatTokenizer("control", 512)
    lines = st.one_of(VALUES, st.builds(lambda messages: {"messages": messages}, CONVERSATIONS | VALUES))
    fuzz(lines, lambda line: tokenizer.encode_chat(chat.parse_chat(line)))


TWIN = TorchTwin(vocab_size=20, dim=8, n_layers=1, max_seq_len=6).checkpoint()
TENSORS = st.one_of(
    st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype),
        st.lists(st.integers(0, 20), max_size=3),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64]),
    ),
    st.sampled_from([torch.zeros(1).expand(10**6, 10**6), torch.zeros(1).expand(20, 8), torch.full((8,), torch.nan)]),
    SCALARS,
)


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[Any, Any]:
    """A PyTorch checkpoint with prefixes, and keys and values that were altered."""
    prefix = draw(st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod.", ".", "blocks."]))
    state = {prefix + key: tensor for key, tensor in TWIN["model_state_dict"].items()}
    keys = sorted(state)
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(keys))
        tensor = state.pop(key, None) if draw(st.booleans()) else state.get(key)
        edit = draw(st.integers(0, 4))
        if edit == 0:
            state[draw(st.sampled_from(["module.", "_orig_mod.", "blocks.7."])) + key] = tensor
        elif edit == 1:
            state[draw(TEXT | st.tuples(st.integers()) | st.integers())] = tensor
        elif edit == 2:
            state[key.replace("0", draw(st.sampled_from(["1", "-1", "00", "9999", "99999", "\u0660", "0.0"])))] = tensor
        elif edit == 3:
            state[key] = draw(TENSORS)
        else:
            state[key] = tensor
    content = {
        "model_state_dict": state,
        **{key: TWIN[key] for key in ("step", "loss")},
        "config": dict(TWIN["config"]),
    }
    if draw(st.integers(0, 3)) == 0:
        content = draw(altered({"config": content["config"], "step": 1, "model_type": "sft"})) | {
            "model_state_dict": state
        }
    return content


def test_converter(fuzz, tmp_path):
    path = tmp_path / "model.pt"

    def act(content: dict[Any, Any]) -> None:
        description, params = read_torch_checkpoint(save(content, path))
        assert params["tok_emb"]["embedding"].shape == (128, description.config.dim)
        json.dumps(description.to_json(), ensure_ascii=False).encode()

    fuzz(checkpoints(), act)


MODEL_JSON = {
    "format_version": 1,
    "model": {
        "vocab_size": 260,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "max_seq_len": 64,
        "mlp_ratio": 4.0,
        "rope_theta": 10000.0,
    },
    "chat_template": "control",
    "tokenizer": {"kind": "gpt2", "bpe_ranks": 256},
    "source": {"kind": "pytorch", "file": "a.pt"},
}
SHAPE_3 = {
    "n_kv_heads": 1,
    "head_dim": 8,
    "norm": "rms",
    "norm_epsilon": 1e-6,
    "qkv_bias": True,
    "qk_norm": False,
    "tied_head": False,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32},
}
MODEL_JSON_3 = MODEL_JSON | {"format_version": 3, "model": MODEL_JSON["model"] | SHAPE_3}
MODEL_JSONS = (altered(MODEL_JSON) | altered(MODEL_JSON_3) | st.sampled_from([MODEL_JSON, MODEL_JSON_3])).map(
    lambda content: json.dumps(content).encode()
)


def test_model_json(fuzz, tmp_path):
    def act(content: bytes) -> None:
        (tmp_path / "model.json").write_bytes(content)
        description = load_description(tmp_path)
        assert 0 < description.config.hidden_dim < 2**31
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.description()["tokenizer"]["bpe_ranks"] == tokenizer.bpe.ranks

    fuzz(damaged(MODEL_JSONS, HOSTILE_BYTES), act)


def test_huggingface_folders(fuzz, tmp_path):
    """Of each name: a `config.json` that lies about its tensors, or tensors that were damaged."""
    originals = {}
    for name in ("llama", "qwen2", "qwen3", "stablelm"):
        folder = families.save(families.random_model(name), tmp_path / name)
        config, weights = folder / "config.json", folder / "model.safetensors"
        originals[name] = json.loads(config.read_text()), weights.read_bytes()

    def act(given: tuple[str, int]) -> None:
        family, seed = given
        config, weights = families.hostile(Random(seed), *originals[family])
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "model.safetensors").write_bytes(weights)
        description, params = read_huggingface(tmp_path)
        shapes = jax.tree.map(lambda leaf: leaf.shape, model_parameter_shapes(description.config))
        assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
        json.dumps(description.to_json(), ensure_ascii=False).encode()

    fuzz(st.tuples(st.sampled_from(sorted(originals)), st.integers(0, 2**63)), act)


def test_gguf_files(fuzz, tmp_path):
    """Of each architecture: files that were cut short or damaged, and other numbers in their headers."""
    originals = {}
    for name in ("default", "llama", "qwen2", "qwen3"):
        tokenizer = ChatTokenizer("control", bpe_ranks=300)
        config = family(name, vocab_size=tokenizer.vocab_size)
        model = ModelDescription(config, **tokenizer.description(), source={})
        write_gguf(path := tmp_path / f"{name}.gguf", random_params(config), model, "A model")
        originals[name] = path.read_bytes()

    def act(given: tuple[str, int]) -> None:
        name, seed = given
        (path := tmp_path / "a.gguf").write_bytes(gguf_files.hostile(Random(seed), originals[name]))
        description, params = read_gguf(path)
        shapes = jax.tree.map(lambda leaf: leaf.shape, model_parameter_shapes(description.config))
        assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
        json.dumps(description.to_json(), ensure_ascii=False).encode()

    fuzz(st.tuples(st.sampled_from(sorted(originals)), st.integers(0, 2**63)), act)


def test_tokenizer_folders(fuzz, tmp_path):
    """Of each kind: files that were cut short or damaged, other values in them, and templates that are none."""
    originals = {kind: own_tokenizers.make_tokenizer(kind, tmp_path / kind).files for kind in own_tokenizers.KINDS[1:]}

    def act(given: tuple[str, int]) -> None:
        kind, seed = given
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        write_files(tmp_path / "folder", own_tokenizers.hostile(Random(seed), originals[kind]))
        tokenizer = read_tokenizer(tmp_path / "folder", {})
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a cat"}]
        json.dumps(tokenizer.description(), ensure_ascii=False).encode()
        if tokenizer.template is not None:
            assert tokenizer.encode_chat(messages)[1].any()
        tokenizer.decode(tokenizer.encode_document("Hi"))

    fuzz(st.tuples(st.sampled_from(sorted(originals)), st.integers(0, 2**63)), act)


ARRAYS = st.builds(
    lambda numbers, dtype: np.array(numbers).astype(dtype),
    st.lists(st.integers(0, 300), max_size=8) | st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=1),
    st.sampled_from(["u2", "u1", "i8", "?", "f4", "<U3", "M8[s]", ">i8"]),
)


@st.composite
def altered_array(draw: st.DrawFn, content: bytes) -> bytes:
    """A `.npy` file of which a few numbers were changed, or another array in its place."""
    array = np.load(io.BytesIO(content))
    for _ in range(draw(st.integers(0, 3)) if array.size else 0):
        number = draw(st.integers(-3, 300) | st.integers(-(2**63), 2**63 - 1))
        array[draw(st.integers(0, array.size - 1))] = np.array(number).astype(array.dtype)
    file = io.BytesIO()
    np.save(file, array if draw(st.integers(0, 3)) else draw(ARRAYS))
    return file.getvalue()


@st.composite
def altered_data(draw: st.DrawFn, originals: dict[str, bytes]) -> dict[str, bytes]:
    """Files of a prepared data set: up to two of them were altered; the manifest says what they are then, or not."""
    changes = {}
    for name in draw(st.lists(st.sampled_from(sorted(originals)), max_size=2)):
        content = originals[name]
        if name.endswith(".json") and draw(st.booleans()):
            changes[name] = json.dumps(draw(altered(json.loads(content)))).encode()
        elif name.endswith(".npy") and draw(st.integers(0, 2)):
            changes[name] = draw(altered_array(content))
        else:
            changes[name] = draw(damaged(st.just(content), HOSTILE_BYTES))
    return changes


@pytest.mark.parametrize("kind", ["stories", "pairs"])
def test_prepared_data(fuzz, tmp_path, kind):
    """Whoever alters a file can write a manifest that fits."""
    small = tmp_path / "small"
    texts = tmp_path / "texts"
    texts.write_text("<|endoftext|>".join(f"Words: cat\nStory: Tom saw {i} boys." for i in range(5)))
    if kind == "pairs":
        texts.write_text("\n".join(json.dumps({"prompt": f"{i}?", "chosen": "Hi", "rejected": "Ho"}) for i in range(5)))
    prepare.main([f"--input={texts}", f"--output={small}", "--bpe_ranks=256", "--valid_fraction=0.4", "--workers=1"])
    names = [path.relative_to(small).as_posix() for path in small.rglob("*") if path.is_file()]
    originals = {name: (small / name).read_bytes() for name in names}

    def act(changes: dict[str, bytes]) -> None:
        for name in names:
            (small / name).write_bytes(changes.get(name, originals[name]))
        if "manifest.json" not in changes:
            files.write_manifest(small)
        data = PreparedData(small)
        data.verify()
        for name in SPLITS:
            split = data.split(name)
            for index in range(len(split)):
                ids, supervised = split.conversation(index)
                assert 0 < len(ids) == len(supervised) == split.lengths[index]
                assert data.tasks[split.tasks[index]] and load_tokenizer(small).decode(ids)
                assert (split.request(index) or {"task": "none"})["task"] is not None
            if len(split):
                source = BatchSource(split, Packing(split.item_lengths, 1024).epoch(), 2, 1024)
                tokens = sum(int((source[i]["segment_ids"] > 0).sum()) for i in range(len(source)))
                assert tokens == data.description["splits"][name]["tokens"]

    fuzz(altered_data(originals), act)


def test_requests(fuzz, tmp_path):
    path, tokenizer, config = tmp_path / "requests.jsonl", make_tokenizer("control"), make_config()
    lines = st.sampled_from([CHATS[0], {"messages": CHATS[1]["messages"][:1]}, {"prompt": "\u00e9<|user|>"}])
    contents = st.lists(lines.map(lambda line: json.dumps(line).encode()), max_size=3).map(b"\n".join)

    def act(content: bytes) -> None:
        path.write_bytes(content)
        for request in read_requests(path, tokenizer, config, "s"):
            assert len(request.ids) < config.max_seq_len

    fuzz(damaged(contents, HOSTILE_BYTES), act)


def test_transcripts(fuzz, tmp_path):
    path = tmp_path / "chat.jsonl"

    def act(content: bytes) -> None:
        path.write_bytes(content)
        chat.check_messages(load_transcript(Path(path)), needs_answer=True)

    one_line = st.sampled_from(CHATS).map(lambda line: json.dumps(line).encode())
    fuzz(damaged(one_line, HOSTILE_BYTES), act)
