"""Pairs of a tiny model's own answers: which they are, what is left out, and runs that are interrupted."""

import dataclasses
import itertools
import json
import signal
from argparse import Namespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_decoder, make_model_directory, make_tokenizer, save_model

from tinysft_jax import console, preferences
from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import Interrupted, UserError
from tinysft_jax.data import prepare
from tinysft_jax.data.store import PreparedData
from tinysft_jax.parameters import make_model
from tinysft_jax.preferences import Sample, draw_questions, make_pair
from tinysft_jax.rewards import metrics
from tinysft_jax.rewards.cases import Case
from tinysft_jax.rewards.registry import DEFAULT_REWARDS, Answered, parse_weights, score
from tinysft_jax.sampling import resumable
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions

pytestmark = pytest.mark.usefixtures("one_device")

QUESTIONS, SAMPLES, LENGTH = 9, 4, 24
SAMPLING = [f"--num_samples={SAMPLES}", f"--max_new_tokens={LENGTH}", "--batch_size=8"]


def prepared(directory, name, text, *options):
    (directory / name).write_text(text, encoding="utf-8")
    flags = [f"--input={directory / name}", f"--output={directory / 'data'}", "--bpe_ranks=256", "--workers=1"]
    prepare.main([*flags, "--valid_fraction=0.2", *options])
    return directory / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions about stories of two sentences, and for them; a requested word is a letter, which the model may say."""
    stories = [
        f'Words: {a}, {b}\nFeatures: Dialogue\nStory:\n{name} ran. "Hi," said {name}.\n<|endoftext|>\n'
        for name, a, b in itertools.product(("Tom", "Ann"), "aeiou", "nrt")
    ]
    return prepared(tmp_path_factory.mktemp("stories"), "stories.txt", "".join(stories), "--max_tokens=240")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_directory(tmp_path_factory.mktemp("models") / "ends", "control", ends=True)


@pytest.fixture(scope="module")
def flags(data, model):
    return [f"--checkpoint={model}", f"--data={data}", f"--questions={QUESTIONS}", *SAMPLING]


@pytest.fixture(scope="module")
def pairs(flags, tmp_path_factory):
    """A run that was not interrupted."""
    output = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    preferences.main([*flags, f"--output={output}"])
    return output


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pairs_are_the_best_and_the_worst_of_answers_that_the_rows_numbers_decide(pairs, data):
    """Against answers that are sampled question by question, and scored one by one."""
    tokenizer, decoder, weights = make_tokenizer("control"), make_decoder(), parse_weights(DEFAULT_REWARDS)
    options = SamplingOptions(LENGTH, 1.0, 0, stop_ids=(256,), forbidden_ids=(257, 258, 259))
    cases, _ = draw_questions(arguments(questions=QUESTIONS), PreparedData(data))
    expected = []
    for number, case in enumerate(cases):
        rows = decoder.generate([case.prompt] * SAMPLES, options, SAMPLES, first_row=number * SAMPLES)
        texts = [tokenizer.decode(ids) for ids in rows]
        scored = []
        for text in texts:
            answered = Answered(case, text, len(text) < LENGTH)  # a token is a byte
            scored.append((*score(weights, answered), text))
        ended = [each for each in scored if len(each[2]) < LENGTH]
        best = next((each for each in ended if each[0] == max(value for value, _, _ in ended)), scored[0])
        worst = next(each for each in scored if each[0] == min(value for value, _, _ in scored))
        if best[0] == worst[0] or not (best[2].strip() and worst[2].strip()):
            continue
        expected.append(
            {
                "prompt": [{"role": "user", "content": case.question}],
                "chosen": [{"role": "assistant", "content": best[2]}],
                "rejected": [{"role": "assistant", "content": worst[2]}],
                "task": case.task,
                "chosen_score": best[0],
                "rejected_score": worst[0],
                "chosen_reasons": best[1],
                "rejected_reasons": worst[1],
            }
        )
    found = lines_of(pairs)
    assert found == expected and 3 <= len(expected) < QUESTIONS
    assert list(found[0]) == list(expected[0]), "as TRL has them"
    assert len({line["task"] for line in found}) > 1
    assert len({json.dumps(line["chosen_reasons"]) for line in found}) > 1
    assert all(line["chosen_reasons"]["ends"] == 1 for line in found)
    assert {line["rejected_reasons"]["ends"] for line in found} >= {0}
    assert [path.name for path in pairs.parent.iterdir()] == ["pairs.jsonl"]


def arguments(**changes):
    return Namespace(**{"tasks": None, "split": "train", "questions": 0, "seed": 0} | changes)


def test_a_run_of_other_batches_gives_the_same_pairs(flags, pairs, tmp_path):
    preferences.main([*flags, f"--output={tmp_path / 'out'}", "--batch_size=4"])
    assert lines_of(tmp_path / "out") == lines_of(pairs)


def test_a_question_may_have_more_answers_than_a_batch(flags, tmp_path, monkeypatch):
    calls = []

    def generate(self, prompts, options, batch_size, first_row):
        calls.append((first_row, len(prompts), batch_size))
        return [[65]] * len(prompts)

    monkeypatch.setattr(Decoder, "generate", generate)
    preferences.main([*flags, f"--output={tmp_path / 'out'}", "--batch_size=3"])
    assert calls == [(SAMPLES * number, SAMPLES, 3) for number in range(QUESTIONS)]
    assert lines_of(tmp_path / "out") == [], "no answer is better than another"


def test_the_settings_reach_the_sampling(model, data, tmp_path, monkeypatch):
    """By default an answer has the room that the data give it."""
    found = []
    monkeypatch.setattr(preferences, "write_pairs", lambda *arguments: found.append(arguments[-1]) or [])
    command = [f"--checkpoint={model}", f"--data={data}", f"--output={tmp_path / 'out'}", "--questions=1"]
    given = ["--max_new_tokens=7", "--temperature=0.5", "--top_k=3", "--top_p=0.75", "--seed=2"]
    for flags in ([], given):
        preferences.main(command + flags)
    assert found == [SamplingOptions(240, 1.0, 0, 1.0), SamplingOptions(7, 0.5, 3, 0.75, seed=2)]


CASE = Case("words", "Use a.", "", {"words": ["a"]})


def sample(text, value, stopped=True):
    return Sample(text, stopped, value, {"words": value})


def pair_of(*samples, template="control", least_difference=0.0):
    return make_pair(CASE, samples, make_tokenizer(template), least_difference)


def test_the_first_of_equals_counts():
    pair = pair_of(sample("b", 0.5), sample("c", 1.0), sample("d", 0.25), sample("e", 1.0), sample("f", 0.25))
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("c", "d")
    assert (pair["chosen_score"], pair["rejected_score"]) == (1.0, 0.25)
    assert (pair["chosen_reasons"], pair["rejected_reasons"]) == ({"words": 1.0}, {"words": 0.25})


def test_an_answer_that_was_cut_off_is_never_chosen_and_may_be_rejected():
    pair = pair_of(sample("b", 1.0, False), sample("c", 0.75), sample("d", 0.0, False))
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("c", "d")
    assert pair_of(sample("b", 1.0, False), sample("c", 0.0))["left_out"] == preferences.SAME_SCORE


@pytest.mark.parametrize(
    ("samples", "options", "why"),
    [
        ([sample("b", None), sample("c", None)], {}, preferences.NO_REWARD),
        ([sample("b", 0.0, False), sample("c", 1.0, False)], {}, preferences.NONE_ENDED),
        ([sample("b", 0.5), sample("c", 0.5)], {}, preferences.SAME_SCORE),
        ([sample("b", 0.1 + 0.2), sample("c", 0.3)], {}, preferences.SAME_SCORE),
        ([sample("b", 0.8), sample("c", 0.5)], {"least_difference": 0.31}, preferences.CLOSE_SCORES),
        ([sample("b", 0.7), sample("c", 0.6)], {"least_difference": 0.1}, None),  # a little less, as numbers
        ([sample(" \u200b", 0.8), sample("c", 0.5)], {}, preferences.UNUSABLE),
        ([sample("b", 0.8), sample("", 0.5)], {}, preferences.UNUSABLE),
        ([sample("b", 0.8), sample("", 0.6), sample("c", 0.5)], {}, None),
        ([sample("b", 0.8), sample("<|user|>", 0.5)], {"template": "text"}, preferences.UNUSABLE),
        ([sample("b", 0.8), sample("<|user|>", 0.5)], {}, None),
    ],
)
def test_why_a_question_has_no_pair(samples, options, why):
    record = pair_of(*samples, **options)
    assert record.get("left_out") == why and record["task"] == "words"
    assert ("chosen" in record) == (why is None)


def test_the_summary():
    scores = {"chosen_score": 0.75, "rejected_score": 0.5}
    outcomes = [{"task": "words"} | scores, {"task": "words", "chosen_score": 0.25, "rejected_score": 0.0}]
    outcomes += [{"task": task, "left_out": why} for task, why in (("words", "x"), ("moral", "y"), ("moral", "x"))]
    assert [line.split() for line in preferences.summary(outcomes).splitlines()] == [
        ["task", "questions", "pairs", "chosen", "rejected"],
        ["moral", "2", "0"],
        ["words", "3", "2", "0.500", "0.250"],
        ["all", "5", "2", "0.500", "0.250"],
        ["left", "out,", "2:", "x"],
        ["left", "out,", "1:", "y"],
    ]


def test_questions_are_drawn_from_tasks_and_split(data):
    data = PreparedData(data)
    cases, left_out = draw_questions(arguments(tasks="story, words"), data)
    assert {case.task for case in cases} == {"story", "words"} and not left_out
    assert [case.task for case in cases] != sorted(case.task for case in cases)
    assert draw_questions(arguments(tasks="story, words", questions=5), data)[0] == cases[:5]
    assert draw_questions(arguments(tasks="story, words", seed=1), data)[0] != cases
    for split in ("train", "valid"):
        assert len(draw_questions(arguments(split=split), data)[0]) == len(data.split(split))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Of six questions, three can't be rebuilt: a system message, an earlier turn that is not learned, and both."""
    question, answer = {"role": "user", "content": "a or b?"}, {"role": "assistant", "content": "b"}
    earlier = [{"role": "user", "content": "c?"}, {"role": "assistant", "content": "d", "weight": 0}]
    system = [{"role": "system", "content": "s"}]
    chats = [[*before, question, answer] for before in ([], system, earlier, [], system + earlier, [])]
    text = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    return prepared(tmp_path_factory.mktemp("chats"), "chats.jsonl", text, "--valid_fraction=0", "--max_tokens=128")


