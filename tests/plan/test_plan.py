"""A plan says what a run takes and what would make it fit, without loading anything."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from plugbridge.config import load_config, parse_config
from plugbridge.errors import ConfigError
from plugbridge.memory.predict import Trace, predict
from plugbridge.memory.rates import Rates
from plugbridge.memory.steps import STEPS
from plugbridge.plan import make
from plugbridge.plan.advice import CHANGES, Advice, Change, Faster, advise, changed, faster
from plugbridge.plan.make import make_plan
from plugbridge.plan.predictions import Predictions
from plugbridge.plan.works import Work, peak_of, references_of, rivals_of, subjects_of, works_of
from plugbridge.prepare import prepare

Raw = dict[str, Any]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let advice know of some stages alone."""

    def choose(*names: str) -> None:
        def chosen(subjects: Any) -> Any:
            return (work for work in works_of(subjects) if work.row.method in names)

        monkeypatch.setattr("plugbridge.plan.advice.works_of", chosen)

    return choose


def test_every_stage_and_every_other_way_is_in_the_plan(run_config: Callable[..., Raw]) -> None:
    plan = make_plan(parse_config(run_config(repair={"steps": 3}, polish={"evaluations": 2}), "x"), 8, 2**40, 1)
    assert [stage.name for stage in plan.stages if stage.ours] == [
        "tune (small)", "tune: validation (a batch)", "score", "prune", "repair", "couple (feedback)", "polish",
        "plug", "evaluate (a batch)",
    ]  # fmt: skip
    assert [stage.name for stage in plan.stages if not stage.ours and not stage.reference] == [
        f"large: {name}" for name in (
            "full fine-tuning", "LoRA", "LoRA, checkpointing", "LoRA, checkpointing, bf16",
            "QLoRA (4 bit, checkpointing, bf16)", "Ladder Side-Tuning",
        )
    ]  # fmt: skip
    assert all(stage.fits and stage.peak_bytes > 0 and stage.seconds > 0 for stage in plan.stages)
    assert plan.advice is None
    couple = next(stage for stage in plan.stages if stage.name == "couple (feedback)")
    assert (couple.passes, couple.large_rows) == (4, 16)
    json.dumps(plan.as_json())


def test_it_reads_configuration_files_only(run_config: Callable[..., Raw], tmp_path: Path) -> None:
    raw = run_config()
    for size in ("small", "large"):
        folder = tmp_path / size
        folder.mkdir()
        (folder / "config.json").write_bytes((Path(raw[size]) / "config.json").read_bytes())
        raw[size] = str(folder)
    assert make_plan(parse_config(raw, "x"), 8, None, 1).stages[0].fits is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"couple": {"mode": "feedback", "cache": "disk"}}, "keeps no activations"),
        ({"couple": {"mode": "standalone"}, "prune": {"reduction": 2, "channels": "pca"}}, "must be a model by itself"),
        ({"couple": {"plug": "fresh", "layer_map": "cka"}}, "a fresh start takes none"),
        ({"method": {"name": "adapter", "dropout": 0.1}}, "only lora has dropout"),
        ({"evaluate": {"models": ["large_probe"]}}, "which needs evaluate.probe: true"),
        ({"task": "nowhere"}, "no task 'nowhere'"),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(run_config: Callable[..., Raw], changes: Raw, message: str) -> None:
    config = parse_config({**run_config(), **changes}, "x")
    for refuses in (lambda: make_plan(config, 8, None, 1), lambda: prepare(config, None)):
        with pytest.raises(ConfigError, match=message):
            refuses()


def test_rows_are_as_long_as_positions_and_max_length_leave(run_config: Callable[..., Raw]) -> None:
    def length(asked: int | None = None, **changes: Any) -> int:
        return subjects_of(parse_config(run_config(**changes), "x"), asked, None).large.length

    assert (length(), length(family="t5")) == (32, 512)
    assert (length(max_length=20), length(family="t5", max_length=20)) == (20, 20)
    assert length(method="prefix") == 30  # which two of a prefix leave
    assert (length(32), length(1000, family="t5")) == (32, 1000)
    for asked, room, changes in ((33, 32, {}), (31, 30, {"method": "prefix"}), (21, 20, {"max_length": 20})):
        with pytest.raises(ConfigError, match=f"rows of {asked} tokens are longer than the {room} that a run gives"):
            length(asked, **changes)


