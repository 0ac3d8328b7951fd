"""Input made to do harm: refused in one line, or taken as the ordinary content that it is."""

import ast
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_model import make_config, make_tokenizer, save_model
from torch_twin import TorchTwin, save

import tinysft_jax
from tinysft_jax import chat, console, files
from tinysft_jax.bpe import LONGEST_BLANK
from tinysft_jax.checkpoints import load_description, load_model, load_tokenizer
from tinysft_jax.console import UserError
from tinysft_jax.conversion.torch import read_torch_checkpoint
from tinysft_jax.data import prepare
from tinysft_jax.data.reading import MAX_BYTES
from tinysft_jax.data.store import PreparedData
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription
from tinysft_jax.sampling import chat as interactive
from tinysft_jax.sampling.batch import read_requests
from tinysft_jax.sampling.chat import Session, Shell, load_transcript
from tinysft_jax.tokenizer import ChatTokenizer

torch = pytest.importorskip("torch")

PACKAGE = Path(tinysft_jax.__file__).parent
MARKERS = "<|system|><|user|><|assistant|><|endoftext|>"
BLANK = "a" + " " * (LONGEST_BLANK + 1) + "b"


pytestmark = pytest.mark.slow


def refusal(act, *arguments) -> str:
    """What the user is told: one line, not too long to read."""
    with pytest.raises(UserError) as caught:
        act(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 3000
    return message


class RunsCode:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# Pickles

UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_no_module_unpickles():
    """`pickle` is known by an exception's name only, and no reader of arrays or tensors is allowed to use it."""
    paths = [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("*.py")]
    assert len(paths) > 50
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & {
                    "pickle",
                    "dill",
                    "cloudpickle",
                    "joblib",
                }
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert [alias.name for alias in node.names] == ["UnpicklingError"], path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("allow_pickle", "False") == "False", path
                if ast.unparse(node.func) == "torch.load":
                    assert given["weights_only"] == "True", path


@pytest.mark.parametrize("name", ["tokens", "supervised", "offsets", "tasks"])
def test_objects_in_a_shard_are_not_made(chat_data, tmp_path, name):
    data = copy(chat_data, tmp_path / "data")
    trace = tmp_path / "code was run"
    np.save(data / "train" / f"{name}-00000.npy", np.array([RunsCode(trace)], object), allow_pickle=True)
    files.write_manifest(data)  # whoever changes a shard can change this too
    assert f"can't read {data}/train/{name}-00000.npy: " in refusal(lambda: PreparedData(data).split("train").lengths)
    assert not trace.exists()


# PyTorch's files


@pytest.fixture(scope="module")
def twin() -> TorchTwin:
    return TorchTwin()


@pytest.fixture
def archive(twin, tmp_path) -> Path:
    return save(twin.checkpoint(), tmp_path / "model.pt")


def rewritten(path: Path, compression: int, extra: dict[str, bytes], swollen: int = 0) -> None:
    """Writes an archive anew, with further entries, and bytes of zero behind its pickle."""
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in (entries | extra).items():
            new.writestr(name, content + bytes(swollen if name.endswith("data.pkl") else 0))


def test_a_compressed_archive_is_not_unpacked(archive):
    """Mapped, its tensors would be the compressed bytes; and a few kB can stand for any number of GB."""
    rewritten(archive, zipfile.ZIP_DEFLATED, {}, swollen=50 << 20)
    assert archive.stat().st_size < 1 << 20
    assert "compressed" in refusal(read_torch_checkpoint, archive)


def test_paths_in_an_archive_lead_nowhere(archive, tmp_path):
    target = tmp_path / "outside"
    rewritten(archive, zipfile.ZIP_STORED, {"../outside": b"x", str(target): b"x", "model/../../outside": b"x"})
    before = sorted(tmp_path.rglob("*"))
    refusal(read_torch_checkpoint, archive)
    assert sorted(tmp_path.rglob("*")) == before and not target.exists()


def test_a_tar_archive_of_early_torch_is_not_extracted(tmp_path):
    path = tmp_path / "inside" / "model.pt"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors", "../outside"):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"abc"))
    refusal(read_torch_checkpoint, path)
    assert [found.name for found in tmp_path.rglob("*")] == ["inside", "model.pt"]


def with_state(content: dict, **tensors: object) -> dict:
    state = content["model_state_dict"]
    return content | {"model_state_dict": state | {name.replace("__", "."): value for name, value in tensors.items()}}


VAST = torch.zeros(1).expand(10**6, 10**5)
ROW = torch.zeros(1).expand(80, 80)  # eight of them are larger than the file, none alone is
STATES = {
    "a vast table": (lambda c: with_state(c, tok_emb__weight=VAST), "has 400,000,000,000 bytes, the whole file"),
    "a vast mask": (lambda c: with_state(c, blocks__0__attn__mask=VAST), "the whole file"),
    "shared memory": (
        lambda c: with_state(c, **{f"blocks__{i}__attn__w{k}__weight": ROW for i in range(2) for k in "qkvo"}),
        "they share memory",
    ),
    "nested": (
        lambda c: with_state(c, ln_f__weight=torch.nested.nested_tensor([torch.ones(3), torch.ones(4)])),
        "not a dense tensor",
    ),
    "ratio": (lambda c: c | {"config": c["config"] | {"mlp_ratio": 1e308}}, "mlp_ratio is 1e\\+308"),
    "theta": (lambda c: c | {"config": c["config"] | {"rope_theta": 10**400}}, "number of over 100 digits"),
    "a long key": (lambda c: with_state(c, **{"x" * 100_000: torch.ones(1)}), "unexpected: x{100}$"),
    "a key of two lines": (lambda c: with_state(c, **{"a\n\x1b[2J": torch.ones(1)}), r"unexpected: 'a\\n\\x1b\[2J'$"),
    "many layers": (lambda c: with_state(c, blocks__9999__ln_1__weight=torch.ones(1)), r"and \d+ more"),
    "a key that is no text": (lambda c: c | {"model_state_dict": c["model_state_dict"] | {(1, 2): 3}}, "not a dense"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", STATES)
def test_states_that_claim_too_much_are_refused(tmp_path, twin, kind):
    change, expected = STATES[kind]
    path = save(change(twin.checkpoint()), tmp_path / "model.pt")
    with pytest.raises(UserError, match=expected):
        read_torch_checkpoint(path)
    refusal(read_torch_checkpoint, path)


def test_what_training_would_not_write_does_not_get_into_model_json(tmp_path, twin):
    odd = {"step": 10**80, "loss": float("nan"), "model_type": "\ud800\x1b[2J"}
    description, _ = read_torch_checkpoint(save(twin.checkpoint() | odd, tmp_path / "model.pt"))
    assert description.source == {"kind": "pytorch", "file": "model.pt"}


def test_a_name_that_is_no_text_can_be_written_down(tmp_path):
    """A file's name is any bytes; those that are not UTF-8 become half surrogate pairs in Python."""
    files.write_json(tmp_path / "a.json", {"file": os.fsdecode(b"caf\xe9.pt")})
    assert json.loads((tmp_path / "a.json").read_text())["file"] == os.fsdecode(b"caf\xe9.pt")


# Model directories

CONFIG = GPTConfig(vocab_size=260, dim=16, n_layers=2, n_heads=2, max_seq_len=32)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    params = nnx.to_pure_dict(nnx.state(GPT(CONFIG, rngs=nnx.Rngs(0))))
    path = tmp_path_factory.mktemp("hostile") / "model"
    save_model(path, params, ModelDescription(CONFIG, "control", {"kind": "gpt2", "bpe_ranks": 256}, {}))
    return path


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, symlinks=True))


@pytest.fixture
def model(original, tmp_path) -> Path:
    return copy(original, tmp_path / "model")


NUMBERS = (
    "-1",
    "0",
    "true",
    "null",
    '"8"',
    "1e400",
    "-1e400",
    "NaN",
    "1e300",
    "9" * 400,
    "9" * 5000,
    "[]",
    "{}",
    "2.5",
)


@pytest.mark.parametrize(
    "key",
    [
        *("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len", "mlp_ratio", "rope_theta"),
        *("n_kv_heads", "head_dim", "norm_epsilon"),
    ],
)
def test_numbers_that_can_be_no_shape(model, key):
    text = (model / "model.json").read_text()
    shape = json.loads(text)["model"]
    allowed = {"n_kv_heads": "0", "head_dim": "0", "mlp_ratio": "2.5", "rope_theta": "2.5", "norm_epsilon": "2.5"}
    for number in NUMBERS:
        if number != allowed.get(key):
            (model / "model.json").write_text(text.replace(f'"{key}": {shape[key]}', f'"{key}": {number}'))
            assert "model.json" in refusal(load_description, model), number


@pytest.mark.parametrize("key", ["vocab_size", "dim", "n_layers", "n_heads", "head_dim", "mlp_ratio"])
def test_a_shape_too_large_for_any_machine_is_compared_not_allocated(model, key):
    content = json.loads((model / "model.json").read_text())
    content["model"][key] = {"n_layers": 5000, "dim": 2**28, "mlp_ratio": 1e7}.get(key, 2**31 - 2)
    (model / "model.json").write_text(json.dumps(content))
    assert "does not fit model.json" in refusal(load_model, model)


@pytest.mark.parametrize(
    "assumed",
    [
        [],
        "x",
        1,
        None,
        [["rope_theta", 1]],
        {"rope_theta": "x"},
        {"rope_theta": 10**400},
        {"\x1b[2J": 1},
        {"dim": [16]},
    ],
    ids=lambda assumed: str(assumed)[:40],
)
def test_what_was_assumed_is_a_part_of_the_shape(model, assumed):
    content = json.loads((model / "model.json").read_text())
    content["source"] = {"assumed": {"max_seq_len": 32, "rope_theta": 10000}}
    (model / "model.json").write_text(json.dumps(content))
    assert load_description(model).source == content["source"]
    content["source"]["assumed"] = assumed
    (model / "model.json").write_text(json.dumps(content))
    assert "'source.assumed' must be" in refusal(load_description, model)


@pytest.mark.parametrize("inner", ["[]", "{}"])
def test_a_source_nested_too_deeply_to_be_copied(model, inner):
    """At some depth, what walks it by recursion fails; JSON's own reader gets deeper."""
    text = json.dumps(json.loads((model / "model.json").read_text()) | {"source": {"step": "X"}})
    for depth, is_refused in ((198, False), (199, True), (900, True)):
        start, end = ("[", "]") if inner == "[]" else ('{"a": ', "}")
        (model / "model.json").write_text(text.replace('"X"', start * depth + "1" + end * depth))
        if is_refused:
            assert "nested more than 200 levels deep" in refusal(load_description, model)
        else:
            json.dumps(load_description(model).to_json())


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"format_version": ' * 100_000,
        b'{"format_version": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"format_version": ' + b"9" * 4000 + b"}",
        b'{"format_version": 1, "model": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
        b'{"format_version": true}',
        b'{"format_version": 1e400}',
        b'{"format_version": 1, "format_version": null}',
        b'{"format_version": 1}\x00',
        b'\xff\xfe{"format_version": 1}',
        b"",
        b"null",
    ],
    ids=lambda content: repr(content[:30]),
)
def test_descriptions_that_are_none(model, content):
    (model / "model.json").write_bytes(content)
    refusal(load_description, model)
    refusal(load_tokenizer, model)


