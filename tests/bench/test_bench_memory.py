"""Memory of steps side by side: predicted where there is no room, measured where there is, with the paper's beside."""

import json
import shutil
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

from plugbridge.bench import memory, reproduce
from plugbridge.bench.memory import Count, Machine, count_shape, read_counts, rows_of, write_counts
from plugbridge.bench.memory_figure import draw_steps, step_name
from plugbridge.bench.memory_page import MEMORY, REDUCTION, memory_page, named_runs, paper_bytes, paper_cells
from plugbridge.cli import main
from plugbridge.errors import ConfigError, RunError
from plugbridge.interrupts import ENDING
from plugbridge.memory.case import Case
from plugbridge.memory.measure import Measurement, lasting, run_here
from plugbridge.memory.predict import predict
from plugbridge.memory.rows import QLORA, Row, jobs
from plugbridge.memory.shapes import PAPER, Shape, gpt2, t5
from plugbridge.memory.steps import MakeStep
from plugbridge.memory.weights import RANDOM, keep_only, write_weights
from plugbridge.models import load_model
from plugbridge.progress import Silent

TINY = Shape("GPT2-XL", gpt2(16, 3, 2, 64, 32), gpt2(8, 2, 2, 64, 32), 2, 16, "Table 6")


def _counts(folder: Path, room: int, *methods: str, **changes: Any) -> list[Count]:
    rows = [row for row in rows_of(TINY, "cpu") if row.method in methods]
    machine = Machine(room, "cpu", 1, folder / "weights", **changes)
    return count_shape(TINY, rows, machine, folder / "counts.json", "a command", Silent())


def test_without_room_everything_is_predicted_and_says_so(tmp_path: Path) -> None:
    counts = {count.method: count for count in _counts(tmp_path, 0, "LoRA", "full fine-tuning", "ours: LoRA, feedback")}
    assert not any(count.measured for count in counts.values())
    assert all(count.peak_bytes == count.predicted_bytes > 0 for count in counts.values())
    assert counts["full fine-tuning"].peak_bytes > counts["LoRA"].peak_bytes > counts["ours: LoRA, feedback"].peak_bytes


def test_with_room_a_step_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    (row,) = [row for row in rows_of(TINY, "cpu") if (row.method, row.stage) == ("ours, streamed", "score (fisher)")]
    machine = Machine(1 << 40, "cpu", 1, tmp_path / "weights")
    (count,) = count_shape(TINY, [row], machine, tmp_path / "counts.json", "a command", Silent())
    assert count.measured
    assert count.seconds > 0
    assert count.peak_bytes > 0
    assert [folder.name for folder in (tmp_path / "weights").iterdir()] == ["gpt2-xl-f32"]


