import jax
import numpy as np
import pytest
from flax import nnx

from tinysft_jax.data.dataset import PreparedData
from tinysft_jax.model import GPT, GPTConfig
from tinysft_jax.sharding import make_mesh
from tinysft_jax.training.evaluate import Evaluator
from tinysft_jax.training.step import make_eval_step

CONFIG = GPTConfig(vocab_size=260, dim=32, n_layers=1, n_heads=2, max_seq_len=256)


def test_validation_loss_does_not_depend_on_batch_size_packing_or_mesh(chat_data):
    """Against the mean over all supervised tokens of all conversations, each computed alone."""
    data, model = PreparedData(chat_data), GPT(CONFIG, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    split = data.split("valid")
    nll = []
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)))
    for index in range(len(split)):
        ids, supervised = split.conversation(index)
        log_p = forward(np.pad(ids, (0, 64 - len(ids))).astype(np.int32)[None])[0]
        nll += [-log_p[i, ids[i + 1]] for i in range(len(ids) - 1) if supervised[i + 1]]
    for seq_len, batch_size, mesh_sizes in ((64, 8, (8, 1, 1)), (256, 8, (2, 2, 2)), (128, 16, (1, 1, 8))):
        mesh = make_mesh(*mesh_sizes)
        with jax.set_mesh(mesh):
            losses = Evaluator(data, batch_size, seq_len).losses(jax.jit(make_eval_step(graph)), params, mesh)
        assert losses == {"sft/val_loss": pytest.approx(np.mean(nll), rel=1e-5)}