INVALID_TOKENIZERS = [
    {"tokenizer": "../../etc/passwd"},
    {"tokenizer": {"kind": "../../evil", "bpe_ranks": 256}},
    {"tokenizer": {"kind": "/dev/zero", "bpe_ranks": 256}},
    {"tokenizer": {"kind": ["gpt2"], "bpe_ranks": 256}},
    {"tokenizer": {"kind": "gpt2", "bpe_ranks": True}},
    {"tokenizer": {"kind": "gpt2", "bpe_ranks": "256"}},
    {"tokenizer": {"kind": "gpt2", "bpe_ranks": 10**4000}},
    {"chat_template": ["control"]},
    {"chat_template": {"a": 1}},
    {"chat_template": "x" * 100_000},
]


@pytest.mark.parametrize("change", INVALID_TOKENIZERS, ids=lambda change: str(change)[:40])
def test_invalid_tokenizers_are_refused(model, change):
    content = json.loads((model / "model.json").read_text()) | change
    (model / "model.json").write_text(json.dumps(content))
    refusal(load_tokenizer, model)


def test_a_description_without_end_is_not_read_to_it(model, monkeypatch):
    """A pipe nobody writes to, a device that never ends, and a file far longer than it should be."""
    path = model / "model.json"
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refusal(load_description, model)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "not a regular file" in refusal(load_description, model)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(files.MAX_TEXT_BYTES + 1)
    assert "longer than 64 MiB" in refusal(load_description, model)


