"""benchmarks/gpu.sh, rehearsed on the CPU at a size of seconds, so that it works the first time a card is at hand."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
KINDS = ("animal", "plant", "person", "artifact", "substance", "food", "body", "act")
RECORDER = """#!/bin/sh
echo "$@" >> "$RECORD"
"""
COUNTS_AND = (
    RECORDER
    + """
case "$*" in *machine.py*) exit ;; *"$FINE"*) end=exit ;; *) end=$END ;; esac
while [ "$1" != --table ]; do shift; done
echo "[]" > "${2%.md}.json"
$end
"""
)
"""Leaves counts, then does $END unless $FINE is among what it is called with."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of the shape that pairs/text.py reads, of made-up words."""
    data = tmp_path_factory.mktemp("texts")
    words = ("".join(letters) for letters in product(ascii_lowercase, repeat=4))
    synsets: list[dict[str, Any]] = []
    for kind in KINDS:
        parent = {"id": kind, "members": [f"{kind}s"], "supersense": f"noun.{kind}", "definition": kind}
        children = [{**parent, "id": word, "members": [word]} for _, word in zip(range(560), words, strict=False)]
        synsets.append({**parent, "hypernyms": [], "examples": []})
        synsets += [{**child, "hypernyms": [kind], "examples": []} for child in children]
    files = {
        "wordnet/synsets.jsonl": "".join(json.dumps(synset) + "\n" for synset in synsets),
        "pretrain_wordnet/wordnet_glosses_examples.txt": "",
        "pretrain_fairytales/fairytales_train.txt": "Once upon a time there was a word, and it had a kind.\n" * 4000,
    }
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True)
        (data / name).write_text(content)
    for folder in ("pretrain_enwiki_part", "pretrain_classics_easy"):
        (data / folder).mkdir()
    return data


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """OUT, where later calls find the results of earlier ones, and WORK."""
    root = tmp_path_factory.mktemp("gpu")
    return {"OUT": str(root / "out"), "FROM": str(root / "out"), "WORK": str(root / "work")}


def call(*parts: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    environment = {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *parts]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def rehearse(places: dict[str, str], *parts: str, **variables: str) -> dict[str, Any]:
    """Run parts on the CPU; returns the results that there are then, by page."""
    done = call(*parts, GPU_REHEARSAL="1", **places, **variables)
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in Path(places["OUT"]).glob("*.json")}


@pytest.fixture(scope="module")
def first(places: dict[str, str], texts: Path) -> dict[str, Any]:
    """What a first call of every part leaves, by page, from texts that were packed."""
    assert call("pack", **places, DATA=str(texts)).returncode == 0
    parts = ("memory-gpt2-xl", "memory-check", "steps", "pretrain-small", "pretrain-large", "quality")
    return rehearse(places, *parts, JOBS="1")