@pytest.mark.parametrize("moment", ["device", "first row", "second row", "page"])
def test_an_interrupt_is_a_line_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    asked: list[str] = []
    stop: str | None = moment

    def interrupted(*_given: Any) -> None:
        raise KeyboardInterrupt

    def measured(case: Case, _make: MakeStep, _threads: int) -> Measurement:
        if stop in ("first row", "second row") and len(asked) == ["first row", "second row"].index(stop):
            raise KeyboardInterrupt
        asked.append(str(case.config))
        return Measurement(2**20, 1.0)

    def bench() -> tuple[int, str, str]:
        words = ["plugbridge", "bench", "memory", "--out", str(tmp_path / "out"), "--budget", "1GB", "--minutes", "9"]
        monkeypatch.setattr(sys, "argv", words)
        before = {number: signal.getsignal(number) for number in ENDING}
        with pytest.raises(SystemExit) as left:
            main()
        for number, handler in before.items():
            signal.signal(number, handler)
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    rows = [row for row in rows_of(TINY, "cpu") if row.method in ("LoRA", "full fine-tuning")]
    monkeypatch.setattr(memory, "rows_of", lambda _shape, _device: rows)
    monkeypatch.setattr(memory, "measured", measured)
    monkeypatch.setattr("plugbridge.memory.shapes.find_shapes", lambda _name: [TINY])
    monkeypatch.setattr("plugbridge.cli.terminal.log_here", lambda quiet: None)  # pytest has the log
    with monkeypatch.context() as patch:
        if moment == "device":
            patch.setattr("plugbridge.models.pick_device", interrupted)
        if moment == "page":
            patch.setattr("plugbridge.bench.memory_page.memory_page", interrupted)
        code, out, err = bench()
    assert (code, out) == (130, "")
    assert err.endswith("\ninterrupted; run the same command again to resume\n")
    assert "Traceback" not in err
    done = {"device": 0, "first row": 0, "second row": 1, "page": 2}[moment]
    assert len(asked) == done
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert names <= {"memory.json"}
    kept = read_counts(tmp_path / "out" / "memory.json").values()
    assert [count.measured for count in kept] == [True] * done
    stop = None
    assert bench()[0] == 0
    assert len(asked) == 2  # what was measured is not measured again
    assert all(count.measured for count in read_counts(tmp_path / "out" / "memory.json").values())


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_qlora_is_measured_on_layers_that_are_quantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    library: Any = pytest.importorskip("bitsandbytes")
    seen: list[str] = []

    def here(case: Case, make: MakeStep, threads: int) -> Measurement:
        (model,) = make(case).held
        assert isinstance(model, PeftModel)
        base: Any = model.get_base_model()
        layers = {name for name, layer in base.named_modules() if isinstance(layer, library.nn.Linear4bit)}
        first = {"gpt2": "transformer.h.0.mlp.c_fc", "t5": "encoder.block.0.layer.0.SelfAttention.k"}[kind]
        assert first in layers
        assert all(layer.weight.dtype is torch.uint8 for layer in map(base.get_submodule, layers))
        assert base.is_gradient_checkpointing
        seen.extend(path.name for path in (tmp_path / "weights").iterdir())
        return run_here(case, make, threads)

    monkeypatch.setattr(memory, "measured", here)
    config = gpt2(64, 2, 1, 96, 32) if kind == "gpt2" else t5(64, 2, 1, 64, 64, 96)
    shape = Shape("wide enough for 4 bits", config, config, 2, 16)
    (row,) = [row for row in rows_of(shape, "cpu") if row.method == QLORA]
    (count,) = count_shape(
        shape, [row], Machine(1 << 40, "cpu", 1, tmp_path / "weights"), tmp_path / "counts.json", "", Silent()
    )
    assert (count.measured, count.failed) == (True, "")
    assert seen == ["wide-enough-for-4-bits-bf16"]


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Case] = []

    def measured(case: Case, _make: object, _threads: int) -> Measurement:
        asked.append(case)
        return Measurement(123, 4.0)

    monkeypatch.setattr(memory, "measured", measured)
    first = _counts(tmp_path, 1 << 40, "LoRA", "Adapter", only=("LoRA: train",))
    assert [(count.method, count.measured) for count in first] == [("Adapter", False), ("LoRA", True)]
    assert [count.peak_bytes for count in first if count.measured] == [123]
    assert _counts(tmp_path, 1 << 40, "LoRA", "Adapter", only=("LoRA",))[1].peak_bytes == 123
    assert len(asked) == 1
    _counts(tmp_path, 0, "Adapter")
    assert {key[3]: count.measured for key, count in read_counts(tmp_path / "counts.json").items()} == {
        "LoRA": True, "Adapter": False,
    }  # fmt: skip


def test_with_a_time_to_end_a_call_counts_a_row_at_least_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def predicted(shape: Shape, row: Row, *_: object) -> Count:
        asked.append(row.method)
        return Count(shape.name, shape.batch, shape.length, row.method, row.stage, 2, 2, 0.1, False, 1.0, "a command")

    monkeypatch.setattr(memory, "_predicted", predicted)
    rows, path = rows_of(TINY, "cpu"), tmp_path / "counts.json"

    def call(seconds: float, command: str = "a command") -> list[Count]:
        machine = Machine(0, "cpu", 1, tmp_path / "weights", until=time.monotonic() + seconds)
        return count_shape(TINY, rows, machine, path, command, Silent())

    (first,) = call(0)
    assert (first.method, first.stage) == ("ours, streamed, bf16", "score (fisher)")  # the targets are about it
    assert list(read_counts(path).values()) == [first]
    page = memory_page([first], MEMORY, "a later command")
    assert f"| {first.method} |" in page  # LoRA, the measure, is not there yet
    assert f"    {first.command}\n    a later command\n" in page
    assert [(count.method, count.stage) for count in call(3600)] == [(row.method, row.stage) for row in rows]
    assert len(asked) == len(rows)
    assert len(call(0, "another command")) == 1


