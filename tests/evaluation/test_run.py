"""The command, from models and prepared data to a report."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_model_directory, save_model

from tinysft_jax import files
from tinysft_jax.checkpoints import load_model
from tinysft_jax.console import RunError, UserError
from tinysft_jax.data import prepare
from tinysft_jax.data.store import PreparedData
from tinysft_jax.evaluation import likelihood, run
from tinysft_jax.rewards import metrics
from tinysft_jax.rewards.cases import Answer, Case, answer_lines, draw_cases
from tinysft_jax.tokenizer import ChatTokenizer
from tinysft_jax.training.state import starting_model

FILES = {"report.json", "report.md", "report.png", "answers.jsonl"}


@pytest.fixture(scope="module")
def story_data(tmp_path_factory):
    """The tasks of a few embedded stories, in each template."""
    path = tmp_path_factory.mktemp("stories")
    options = ["--bpe_ranks=256", "--max_tokens=2048", "--workers=1"]
    for template in ("control", "text"):
        prepare.main(["--embedded=100", f"--output={path / template}", f"--template={template}", *options])
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One that ends its answers, and one that never does."""
    path = tmp_path_factory.mktemp("models")
    for name in ("ends", "talks"):
        make_model_directory(path / name, "control", 128, ends=name == "ends")
    return path


@pytest.fixture(scope="module")
def evaluated(models, chat_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation") / "out"
    flags = [f"--checkpoint={models / 'ends'}", f"--baseline={models / 'talks'}", f"--data={chat_data}", "--cases=12"]
    run.main([*flags, f"--output={output}", "--batch_size=4"])
    return output, flags


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def answers(directory, speaker):
    return [json.loads(line)[speaker]["text"] for line in (directory / "answers.jsonl").read_text().splitlines()]


def test_the_output(evaluated, chat_data, models):
    output, _ = evaluated
    assert content(output).keys() == FILES
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert not any(line["baseline"]["stopped"] for line in lines)
    assert any(line["model"]["stopped"] for line in lines)
    figures = json.loads((output / "report.json").read_text())["tasks"]["chat"]
    assert figures["stopped"]["baseline"]["value"] == 0
    assert figures["loss"]["difference"]["cases"] == 12
    assert figures["rouge_l"]["ground_truth"]["value"] == 1

    # The negative log-likelihoods, each from a forward pass of its own.
    data, model = PreparedData(chat_data), load_model(models / "ends")
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)))
    for line, case in zip(lines, draw_cases(data, 12), strict=True):
        assert (line["question"], line["ground_truth"]) == (case.question, case.ground_truth)
        ids = [*case.prompt, *case.target]
        log_p = forward(np.pad(ids, (0, 64 - len(ids))).astype(np.int32)[None])[0]
        nll = [-log_p[i - 1, ids[i]] for i in range(len(case.prompt), len(ids))]
        assert len(nll) == line["tokens"]
        assert line["model"]["nll"] == pytest.approx(float(np.sum(nll)), rel=1e-4)
        # Its context is 128, but the data's longest conversations have 64 tokens, and so much room has an answer.
        assert len(case.prompt) + len(line["baseline"]["text"]) == 64


def test_the_same_seed_gives_the_same_report_and_another_one_other_cases(evaluated, tmp_path):
    output, flags = evaluated
    run.main([*flags, f"--output={tmp_path / 'again'}", "--batch_size=4"])
    assert content(tmp_path / "again") == content(output)
    run.main([*flags, f"--output={tmp_path / 'other'}", "--batch_size=4", "--seed=1"])
    assert content(tmp_path / "other")["answers.jsonl"] != content(output)["answers.jsonl"]


@pytest.mark.slow
def test_drawn_answers_follow_the_seed(evaluated, tmp_path):
    output, flags = evaluated
    for name in ("once", "twice"):
        run.main([*flags, f"--output={tmp_path / name}", "--batch_size=4", "--temperature=1"])
    assert content(tmp_path / "once") == content(tmp_path / "twice")
    drawn, greedy = (answers(directory, "baseline") for directory in (tmp_path / "once", output))
    assert drawn != greedy and len(set(drawn)) > len(drawn) / 2