def test_questions_that_can_not_be_rebuilt_are_left_out_and_counted(chats, model, tmp_path, monkeypatch, capsys):
    cases, left_out = draw_questions(arguments(), PreparedData(chats))
    assert [case.question for case in cases] == ["a or b?"] * 3
    assert left_out == [{"task": "chat", "left_out": preferences.OTHER_PROMPT}] * 3
    pair = {"task": "chat", "chosen_score": 1.0, "rejected_score": 0.0}
    monkeypatch.setattr(preferences, "write_pairs", lambda flags, cases, *_: [pair] * len(cases))
    preferences.main([f"--checkpoint={model}", f"--data={chats}", f"--output={tmp_path / 'out'}"])
    _, chat, total, reason, end = capsys.readouterr().out.splitlines()
    assert chat.split() == ["chat", "6", "3", "1.000", "0.000"] and chat[4:] == total.replace("all ", "chat")[4:]
    assert reason == f"left out, 3: {preferences.OTHER_PROMPT}"
    assert end == f"{tmp_path / 'out'}: 3 of 6 questions have a pair"


def test_data_without_a_question_that_can_be_asked(chat_data, tmp_path):
    """All have a system message of their own."""
    with pytest.raises(UserError, match=r"train has no question of chat that can be asked; of 2\d\d, the"):
        preferences.main(["--checkpoint=x", f"--data={chat_data}", f"--output={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())


def stop_after(monkeypatch, n_batches, stop):
    """Calls `stop` in place of the next batch."""
    generate, calls = Decoder.generate, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        return stop() if len(calls) > n_batches else generate(self, *arguments, **options)

    monkeypatch.setattr(Decoder, "generate", interrupted)


@pytest.mark.parametrize(
    ("number", "code", "tear"), [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 1), (signal.SIGTERM, 143, 10_000)]
)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    flags, pairs, tmp_path, monkeypatch, capsys, number, code, tear
):
    """Two questions a batch. A run that was killed leaves a part of a line."""
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    found = []
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda: (found.append(partial.read_bytes()), signal.raise_signal(number)))
        with pytest.raises(SystemExit) as end:
            console.run(lambda: preferences.main([*flags, f"--output={output}"]))
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == code and line == f"stopped; the answers so far are in {partial}, the same command resumes"
    assert not output.exists() and len(partial.read_bytes().splitlines()) == 1 + 4, "also where there is no pair"
    assert found == [partial.read_bytes()], "a batch is in the file before the next is begun"
    partial.write_bytes(partial.read_bytes()[: -tear or None])
    preferences.main([*flags, f"--output={output}"])
    printed = capsys.readouterr()
    assert output.read_bytes() == pairs.read_bytes() and not partial.exists()
    assert printed.err.startswith({0: "resuming after 4 of 9", 1: "resuming after 2", 10_000: "questions 9/9"}[tear])
    table = [row.split() for row in printed.out.splitlines()]
    assert ["all", str(QUESTIONS), str(len(lines_of(pairs)))] in [row[:3] for row in table], "all questions count"


