"""What a run depends on of its models: configuration, tokenizer and weights, no more."""

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_model, save_model, toy_rows, write_jsonl
from plugbridge.cli.report import print_loading
from plugbridge.config import parse_config
from plugbridge.errors import RunError
from plugbridge.folders import model_files
from plugbridge.models import load_model
from plugbridge.plan.make import make_plan
from plugbridge.preflight import with_commits
from plugbridge.prepare import Prepared, prepare
from plugbridge.progress import Silent
from plugbridge.report import read_report
from plugbridge.run import Stage, execute, locked
from plugbridge.sources import HubId
from plugbridge.stages.build import build_stages
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.rows import Row
from plugbridge.tasks.spec import Task

Raw = dict[str, Any]
OWN = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_only_what_loading_reads_is_of_a_model(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path / "model")
    assert [path.name for path in model_files(folder)] == OWN
    for name in ("NOTES.md", "runs/config/tune/module/model.safetensors", ".hidden/config.json", "pytorch_model.bin",
                 "optimizer.bin", "other.safetensors", "train.py", "generation_config.json"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert [path.name for path in model_files(folder)] == OWN
    assert [path.name for path in model_files(folder, code=True)] == [*OWN, "train.py"]
    (folder / "adapter_config.json").touch()  # which transformers loads into the model
    assert "adapter_config.json" in {path.name for path in model_files(folder)}


def test_weights_are_the_shards_that_the_index_names(tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path, max_shard_size="6KB")
    shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
    assert len(shards) > 1
    (tmp_path / "model-of-before.safetensors").touch()
    assert {path.name for path in model_files(tmp_path)} == {"config.json", "model.safetensors.index.json", *shards}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a model into a cache of the hub at a commit, and its `main` there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(name: str, commit: str, seed: int, hidden: int = 8) -> None:
        folder = tmp_path / "hub" / f"models--org--{name}"
        if not (folder / "snapshots" / commit).is_dir():
            save_model("gpt2", folder / "snapshots" / commit, hidden=hidden, layers=1, heads=hidden // 4, seed=seed)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit, encoding="utf-8")

    return put


def test_a_hub_model_is_of_its_commit(
    hub: Callable[..., None],
    run_config: Callable[..., Raw],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new = "a" * 40, "b" * 40
    hub("small", old, 1)
    hub("large", old, 2)
    raw = run_config(small="org/small", large="org/large", ceiling=None, evaluate={"limit": 8})

    def stages() -> tuple[Prepared, list[Stage]]:
        prepared = prepare(parse_config(raw, "test"), None)
        return prepared, build_stages(prepared, tmp_path / "run", Silent())

    before, first = stages()
    assert before.inputs["large"] == {"source": "org/large", "commit": old}
    with locked(tmp_path / "run"):
        execute(tmp_path / "run", first, None, lambda _stage, _what: None)
    adapter = json.loads((tmp_path / "run" / "plug" / "checkpoint" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/large", old)
    tuned = json.loads((tmp_path / "run" / "tune" / "module" / "adapter_config.json").read_text())
    assert (tuned["base_model_name_or_path"], tuned["revision"]) == ("org/small", old)
    print_loading(read_report(tmp_path / "run"), "")
    assert f"from_pretrained('org/large', revision='{old}')" in "".join(capsys.readouterr().out.split("\n"))
    found = read_report(tmp_path / "run")["models"]
    assert (found["small"]["commit"], found["large"]["commit"]) == (old, old)
    assert found["large"]["source"] == "org/large"
    # main moves while the first run holds its models
    hub("large", new, 3)
    weights = [model.load(model.config.large_path)[0].state_dict() for model in (before, stages()[0])]
    assert not all(torch.equal(a, b) for a, b in zip(*(found.values() for found in weights), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), _of(tmp_path, old).values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights[1].values(), _of(tmp_path, new).values(), strict=True))
    with pytest.raises(
        RunError, match=r'\(score, prune, couple, plug, evaluate\): large\.commit "a{12}" → "b{12}"[,;]'
    ):
        execute(tmp_path / "run", stages()[1], None, lambda _stage, _what: None)


def test_a_plan_is_of_the_commit_that_it_read(
    hub: Callable[..., None], run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub("small", "a" * 40, 1)
    hub("large", "b" * 40, 2)
    raw = run_config(small="org/small", large="org/large", ceiling=None, evaluate={"models": ["large_zero_shot"]})
    monkeypatch.setattr("plugbridge.plan.make.rivals_of", lambda _subjects: [])
    assert make_plan(parse_config(raw, "test"), 8, None, 1).commits == {"small": "a" * 40, "large": "b" * 40}
    local = run_config(ceiling=None, evaluate={"models": ["large_zero_shot"]})
    assert with_commits(parse_config(local, "test")) == parse_config(local, "test")


def _of(folder: Path, commit: str) -> dict[str, torch.Tensor]:
    return load_model(str(folder / "hub" / "models--org--large" / "snapshots" / commit)).state_dict()


def test_a_pinned_id_is_the_id() -> None:
    pinned = HubId("org/large", "a" * 40)
    again = pickle.loads(pickle.dumps(pinned))
    assert (again, again.commit, json.dumps(again)) == ("org/large", "a" * 40, '"org/large"')


def test_rows_in_tokens_are_taken_from_a_run_that_reads_the_same(
    run_config: Callable[..., Raw], toy: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = str(write_jsonl(tmp_path / "test.jsonl", toy_rows(30, 7)))

    def prepared(**changes: Any) -> Prepared:
        return prepare(parse_config(run_config(**changes), "test"), None, before)

    before: Prepared | None = None
    before, encode_all, encoded = prepared(), Encoder.encode_all, list[int]()

    def counted(self: Encoder, task: Task, form: PromptForm, rows: Sequence[Row]) -> list[Encoded]:
        encoded.append(len(rows))
        return encode_all(self, task, form, rows)

    monkeypatch.setattr(Encoder, "encode_all", counted)
    again = prepared(method="adapter", seed=1)
    assert not encoded
    assert (again.rows, again.large_rows) == (before.rows, before.large_rows)
    for changes in ({"max_length": 8}, {"task": {**toy, "prompt": "it is : {word}"}}, {"task": {**toy, "test": own}}):
        prepared(**changes)
        assert encoded
        encoded.clear()