def test_a_repair_of_logits_trains_the_whole_bridge(run_config: Callable[..., Raw]) -> None:
    def repair(target: str) -> Trace:
        config = parse_config(run_config(repair={"steps": 3, "target": target}), "x")
        (row,) = (work.row for work in works_of(subjects_of(config, 8, None)) if work.row.method == "repair")
        return predict(row.case, row.make)

    response, logits = repair("response"), repair("logits")
    assert logits.trained > response.trained
    assert logits.peak != response.peak


def test_advice_names_settings_that_fit(run_config: Callable[..., Raw], only: Callable[..., None]) -> None:
    only("couple (feedback)", "prune")
    config = parse_config(run_config(couple={"steps": 4, "batch_size": 64}, resident="all"), "x")
    rows = {work.row.method: work.row for work in works_of(subjects_of(config, 8, None))}
    whole, half = (
        predict(replace(rows["couple (feedback)"].case, batch=batch), rows["couple (feedback)"].make).peak
        for batch in (64, 32)
    )
    assert advise(config, 8, half, {"couple (feedback)": whole}) == Advice(("couple.micro_batch=16",))
    assert advise(config, 8, 1000, {"prune": 1 << 20}) == Advice((), "prune")


@pytest.mark.parametrize(
    ("memory", "micro_batch", "said"),
    [
        (162, None, 4),
        (156, None, 4),
        (155, None, 2),
        (119, None, 1),
        (208, 16, 8),
        (162, 16, 4),
        (162, 5, 4),
        (125, 2, 1),
    ],
)
def test_advice_takes_as_many_rows_at_a_time_as_fit(
    run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch, only: Callable[..., None], memory: int,
    micro_batch: int | None, said: int,
) -> None:  # fmt: skip
    """Each row takes 10 bytes over 100; as powers of two, fewer than there are now, in nine tenths of the memory."""

    def predicted(case: Any, _make: Any) -> Trace:
        return Trace({"": 100 + 10 * min(case.batch, case.micro_batch or case.batch)}, {}, {}, 0, 0)

    only("couple (feedback)")
    monkeypatch.setattr("plugbridge.plan.predictions.predict", predicted)
    couple = {"steps": 4, "batch_size": 16, "micro_batch": micro_batch}
    config = parse_config(run_config(couple=couple, resident="none"), "x")
    tight = {"couple (feedback)": 10**5}
    assert advise(config, 8, memory, tight) == Advice((f"couple.micro_batch={said}",))
    assert advise(config, 8, 10**6, tight) == Advice(())  # the whole batch