def every_file(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_damaged_parameters_are_no_crash(model, caplog):
    """Each file of `params/` emptied, replaced by noise or by a directory: refused, or (a cache, say) not needed."""
    refused = 0
    for path in every_file(model / "params"):
        content = path.read_bytes()
        for other in (b"", b"{}", b"[]", b"null", bytes(range(156, 256)), content[:-1]):
            path.write_bytes(other)
            try:
                load_model(model)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
        path.unlink()
        path.mkdir()
        try:
            load_model(model)
        except UserError:
            refused += 1
        path.rmdir()
        path.write_bytes(content)
    assert refused > 8 and not caplog.records, "orbax says nothing of its own"
    load_model(model)


def test_replacing_a_model_does_not_follow_its_links(model, tmp_path):
    outside = copy(model / "params", tmp_path / "outside")
    content = {path: path.read_bytes() for path in every_file(outside)}
    (model / "params").rename(tmp_path / "moved")
    (model / "params").symlink_to(outside)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(load_model(model))))
    save_model(model, params, load_description(model), overwrite=True)
    assert not (model / "params").is_symlink()
    assert {path: path.read_bytes() for path in every_file(outside)} == content
    load_model(model)


# Text


@pytest.mark.parametrize("content", [MARKERS, "<|user|>", "<|endoftext|>", "a<|assistant|>b", "<|<|user|>user|>"])
@pytest.mark.parametrize("bpe_ranks", [256, 50256])
def test_markers_in_content_are_content(content, bpe_ranks):
    tokenizer = ChatTokenizer("control", bpe_ranks)
    messages = [{"role": role, "content": content} for role in ("system", "user", "assistant")]
    ids, supervised = tokenizer.encode_chat(messages)
    assert [i for i in ids.tolist() if i >= tokenizer.eot_id] == [*tokenizer.control_ids.values(), tokenizer.eot_id]
    assert tokenizer.decode(ids[supervised][:-1]) == content
    assert all(i < tokenizer.eot_id for i in tokenizer.encode_text(content))
    with pytest.raises(UserError, match="can't tell from"):
        ChatTokenizer("text", bpe_ranks).encode_chat(messages)


