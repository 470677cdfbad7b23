"""Only the stages that make the models to be scored are run, planned and reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import test_cli
from plugbridge.config import MADE_BY, parse_config
from plugbridge.plan.works import references_of, subjects_of, works_of
from plugbridge.preflight import resolve
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.report import TITLES, _counts, _Markers, read_report
from plugbridge.run import execute, locked
from plugbridge.stages.build import build_stages
from plugbridge.transfer.needed import couple_needs, stages_of
from test_cli import Call

call = test_cli.call  # a fixture
Raw = dict[str, Any]
TRAIN = {"steps": 1, "batch_size": 4}
WHOLE = {
    "ceiling": TRAIN, "repair": TRAIN, "polish": {"evaluations": 2, "rows": 4}, "baselines": {"small_finetuned": TRAIN},
    "couple": {**TRAIN, "mode": "standalone"},
}  # fmt: skip
BRIDGE = ["tune", "score", "prune", "repair", "couple"]


@pytest.mark.parametrize(
    ("models", "stages"),
    [
        (["large_zero_shot"], []),
        (["small_probe"], []),
        (["small_tuned", "large_zero_shot"], ["tune"]),
        (["large_proxy"], ["tune"]),
        (["large_tuned"], ["ceiling"]),
        (["small_finetuned"], ["small_finetuned"]),
        (["bridge_coupled"], BRIDGE),
        (["large_plugged"], [*BRIDGE, "polish", "plug"]),
        (["large_plugged", "large_tuned"], [*BRIDGE, "polish", "plug", "ceiling"]),
        (None, [*BRIDGE, "polish", "plug", "ceiling", "small_finetuned"]),
    ],
)
def test_stages_are_those_of_the_models_asked_for(
    run_config: Callable[..., Raw], tmp_path: Path, models: list[str] | None, stages: list[str]
) -> None:
    raw = run_config(**WHOLE, evaluate={"models": models, "probe": models in (None, ["small_probe"]),
                                       "proxy": models in (None, ["large_proxy"])})  # fmt: skip
    config = parse_config(raw, "test")
    assert stages_of(config) == {*stages, "evaluate"}
    prepared = prepare(config, None)
    made = build_stages(prepared, tmp_path, Silent())
    assert [stage.name for stage in made] == [*stages, "evaluate"]
    for stage in made:  # what a stage needs is done before it
        assert set(stage.needs) <= {before.name for before in made}
    assert len(build_stages(prepared, tmp_path, Silent(), "score")) == 10
    subjects = subjects_of(config, None, None)
    planned = [work.row.method for work in (*works_of(subjects), *references_of(subjects))]
    found = {name.partition(":")[0].partition(" ")[0] for name in planned}
    assert found - {"evaluate"} == set(stages)
    assert planned  # whatever is asked for, something takes memory


ALL = ["small_tuned", "large_plugged"]


@pytest.mark.parametrize(
    ("couple", "models", "stages", "needs"),
    [
        ({}, ["large_plugged"], ["score", "prune", "repair", "couple", "plug"], ["prune", "repair"]),
        ({}, ALL, ["tune", "score", "prune", "repair", "couple", "plug"], ["prune", "repair"]),
        ({"plug": "ridge"}, ["large_plugged"], ["tune", "score", "prune", "repair", "couple", "plug"],
         ["tune", "prune", "repair"]),
        ({"mode": "identity"}, ["large_plugged"], ["couple", "plug"], []),
        ({"mode": "identity"}, None, ["tune", "couple", "plug"], []),
        ({"mode": "identity", "plug": "random"}, ["large_plugged"], ["tune", "couple", "plug"], ["tune"]),
        ({"mode": "mezo"}, ["large_plugged"], ["couple", "plug"], []),
        ({"steps": 0}, ["large_plugged"], ["couple", "plug"], []),
        ({"steps": 0, "plug": "random"}, None, ["tune", "couple", "plug"], ["tune"]),
        ({"mode": "standalone", "steps": 0}, ["large_plugged"], ["tune", "couple", "plug"], ["tune"]),
        ({"mode": "standalone", "steps": 0}, ["large_plugged", "bridge_coupled"],
         ["tune", "score", "prune", "repair", "couple", "plug"], ["tune", "prune", "repair"]),
    ],
)  # fmt: skip
def test_a_stage_is_done_only_for_what_needs_it(
    run_config: Callable[..., Raw], couple: Raw, models: list[str] | None, stages: list[str], needs: list[str]
) -> None:
    repair = {} if couple.get("mode") in ("identity", "mezo") else {"repair": TRAIN}
    raw = run_config(ceiling=None, couple=couple, evaluate={"models": models}, **repair)
    config = parse_config(raw, "test")
    assert stages_of(config) == stages_of(resolve(config)) == {*stages, "evaluate"}
    assert list(couple_needs(config)) == needs


@pytest.mark.parametrize(
    ("couple", "models", "stages", "needed"),
    [
        ({"mode": "identity", "steps": 1, "batch_size": 4}, ["large_plugged"], ["couple", "plug"], ["couple", "plug"]),
        ({"mode": "standalone", "plug": "random", "steps": 0}, ["large_plugged"], ["tune", "couple", "plug"],
         ["tune", "couple", "plug"]),
        ({"steps": 0}, ["small_tuned", "large_plugged"], ["tune", "couple", "plug"], ["couple", "plug"]),
    ],
    ids=["identity", "random plug", "fresh"],
)  # fmt: skip
def test_a_run_without_a_bridge_is_run_and_reported(
    run_config: Callable[..., Raw], tmp_path: Path, couple: Raw, models: list[str], stages: list[str],
    needed: list[str],
) -> None:  # fmt: skip
    raw = run_config(ceiling=None, tune=TRAIN, couple=couple, evaluate={"limit": 8, "models": models})
    root = tmp_path / "run"
    with locked(root):
        execute(root, build_stages(prepare(parse_config(raw, "test"), None), root, Silent()), None, lambda *_: None)
    found = read_report(root)
    assert [row["name"] for row in found["rows"]] == models
    assert [stage["name"] for stage in found["stages"]] == [*stages, "evaluate"]
    assert found["models"]["bridge"] is None
    plugged = next(row for row in found["rows"] if row["name"] == "large_plugged")
    cost = sum(stage["seconds"] for stage in found["stages"] if stage["name"] in needed)
    assert plugged["seconds"] == pytest.approx(cost)
    assert plugged["parameters"]["changed"] > 0


def test_every_model_has_stages_and_a_title() -> None:
    assert set(MADE_BY) == set(TITLES)


def test_a_run_of_one_model_is_run_and_reported(call: Call, run_config: Callable[..., Raw], tmp_path: Path) -> None:
    raw = run_config(tune=TRAIN, couple=TRAIN, ceiling=TRAIN, evaluate={"limit": 8, "models": ["large_zero_shot"]})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    code, out, err = call("run", "run.yaml", "--out", "run", "--quiet")
    assert (code, err) == (0, "")
    assert "own, 8 test rows" in out
    assert "lora" not in out
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["evaluate"]
    assert (tmp_path / "run" / "report.png").is_file()
    found = json.loads(call("report", "run", "--json")[1])
    assert [row["name"] for row in found["rows"]] == ["large_zero_shot"]
    for key in ("method", "mode", "coupling", "checkpoint", "pgr"):
        assert found[key] is None, key
    assert found["models"]["bridge"] is None
    assert found["models"]["large"]["source"] == raw["large"]
    assert found["models"]["large"]["parameters"] > found["models"]["small"]["parameters"] > 0
    assert found["peak"]["stage"] == "evaluate"

    words = ("--out", "run", "--quiet", "--set", "evaluate.models=[small_tuned, large_zero_shot]")
    assert call("run", "run.yaml", *words, "--redo")[0] == 0
    done = {stage for stage in MADE_BY["large_plugged"] if (tmp_path / "run" / stage).exists()}
    assert done == {"tune"}
    found = json.loads(call("report", "run", "--json")[1])
    assert (found["method"], found["mode"]) == ("lora", None)
    assert call("score", "run.yaml", *words)[0] == 0  # a stage that is asked for by name is done
    assert (tmp_path / "run" / "score" / "done.json").is_file()


def test_the_rank_is_that_of_the_change_and_the_setting_has_its_own_name() -> None:
    def counts(method: str, bridge: int = 0) -> dict[str, tuple[int | None, int | None]]:
        depends = {"method": {"name": method, "rank": 5}}
        facts = {"trainable": {"module": 10, "bridge": bridge}}
        stages = {name: {"facts": {"trainable": 7}, "depends": depends} for name in ("tune", "ceiling")}
        stages |= {"couple": {"facts": facts, "depends": depends}, "plug": {"facts": {"changed": 9}, "depends": {}}}
        stages |= {"small_finetuned": {"facts": {"trainable": 99}, "depends": {}}}
        return {name: (found["rank"], found["size"]) for name, found in _counts(_Markers(stages)).items()}

    tuned = ("small_tuned", "bridge_coupled", "large_plugged", "large_tuned")
    for method, rank in (("lora", 5), ("adapter", None), ("prefix", None)):
        found = counts(method)
        assert {found[name] for name in tuned} == {(rank, 5)}
        assert found["small_zero_shot"] == found["large_probe"] == (0, 0)
        assert found["small_finetuned"] == (None, 0)
    assert counts("lora", bridge=3)["bridge_coupled"] == (None, 5)  # all of its weights train