def test_advice_fits_as_a_whole(run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that fits until another one is helped is helped, too."""

    def predicted(case: Any, make: Any) -> Trace:
        if make is STEPS["score"]:
            return Trace({"": 500 if case.importance == "fisher" else 90}, {}, {}, 0, 0)
        if make is STEPS["prune"]:
            return Trace({"": 50 if case.importance == "fisher" else 150 if case.dtype == torch.float32 else 80}, {},
                         {}, 0, 0)  # fmt: skip
        return Trace({"": 10}, {}, {}, 0, 0)

    monkeypatch.setattr("plugbridge.plan.predictions.predict", predicted)
    config = parse_config(run_config(resident="none"), "x")
    assert advise(config, 8, 100, {"score": 500}) == Advice(("score.importance=activation", "dtype=bfloat16"))


def test_a_model_that_only_the_memory_given_streams_is_told_to_be_streamed(
    run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes by what is free when it begins, which may be more."""
    monkeypatch.setattr(make, "_baseline", lambda _dtype: 0)
    need = 4 * subjects_of(parse_config(run_config(), "x"), 8, None).parameters
    for resident, memory, settings in (
        ("auto", 2 * need - 1, ("resident=none",)),
        ("auto", 2**40, None),
        ("none", 2 * need - 1, None),
        ("all", 2**40, None),
    ):
        monkeypatch.setattr("plugbridge.plan.predictions.predict", lambda _case, _make: Trace({"": 1}, {}, {}, 0, 0))
        advice = make_plan(parse_config(run_config(resident=resident, device="cpu"), "x"), 8, memory).advice
        assert advice == (None if settings is None else Advice(settings))


def test_advice_is_what_the_command_line_takes(
    run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every change by itself, of files that say as little as they may; each row at a time takes nearly all memory."""

    def predicted(case: Any, _make: Any) -> Trace:
        return Trace({"": 1 if min(case.batch, case.micro_batch or case.batch) == 1 else 950_000}, {}, {}, 0, 0)

    monkeypatch.setattr("plugbridge.plan.predictions.predict", predicted)
    monkeypatch.setattr("plugbridge.plan.advice.check_blocks", lambda *_: None)
    few = {key: run_config()[key] for key in ("small", "large", "task")} | {"device": "cpu", "resident": "all"}
    starts: list[Raw] = [
        few,
        {**few, "prune": {"reduction": 2, "channels": "gradient_pca"}, "polish": {}},
        {**few, "couple": {"mode": "ladder", "cache": "memory"}},
        {**few, "couple": {"mode": "ladder"}, "score": {"keep": "memory"}},
        {**few, "couple": {"recompute": False, "activations": "bridge"}},
    ]
    said: set[str] = set()
    for raw in starts:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        config = parse_config(raw, "x")
        for change in CHANGES:
            monkeypatch.setattr("plugbridge.plan.advice.CHANGES", (change,))
            names = [work.row.method for work in works_of(subjects_of(config, 8, None))]
            found = advise(config, 8, 10**6, {name: 10**7 for name in names if name.startswith(change.stages)})
            if found.settings:
                settings = dict(setting.split("=") for setting in found.settings)
                values = {key: yaml.safe_load(value) for key, value in settings.items()}
                assert values.items() <= change.settings.items()
                taken = load_config(tmp_path / "run.yaml", found.settings)
                assert changed(taken, {}) == changed(config, values)
                said |= values.keys()
    assert said == {key for change in CHANGES for key in change.settings} - {"prune.budget"}  # too small a Bridge here


def test_time_is_saved_where_memory_is_left(run_config: Callable[..., Raw]) -> None:
    def found(memory: int, advice: Advice | None = None, resident: str = "all", **couple: Any) -> Faster | None:
        config = parse_config(run_config(couple={"steps": 4, "batch_size": 4, **couple}, resident=resident), "x")
        return faster(config, advice, 8, memory, {torch.float32: Rates(1e9, 1e9)}, Predictions())

    quick = found(2**40)
    assert quick is not None
    assert quick.settings == ("couple.recompute=false",)
    assert 0.3 < quick.share < 0.95
    assert found(quick.peak_bytes) is None  # not all of the memory is given away
    assert found(round(1.2 * quick.peak_bytes)) == quick
    assert found(2**40, recompute=False) is None
    assert found(2**40, mode="ladder") is None
    assert found(2**40, activations="large") is None
    assert found(2**40, Advice(("couple.activations=large",))) is None
    assert found(2**40, steps=0, batch_size=32) is None
    assert found(2**40, resident="none") is None
    assert found(2**40, Advice(("resident=none",))) is None
    assert found(2**40, Advice((), "score")) is None


def test_a_reference_is_left_out_only_if_it_does_not_fit_as_advised(
    run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(make, "_baseline", lambda _dtype: 0)
    train = {"steps": 3, "batch_size": 4}
    raw = run_config(
        resident="all", ceiling=train, baselines={"large_finetuned": train, "large_ladder": train},
        score={"samples": 4},
        evaluate={"batch_size": 64, "models": ["large_tuned", "large_finetuned", "large_plugged"]},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    config = parse_config(raw, "x")
    peaks = {stage.name: stage.peak_bytes for stage in make_plan(config, 8, None).stages}
    for memory, gone, models in (
        (max(peaks.values()), (), None),
        (peaks["reference: large_finetuned"] - 1, ("baselines.large_finetuned",), ["large_tuned", "large_plugged"]),
    ):
        found = make_plan(config, 8, memory)
        settings = (*(found.advice.settings if found.advice is not None else ()), *found.left_out)
        taken = load_config(tmp_path / "run.yaml", settings)
        assert [setting.partition("=")[0] for setting in found.left_out if setting.endswith("=null")] == [*gone]
        assert taken.evaluate.models == (config.evaluate.models if models is None else models)
        prepare(taken, None)  # which refuses nothing
        again = make_plan(taken, 8, memory)
        assert all(stage.fits for stage in again.stages if stage.ours or stage.reference)


def test_weights_that_cannot_be_streamed_are_not(run_config: Callable[..., Raw], tmp_path: Path) -> None:
    raw = run_config(device="cpu")
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(raw["large"]) / "config.json").read_bytes())
    config = parse_config({**raw, "large": str(folder)}, "x")
    assert subjects_of(config, 8, 1).large.streamed  # what is not here yet may be
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert not subjects_of(config, 8, 1).large.streamed
    assert advise(config, 8, 1000, {"prune": 1 << 30}).stuck == "prune"


def test_advice_ends_where_a_stage_has_no_setting_left(
    run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(run_config(resident="all", dtype="bfloat16", tune={"steps": 4, "micro_batch": 1}), "x")
    monkeypatch.setattr("plugbridge.plan.predictions.predict", None)  # nothing is traced for it
    assert advise(config, 8, 1000, {"prune": 1 << 20, "tune (small)": 1 << 20}) == Advice((), "tune (small)")


def test_advice_never_quantises_a_streamed_model_nor_one_too_large_in_4_bits(
    run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"steps": 4, "batch_size": 4, "micro_batch": 1}
    config = parse_config(run_config(resident="none", dtype="bfloat16", couple=steps), "x")
    asked: list[Any] = []

    def predicted(case: Any, _make: Any) -> Any:
        asked.append(case.bits)
        return Trace({"": 1e9}, {}, {}, 0, 0)

    monkeypatch.setattr("plugbridge.plan.predictions.predict", predicted)
    monkeypatch.setattr("plugbridge.plan.advice.check_blocks", lambda *_: None)  # this model's are no multiples of 64
    assert advise(config, 8, 1000, {"couple (feedback)": 1 << 20}) == Advice((), "couple (feedback)")
    assert set(asked) <= {None}
    resident = config.model_copy(update={"resident": "all"})
    least = subjects_of(config, 8, None).parameters // 2  # bytes
    for memory, tried in ((least - 1, False), (least + 1, True)):
        asked.clear()
        advise(resident, 8, memory, {"couple (feedback)": 1 << 29, "evaluate (a batch)": 1 << 29})
        assert ("4bit" in asked) is tried


def test_advice_freezes_a_bridge_that_trains(
    run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    def predicted(case: Any, _make: Any) -> Trace:
        return Trace({"": 1e9 if case.train_bridge else 1e3}, {}, {}, 0, 0)

    monkeypatch.setattr("plugbridge.plan.predictions.predict", predicted)
    for mode, bridge, memory, settings in (
        ("standalone", "train", 1000, ("couple.bridge=freeze",)),
        ("ladder", "train", 1000, ("couple.bridge=freeze",)),
        ("standalone", "freeze", 999, ()),
    ):
        only(f"couple ({mode})")
        config = parse_config(run_config(couple={"steps": 4, "mode": mode, "bridge": bridge}, resident="none"), "x")
        found = advise(config, 8, memory, {f"couple ({mode})": 10**9})
        assert found == Advice(settings, None if settings else f"couple ({mode})")


def test_advice_tries_smaller_and_smaller_budgets(
    run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    """Those too small for the model are left out, and of those that help the last one is said."""
    only("prune")
    assert [c.settings["prune.budget"] for c in CHANGES if "prune.budget" in c.settings][:2] == [1 / 32, 1 / 64]
    shares = (0.4, 0.2, 1e-6)
    changes = tuple(Change({"prune.budget": share}, ("prune",)) for share in shares)
    monkeypatch.setattr("plugbridge.plan.advice.CHANGES", changes)
    asked: list[int] = []

    def predicted(case: Any, _make: Any) -> Trace:
        asked.append(sum(case.sizes.values()))
        return Trace({"": asked[-1]}, {}, {}, 0, 0)

    monkeypatch.setattr("plugbridge.plan.predictions.predict", predicted)
    config = parse_config(run_config(prune={"budget": 0.5}, resident="none"), "x")
    assert advise(config, 8, 1, {"prune": 1 << 40}).stuck == "prune"
    larger, smaller = asked
    assert larger > smaller
    for memory, share in ((larger, 0.4), (smaller, 0.2)):
        assert advise(config, 8, memory, {"prune": 1 << 40}).settings == (f"prune.budget={share}",)
    asked.clear()
    advise(parse_config(run_config(prune={"budget": 0.4}, resident="none"), "x"), 8, 1, {"prune": 1 << 40})
    assert asked == [smaller]


def test_parts_of_a_batch_are_coupling_s_alone(run_config: Callable[..., Raw]) -> None:
    def works(**couple: Any) -> dict[str, tuple[int | None, float]]:
        config = parse_config(run_config(couple={"steps": 4, "batch_size": 8, **couple}, polish={}, repair={}), "x")
        return {w.row.method: (w.row.case.micro_batch, w.times) for w in works_of(subjects_of(config, 8, None))}

    whole, parts = works(), works(micro_batch=2)
    assert {name for name in whole if whole[name] != parts[name]} == {"couple (feedback)"}
    assert parts["couple (feedback)"] == (2, 4)


@pytest.mark.parametrize(
    ("changes", "concerned"),
    [
        ({"prune": {"reduction": 4}}, {"prune", "repair", "couple (feedback)"}),
        ({"couple": {"batch_size": 4, "optimizer": "adafactor"}}, {"couple (feedback)"}),
        ({"couple": {"batch_size": 4, "recompute": False}}, {"couple (feedback)"}),
        ({"tune": {"micro_batch": 1}}, {"tune (small)"}),
        ({"method": "adapter"}, None),
    ],
)
def test_stages_that_a_setting_does_not_concern_stay_as_they_are(
    run_config: Callable[..., Raw], changes: Raw, concerned: set[str] | None
) -> None:
    """Or advice would predict them again."""
    before, after = (
        {work.row.method: repr(work.row.case) for work in works_of(subjects_of(parse_config(raw, "x"), 8, None))}
        for raw in (run_config(repair={"steps": 2}, **also) for also in ({}, changes))
    )
    differ = {name for name in before if before[name] != after[name]}
    assert differ == (concerned if concerned is not None else set(before))


def test_memory_is_what_python_leaves_of_it(run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(_case: Any, _make: Any) -> Trace:
        return Trace({"": 2**20}, {torch.float32: 1}, {torch.float32: 1}, 1, 1)

    def rates(_cases: Any, _device: str, _threads: int) -> dict[torch.dtype, Rates]:
        return {torch.float32: Rates(1e9, 1e9)}

    monkeypatch.setattr(make, "_baseline", lambda _dtype: 2**30)
    monkeypatch.setattr("plugbridge.plan.predictions.predict", predicted)
    config = parse_config(run_config(), "x")
    for memory, fits in ((2**30 + 2**20, True), (2**30 + 2**20 - 1, False), (2**20, False), (None, None)):
        plan = make_plan(config, 8, memory, 1)
        assert (plan.baseline, plan.memory) == (2**30, memory)
        assert {stage.fits for stage in plan.stages} == {fits}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(make, "rates_for", rates)
    plan = make_plan(config.model_copy(update={"device": "auto"}), 8, 2**20, 1)
    assert (plan.baseline, {stage.fits for stage in plan.stages}) == (0, {True})


def test_advice_leaves_out_a_budget_beside_a_reduction(run_config: Callable[..., Raw]) -> None:
    config = parse_config(run_config(prune={"reduction": 2}), "x")
    with pytest.raises(ConfigError, match="prune"):
        changed(config, {"prune.budget": 0.02})
    assert advise(config, 8, 1000, {"prune": 1 << 20}).stuck == "prune"


def test_stages_follow_resident_and_the_memory_given(run_config: Callable[..., Raw]) -> None:
    config = parse_config(run_config(), "x")
    need = 4 * subjects_of(config, 8, None).parameters
    for resident, memory, streams in (
        ("all", 1, False), ("none", 1 << 40, True), ("auto", 2 * need, False), ("auto", 2 * need - 1, True),
    ):  # fmt: skip
        subjects = subjects_of(config.model_copy(update={"resident": resident}), 8, memory)
        streamed = {work.row.method: work.row.case.streamed for work in works_of(subjects)}
        assert streamed == {
            "tune (small)": False, "tune: validation (a batch)": False, "score": streams, "prune": streams,
            "couple (feedback)": streams, "plug": False, "evaluate (a batch)": streams,
        }  # fmt: skip
        assert not any(work.row.case.streamed for work in rivals_of(subjects))


def test_a_model_that_is_pruned_is_streamed_first(run_config: Callable[..., Raw], only: Callable[..., None]) -> None:
    only("prune")
    config = parse_config(run_config(resident="all"), "x")
    (prune,) = (work for work in works_of(subjects_of(config, 8, None)) if work.row.method == "prune")
    peak = predict(prune.row.case, prune.row.make).peak
    assert advise(config, 8, peak - 1, {"prune": peak}) == Advice(("resident=none",))
    quantised = changed(config, {"large.load_in": "4bit"})
    assert changed(quantised, {"resident": "none"}).load_in == "4bit"
    assert advise(quantised, 8, peak - 1, {"prune": peak}) == Advice(("dtype=bfloat16",))


def test_fewer_rows_at_a_time_come_before_streaming(run_config: Callable[..., Raw], only: Callable[..., None]) -> None:
    only("evaluate (a batch)")
    config = parse_config(run_config(resident="all", evaluate={"batch_size": 64}), "x")
    (evaluate,) = (w for w in works_of(subjects_of(config, 8, None)) if w.row.method == "evaluate (a batch)")
    whole, half = (predict(replace(evaluate.row.case, batch=n), evaluate.row.make).peak for n in (64, 32))
    found = advise(config, 8, round(half / 0.9) + 1, {"evaluate (a batch)": whole})
    assert found == Advice(("evaluate.batch_size=32",))


def test_a_limit_says_how_many_rows_are_scored(run_config: Callable[..., Raw]) -> None:
    def scored(**evaluate: Any) -> dict[str, tuple[float, int, int]]:
        couple = {"steps": 4, "mode": "ladder"}
        config = parse_config(run_config(couple=couple, evaluate={"batch_size": 8, **evaluate}), "x")
        works = works_of(subjects_of(config, 8, None))
        return {w.row.method: (w.times, w.passes, w.large_rows) for w in works if w.row.method.startswith("evaluate")}

    assert scored() == {"evaluate (a batch)": (1, 1, 8), "evaluate: bridge_coupled (a batch)": (1, 1, 8)}
    assert scored(limit=20) == {"evaluate": (6, 6, 40), "evaluate: bridge_coupled": (3, 3, 20)}
    assert scored(limit=20, models=["large_plugged", "small_tuned"]) == {"evaluate": (3, 3, 20)}
    assert scored(models=["small_tuned"]) == {}
    assert scored(models=["large_proxy"], proxy=True) == {"evaluate: large_proxy (a batch)": (1, 1, 8)}
    assert scored(limit=20, models=["large_proxy", "large_plugged"], proxy=True) == {
        "evaluate": (3, 3, 20), "evaluate: large_proxy": (3, 3, 20),
    }  # fmt: skip


def test_a_step_of_mezo_is_two_forward_passes(run_config: Callable[..., Raw]) -> None:
    def planned(mode: str) -> Any:
        couple = {"steps": 5, "batch_size": 4, "mode": mode}
        works = list(works_of(subjects_of(parse_config(run_config(couple=couple), "x"), 8, None)))
        assert {"score", "prune"}.isdisjoint(work.row.method for work in works)
        return next(work for work in works if work.row.method == f"couple ({mode})")

    mezo, one = planned("mezo"), planned("identity")
    assert (mezo.passes, mezo.large_rows) == (10, 40)
    assert (one.passes, one.large_rows) == (5, 20)
    counts, feedback = (predict(work.row.case, work.row.make) for work in (mezo, one))
    assert counts.trained > 0
    assert counts.peak < feedback.peak  # no graph


def test_the_whole_run_is_all_of_our_stages(run_config: Callable[..., Raw]) -> None:
    plan = make_plan(parse_config(run_config(ceiling={"steps": 900}), "x"), 8, 2**40)
    ours, whole = [stage for stage in plan.stages if stage.ours], plan.whole
    assert plan.threads == torch.get_num_threads()
    assert whole.peak_bytes == max(stage.peak_bytes for stage in ours) == plan.peak.peak_bytes
    for key in ("seconds", "disk_bytes", "read_bytes", "passes", "large_rows"):
        assert getattr(whole, key) == sum(getattr(stage, key) for stage in ours)
    assert whole.fits
    assert plan.as_json()["whole"]["passes"] == whole.passes


def test_what_a_streamed_model_has_read_is_counted(run_config: Callable[..., Raw]) -> None:
    def read(**changes: Any) -> dict[str, int]:
        plan = make_plan(parse_config(run_config(resident="none", **changes), "x"), 8, None)
        return {stage.name: stage.read_bytes for stage in plan.stages}

    couple = {"steps": 4, "batch_size": 4, "mode": "ladder"}
    some = read(couple=couple, score={"samples": 64, "keep": "disk"})
    assert {name for name, count in some.items() if count} == {
        "score", "prune", "couple (ladder)", "evaluate (a batch)", "evaluate: bridge_coupled (a batch)",
        "reference: ceiling", "reference: ceiling: validation (a batch)",
    }  # fmt: skip
    blocks = some["prune"]
    assert some["reference: ceiling"] == pytest.approx(2 * 4 * blocks, rel=0.35)  # there and back, four steps
    backprop = read(couple={**couple, "mode": "backprop", "micro_batch": 1})
    assert backprop["couple (backprop)"] == some["reference: ceiling"]  # parts go together
    assert some["score"] == pytest.approx(3 * blocks, rel=0.35)  # there, back, and once more for the residual stream
    assert some["couple (ladder)"] == pytest.approx(4 * blocks, rel=0.35)  # with one block read ahead
    parts = read(couple={**couple, "micro_batch": 1}, score={"samples": 128, "keep": "disk"})
    assert parts["couple (ladder)"] == 4 * some["couple (ladder)"]
    assert parts["score"] == some["score"]
    few = read(score={"samples": 64, "keep": "memory"})
    assert few["score"] > some["score"]
    resident = make_plan(parse_config(run_config(resident="all"), "x"), 8, None)
    assert resident.whole.read_bytes == 0


def test_references_are_planned_where_the_run_makes_them(run_config: Callable[..., Raw]) -> None:
    train = {"steps": 3, "batch_size": 2}
    asked = {"large_finetuned": train, "small_ladder": {**train, "reduction": 2}}
    config = parse_config(run_config(ceiling={**train, "micro_batch": 1}, baselines=asked), "x")
    plan = make_plan(config, 8, 1000, 1)
    found = {stage.name: stage for stage in plan.stages if stage.reference}
    assert list(found) == [
        "reference: ceiling", "reference: ceiling: validation (a batch)", "reference: small_ladder",
        "reference: small_ladder: validation (a batch)", "reference: small_ladder: score", "reference: large_finetuned",
        "reference: large_finetuned: validation (a batch)",
    ]  # fmt: skip
    assert not any(stage.ours or stage.fits for stage in found.values())
    assert (found["reference: ceiling"].passes, found["reference: ceiling"].large_rows) == (3, 6)
    assert found["reference: small_ladder"].large_rows == 0
    bare = make_plan(parse_config(run_config(ceiling=None), "x"), 8, None, 1)
    assert not any(stage.reference for stage in bare.stages)


def test_a_coupled_bridge_is_scored_where_there_is_one(run_config: Callable[..., Raw]) -> None:
    def scored(mode: str, models: list[str] | None = None) -> list[tuple[Any, int, int]]:
        train, evaluate = {"steps": 3, "mode": mode}, {"batch_size": 5, "models": models}
        works = works_of(subjects_of(parse_config(run_config(couple=train, evaluate=evaluate), "x"), 8, None))
        return [(work.row.make, work.row.case.batch, work.large_rows) for work in works
                if work.row.method == "evaluate: bridge_coupled (a batch)"]  # fmt: skip

    assert scored("ladder") == [(STEPS["evaluate, ladder"], 5, 5)]
    assert scored("standalone", ["bridge_coupled"]) == [(STEPS["evaluate, bridge"], 5, 0)]
    assert scored("standalone", ["large_plugged"]) == scored("feedback") == []


def test_validation_in_training_is_of_as_many_rows_as_evaluation(
    run_config: Callable[..., Raw], only: Callable[..., None]
) -> None:
    train = {"steps": 3, "batch_size": 2, "micro_batch": 1}
    config = parse_config(run_config(tune=train, ceiling=train, evaluate={"batch_size": 50}, resident="none"), "x")
    subjects = subjects_of(config, 8, None)
    works = {work.row.method: work for work in (*works_of(subjects), *references_of(subjects))}
    for name, validation in (("tune (small)", "tune: validation"), ("ceiling", "ceiling: validation")):
        training, scoring = works[name].row, works[f"{validation} (a batch)"].row
        assert (scoring.case.batch, scoring.case.micro_batch, scoring.case.streamed) == (50, None, name == "ceiling")
        assert scoring.case.config is training.case.config
        assert predict(scoring.case, scoring.make).peak > predict(training.case, training.make).peak
    small, large = works["tune: validation (a batch)"], works["ceiling: validation (a batch)"]
    assert (small.large_rows, large.passes, large.large_rows) == (0, 1, 50)
    only(*(tight := {"tune: validation (a batch)": 1 << 30}))
    peak = predict(replace(small.row.case, batch=1), small.row.make).peak
    assert advise(config, 8, peak, tight) == Advice(("evaluate.batch_size=1",))


def test_a_ladder_beside_a_streamed_model_is_streamed(run_config: Callable[..., Raw]) -> None:
    train = {"steps": 3, "batch_size": 2}
    asked = {"large_ladder": train, "small_ladder": train, "large_finetuned": train}
    for resident, streams in (("none", True), ("all", False)):
        config = parse_config(run_config(baselines=asked, resident=resident), "x")
        rows = [work.row for work in references_of(subjects_of(config, 8, None))]
        for row in rows:
            assert row.case.streamed is (streams and row.method.startswith(("large_ladder", "ceiling"))), row.method
        (ladder,) = (row for row in rows if row.method == "large_ladder")
        assert predict(ladder.case, ladder.make).peak > 0


def test_passes_and_disk_follow_importance_and_cache(run_config: Callable[..., Raw]) -> None:
    def works(**changes: Any) -> dict[str, Any]:
        config = parse_config(run_config(**changes), "x")
        return {work.row.method: work for work in works_of(subjects_of(config, 8, None))}

    samples = parse_config(run_config(), "x").score.samples
    assert works()["score"].passes == 2 * samples
    prune = {"reduction": 2, "channels": "pca"}
    assert works(score={"importance": "magnitude", "samples": samples}, prune=prune)["score"].passes == samples
    couple = {"steps": 4, "batch_size": 4, "mode": "ladder"}
    assert works(couple=couple)["couple (ladder)"].disk == 0
    for plug, layer_map, passes in (("ridge", "uniform", 1), ("random", "cka", 1), ("procrustes", "cka", 2)):
        fitted = works(couple={**couple, "plug": plug, "layer_map": layer_map, "align_samples": 5})
        start = fitted["couple: start from both models' states"]
        assert (start.times, start.passes, start.large_rows, start.disk) == (5, 5 * passes, 5 * passes, 0)
        assert (fitted["couple (ladder)"].passes, fitted["couple (ladder)"].large_rows) == (4, 16)
    assert not any(name.startswith("couple:") for name in works(couple={**couple, "plug": "random"}))


@pytest.mark.parametrize(("family", "positions"), [("gpt2", 4 * 8), ("t5", 4 * 8 + 4 * 2)])
def test_a_cache_is_counted_where_it_is(run_config: Callable[..., Raw], family: str, positions: int) -> None:
    """A T5 row has two tokens in the decoder. Both pairs have three layers and a final norm in each stack."""
    works: dict[str, Work] = {}
    peaks: dict[str, int] = {}
    for cache in ("off", "disk", "memory"):
        couple = {"steps": 4, "batch_size": 4, "mode": "ladder", "cache": cache}
        config = parse_config(run_config(family, couple=couple), "x")
        (work,) = (work for work in works_of(subjects_of(config, 8, None)) if work.row.method == "couple (ladder)")
        works[cache], peaks[cache] = work, peak_of(work, predict(work.row.case, work.row.make))
    kept = 16 * positions * 16 * 4  # rows, hidden size, float32
    assert {cache: work.disk for cache, work in works.items()} == {"off": 0, "disk": kept, "memory": 0}
    assert (peaks["disk"] - peaks["off"], peaks["memory"] - peaks["off"]) == (0, kept)
    assert [bool(work.note) for work in works.values()] == [False, True, True]


def test_advice_puts_a_cache_on_disk(run_config: Callable[..., Raw]) -> None:
    couple = {"steps": 4000, "batch_size": 4, "mode": "ladder", "cache": "memory"}
    config = parse_config(run_config(couple=couple, resident="none"), "x")
    (work,) = (work for work in works_of(subjects_of(config, 8, None)) if work.row.method == "couple (ladder)")
    step = predict(work.row.case, work.row.make).peak
    assert advise(config, 8, step, {"couple (ladder)": step + round(work.kept)}) == Advice(("couple.cache=disk",))


def test_lora_beside_another_method_is_lora(run_config: Callable[..., Raw]) -> None:
    config = parse_config(run_config(method="adapter"), "x")
    methods = {work.row.method: work.row.case.method.name for work in rivals_of(subjects_of(config, 8, None))}
    named = {name: method for name, method in methods.items() if "LoRA" in name}
    assert len(named) == 4
    assert set(named.values()) == {"lora"}


@pytest.mark.parametrize(
    ("asked", "there", "wanted"), [("auto", True, "cuda"), ("cpu", True, "cpu"), ("auto", False, "cpu")]
)
def test_hours_are_of_the_device_that_the_run_would_take(
    run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch, asked: str, there: bool, wanted: str
) -> None:
    measured: list[str] = []

    def rates(_cases: Any, device: str, _threads: int) -> dict[torch.dtype, Rates]:
        measured.append(device)
        return dict.fromkeys((torch.float32, torch.bfloat16), Rates(1e9, 1e9))

    monkeypatch.setattr(make, "rates_for", rates)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    plan = make_plan(parse_config(run_config(device=asked), "x"), 8, 2**40, 1)
    assert (plan.device, measured) == (wanted, [wanted])


def test_the_command_in_a_process_of_its_own_says_the_same(run_config: Callable[..., Raw], tmp_path: Path) -> None:
    """Where it works beside a copy of itself."""
    raw = run_config(device="cpu")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "plugbridge",
        "plan",
        tmp_path / "run.yaml",
        "--length",
        "8",
        "--memory",
        "100GB",
        "--json",
    ]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    wanted = make_plan(parse_config(raw, "x"), 8, 10**11, 1).as_json()
    same = ("name", "peak_bytes", "disk_bytes", "passes", "large_rows", "fits")
    for one, other in zip(found["stages"], wanted["stages"], strict=True):
        assert [one[key] for key in same] == [other[key] for key in same]