def test_a_model_without_a_template_is_asked_as_fine_tuning_starts_from_it(chat_data, evaluated, tmp_path):
    """Its table grows by the markers' rows; a work directory's step 0 has the same."""
    plain = make_model_directory(tmp_path / "plain", None, 128)
    output, flags = tmp_path / "out", evaluated[1]
    run.main([flags[0], f"--baseline={plain}", f"--data={chat_data}", "--cases=12", f"--output={output}"])
    description, params = starting_model(str(plain), {}, PreparedData(chat_data))
    save_model(tmp_path / "start", params, description)
    run.main([f"--checkpoint={tmp_path / 'start'}", *flags[2:], f"--output={tmp_path / 'again'}"])
    asked, started = (
        [line[speaker] for line in map(json.loads, (directory / "answers.jsonl").read_text().splitlines())]
        for directory, speaker in ((output, "baseline"), (tmp_path / "again", "model"))
    )
    assert asked == started and len({answer["nll"] for answer in asked}) > 1


def test_a_judge_reads_the_answers_and_the_ground_truth(evaluated, chat_data, models, tmp_path):
    """With the same tokenizer, in the order of the columns; a blank answer is left out of its column alone."""
    _, flags = evaluated
    run.main([*flags, f"--output={tmp_path / 'out'}", "--batch_size=4", f"--judge={models / 'talks'}"])
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    questions = [line["question"] for line in lines]
    figures, judge = report["tasks"]["chat"]["fluency"], likelihood.Judge(str(models / "talks"))
    assert report["settings"]["judge"] == str(models / "talks")
    assert figures.keys() == {"model", "baseline", "difference", "ground_truth"}
    for column in ("model", "baseline", "ground_truth"):
        texts = [line[column] if column == "ground_truth" else line[column]["text"] for line in lines]
        scores = [value for value in judge.fluency(texts, 4, questions) if value is not None]
        assert figures[column]["value"] == pytest.approx(sum(scores) / len(scores))
        assert figures[column]["cases"] == len(scores)
    others = {name: columns for name, columns in report["tasks"]["chat"].items() if name != "fluency"}
    assert others == json.loads((evaluated[0] / "report.json").read_text())["tasks"]["chat"]
    assert "- **fluency**: " in (tmp_path / "out" / "report.md").read_text()


def test_several_checkpoints_answer_the_same_cases(evaluated, chat_data, models, tmp_path, capsys):
    """Each as it does alone, and is rewarded as its answers are."""
    flags = [f"--checkpoint={models / name}" for name in ("talks", "ends")]
    flags += [f"--data={chat_data}", "--cases=12", "--batch_size=4", "--rewards=ends:1,answer:3", "--show=1"]
    run.main([*flags, f"--output={tmp_path / 'out'}"])
    for name, speaker in (("ends", "model"), ("talks", "baseline")):
        assert answers(tmp_path / "out", name) == answers(evaluated[0], speaker)
    report, alone = (json.loads((of / "report.json").read_text()) for of in (tmp_path / "out", evaluated[0]))
    assert report["settings"] | {"talks": str(models / "talks"), "rewards": "ends:1,answer:3"} == report["settings"]
    figures, others = report["tasks"]["chat"], alone["tasks"]["chat"]
    assert figures["loss"].keys() == {"talks", "ends", "ends - talks"} and "columns" not in alone
    for metric, of in others.items():
        assert of.get("model") == figures[metric].get("ends") and of.get("difference") == figures[metric].get(
            "ends - talks"
        )
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    for name in ("talks", "ends"):
        worth = []
        for line in lines:
            case = Case("chat", line["question"], line["ground_truth"])
            included, stopped = metrics.answer_included(case, line[name]["text"]), line[name]["stopped"]
            worth.append(stopped if included is None else (stopped + 3 * included) / 4)
        assert figures["reward"][name]["value"] == pytest.approx(np.mean(worth)) and len(set(worth)) <= 4
    assert figures["reward"]["ground_truth"]["value"] == 1 > figures["reward"]["ends"]["value"] > 0
    said = capsys.readouterr().out
    assert "\nTalks: " in said and "| reward " in said and "- **reward**: " in said


