import hashlib
import json
import os

import pytest

from tinysft_jax import files
from tinysft_jax.console import UserError


def test_a_directory_appears_whole(tmp_path):
    with files.new_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_directory_that_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(error), files.new_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(UserError, match="--overwrite"), files.new_directory(tmp_path / "out"):
        pass
    with pytest.raises(RuntimeError), files.new_directory(tmp_path / "out", overwrite=True, content=("old", "new")):
        raise RuntimeError
    assert os.listdir(tmp_path / "out") == ["old"]
    with files.new_directory(tmp_path / "out", overwrite=True, content=("old", "new")) as directory:
        (directory / "new").write_text("2")
    assert os.listdir(tmp_path / "out") == ["new"] and os.listdir(tmp_path) == ["out"]


def test_nothing_of_another_kind_is_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious").write_text("1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "file").write_text("1")
    for name in ("notes", "link", "file"):
        with (
            pytest.raises(UserError, match="replaces nothing else"),
            files.new_directory(tmp_path / name, overwrite=True),
        ):
            pass
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "model", "notes"]


def test_what_somebody_else_put_there_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("model.json", "my notes"):
        (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(UserError, match=r"'my notes'.*would delete it"), files.new_directory(tmp_path / "model", True):
        pass
    assert sorted(os.listdir(tmp_path / "model")) == ["model.json", "my notes"]


def test_of_two_that_make_the_same_the_second_is_refused(tmp_path):
    with pytest.raises(UserError, match="out exists"), files.new_directory(tmp_path / "out") as directory:
        with files.new_directory(tmp_path / "out") as other:
            (other / "first").write_text("1")
        (directory / "second").write_text("2")
    with pytest.raises(UserError, match="file exists"), files.new_file(tmp_path / "file") as aside:
        (tmp_path / "file").write_text("first")
        aside.write_text("second")
    assert os.listdir(tmp_path / "out") == ["first"] and (tmp_path / "file").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_a_directory_that_cannot_be_made_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write"), files.new_directory(tmp_path / "file" / "out"):
        pass


def test_a_link_is_moved_in_one_step(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "models" / name).mkdir(parents=True)
        files.link(tmp_path / "model", tmp_path / "models" / name)
        assert os.readlink(tmp_path / "model") == f"models/{name}"
    assert sorted(os.listdir(tmp_path)) == ["model", "models"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "is not a thing: it has no x.json"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "is not a JSON object"),
        ('{"format_version": true}', "no format_version"),
        ('{"format_version": 0}', "no format_version"),
        ('{"format_version": 8}', "knows up to 7; upgrade"),
    ],
)
def test_a_description_that_cannot_be_read(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=complaint):
        files.read_json(tmp_path / "x.json", "a thing", 7)