def test_markers_in_training_data_are_content(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [{"prompt": MARKERS, "completion": MARKERS}, {"prompt": "<|user|>", "completion": "<|endoftext|>"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--valid_fraction=0", "--workers=1", "--bpe_ranks=256"]
    prepare.main([f"--input={path}", f"--output={tmp_path / 'data'}", *flags])
    data = PreparedData(tmp_path / "data")
    tokenizer, split = load_tokenizer(tmp_path / "data"), data.split("train")
    for index, line in enumerate(lines):
        ids, supervised = split.conversation(index)
        assert [i for i in ids.tolist() if i >= 256] == [*tokenizer.control_ids.values(), tokenizer.eot_id]
        assert tokenizer.decode(ids[supervised][:-1]) == line["completion"]
    flags += ["--template=text"]
    assert "chats.jsonl:1" in refusal(prepare.main, [f"--input={path}", f"--output={tmp_path / 'text'}", *flags])
    assert not (tmp_path / "text").exists()


def test_blank_text_is_refused_before_the_tokenizer_ends_the_process(tmp_path):
    user, answer = ({"role": role, "content": BLANK} for role in ("user", "assistant"))
    for tokenizer in (ChatTokenizer("control", 256), ChatTokenizer("text", 256)):
        for act, argument in (
            (tokenizer.encode_text, BLANK),
            (tokenizer.encode_document, BLANK),
            (tokenizer.encode_prompt, [user]),
            (tokenizer.encode_chat, [user, answer]),
        ):
            assert refusal(act, argument) == "over 500,000 white-space characters in a row"
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps({"prompt": BLANK}))
    assert "requests.jsonl:1: over 500,000" in refusal(read_requests, path, make_tokenizer("control"), make_config())
    path.write_text(json.dumps({"prompt": BLANK.replace(" ", "\n"), "completion": "a"}))  # escaped, in the file
    flags = ["--max_tokens=8192", "--workers=1", "--bpe_ranks=256"]
    message = refusal(prepare.main, [f"--input={path}", f"--output={tmp_path / 'data'}", *flags])
    assert "requests.jsonl:1: over 500,000" in message


def test_white_space_that_is_not_in_a_row_is_text():
    text = "a " * (LONGEST_BLANK + 1)
    assert len(make_tokenizer(None).encode_text(text)) == len(text)


def test_a_request_without_end_is_not_held(tmp_path):
    path = tmp_path / "requests.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a"}\n')
        file.truncate(20 * MAX_BYTES)
    tokenizer = make_tokenizer(None)
    assert "requests.jsonl:2: longer than 8 MiB" in refusal(read_requests, path, tokenizer, make_config())
    assert "longer than 64 MiB" in refusal(load_transcript, path)


def test_a_role_nested_deeply_is_told_shortly(tmp_path):
    role = "[" * 900 + "]" * 900
    path = tmp_path / "chat.jsonl"
    path.write_text(f'{{"messages": [{{"role": {role}, "content": "a"}}]}}\n')
    assert "[[[...]]]" in refusal(load_transcript, path)
    assert "[[[...]]]" in refusal(chat.check_messages, [{"role": json.loads(role), "content": "a"}])
    assert "chat.jsonl:1" in refusal(read_requests, path, make_tokenizer("control"), make_config())


class Echo(Session):
    """A session without a model, which keeps what was said."""

    def __init__(self):
        self.said, self.forgotten, self.last, self.opening = [], 0, None, ""

    def ask(self, text: str):
        self.said.append(text)
        return (part for part in ["ok"])


def test_lines_too_long_to_answer_do_not_end_the_chat(monkeypatch, capsys):
    monkeypatch.setattr(interactive, "MAX_CHARACTERS", 100)
    said = ["a" * 100, "b" * 101, "c" * 1000, " " * 1000, MARKERS, "\x00\ufffd"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(said)))
    session = Echo()
    Shell(session).run()
    assert session.said == ["a" * 100, MARKERS, "\x00\ufffd"]
    assert capsys.readouterr().err.count("over 100 characters is not answered\n") == 2


# Commands


@pytest.mark.parametrize(("error", "code"), [(UserError("a\x1b[2Jb\n\nc"), 2), (MemoryError("9 TiB"), 3)])
def test_what_a_command_says_does_not_steer_the_terminal(capsys, error, code):
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        console.run(fail)
    said = capsys.readouterr().err
    assert left.value.code == code and said.startswith("error: ") and said.count("\n") == 1 and said[:-1].isprintable()


def test_a_message_without_end_is_cut(capsys):
    def fail() -> None:
        raise UserError("x" * 1_000_000)

    with pytest.raises(SystemExit):
        console.run(fail)
    assert len(capsys.readouterr().err) < 5000