@pytest.mark.parametrize(
    ("paths", "baseline", "names"),
    [
        (["runs/sft", "runs/grpo/"], "runs/dpo", ["sft", "grpo", "baseline"]),
        (["a/sft/model", "b/sft/model", "c/dpo"], None, ["a/sft/model", "b/sft/model", "dpo"]),
        (["a/x", "x"], "b/y", ["a/x", "HERE/x", "baseline"]),
        (["a/x", "b/x.pt"], "c/x", ["a/x", "x.pt", "baseline"]),
        (["runs/baseline", "runs/model", "runs/data"], None, ["runs/baseline", "runs/model", "runs/data"]),
        (["a b", "./ab"], None, ["a b", "ab"]),
        (["runs/sft"], "runs/sft", ["model", "baseline"]),
    ],
)
def test_checkpoints_are_called_by_the_ends_of_their_paths(paths, baseline, names, tmp_path, monkeypatch):
    (tmp_path / "HERE").mkdir()
    monkeypatch.chdir(tmp_path / "HERE")
    assert list(run.speakers(paths, baseline).items()) == list(
        zip(names, [*paths, *([baseline] if baseline else [])], strict=True)
    )


@pytest.mark.parametrize("template", ["control", "text"])
def test_questions_are_those_of_the_data(story_data, template):
    """Task by task, with the prompt's ids and what the data answers."""
    data = PreparedData(story_data / template)
    tokenizer = ChatTokenizer.from_description(data.description)
    cases = draw_cases(data, 3)
    tasks = [case.task for case in cases]
    assert tasks == sorted(tasks, key=data.tasks.index) and max(map(tasks.count, tasks)) == 3
    for case in cases:
        messages = [{"role": "user", "content": case.question}, {"role": "assistant", "content": case.ground_truth}]
        ids, supervised = tokenizer.encode_chat(messages)
        assert ids.tolist() == [*case.prompt, *case.target]
        assert supervised.tolist() == [False] * len(case.prompt) + [True] * len(case.target)
        assert bool(case.conditions) == (case.task in ("words", "story"))
        assert all(word in case.question for word in case.conditions.get("words", ()))
    assert draw_cases(data, 1) == [
        case for case, before in zip(cases, [None, *tasks], strict=False) if case.task != before
    ]


def test_questions_of_the_training_split(story_data):
    """Where conversations have follow-ups, whose answers are supervised, too: the first counts."""
    data = PreparedData(story_data / "control")
    cases = draw_cases(data, 2, split="train")
    assert len(cases) == 2 * len(data.tasks) and not {case.question for case in cases} & {
        case.question for case in draw_cases(data, 100)
    }
    starts = {tuple(case.prompt + case.target) for case in cases}
    split = data.split("train")
    whole = [split.conversation(i)[0].tolist() for i in range(len(split))]
    assert starts <= {tuple(ids[: len(start)]) for ids in whole for start in starts}
    assert starts - set(map(tuple, whole))