STREAMED = ("ours, streamed", "ours, streamed, bf16")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Cases that were measured; nothing is."""
    cases: list[Case] = []

    def measured(case: Case, _make: object, _threads: int) -> Measurement:
        cases.append(case)
        return Measurement(123, 4.0)

    monkeypatch.setattr(memory, "measured", measured)
    return cases


def _soon() -> float:
    return time.monotonic() + 3600


def test_weights_are_on_disk_only_while_rows_need_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = tmp_path / "weights", list[list[str]]()
    (folder / ".left-by-a-call-that-was-killed.part").mkdir(parents=True)
    (folder / ".left-by-a-call-that-was-killed.part" / RANDOM).touch()

    def measured(case: Case, _make: object, _threads: int) -> Measurement:
        seen.append([path.name for path in folder.iterdir()])
        assert case.weights == str(folder / seen[-1][0])
        return Measurement(123, 4.0)

    monkeypatch.setattr(memory, "measured", measured)
    _counts(tmp_path, 1 << 40, *STREAMED, keep_weights=False, until=_soon())
    half = [["gpt2-xl-bf16"]] * (len(seen) // 2)
    assert seen == half + [["gpt2-xl-f32"]] * len(half)
    assert len(half) > 2
    assert not list(folder.iterdir())


def test_weights_stay_for_rows_that_are_left(tmp_path: Path, asked: list[Case]) -> None:
    _counts(tmp_path, 1 << 40, *STREAMED, keep_weights=False, until=0.0)
    assert len(asked) == 1
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["gpt2-xl-bf16"]
    _counts(tmp_path, 1 << 40, *STREAMED)
    assert len(list((tmp_path / "weights").iterdir())) == 2


def test_a_row_without_room_on_disk_stays_predicted(
    tmp_path: Path, asked: list[Case], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=10))
    counts = _counts(tmp_path, 1 << 40, "LoRA", "ours, streamed")
    assert {count.method for count in counts if count.measured} == {"LoRA"}
    assert len(asked) == 1
    assert all("GB for random weights, 0.0 GB are free" in c.failed for c in counts if not c.measured)
    assert "GPT2-XL, ours, streamed: prune stays predicted: RunError: " in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (BrokenProcessPool("terminated\nabruptly"), "BrokenProcessPool: terminated"),
        (MemoryError(), "MemoryError: "),
        (TypeError("a bug"), "TypeError: a bug"),
    ],
)
def test_a_row_that_fails_stays_predicted_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, told: str
) -> None:
    tried: list[str] = []

    def measured(case: Case, _make: object, _threads: int) -> Measurement:
        tried.append(case.method.name)
        if case.method.name == "adapter":
            raise error
        return Measurement(123, 4.0)

    monkeypatch.setattr(memory, "measured", measured)

    def call(**changes: Any) -> dict[str, Count]:
        return {count.method: count for count in _counts(tmp_path, 1 << 40, "Adapter", "LoRA", **changes)}

    counts = call(until=_soon())
    assert (counts["LoRA"].measured, counts["LoRA"].failed) == (True, "")
    assert (counts["Adapter"].measured, counts["Adapter"].failed) == (False, told)
    assert counts["Adapter"].peak_bytes == counts["Adapter"].predicted_bytes
    assert f"GPT2-XL, Adapter: train stays predicted: {told}" in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, TypeError)
    assert call(until=_soon()) == counts
    assert sorted(tried) == ["adapter", "lora"]  # with a time to end it is not tried again
    call()
    assert sorted(tried) == ["adapter", "adapter", "lora"]


def _fixed(shape: Shape, row: Row, *_: object) -> Count:
    seconds = 50.0 if row.method == "LoRA" else 0.1
    return Count(shape.name, shape.batch, shape.length, row.method, row.stage, 2, 2, seconds, False, 1.0, "a command")


def test_a_row_that_cannot_end_in_time_is_left_for_the_next_call(
    tmp_path: Path, asked: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_predicted", _fixed)
    assert (lasting(10), lasting(50), lasting(70)) == (30, 100, 70)

    def call() -> dict[str, bool]:
        until = time.monotonic() + 90
        counts = _counts(tmp_path, 1 << 40, "LoRA", "LoRA, checkpointing", "ours, streamed, bf16", until=until)
        return {count.method: count.measured for count in counts}

    first = call()
    assert first == {"LoRA, checkpointing": True, "ours, streamed, bf16": True}
    assert call() == {"LoRA": True, **first}  # it is the first of its call
    assert len(asked) == len(read_counts(tmp_path / "counts.json"))


def test_a_row_during_which_a_call_was_stopped_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tried = tmp_path / "counts.json", list[str]()

    def killed(_case: Case, _make: object, _threads: int) -> Measurement:
        shutil.copy(path, tmp_path / "at_the_kill.json")
        raise KeyboardInterrupt

    def works(case: Case, _make: object, _threads: int) -> Measurement:
        tried.append(case.method.name)
        return Measurement(123, 4.0)

    monkeypatch.setattr(memory, "measured", killed)
    with pytest.raises(KeyboardInterrupt):
        _counts(tmp_path, 1 << 40, "Adapter", "LoRA", until=_soon())
    assert not read_counts(path)  # what the user stops is not lost
    shutil.copy(tmp_path / "at_the_kill.json", path)
    monkeypatch.setattr(memory, "measured", works)
    counts = {count.method: count for count in _counts(tmp_path, 1 << 40, "Adapter", "LoRA", until=_soon())}
    assert tried == ["adapter"]
    assert (counts["LoRA"].measured, counts["LoRA"].failed) == (False, memory.STOPPED)
    assert counts["Adapter"].measured


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", '[{"model": 1}]', "[NaN]", "[" * 100_000, "", '"\\ud800"'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "counts.json").write_text(text)
    with pytest.raises(ConfigError, match=r"counts\.json holds no counts"):
        _counts(tmp_path, 0, "LoRA")


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_on_disk_are_a_model_and_are_written_once(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    config = gpt2(16, 2, 2, 64, 32) if kind == "gpt2" else t5(16, 2, 2, 8, 32, 64)
    case = Case(config, 1, 8, dtype=dtype)
    folder = write_weights(case, tmp_path / "model")
    model = load_model(str(folder), dtype=dtype)
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in case.on_meta()[0].named_parameters()
    }
    assert all(0.01 < float(p.detach().float().std()) < 0.03 for p in model.parameters() if p.numel() > 100)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    write_weights(case, folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_only_random_weights_of_ours_are_removed(tmp_path: Path) -> None:
    case = Case(gpt2(16, 2, 2, 64, 32), 1, 8)
    for name in ("one", "two"):
        write_weights(case, tmp_path / name)
    (tmp_path / "mine").mkdir()
    keep_only(tmp_path, "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "two"]
    with pytest.raises(RunError, match="mine was not made by plugbridge"):
        write_weights(case, tmp_path / "mine")


def test_whole_runs_stand_below_with_their_targets() -> None:
    names = {stage for job in jobs() for stage in job.stages} | {("LoRA", "train"), (QLORA, "train")}
    rows = {(row.method, row.stage) for row in rows_of(TINY, "cpu")}
    assert names <= rows
    counts = [Count("GPT2-XL", 8, 512, *name, 2**20, 2**20, 1.0, False, 0.4, "a command") for name in sorted(names)]
    page = memory_page(counts, MEMORY, "a command")
    lines = [line for line in page.splitlines() if line.startswith(("| standalone, ", "| feedback, "))]
    assert len(lines) == len(jobs())
    assert all("0.40 (target 0.35: missed)" in line for line in lines if "standalone" in line)
    assert all("0.40 (target 0.5: kept) | 1.00 (target 0.1: missed) |" in line for line in lines if "feedback" in line)
    small = memory_page([replace(count, model="GPT-2-shaped") for count in counts], MEMORY, "a command")
    assert "| 0.40 | 1.00 |" in small
    assert "(target" not in small


def test_a_page_has_every_step_and_the_papers_number(tmp_path: Path) -> None:
    counts = _counts(tmp_path, 0, "LoRA", "Adapter", "Ladder Side-Tuning")
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
    draw_steps(counts, [tmp_path / "x.png", tmp_path / "x.svg"])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_table_seven_is_reproduced_on_the_t5_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape("T5-3B", t5(16, 2, 2, 8, 32, 64), t5(8, 1, 2, 4, 16, 64), 1, 8, "Table 7")
    rows = [row for row in rows_of(shape, "cpu") if row.method in ("LoRA", "Adapter", "full fine-tuning")]
    monkeypatch.setattr(reproduce, "find_shapes", lambda _name: (TINY, shape))
    monkeypatch.setattr(reproduce, "rows_of", lambda _shape, _device: rows)
    monkeypatch.setattr(memory, "measured", lambda *_: Measurement(3 * 2**20, 1.0))
    needs = {row.method: predict(row.case, row.make).peak for row in rows}
    monkeypatch.setattr(reproduce, "free_memory", lambda _device: int(memory.ROOM * needs["LoRA"] + 1))
    page = tmp_path / "table7.md"
    asked = reproduce.Asked("table7", None, True, "standalone", None, 0, (), None, tmp_path, page, False, "a command")
    text = "".join(reproduce.reproduce(asked, Silent(), lambda _run, _what: None))
    assert "## T5-3B, batch 1 x 8; the paper's Table 7 beside it" in text
    assert all(page.with_suffix(ending).is_file() for ending in (".json", ".png", ".svg", ".tex"))
    assert "| LoRA | 3.0 (52134.0, -52131.0) | (1.5) |" in text
    assert "LoRA & 3.0 (52134.0, --52131.0) & (1.5)" in page.with_suffix(".tex").read_text()
    assert "| full fine-tuning | (77465.0) | (1.0) |" in text  # did not fit: never filled in
    assert f"- full fine-tuning: predicted {needs['full fine-tuning'] / 2**20:,.0f} MiB" in text
    rows_made = json.loads(page.with_name("table7_rows.json").read_text())
    cells = {cell["row"]: cell for cell in rows_made if cell["metric"] == "MiB"}
    assert cells["LoRA"]["difference"] == 3.0 - 52134.0
    assert cells["full fine-tuning"]["value"] is None
    assert cells["ours: LoRA"]["obtained"] == "not run"
    monkeypatch.setattr(memory, "measured", lambda *_: pytest.fail("--summary runs nothing"))
    monkeypatch.setattr(reproduce, "free_memory", lambda _device: 2**60)
    again = "".join(reproduce.reproduce(replace(asked, summary=True), Silent(), lambda _run, _what: None))
    assert again == text


def test_reductions_are_of_full_fine_tuning() -> None:
    counts = [
        Count("GPT2-XL", 8, 512, name, "train", size * 2**20, size * 2**20, 1.0, True, 1.0, "x")
        for name, size in (("full fine-tuning", 900), ("LoRA", 300), ("ours: LoRA, feedback", 100))
    ]
    found = {(c.row, c.metric): (c.value, c.printed) for c in paper_cells(counts, "table6", "feedback")}
    assert found["LoRA", REDUCTION] == (3.0, pytest.approx(1.35, abs=0.005))
    assert found["ours: LoRA", REDUCTION] == (9.0, pytest.approx(7.1, abs=0.05))
    assert found["full fine-tuning", REDUCTION] == (1.0, 1.0)
    without = {(c.row, c.metric): c.value for c in paper_cells(counts[1:], "table6", "feedback")}
    assert without["LoRA", REDUCTION] is None


def test_figure_1a_has_whole_runs_beside_other_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "find_shapes", lambda _name: (TINY, TINY))
    monkeypatch.setattr(reproduce, "free_memory", lambda _device: 0)
    page = tmp_path / "fig1a.md"
    asked = reproduce.Asked("fig1a", None, True, "standalone", None, 0, (), None, tmp_path, page, False, "a command")
    text = "".join(reproduce.reproduce(asked, Silent(), lambda _run, _what: None))
    runs = named_runs(list(read_counts(page.with_suffix(".json")).values()))
    assert {"LoRA", "full fine-tuning", "ours: feedback", "ours: standalone", "ours: feedback, streamed"} <= set(runs)
    assert all(f"| {name} | " in text for name in runs)
    counts = read_counts(page.with_suffix(".json"))
    feedback = runs["ours: feedback"].top.peak_bytes
    assert feedback == max(c.peak_bytes for key, c in counts.items() if key[3] in ("ours", "ours: LoRA, feedback"))
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_no_two_bars_have_one_name() -> None:
    names = [step_name(row.method, row.stage) for row in rows_of(TINY, "cpu")]
    assert len(set(names)) == len(names)