def test_a_run_left_before_its_last_step(flags, pairs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(resumable, "_finish", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            preferences.main([*flags, f"--output={tmp_path / 'out'}"])
    assert len((tmp_path / "out.partial").read_bytes().splitlines()) == 1 + QUESTIONS
    preferences.main([*flags, f"--output={tmp_path / 'out'}"])
    assert (tmp_path / "out").read_bytes() == pairs.read_bytes()


def test_other_settings_do_not_go_on_with_it_nor_does_a_second_run(flags, tmp_path, monkeypatch):
    output = f"--output={tmp_path / 'out'}"

    def second_run():
        with pytest.raises(UserError, match="another run of this command is writing"):
            preferences.main([*flags, output])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stop_after(patch, 1, second_run)
        with pytest.raises(Interrupted):
            preferences.main([*flags, output])
    before = (tmp_path / "out.partial").read_bytes()
    for flag, name in {
        "--num_samples=2": "num_samples",
        "--batch_size=4": "batch_size",
        "--rewards=words:1": "rewards",
        "--least_difference=0.1": "least_difference",
        "--temperature=0.5": "temperature",
        "--tasks=words": "questions",
        "--split=valid": "questions",
        "--max_new_tokens=8": "max_new_tokens",
        f"--checkpoint={make_model_directory(tmp_path / 'other', 'control')}": "model",
    }.items():
        with pytest.raises(UserError, match=rf"out\.partial was begun with another {name};"):
            preferences.main([*flags, output, flag])
    assert (tmp_path / "out.partial").read_bytes() == before and not (tmp_path / "out").exists()


def test_an_existing_output_is_replaced_only_when_told_and_only_at_the_end(flags, pairs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.write_text("mine")
    with pytest.raises(UserError, match="out exists; choose another --output or add --overwrite"):
        preferences.main([*flags, f"--output={output}"])
    with monkeypatch.context() as patch:
        stop_after(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            preferences.main([*flags, f"--output={output}", "--overwrite"])
    assert output.read_text() == "mine"
    preferences.main([*flags, f"--output={output}", "--overwrite"])
    assert output.read_bytes() == pairs.read_bytes()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_samples=1", "--num_samples is 1; it must be 2 or more"),
        ("--questions=-1", "--questions is -1"),
        ("--batch_size=0", "--batch_size is 0"),
        ("--max_new_tokens=0", "--max_new_tokens is 0"),
        ("--seed=-1", "--seed is -1"),
        ("--least_difference=1.5", "--least_difference is 1.5; it must be from 0 to 1"),
        ("--least_difference=nan", "--least_difference is nan"),
        ("--temperature=0", "--temperature is 0; it must be above 0, or all answers"),
        ("--temperature=-1", "temperature is -1.0"),
        ("--top_p=2", "top_p is 2.0"),
        ("--top_k=-1", "top_k is -1"),
        ("--rewards=word:1", "rewards can't be 'word:1'"),
        ("--tasks=words,poem", "has no task 'poem'; choose from summary, "),
        ("--tasks=", "has no task ''"),
        ("--tasks=moral", "train has no question of moral that can be asked$"),
        ("--split=test", "invalid choice: 'test'"),
        ("--data=nowhere", "nowhere is not a prepared data set"),
        ("--checkpoint=nowhere", "nowhere does not exist"),
        ("--output=nowhere/out", "there is no directory nowhere for --output"),
    ],
)
def test_mistakes_are_one_line(flags, tmp_path, monkeypatch, flag, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        preferences.main([*flags, "--output=out", flag])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_what_does_not_fit_together_is_refused(flags, data, tmp_path):
    output = f"--output={tmp_path / 'out'}"
    for template, context, message in (
        (None, 256, "has no chat template: it has not learned to answer"),
        ("text", 256, "has the chat template 'text', the data 'control'"),
        ("control", 128, "has a context of 128 tokens, and the data a conversation of"),
    ):
        other = make_model_directory(tmp_path / f"{template}", template, context)
        with pytest.raises(UserError, match=message):
            preferences.main([*flags, f"--checkpoint={other}", output])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_missing_library_is_said_before_the_work(flags, monkeypatch, tmp_path):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs simplemma; pip install -e '.\[eval\]'"):
        preferences.main([*flags, f"--output={tmp_path / 'out'}"])


def test_models_judge_answers(flags, data, model, tmp_path):
    """Fluency and a reward model's scores, against those of each answer by itself."""
    reward = tmp_path / "reward"
    description, params = open_model(model)
    head = {"score": np.random.default_rng(0).normal(size=description.config.dim).astype(np.float32)}
    config = dataclasses.replace(description.config, scalar_head=True)
    save_model(reward, params | head, dataclasses.replace(description, config=config))
    output = tmp_path / "pairs.jsonl"
    preferences.main([*flags, "--rewards=fluency:1,preferred:3", f"--reward_model={reward}", f"--output={output}"])
    language, judge = make_model(description.config, params), make_model(config, params | head)
    drawn = draw_questions(arguments(questions=QUESTIONS), PreparedData(data))[0]
    # Several stories may have been asked for with the same words.
    cases = {case.question: case for case in drawn if sum(case.question == other.question for other in drawn) == 1}
    tokenizer = make_tokenizer("control")

    def ending(answer: str) -> list[int]:
        return [tokenizer.eot_id] if len(answer) < LENGTH else []

    def padded(ids) -> jax.Array:  # one shape is compiled; what follows a token changes nothing before it
        return jnp.array([[*ids, *[0] * (description.config.max_seq_len - len(ids))]])

    scores, logits = jax.jit(lambda tokens: judge.scores(tokens)), jax.jit(lambda tokens: language(tokens))

    def last_score(ids) -> float:
        return float(scores(padded(ids))[0, len(ids) - 1])

    def mean_log_p(case, ids) -> float:
        log_p = np.asarray(jax.nn.log_softmax(logits(padded(ids))[0]))
        return np.mean([log_p[i - 1, ids[i]] for i in range(len(case.prompt), len(ids))])

    lines = [line for line in lines_of(output) if line["prompt"][0]["content"] in cases][:3]
    assert len(lines) == 3
    for line in lines:
        case = cases[line["prompt"][0]["content"]]
        own = last_score([*case.prompt, *case.target])
        for side in ("chosen", "rejected"):
            answer = line[side][0]["content"]
            ids = [*case.prompt, *tokenizer.encode_text(answer), *ending(answer)]
            difference = mean_log_p(case, ids) - mean_log_p(case, [*case.prompt, *case.target])
            reasons = line[f"{side}_reasons"]
            assert reasons["fluency"] == pytest.approx(min(np.exp(difference), 1), rel=1e-4)
            assert reasons["preferred"] == pytest.approx(1 / (1 + np.exp(own - last_score(ids))), rel=1e-4)
