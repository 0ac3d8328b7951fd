import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from runs import tiny_config

from tinysft_jax.checkpoints import load_model, open_model, write_model
from tinysft_jax.console import UserError
from tinysft_jax.data import prepare
from tinysft_jax.data.store import PreparedData
from tinysft_jax.evaluation import run as evaluation
from tinysft_jax.training import loop

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def rewards(pair_data, tmp_path_factory):
    """Work directories of a reward model that has learned, and of one that has not."""
    directory = tmp_path_factory.mktemp("rewards")
    for name, steps in (("learned", 12), ("first", 1)):
        config = tiny_config(pair_data, objective="reward", train__max_steps=steps, optimizer__warmup_steps=1)
        loop.train(config, directory / name)
    return directory


def evaluate(output, data, checkpoint, *more):
    evaluation.main([f"--checkpoint={checkpoint}", f"--data={data}", f"--output={output}", *map(str, more)])
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    return json.loads((output / "report.json").read_text())["tasks"]["preference"], lines


def test_the_report_has_the_share_of_pairs_that_are_ranked_right(rewards, pair_data, tmp_path, capsys):
    options = (f"--baseline={rewards / 'first'}", "--cases=1000", "--batch_size=7")
    figures, lines = evaluate(tmp_path / "report", pair_data, rewards / "learned", *options)
    split, model = PreparedData(pair_data).split("valid"), load_model(rewards / "learned", reward=True)
    assert sorted(line["pair"] for line in lines) == list(range(len(split) // 2))
    for line in lines:
        for place, side in enumerate(("chosen", "rejected")):
            ids = split.conversation(2 * line["pair"] + place)[0].astype(np.int32)
            alone = float(model.scores(jnp.asarray(np.pad(ids, (0, 64 - len(ids)))[None]))[0, len(ids) - 1])
            assert line["model"][side] == pytest.approx(alone, abs=1e-5)
    right = np.mean([line["model"]["chosen"] > line["model"]["rejected"] for line in lines])
    found = figures["ranked_right"]["model"]
    assert found["value"] == right > 0.9 and found["low"] < right <= found["high"] and found["share"]
    first = np.mean([line["baseline"]["chosen"] > line["baseline"]["rejected"] for line in lines])
    assert figures["ranked_right"]["difference"]["value"] == pytest.approx(right - first)
    margins = [line["model"]["chosen"] - line["model"]["rejected"] for line in lines]
    assert figures["margin"]["model"]["value"] == pytest.approx(np.mean(margins))
    said = capsys.readouterr().out
    assert said == (tmp_path / "report" / "report.md").read_text() + "\n" and "ranked_right" in said
    assert (tmp_path / "report" / "report.png").exists()


def test_several_reward_models_are_ranked_in_one_table(rewards, pair_data, tmp_path):
    options = (f"--checkpoint={rewards / 'first'}", "--cases=9")
    figures, lines = evaluate(tmp_path / "report", pair_data, rewards / "learned", *options)
    assert list(figures["margin"]) == ["learned", "first", "first - learned"]
    first, learned = (
        [line[name]["chosen"] - line[name]["rejected"] for line in lines] for name in ("first", "learned")
    )
    difference = figures["margin"]["first - learned"]
    assert difference["value"] == pytest.approx(np.mean(first) - np.mean(learned)) and difference["value"] < 0
    assert "| first - learned |" in " ".join((tmp_path / "report" / "report.md").read_text().split())
    assert (tmp_path / "report" / "report.png").exists()


def test_fewer_cases_are_a_part_of_more(rewards, pair_data, tmp_path):
    few, more = (evaluate(tmp_path / str(n), pair_data, rewards / "learned", f"--cases={n}")[1] for n in (5, 9))
    assert [line["pair"] for line in few] == [line["pair"] for line in more[:5]] and len(more) == 9
    for one, other in zip(few, more, strict=False):  # packed otherwise: with other round-off
        assert one["model"] == pytest.approx(other["model"], abs=1e-5)
    assert sorted(line["pair"] for line in more) != list(range(9))  # random ones


def test_a_tie_is_not_ranked_right(rewards, pair_data, tmp_path):
    description, params = open_model(rewards / "learned", reward=True)
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", params | {"score": 0 * params["score"]}, description)
    figures, _ = evaluate(tmp_path / "report", pair_data, tmp_path / "model")
    assert figures["ranked_right"]["model"]["value"] == 0


def test_what_can_not_be_ranked_is_one_line(rewards, pair_data, chat_data, tmp_path):
    loop.train(tiny_config(chat_data, train__max_steps=1, optimizer__warmup_steps=1), tmp_path / "sft")
    lines, options = pair_data.parent / "pairs.jsonl", ["--max_tokens=64", "--workers=1", "--limit=50"]
    prepare.main(
        [f"--input={lines}", f"--output={tmp_path / 'foreign'}", "--bpe_ranks=257", "--valid_fraction=0.5", *options]
    )
    prepare.main(
        [f"--input={lines}", f"--output={tmp_path / 'whole'}", "--bpe_ranks=256", "--valid_fraction=0", *options]
    )
    for checkpoint, data, complaint, *more in (
        (rewards / "learned", chat_data, r"is a reward model: it scores answers, and gives none$"),
        (rewards / "learned", tmp_path / "whole", r"has no validation pairs; prepare it with a --valid_fraction$"),
        (rewards / "learned", tmp_path / "foreign", r"prepare the data with --bpe_ranks 256$"),
        (tmp_path / "sft", pair_data, r"is a language model; give a reward model$"),
        (rewards / "learned", pair_data, r"is a language model; give a reward", f"--baseline={tmp_path / 'sft'}"),
        (tmp_path / "sft", chat_data, r"is a reward model", f"--baseline={rewards / 'learned'}"),
        (tmp_path / "sft", chat_data, r"is a reward model", f"--judge={rewards / 'learned'}"),
        (
            rewards / "learned",
            pair_data,
            r"--judge, .* and --tasks are about",
            f"--judge={tmp_path / 'sft'}",
        ),
        (rewards / "learned", pair_data, r"--judge, .* and --tasks are about", "--show=1"),
        (rewards / "learned", pair_data, r"--judge, .* and --tasks are about", "--rewards=words:1"),
        (rewards / "learned", pair_data, r"--judge, .* and --tasks are about", "--tasks=preference"),
    ):
        with pytest.raises(UserError, match=complaint) as refusal:
            evaluate(tmp_path / "report", data, checkpoint, *more)
        assert "\n" not in str(refusal.value) and not (tmp_path / "report").exists()


def test_a_reward_model_does_not_pass_for_a_language_model(rewards, tmp_path):
    shutil.copytree((rewards / "learned" / "model").resolve(), tmp_path / "model")
    content = json.loads((tmp_path / "model" / "model.json").read_text())
    content["model"]["scalar_head"] = False
    (tmp_path / "model" / "model.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"does not fit model.json: score is float32\[16\], not expected"):
        open_model(tmp_path / "model")
