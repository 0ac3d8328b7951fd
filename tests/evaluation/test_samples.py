import numpy as np
import pytest
from flax import nnx

from tinysft_jax.data import prepare
from tinysft_jax.data.dataset import PreparedData
from tinysft_jax.errors import UserError
from tinysft_jax.evaluation import samples
from tinysft_jax.model import GPT, GPTConfig
from tinysft_jax.model_directory import ModelDescription, save_model
from tinysft_jax.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def story_data(tmp_path_factory):
    """The tasks of a few embedded stories."""
    path = tmp_path_factory.mktemp("stories") / "data"
    options = ["--bpe_ranks=512", "--max_tokens=1024", "--workers=1"]
    prepare.main(["--embedded=200", f"--output={path}", *options])
    return path


def test_cases_are_conversations_of_different_tasks(story_data):
    data = PreparedData(story_data)
    cases = samples.held_out_cases(data, len(data.tasks))
    assert {case.task for case in cases} == set(data.tasks)
    tokenizer, split = ChatTokenizer.from_description(data.description), data.split("valid")
    stored = [split.conversation(index)[0].tolist() for index in range(len(split))]
    for case in cases:
        assert [*case.prompt, *case.answer, tokenizer.eot_id] in stored
        assert tokenizer.decode(case.prompt).endswith("<|assistant|>")
        assert "<|" not in tokenizer.decode(case.answer)


def test_the_command_shows_them_with_the_models_answers(story_data, tmp_path, capsys):
    tokenizer = ChatTokenizer("control", 512)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, dim=8, n_layers=1, n_heads=1, max_seq_len=1024)
    params = nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0))))
    # All rows of the table alike, but for end-of-text: greedy decoding stops at once.
    table = np.zeros((config.padded_vocab_size, 8), np.float32)
    table[tokenizer.eot_id] = 1
    params["tok_emb"]["embedding"] = table
    params["ln_f"]["bias"] = np.ones(8, np.float32)
    save_model(tmp_path / "model", params, ModelDescription(config, **tokenizer.description(), source={}))
    samples.main([f"--checkpoint={tmp_path / 'model'}", f"--data={story_data}", "--count=2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("Model:")] == ["Model: "] * 2
    assert sum(line.startswith("--- ") for line in lines) == sum(line.startswith("Data: ") for line in lines) == 2


def test_a_model_of_another_language_is_refused(story_data, chat_data, tmp_path):
    tokenizer = ChatTokenizer("control", 256)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, dim=8, n_layers=1, n_heads=1, max_seq_len=64)
    params = nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0))))
    save_model(tmp_path / "model", params, ModelDescription(config, **tokenizer.description(), source={}))
    with pytest.raises(UserError, match="different tokenizers"):
        samples.main([f"--checkpoint={tmp_path / 'model'}", f"--data={story_data}"])