def test_of_a_longer_chat_the_first_answer_counts(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = [{"role": "system", "content": "s"}, *turns, {"role": "user", "content": "c"}, turns[1]]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 3)
    options = ["--bpe_ranks=256", "--valid_fraction=0.999", "--workers=1"]
    prepare.main([f"--input={tmp_path / 'chats.jsonl'}", f"--output={tmp_path / 'data'}", *options])
    data = PreparedData(tmp_path / "data")
    tokenizer = ChatTokenizer.from_description(data.description)
    (case,) = draw_cases(data, 1)
    assert (case.question, case.ground_truth, case.conditions) == ("a", "b", {})
    with pytest.raises(UserError, match=r"data has no training data; prepare it with a smaller --valid_fraction"):
        draw_cases(data, 1, split="train")
    assert tokenizer.decode([*case.prompt, *case.target]) == "<|system|>s<|user|>a<|assistant|>b<|endoftext|>"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=x"], "required: --checkpoint"),
        (["--checkpoint=x", "--data=x", "--cases=0"], "--cases is 0"),
        (["--checkpoint=x", "--data=x", "--seed=-1"], "--seed is -1"),
        (["--checkpoint=x", "--data=x", "--batch_size=0"], "--batch_size is 0"),
        (["--checkpoint=x", "--data=x", "--show=-1"], "--show is -1"),
        (["--checkpoint=x", "--data=nowhere"], "nowhere is not a prepared data set"),
        (["--checkpoint=a/x", "--checkpoint=y", "--checkpoint=./a/x/", "--data=x"], "a/x is given twice; give each"),
        (["--checkpoint=x", "--checkpoint=y", "--baseline=y", "--data=x"], "y is given twice; give each model once$"),
        (["--checkpoint=x", "--data=x", "--rewards=words"], "rewards can't be 'words'"),
        (["--checkpoint=x", "--data=x", "--rewards="], "rewards can't be ''"),
    ],
)
def test_mistakes_are_one_line(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run.main([*flags, f"--output={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())


def test_tasks_can_be_chosen(models, chat_data, story_data, tmp_path):
    data = PreparedData(story_data / "control")
    chosen, every = draw_cases(data, 2, tasks="story, words"), draw_cases(data, 2)
    assert chosen == [case for case in every if case.task in ("story", "words")] and len(chosen) == 4 < len(every)
    flags = [f"--checkpoint={models / 'ends'}", f"--data={chat_data}", "--cases=2", f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"has no task 'wit'; choose from chat"):
        run.main([*flags, "--tasks=chat,wit"])
    run.main([*flags, "--tasks=chat"])
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["tasks"] == "chat"


def test_what_does_not_fit_together_is_refused(models, chat_data, story_data, evaluated, tmp_path):
    output = f"--output={tmp_path / 'out'}"
    with pytest.raises(UserError, match="exists; choose another --output"):
        run.main([f"--checkpoint={models / 'ends'}", f"--data={chat_data}", f"--output={evaluated[0]}"])
    with pytest.raises(UserError, match="has the chat template 'control'"):
        run.main([f"--checkpoint={models / 'ends'}", f"--data={story_data / 'text'}", output])
    with pytest.raises(UserError, match="nowhere does not exist; give a work directory"):
        run.main([f"--checkpoint={models / 'ends'}", f"--data={chat_data}", "--judge=nowhere", output])
    with pytest.raises(UserError, match="has a context of 128 tokens, and the data a conversation of"):
        run.main([f"--checkpoint={models / 'ends'}", f"--data={story_data / 'control'}", output])
    assert not list(tmp_path.iterdir())


def test_data_without_requests_are_refused(fixtures, tmp_path):
    with pytest.raises(UserError, match="without requests; prepare it again"):
        run.main(["--checkpoint=x", f"--data={fixtures / 'data_version_1'}", f"--output={tmp_path / 'out'}"])


def test_several_data_sets_are_reported_one_by_one(models, chat_data, tmp_path):
    """Under their directories' names; the weights don't matter."""
    chats = chat_data.parent / "chats.jsonl"
    options = ["--bpe_ranks=256", "--max_tokens=64", "--valid_fraction=0.5", "--workers=1", "--limit=20"]
    prepare.main([f"--input={chats}", f"--output={tmp_path / 'few'}", *options])
    (tmp_path / "many").symlink_to(chat_data)
    data = f"{tmp_path / 'few'}=1,{tmp_path / 'many'}=5"
    run.main([f"--checkpoint={models / 'ends'}", f"--data={data}", f"--output={tmp_path / 'out'}", "--cases=3"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["data"] == data and [*report["tasks"]] == ["few/chat", "many/chat"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [line["data"] for line in lines] == ["few"] * 3 + ["many"] * 3 and {line["task"] for line in lines} == {
        "chat"
    }
    cases = draw_cases(PreparedData(tmp_path / "few"), 3)
    assert [line["ground_truth"] for line in lines[:3]] == [case.ground_truth for case in cases]


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out exists; choose another --output or add --overwrite$"):
        run.main(["--checkpoint=x", "--data=nowhere", f"--output={tmp_path / 'out'}"])


def test_plain_text_has_no_questions(tmp_path):
    prepare.main(["--embedded=60", f"--output={tmp_path / 'data'}", "--format=text", "--bpe_ranks=256", "--workers=1"])
    with pytest.raises(UserError, match="holds plain text"):
        run.main(["--checkpoint=x", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"])


def test_a_diverged_model_ends_the_run(models, chat_data, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "log_probs_under", lambda _: lambda model, batch: jnp.full(batch["tokens"].shape, jnp.nan))
    with pytest.raises(RunError, match="diverged or is damaged"):
        run.main([f"--checkpoint={models / 'ends'}", f"--data={chat_data}", f"--output={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_exit_code_of_a_mistake(tmp_path):
    command = [sys.executable, "-m", "tinysft_jax.evaluation.run", f"--output={tmp_path / 'out'}"]
    done = subprocess.run([*command, "--checkpoint=x", "--data=nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: nowhere is not a prepared data set") and done.stderr.count("\n") == 1


def test_a_missing_library_is_said_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs simplemma; pip install -e '.\[eval\]'"):
        run.main(["--checkpoint=x", "--data=nowhere", f"--output={tmp_path / 'out'}"])


def test_chats_of_version_1_can_be_evaluated(models, chat_data, evaluated, tmp_path):
    """It differs from version 2 in the requests, which chats don't have."""
    data = shutil.copytree(chat_data, tmp_path / "data")
    description = json.loads((data / "data.json").read_text()) | {"format_version": 1}
    del description["dtype"], description["tokenizer_hash"]
    files.write_json(data / "data.json", description)
    files.write_manifest(data)
    flags = [f"--checkpoint={models / 'ends'}", f"--data={data}", f"--output={tmp_path / 'out'}", "--cases=12"]
    run.main([*flags, "--batch_size=4"])
    assert answers(tmp_path / "out", "model") == answers(evaluated[0], "model")


def test_answers_survive_the_file(tmp_path):
    """Also where they hold what some take for the end of a line."""
    said, case = 'a\n"\u2028\x85ü', Case("chat", "?\u2028", "truth", target=[1, 2])
    written = answer_lines([case] * 2, {"model": [Answer(said, True, 1.5)] * 2})
    files.write_json_lines(tmp_path / "answers.jsonl", written)
    lines = files.read_json_lines(tmp_path / "answers.jsonl")
    answer = {"text": said, "stopped": True, "nll": 1.5}
    asked = {"task": "chat", "question": "?\u2028", "conditions": {}, "ground_truth": "truth", "tokens": 2}
    assert lines == [asked | {"model": answer}] * 2


def test_examples_come_round_by_round():
    cases = [Case("moral", "1", ""), Case("moral", "2", ""), Case("moral", "3", ""), Case("words", "4", "")]
    assert run.examples(cases, 3) == [0, 3, 1]
    assert run.examples(cases, 0) == [] and len(run.examples(cases, 9)) == 4


def test_a_transcript_has_all_answers():
    answers = {"model": Answer("said", True, 1.0), "baseline": Answer("before", True, 1.0)}
    text = run.transcript(Case("words", "Use cat.", "truth"), answers)
    assert text == "--- words\nQuestion: Use cat.\nModel: said\nBaseline: before\nData: truth"
