"""Batches: what their arrays hold, and that threads, workers and processes make the same ones."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from tinysft_jax.data.batches import BatchSource, batches, epoch_batches
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import PreparedData


@pytest.fixture(scope="module")
def split(chat_data):
    return PreparedData(chat_data).split("train")


@pytest.fixture(scope="module")
def source(split):
    return BatchSource(split, Packing(split.lengths, 128).epoch(), batch_size=4, seq_len=128)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def conversations_of(batch):
    """Every conversation of a batch as (ids, supervised ids), read back from its arrays."""
    for row in range(len(batch["tokens"])):
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            targets = batch["targets"][row][inside][batch["weights"][row][inside] > 0]
            yield tuple(batch["tokens"][row][inside]), tuple(targets)


def test_an_epoch_holds_every_conversation_once_with_its_supervision(split, source):
    seen = sorted(pair for batch in epoch_batches(source) for pair in conversations_of(batch))
    stored = (split.conversation(i) for i in range(len(split)))
    assert seen == sorted((tuple(ids), tuple(ids[supervised])) for ids, supervised in stored)


def test_targets_are_the_next_tokens_of_the_same_conversation(source):
    for batch in epoch_batches(source):
        for row in range(4):
            for i in np.flatnonzero(batch["weights"][row]):
                assert batch["targets"][row, i] == batch["tokens"][row, i + 1]
                assert batch["segment_ids"][row, i] == batch["segment_ids"][row, i + 1] > 0
                assert batch["positions"][row, i] + 1 == batch["positions"][row, i + 1]


def test_positions_restart_and_padding_is_empty(source):
    for batch in epoch_batches(source):
        starts = np.diff(batch["segment_ids"], axis=1, prepend=0) != 0
        assert np.all(batch["positions"][starts & (batch["segment_ids"] > 0)] == 0)
        padding = batch["segment_ids"] == 0
        for key in ("tokens", "positions", "targets", "weights"):
            assert np.all(batch[key][padding] == 0)


def test_reading_can_start_at_any_batch(source):
    everything = list(epoch_batches(source))
    assert len(everything) == len(source) > 5
    for start in (0, 3, len(source) - 1):
        rest = list(epoch_batches(source, start))
        assert len(rest) == len(everything) - start
        for one, other in zip(rest, everything[start:], strict=True):
            assert_same(one, other)


def test_parts_for_several_processes_make_up_the_batch(split, source):
    parts = [BatchSource(split, source.plan, 4, 128, part=(i, 2)) for i in range(2)]
    for index in range(len(source)):
        joined = {key: np.concatenate([part[index][key] for part in parts]) for key in source[index]}
        assert_same(joined, source[index])


@pytest.fixture(autouse=True, scope="module")
def parsed_flags():
    """Grain's workers ask absl's flags."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def test_workers_make_the_same_batches(source):
    plain, by_workers = list(epoch_batches(source, 2)), list(epoch_batches(source, 2, num_workers=2))
    assert len(plain) == len(by_workers)
    for one, other in zip(plain, by_workers, strict=True):
        assert_same(one, other)


def test_workers_end_with_the_iterator(source):
    before = multiprocessing.active_children()
    batches = epoch_batches(source, num_workers=1)
    next(batches)
    assert len(multiprocessing.active_children()) == len(before) + 1
    batches.close()
    assert multiprocessing.active_children() == before


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(chat_data, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"""
import multiprocessing, time
from absl import flags
from tinysft_jax.data.store import PreparedData
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.batches import BatchSource, epoch_batches

if __name__ == "__main__":
    flags.FLAGS(["program"])
    split = PreparedData({str(chat_data)!r}).split("train")
    batches = epoch_batches(BatchSource(split, Packing(split.lengths, 128).epoch(), 1, 128), num_workers=1)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
""")
    parent = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not _is_running(worker):
            break
        time.sleep(0.1)
    assert not _is_running(worker)


def _is_running(pid):
    """Not ended, and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_batches_is_the_short_way(chat_data, split):
    batch = next(iter(batches(chat_data, split="train", batch_size=2, seq_len=100, seed=1)))
    assert all(array.shape == (2, 100) for array in batch.values())
    assert_same(batch, BatchSource(split, Packing(split.lengths, 100).epoch(seed=1), 2, 100)[0])
