import contextlib
import json
import sys
import time

import jax
import pytest
from fake_wandb import FakeWandb
from runs import load_config
from tiny_model import FAMILIES, family

from tinysft_jax.console import Interrupted
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.parameters import model_parameter_shapes
from tinysft_jax.training import log as metrics
from tinysft_jax.training.log import Rates, RunLog, read_metrics, train_flops

CONFIG = GPTConfig(vocab_size=260, dim=16, n_layers=1, n_heads=2, max_seq_len=64)


def write_lines(workdir, kept_until, lines, mode="disabled", error=None):
    """A run's log of some lines, after those of steps up to `kept_until`; `error` ends it."""
    log = RunLog(load_config("sft"), workdir, CONFIG, 10)
    log.open(lambda line: line["step"] <= kept_until, {"config": {"wandb": {"mode": mode, "project": "p", "name": ""}}})
    with contextlib.suppress(Interrupted), log:
        for step, metrics in lines:
            log.write(step, metrics)
        if error:
            raise error


def test_wandb_resumes_the_same_run_and_learns_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    for error in (Interrupted("stopped", 143), None):
        write_lines(tmp_path, 0, [(3, {"lr": 0.5})], "offline", error)
    first, second = fake.started
    assert first["id"] == second["id"] and len(first["id"]) == 8 and first["resume"] == "allow"
    assert (first["mode"], first["project"], first["name"]) == ("offline", "p", tmp_path.name)
    assert fake.logged == [(3, {"sft/lr": 0.5})] * 2 and fake.finished == [143, 0]


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path):
    write_lines(tmp_path, 0, [(step, {"train_loss": step / 2}) for step in range(1, 6)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('3\n{"step": null}\n{}\n')  # damaged
        file.write('{"step": 6, "sft/tr')  # killed while writing
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    write_lines(tmp_path, 3, [(4, {"train_loss": 9.0})])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["sft/train_loss"] for line in lines] == [0.5, 1.0, 1.5, 9.0]


def test_rates_leave_out_compilation_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e6)
    rates = Rates(CONFIG, seq_len=50)
    assert rates.report() == {}
    now[0] = 30.0
    rates.count(100, 80, 8)  # compiled: starts the clock
    assert rates.report() == {}
    now[0] = 32.0
    rates.count(100, 90, 10)
    with rates.paused():
        now[0] = 60.0
    now[0] = 62.0
    rates.count(100, 70, 6)
    report = rates.report()
    assert report["tokens_per_second"] == pytest.approx(160 / 4)
    assert report["supervised_tokens_per_second"] == pytest.approx(16 / 4)
    assert report["padding_fraction"] == pytest.approx(0.2)
    assert report["mfu"] == pytest.approx(train_flops(CONFIG, 160, 16, 50) / 4 / 1e6)
    assert rates.report() == {}


def test_training_flops_by_hand():
    """One layer: 4·16² of attention, 3·16·64 of MLP, 2·16·(50/2) of scores a token; the head is 260·16."""
    assert train_flops(CONFIG, 10, 3, 50) == 6 * (10 * (1024 + 3072 + 800) + 3 * 4160)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_flops_are_6_per_parameter_that_multiplies(name):
    """Those of a layer for each token, those of the head for each supervised one; and scores of half a row's keys."""
    config = family(name)
    shapes = model_parameter_shapes(config)
    kernels = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(shapes["blocks"]) if path[-1].key == "kernel")
    scores = config.n_layers * 2 * config.n_heads * config.head_dim * 50 / 2
    assert train_flops(config, 10, 3, 50) == 6 * (10 * (kernels + scores) + 3 * 260 * 32)


def test_an_unknown_device_has_no_peak():
    assert metrics.peak_flops() is None
