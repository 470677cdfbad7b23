"""Memory of steps side by side: predicted where there is no room, measured where there is, with the paper's beside."""

import json
from pathlib import Path

import pytest

from plugbridge.bench import reproduce
from plugbridge.bench.memory import Count, count_shape, rows_of, write_counts
from plugbridge.bench.memory_page import MEMORY, draw_memory, memory_page, paper_bytes
from plugbridge.memory.shapes import PAPER, Shape, gpt2, t5
from plugbridge.progress import Silent

TINY = Shape("GPT2-XL", gpt2(16, 3, 2, 64, 32), gpt2(8, 2, 2, 64, 32), 2, 16, "Table 6")


def _counts(room: int, *methods: str) -> list[Count]:
    rows = [row for row in rows_of(TINY, "cpu") if row.method in methods]
    return count_shape(TINY, rows, room, "cpu", 1, "a command", Silent())


def test_without_room_everything_is_predicted_and_says_so() -> None:
    counts = {count.method: count for count in _counts(0, "LoRA", "full fine-tuning", "ours: LoRA, feedback")}
    assert not any(count.measured for count in counts.values())
    assert all(count.peak_bytes == count.predicted_bytes > 0 for count in counts.values())
    assert counts["full fine-tuning"].peak_bytes > counts["LoRA"].peak_bytes > counts["ours: LoRA, feedback"].peak_bytes


def test_with_room_a_step_runs_in_a_process_of_its_own() -> None:
    (count,) = _counts(1 << 40, "LoRA")
    assert count.measured
    assert count.seconds > 0
    assert count.peak_bytes > 0


def test_a_page_has_every_step_and_the_papers_number(tmp_path: Path) -> None:
    counts = _counts(0, "LoRA", "Adapter", "Ladder Side-Tuning")
    page = memory_page(counts, MEMORY, "a command")
    for count in counts:
        printed = PAPER["Table 6"][count.method]
        assert f"{printed:,}" in next(line for line in page.splitlines() if line.startswith(f"| {count.method} |"))
        assert paper_bytes(count) == printed
    write_counts(counts, tmp_path / "x.json")
    keys = {
        "model",
        "batch",
        "length",
        "method",
        "stage",
        "peak_bytes",
        "seconds",
        "measured",
        "ratio_to_large_bf16",
        "command",
    }
    assert all(keys <= row.keys() for row in json.loads((tmp_path / "x.json").read_text()))
    draw_memory(counts, [tmp_path / "x.png", tmp_path / "x.svg"])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_table_seven_is_reproduced_on_the_t5_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape("T5-3B", t5(16, 2, 2, 8, 32, 64), t5(8, 1, 2, 4, 16, 64), 1, 8, "Table 7")
    rows = [row for row in rows_of(shape, "cpu") if row.method == "LoRA"]
    monkeypatch.setattr(reproduce, "find_shapes", lambda _name: (TINY, shape))
    monkeypatch.setattr(reproduce, "rows_of", lambda _shape, _device: rows)
    monkeypatch.setattr(reproduce, "free_memory", lambda _device: 0)
    page = tmp_path / "table7.md"
    asked = reproduce.Asked("table7", None, True, "standalone", None, 0, (), None, tmp_path, page, False, "a command")
    text = "".join(reproduce.reproduce(asked, Silent(), lambda _run, _what: None))
    assert "## T5-3B, batch 1 x 8; the paper's Table 7 beside it" in text
    assert "52,134" in text
    assert all(page.with_suffix(ending).is_file() for ending in (".json", ".png", ".svg"))
