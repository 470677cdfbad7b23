"""benchmarks/gpu.sh, rehearsed on the CPU at a size of seconds, so that it works the first time a card is at hand."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
KINDS = ("animal", "plant", "person", "artifact", "substance", "food", "body", "act")
RECORDER = """#!/bin/sh
echo "$@" >> "$RECORD"
"""


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
    """OUT and WORK."""
    root = tmp_path_factory.mktemp("gpu")
    return {"OUT": str(root / "out"), "WORK": str(root / "work")}


def call(*parts: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    environment = {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *parts]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def rehearse(places: dict[str, str], name: str, *parts: str, **variables: str) -> Any:
    """Run parts on the CPU; returns a result that they left."""
    done = call(*parts, GPU_REHEARSAL="1", **places, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads((Path(places["OUT"]) / f"{name}.json").read_text())


def test_the_memory_parts_count_a_row_a_call_and_go_on(places: dict[str, str]) -> None:
    (first,) = rehearse(places, "memory-gpt2-xl", "memory-gpt2-xl")
    assert (first["method"], first["measured"]) == ("full fine-tuning", False)  # there is no room: predicted
    assert first["peak_bytes"] == first["predicted_bytes"] > 0
    machine = json.loads((Path(places["OUT"]) / "machine.json").read_text())
    assert machine["device"] == "cpu"


def test_steps_stand_beside_each_other_with_ratios(places: dict[str, str]) -> None:
    rows = rehearse(places, "steps-bfloat16", "steps")
    assert [row["kind"] for row in rows][:3] == ["LoRA", "LoRA, checkpointing", "feedback"]
    assert rows[0]["seconds to LoRA"] == {"rounds": [1], "median": 1}
    assert all(row["seconds"] > 0 for row in rows)


def test_a_pair_is_pretrained_and_the_quality_bench_runs_on_it(places: dict[str, str], texts: Path) -> None:
    for size in ("small", "large"):
        summary = rehearse(places, f"pretrain-{size}", f"pretrain-{size}", DATA=str(texts))
        assert summary["finished"]
        assert summary["recipe"]["size"] == size
        assert summary["dtype"] == "bfloat16"
    cells = rehearse(places, "quality", "quality", JOBS="1")
    assert {"feedback", "ladder_delta", "standalone", "shuffled Bridge", "no Bridge"} <= {c["variant"] for c in cells}
    assert {cell["control"] for cell in cells} >= {None, "no Bridge", "shuffled Bridge"}


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
    recorder, record = tmp_path / "python", tmp_path / "calls"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    work = tmp_path / "work"
    for name in ("memory-gpt2-xl", "memory-t5-3b", "memory-t5-11b", "memory-check"):
        _leave(work / name / "memory")
    for name in ("steps/float32", "steps/bfloat16", "quality", "quality-methods", "pairs/gpt2/small-work/summary",
                 "pairs/gpt2/large-work/summary", "pairs/gpt2/small/config", "pairs/gpt2/large/config"):  # fmt: skip
        _leave(work / name)
    done = call(PYTHON=str(recorder), RECORD=str(record), OUT=str(tmp_path / "out"), WORK=str(work), DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr
    calls = [line for line in record.read_text().splitlines() if "machine.py" not in line]
    assert [line.split("--shapes ")[1].split()[0] for line in calls if "--shapes" in line] == [
        "gpt2-xl", "t5-3b", "t5-11b",
    ]  # fmt: skip
    assert sum("bench memory --check" in line for line in calls) == 1
    assert sum("--device cuda --dtype float32 --hidden 1600 --layers 48" in line for line in calls) == 1
    assert [line.split("pretrain.py ")[1].split()[0] for line in calls if "pretrain.py" in line] == [
        "gpt2-20m", "gpt2-120m",
    ]  # fmt: skip
    assert sum("--only lora-" in line for line in calls) == 1
    assert sum("--only adapter- --only prefix-" in line for line in calls) == 1


def _leave(page: Path) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    for ending in (".json", ".md"):
        Path(f"{page}{ending}").write_text("")
