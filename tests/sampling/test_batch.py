"""Requests read, answered into a file, interrupted, and gone on with."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
from tiny_model import make_config, make_decoder, make_tokenizer

from tinysft_jax.console import Interrupted, RunError, UserError
from tinysft_jax.sampling import resumable
from tinysft_jax.sampling.batch import Request, answer_file, read_requests
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions

TOKENIZER = make_tokenizer("control")
OPTIONS = SamplingOptions(max_new_tokens=12, temperature=1.0)
SYSTEM = [{"role": "system", "content": "s"}]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": "abc" * n} for n in (3, 1, 6)] + [{"messages": [*SYSTEM, {"role": "user", "content": "why"}]}]
    path.write_text("\n\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


@pytest.fixture
def requests(source) -> list[Request]:
    return read_requests(source, TOKENIZER, make_config(), "s")


def answer(decoder, requests, output, options=OPTIONS, num_samples=2, batch_size=2) -> None:
    answer_file(decoder, TOKENIZER, options, requests, output, num_samples, batch_size)


def test_requests_become_prompts(requests):
    assert [request.line for request in requests] == [1, 3, 5, 7], "counted with the blank ones"
    assert TOKENIZER.decode(requests[0].ids) == "<|system|>s<|user|>abcabcabc<|assistant|>"
    assert requests[3].messages == [*SYSTEM, {"role": "user", "content": "why"}]


def test_a_request_may_come_in_parts(source):
    parts = [{"type": "text", "text": text} for text in ("wh", "y")]
    source.write_text(json.dumps({"messages": [*SYSTEM, {"role": "user", "content": parts}]}))
    (request,) = read_requests(source, TOKENIZER, make_config())
    assert request.messages == [*SYSTEM, {"role": "user", "content": "why"}]
    source.write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}))
    with pytest.raises(UserError, match=r"jsonl:1: messages\[0\].content\[0\] is {'type': 'image_url'}; only"):
        read_requests(source, TOKENIZER, make_config())


def test_requests_of_a_model_without_template(source, tmp_path):
    plain, path = make_tokenizer(None), tmp_path / "plain.jsonl"
    path.write_text('{"prompt": "Once"}')
    (request,) = read_requests(path, plain, make_config())
    assert plain.decode(request.ids) == "Once" and request.answered(" upon") == {
        "prompt": "Once",
        "completion": " upon",
    }
    with pytest.raises(UserError, match=r"prompts\.jsonl:7: .*no chat template"):
        read_requests(source, plain, make_config())
    with pytest.raises(UserError, match="takes no system message"):
        read_requests(path, plain, make_config(), "s")


@pytest.mark.parametrize("indent", [None, 2])
def test_requests_in_an_array_are_known_by_their_number(source, tmp_path, indent):
    records = [json.loads(line) for line in source.read_text().splitlines() if line]
    (tmp_path / "array.json").write_text("\ufeff" + json.dumps(records, indent=indent), encoding="utf-8")
    requests = read_requests(tmp_path / "array.json", TOKENIZER, make_config(), "s")
    assert [request.line for request in requests] == [1, 2, 3, 4]
    assert [request.ids for request in requests] == [
        r.ids for r in read_requests(source, TOKENIZER, make_config(), "s")
    ]
    for tokenizer in (TOKENIZER, make_tokenizer(None)):
        (tmp_path / "array.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": " \n"}]))
        with pytest.raises(UserError, match=r"array\.json:1, element 2: .* is empty"):
            read_requests(tmp_path / "array.json", tokenizer, make_config())


def test_files_that_were_put_together(tmp_path):
    (tmp_path / "both.jsonl").write_text('\ufeff{"prompt": "a"}\n\ufeff\n\ufeff{"prompt": "b"}\n', encoding="utf-8")
    assert [request.line for request in read_requests(tmp_path / "both.jsonl", TOKENIZER, make_config())] == [1, 3]


def test_what_a_message_says_about_its_training_stays(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": [*turns, turns[0] | {"name": "Ann"}]}))
    (request,) = read_requests(path, TOKENIZER, make_config())
    assert request.answered("c")["messages"] == [*turns, turns[0], {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "object"),
        ('{"text": "a"}', "object"),
        ('{"prompt": 3}', "text"),
        ('{"prompt": ""}', "empty"),
        ('{"prompt": "\\u200b "}', "empty"),
        ('{"prompt": "\\ud800"}', "Unicode"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "role"),
        (json.dumps({"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]}), "ends with a user"),
        (json.dumps({"prompt": "a" * 300}), "304 tokens.*context is 256"),
    ],
    ids=lambda text: text[:30],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: .*{message}") as error:
        read_requests(path, TOKENIZER, make_config(), "s")
    assert "\n" not in str(error.value)


def test_files_that_hold_no_requests(tmp_path):
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\n")
    for name, message in (("blank", "no requests"), ("binary", "binary:1"), ("missing", "can't read")):
        with pytest.raises(UserError, match=message):
            read_requests(tmp_path / name, TOKENIZER, make_config())


def test_each_line_is_the_conversation_with_an_answer(decoder, requests, tmp_path):
    output = tmp_path / "answers.jsonl"
    answer(decoder, requests, output)
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(line["line"], line["sample"]) for line in lines] == [(n, s) for n in (1, 3, 5, 7) for s in (0, 1)]
    assert lines[6]["messages"][:2] == lines[7]["messages"][:2] == [*SYSTEM, {"role": "user", "content": "why"}]
    expected = decoder.generate(
        [request.ids for request in requests for _ in range(2)],
        dataclasses.replace(OPTIONS, stop_ids=(256,), forbidden_ids=(257, 258, 259)),
        batch_size=2,
    )
    for line, ids in zip(lines, expected, strict=True):
        assert line["messages"][-1] == {"role": "assistant", "content": TOKENIZER.decode(ids)}
        assert (line["tokens"], line["finish"]) == (len(ids), "length" if len(ids) == 12 else "stop")
    assert {line["finish"] for line in lines} == {"length", "stop"}
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "answers.jsonl"}


def interrupt_after(monkeypatch, n_batches: int, error: BaseException) -> None:
    generate, calls = Decoder.generate, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) > n_batches:
            raise error
        return generate(self, *arguments, **options)

    monkeypatch.setattr(Decoder, "generate", interrupted)


@pytest.mark.parametrize("tear", [0, 1, 200, 10_000], ids=lambda n: f"torn_by_{n}_bytes")
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted("terminated", 143)], ids=repr)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    decoder, requests, tmp_path, monkeypatch, capsys, tear, stop
):
    whole, output, partial = (tmp_path / name for name in ("whole", "out", "out.partial"))
    answer(decoder, requests, whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, stop)
        with pytest.raises(Interrupted, match="same command resumes") as end:
            answer(decoder, requests, output)
    assert end.value.exit_code == (143 if isinstance(stop, Interrupted) else 130)
    assert not output.exists() and len(partial.read_bytes().splitlines()) == 1 + 4
    partial.write_bytes(partial.read_bytes()[: -tear or None])
    capsys.readouterr()
    answer(decoder, requests, output)
    assert output.read_bytes() == whole.read_bytes() and not partial.exists()
    expected = {0: "resuming after 4", 1: "resuming after 2", 200: "resuming after 2", 10_000: "answers 8/8"}[tear]
    assert capsys.readouterr().err.startswith(expected)


def test_a_run_left_before_its_last_step(decoder, requests, tmp_path, monkeypatch):
    """All answers are there, but the output is not yet in its place."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    answer(decoder, requests, whole)
    with monkeypatch.context() as patch:
        patch.setattr(resumable, "_finish", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            answer(decoder, requests, output)
    answer(decoder, requests, output)
    assert output.read_bytes() == whole.read_bytes()


def test_a_partial_output_of_other_settings_is_refused(decoder, requests, tmp_path, monkeypatch):
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            answer(decoder, requests, output)
    before = partial.read_bytes()
    other = make_decoder(ends=False)
    for changed, call in {
        "temperature, seed": lambda: answer(
            decoder, requests, output, dataclasses.replace(OPTIONS, temperature=0.5, seed=1)
        ),
        "batch_size": lambda: answer(decoder, requests, output, batch_size=4),
        "num_samples": lambda: answer(decoder, requests, output, num_samples=3),
        "input": lambda: answer(decoder, requests[1:], output),
        "model": lambda: answer(other, requests, output),
    }.items():
        with pytest.raises(UserError, match=f"another {changed};"):
            call()
    assert partial.read_bytes() == before


@pytest.mark.parametrize("content", [b"mine", b"mine\n", b"[]\n", b'{"a": 1}\n{}\n'])
def test_a_file_of_the_user_in_the_partial_outputs_place_is_left_alone(decoder, requests, tmp_path, content):
    (tmp_path / "out.partial").write_bytes(content)
    with pytest.raises(UserError, match=r"out\.partial is not the partial output"):
        answer(decoder, requests, tmp_path / "out")
    assert (tmp_path / "out.partial").read_bytes() == content


def test_a_full_disk_is_no_traceback(decoder, requests, monkeypatch):
    with pytest.raises(RunError, match="can't write"):
        answer(decoder, requests, Path("/nowhere/out"))