def test_a_description_is_read_back(tmp_path):
    files.write_json(tmp_path / "x.json", {"format_version": 7, "é": 1})
    assert files.read_json(tmp_path / "x.json", "a thing", 7) == {"format_version": 7, "é": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_lines_of_a_log_are_read_up_to_where_it_was_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    assert files.read_json_lines(path) == []
    path.write_bytes(
        '{"step": 1, "text": "a\u2028b"}\n[1]\n'.encode() + b"\xff\n\n" + b"[" * 10**5 + b'\n{"step": 2}\n{"ste'
    )
    assert files.read_json_lines(path) == [{"step": 1, "text": "a\u2028b"}, {"step": 2}]


def test_the_manifest_names_every_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"abc")
    files.write_manifest(tmp_path)
    files.write_manifest(tmp_path)  # does not list itself
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["files"] == {"sub/a": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with pytest.raises(ZeroDivisionError), files.new_file(path) as aside:
        aside.write_bytes(b"half")
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []
    with files.new_file(path) as aside:
        aside.write_bytes(b"one")
        assert not path.exists()
    with pytest.raises(UserError, match="--overwrite"), files.new_file(path):
        pass
    with files.new_file(path, overwrite=True) as aside:
        aside.write_bytes(b"two")
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [("a.bin", b"two")]
    with pytest.raises(UserError, match="is not a file"), files.new_file(path.parent, overwrite=True):
        pass
    with pytest.raises(UserError, match="can't write"), files.new_file(path / "below"):
        pass


def test_damage_is_named(tmp_path):
    """Sizes first, of all files; what is there besides is nobody's business."""
    (tmp_path / "sub").mkdir()
    for name in ("a", "b", "sub/c"):
        (tmp_path / name).write_bytes(b"abc")
    assert files.find_damage(tmp_path).endswith("it has no manifest.json")
    files.write_manifest(tmp_path)
    (tmp_path / "more").touch()
    assert files.find_damage(tmp_path) is None
    (tmp_path / "a").write_bytes(b"abd")
    assert files.find_damage(tmp_path) == "a has other content than its manifest says"
    assert files.find_damage(tmp_path, hashes=False) is None
    (tmp_path / "sub" / "c").write_bytes(b"ab")
    assert files.find_damage(tmp_path) == "sub/c has 2 bytes, its manifest says 3"
    (tmp_path / "sub" / "c").unlink()
    assert files.find_damage(tmp_path, hashes=False) == "sub/c is missing"
    (tmp_path / "sub" / "c").mkdir()
    assert files.find_damage(tmp_path).startswith("sub/c ")


@pytest.mark.parametrize(
    "content",
    [
        *("{}", '{"format_version": 1}', '{"format_version": 1, "files": {"a": 3}}', '{"format_version": 2}', "\0"),
        *(json.dumps({"format_version": 1, "files": value}) for value in ({}, [], ["a"], "a", 3, True, None)),
    ],
)
def test_a_damaged_manifest_is_damage(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    assert files.find_damage(tmp_path)


def write_entry(directory, name: str, **entry: object) -> None:
    files.write_json(directory / "manifest.json", {"format_version": 1, "files": {"a": entry, name: entry}})


@pytest.fixture
def beside(tmp_path):
    """A directory, and a file beside it that none of its manifests may lead to."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for path in (tmp_path / "outside", tmp_path / "in" / "a"):
        path.write_bytes(b"abc")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "in" / "up").symlink_to("..")
    return tmp_path / "in"


@pytest.mark.parametrize(
    "name", ["../outside", "sub/../../outside", "{root}/outside", "link", "up/outside", "../in/../outside", "..", "/"]
)
def test_a_manifest_leads_nowhere_else(beside, monkeypatch, name):
    """Not even to look whether a file has the content that is claimed."""
    name = name.replace("{root}", str(beside.parent))
    write_entry(beside, name, bytes=3, sha256=hashlib.sha256(b"abc").hexdigest())
    opened = []
    monkeypatch.setattr(files, "sha256", lambda path: opened.append(path) or hashlib.sha256(b"abc").hexdigest())
    assert files.find_damage(beside) == f"{name} lies outside the directory"
    assert opened == []


def test_links_within_a_directory_are_its_own(beside):
    (beside / "sub" / "b").symlink_to("../a")
    write_entry(beside, "sub/b", bytes=3, sha256=hashlib.sha256(b"abc").hexdigest())
    assert files.find_damage(beside) is None
    (beside.parent / "other").symlink_to("in")
    assert files.find_damage(beside.parent / "other") is None


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\x1b[2J", "x" * 100_000, "x/" * 50_000, "\ud800", "sub", ""])
def test_names_and_sizes_that_can_not_be_are_told_shortly(beside, name):
    for size in (3, None, [[[[[[[[9]]]]]]]], "x" * 1000):
        write_entry(beside, name, bytes=size)
        damage = files.find_damage(beside)
        assert damage.isprintable() and len(damage) < 500


def test_a_pipe_is_not_waited_for(beside):
    os.mkfifo(beside / "pipe")
    write_entry(beside, "pipe", bytes=3, sha256=hashlib.sha256(b"abc").hexdigest())
    assert files.find_damage(beside) == "pipe is not a regular file"


def test_what_is_needed_must_be_listed(beside):
    write_entry(beside, "a", bytes=3, sha256=hashlib.sha256(b"abc").hexdigest())
    assert files.find_damage(beside, needed=["a"]) is None
    assert files.find_damage(beside, needed=(name for name in ("a", "b", "c"))) == "manifest.json does not list b"