@pytest.fixture(scope="module")
def again(places: dict[str, str], first: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a second call leaves on a bare machine, where the first was stopped before the last kind of step."""
    stopped = Path(places["OUT"]) / "steps-bfloat16.json"
    stopped.write_text(json.dumps(first["steps-bfloat16"][:-1]))
    work = tmp_path_factory.mktemp("bare")
    found = rehearse({**places, "WORK": str(work)}, "memory-gpt2-xl", "steps")
    assert not list(work.rglob("*.safetensors"))
    return found


def test_a_streamed_row_is_measured(first: dict[str, Any]) -> None:
    (streamed,) = first["memory-gpt2-xl"]
    assert (streamed["method"], streamed["stage"]) == ("ours, streamed, bf16", "score (fisher)")
    assert streamed["measured"]
    assert first["machine"]["device"] == "cpu"


def test_a_bare_machine_goes_on(first: dict[str, Any], again: dict[str, Any]) -> None:
    streamed, second = again["memory-gpt2-xl"]
    assert [streamed] == first["memory-gpt2-xl"]
    assert (second["stage"], second["measured"]) == ("prune", False)


def test_the_check_counts_only_what_its_page_has(first: dict[str, Any]) -> None:
    counts = first["memory-check"]
    assert len({count["model"] for count in counts}) == len(counts) == 3
    page = (ROOT / "docs" / "results" / "plan_accuracy.md").read_text()
    only = {text for line in page.splitlines() if "--check" in line for text in re.findall("--only '([^']+)'", line)}
    assert only == set(re.findall("--only '([^']+)'", counts[0]["command"]))


def test_steps_stand_beside_each_other_with_ratios_and_go_on(first: dict[str, Any], again: dict[str, Any]) -> None:
    rows, more = first["steps-bfloat16"], again["steps-bfloat16"]
    assert [row["kind"] for row in rows][:3] == ["LoRA", "LoRA, checkpointing", "feedback"]
    assert rows[0]["seconds to LoRA"] == {"rounds": [1], "median": 1}
    assert all(row["seconds"] > 0 for row in rows)
    assert more[:-1] == rows[:-1]
    assert more[-1]["measured"] != rows[-1]["measured"]


def test_a_kind_of_step_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("step_memory", ROOT / "benchmarks" / "step_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked: list[str] = []
    bad = {module.CHECKPOINTING}

    def apart(kind: str) -> dict[str, Any]:
        asked.append(kind)
        if kind in bad:
            raise subprocess.CalledProcessError(1, "a step")
        return {"kind": kind, "peak_bytes": len(asked), "seconds": 1.0}

    monkeypatch.setattr(module, "measured_apart", apart)
    args = SimpleNamespace(rounds=2, here=False, only=None, table=tmp_path / "steps.md")
    assert module.measure_rounds(args, {}, {"batch": 8}) == bad
    assert len(asked) == 2 * len(module.KINDS) - 1  # it is not tried again in the second round
    done = module.read_done(tmp_path / "steps.json", {"batch": 8})
    assert set(done) == set(module.KINDS) - bad
    assert module.read_done(tmp_path / "steps.json", {"batch": 4}) == {}
    bad.clear()
    asked.clear()
    assert not module.measure_rounds(args, done, {"batch": 8})
    assert asked == [module.CHECKPOINTING] * 2
    (row,) = [row for row in module.summary(done, {}) if row["kind"] == module.CHECKPOINTING]
    assert row["seconds to LoRA"] == {"rounds": [1, 1], "median": 1}


def test_a_pair_is_pretrained_on_what_was_packed(first: dict[str, Any]) -> None:
    for size in ("small", "large"):
        summary = first[f"pretrain-{size}"]
        assert summary["finished"]
        assert summary["recipe"]["size"] == size
        assert summary["dtype"] == "bfloat16"


def test_the_quality_bench_runs_on_the_pair(first: dict[str, Any]) -> None:
    cells = first["quality"]
    assert {"feedback", "ladder_delta", "standalone", "shuffled Bridge", "no Bridge"} <= {c["variant"] for c in cells}
    assert {cell["control"] for cell in cells} >= {None, "no Bridge", "shuffled Bridge"}


def test_packing_takes_relative_paths_and_says_what_goes_along(tmp_path: Path, texts: Path) -> None:
    python, data = (os.path.relpath(path, tmp_path) for path in (sys.executable, texts))
    places = {"PYTHON": python, "DATA": data, "OUT": "out", "WORK": "work"}
    done = call("pack", cwd=tmp_path, **places)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "text.tar.xz").is_file()
    assert "with the checkout and wheels " in done.stdout
    (tmp_path / "work" / "wheels").mkdir()
    with (tmp_path / "work" / "wheels" / "torch.whl").open("wb") as wheel:
        wheel.truncate(64 << 20)
    done = call("pack", cwd=tmp_path, **places)
    assert done.returncode == 2
    assert "are more than the 67108864 that may go along" in done.stderr


def test_tracked_files_leave_room_for_the_texts() -> None:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    files = [ROOT / name for name in listed.decode().split("\0") if name]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 20 << 20


def _recorder(folder: Path, script: str) -> dict[str, str]:
    """Variables of a call whose interpreter is a script that writes down what it is called with."""
    (folder / "python").write_text(script)
    (folder / "python").chmod(0o755)
    names = {"RECORD": "calls", "OUT": "out", "FROM": "out", "WORK": "work", "DATA": ".", "PYTHON": "python"}
    return {key: str(folder / name) for key, name in names.items()}


@pytest.mark.parametrize(("end", "status"), [("sleep 60", 0), ("exit 3", 3)])
def test_a_part_that_is_stopped_or_fails_leaves_its_counts_and_the_next_begins(
    tmp_path: Path, end: str, status: int
) -> None:
    places = _recorder(tmp_path, COUNTS_AND)
    done = call("memory-t5-3b", "steps", **places, END=end, FINE="bfloat16", LIMIT="2")
    assert done.returncode == status, done.stderr
    for name in ("memory-t5-3b", "steps in float32"):
        if status:
            assert f"error: {name} failed with status 3" in done.stderr
        else:
            assert f"{name} did not end; run it again" in done.stdout
    assert {path.name for path in Path(places["OUT"]).iterdir()} == {
        "memory-t5-3b.json", "steps-float32.json", "steps-bfloat16.json",
    }  # fmt: skip


def test_a_part_that_is_not_known_says_so_in_one_line(places: dict[str, str]) -> None:
    done = call("everything", **places)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no part 'everything'; known: check memory-gpt2-xl ")
    assert len(done.stderr.splitlines()) == 1


def test_a_machine_without_a_card_says_so_in_one_line(places: dict[str, str]) -> None:
    done = call("memory-t5-11b", **places, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "sees no CUDA card" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_quality_without_a_pair_and_pretraining_without_texts_say_what_to_do(tmp_path: Path) -> None:
    places = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work")}
    assert "run pretrain-small first" in call("quality", GPU_REHEARSAL="1", **places).stderr
    assert "set DATA, or bring" in call("pretrain-small", GPU_REHEARSAL="1", **places).stderr


def test_all_parts_are_called_at_full_size_on_the_card(tmp_path: Path) -> None:
    places, work = _recorder(tmp_path, RECORDER), tmp_path / "work"
    for name in ("memory-gpt2-xl", "memory-t5-3b", "memory-t5-11b", "memory-check"):
        _leave(work / name / "memory")
    for name in ("steps/float32", "steps/bfloat16", "quality", "quality-methods", "pairs/gpt2/small-work/summary",
                 "pairs/gpt2/large-work/summary", "pairs/gpt2/small/config", "pairs/gpt2/large/config"):  # fmt: skip
        _leave(work / name)
    done = call(**places)
    assert done.returncode == 0, done.stderr
    checked, *calls = (tmp_path / "calls").read_text().splitlines()
    assert "machine.py --device cuda" in checked
    assert not any("machine.py" in line for line in calls)
    memory = [line for line in calls if "bench memory" in line]
    assert all(f"--minutes 7 --out {work}/memory --remove-weights" in line for line in memory)
    assert [line.split("--shapes ")[1].split()[0] for line in calls if "--shapes" in line] == [
        "gpt2-xl", "t5-3b", "t5-11b",
    ]  # fmt: skip
    assert sum("bench memory --check" in line for line in calls) == 1
    assert (
        sum("--device cuda --dtype float32 --hidden 1600 --layers 48 --vocabulary 50257" in line for line in calls) == 1
    )
    assert [line.split("pretrain.py ")[1].split()[0] for line in calls if "pretrain.py" in line] == [
        "gpt2-20m", "gpt2-120m",
    ]  # fmt: skip
    assert sum("--only lora-" in line for line in calls) == 1
    assert sum("--only adapter- --only prefix-" in line for line in calls) == 1


def _leave(page: Path) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    for ending in (".json", ".md"):
        Path(f"{page}{ending}").write_text("")
