"""The ledger: parts add up, and the figures are those of the lengths."""

import io
import random
import statistics

from rich.console import Console

from tinysft_jax.data.ledger import NAMED_BAD_LINES, Ledger


def test_parts_add_up_to_the_whole():
    draw, whole, sum_of_parts = random.Random(0), Ledger(), Ledger()
    for part_number in range(5):
        part = Ledger()
        for ledger in (part, whole):
            draw.seed(part_number)
            for i in range(50):
                split, task = draw.choice(("train", "valid")), draw.choice("ab")
                ledger.read[split] += 1
                ledger.keep(split, task, draw.randint(1, 30), draw.randint(0, 9), draw.random() < 0.5)
                if draw.random() < 0.1:
                    ledger.skip(split, "torn", f"line {part_number}.{i}")
        sum_of_parts.add(part)
    assert sum_of_parts == whole
    assert len(whole.bad) == NAMED_BAD_LINES < whole.skipped.total()


def test_figures_of_lengths():
    draw, ledger = random.Random(1), Ledger()
    lengths = [draw.randint(1, 50) for _ in range(100)]
    for length in lengths:
        ledger.keep("train", "chat", length, length // 2, trimmed=length > 40)
    ledger.left_out["train", "chat", "too long"] = 7
    chat = ledger.to_json(("train",), ("chat", "none"))["splits"]["train"]["tasks"]["chat"]
    assert chat["tokens"] == {
        "total": sum(lengths),
        "supervised": sum(length // 2 for length in lengths),
        "mean": round(statistics.mean(lengths), 1),
        "median": statistics.median_low(lengths),
        "longest": max(lengths),
    }
    assert (chat["made"], chat["kept"], chat["left_out"]) == (107, 100, {"too long": 7})
    assert chat["trimmed"] == sum(length > 40 for length in lengths)


def test_the_tables_fit_a_narrow_terminal_and_name_all_that_was_left_out():
    ledger = Ledger()
    for split in ("train", "valid"):
        ledger.read[split] = 21_755_681
        ledger.lengths[split, "main_character", 512] = 12_345_678
        ledger.supervised[split, "main_character"] = 1_234_567_890
    ledger.skip("train", "no story")
    ledger.left_out["train", "moral", "longer than max_tokens"] = 3
    console = Console(width=80, record=True, file=io.StringIO())
    for table in ledger.tables(("train", "valid"), ("main_character", "moral")):
        console.print(table)
    text = console.export_text()
    assert "…" not in text and text.count("12,345,678") == 4
    assert text.count("6,320,987,136") == text.count("19.5%") == 2
    assert ledger.reasons() == ["skipped 1 records: no story", "left out 3 conversations: longer than max_tokens"]
