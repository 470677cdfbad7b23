"""Rows that stages look at are drawn by the seed: the first of a file may all be of one class."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from conftest import WORDS, write_jsonl
from plugbridge.config import parse_config
from plugbridge.prepare import Prepared, prepare
from plugbridge.progress import Silent
from plugbridge.stages import couple, evaluate, room, shrink
from plugbridge.stages.baselines import climb
from plugbridge.stages.build import build_stages
from plugbridge.stages.work import Work
from plugbridge.tasks.encode import Encoded
from plugbridge.tasks.rows import Row
from plugbridge.tasks.spec import load_task


class _Enough(Exception):
    pass


@pytest.fixture
def prepared(run_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Prepared]:
    """A run whose 600 rows are sorted by label."""
    files: dict[str, str] = {}
    for k, split in enumerate(("train", "validation", "test")):
        rows = [{"word": WORDS[(i + k) % 24], "label": label} for label in ("even", "odd") for i in range(300)]
        files[split] = str(write_jsonl(tmp_path / f"{split}.jsonl", rows))

    def make(**changes: Any) -> Prepared:
        task = {**files, "prompt": "is it : {word}", "words": {"even": "yes", "odd": "no"}}
        couple = {"steps": 1, "plug": "ridge", "align_samples": 256}
        raw = run_config(task=task, score={"samples": 256, "keep": "disk"}, couple=couple, **changes)
        return prepare(parse_config(raw, "test"), None)

    return make


def _work(p: Prepared, folder: Path) -> Work:
    return Work(p, folder, folder, Silent(), cast(Any, SimpleNamespace()))


def _balanced(rows: list[Encoded], count: int) -> bool:
    """Whether rows are so many different ones with both answers as often as chance has it, five deviations at most."""
    ones = sum(row.answer for row in rows)
    return len(rows) == count and abs(ones - count / 2) < 5 * (count / 4) ** 0.5


def test_scored_rows_are_drawn_by_the_seed(
    prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Encoded]] = []

    def units(_model: Any, _layout: Any, _encoder: Any, rows: list[Encoded], *_: Any) -> None:
        seen.append(rows)
        raise _Enough

    monkeypatch.setattr(shrink, "units_of", units)
    for seed, size in ((0, None), (0, None), (1, None), (0, "small"), (0, "large")):
        ladders = {f"{s}_ladder": {"steps": 1} for s in ("small", "large")}
        p = prepared(seed=seed, baselines=ladders)
        with pytest.raises(_Enough):
            shrink.score(_work(p, tmp_path)) if size is None else climb(_work(p, tmp_path), cast(Any, size))
    assert all(_balanced(rows, 256) for rows in seen)
    assert seen[0] == seen[1] == seen[4]
    assert seen[0] != seen[2]
    assert [row.prompt for row in seen[3]] == [row.prompt for row in seen[0]]

    p, roomed = prepared(resident="none"), list[Encoded]()
    monkeypatch.setattr(room, "kept_numbers", lambda _layout, row, _kind: roomed.append(row) or 1)
    assert room.score_room(p) == 256 * 4
    assert roomed == seen[0]


def test_rows_that_a_start_is_fitted_to_are_drawn_by_the_seed(
    prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Encoded] = []
    monkeypatch.setattr(couple, "watch", lambda _model, _layout, _encoder, row, _places, _see: seen.append(row))
    rows = couple._rows_of_both(_work(prepared(), tmp_path))
    assert len(list(rows([], []))) == 256
    assert _balanced(seen, 256)


def test_rows_that_are_scored_are_the_same_whatever_the_seed_and_in_their_own_order(
    prepared: Callable[..., Prepared],
) -> None:
    p = prepared()
    found = [evaluate.limited(prepared().task, prepared(seed=seed).large_rows["test"], 256) for seed in (0, 1)]
    assert found[0] == found[1]
    assert _balanced(found[0], 256)
    assert sorted(row.answer for row in found[0]) == [row.answer for row in found[0]]
    assert evaluate.limited(p.task, p.large_rows["test"], None) == p.large_rows["test"]


def test_rows_that_a_metric_judges_together_are_scored_together() -> None:
    fields = [{"paragraph_idx": i // 12, "question_idx": i // 4 % 3, "idx": i} for i in range(240)]
    rows = [Encoded((1,), ((2,), (3,)), 0, Row("", ("a", "b"), 0, some, "")) for some in fields]
    for name, metric, size in (("multirc", "question_match", 4), ("ax-g", "gender_parity", 2)):
        task = load_task(name)
        assert metric in task.metrics
        chosen = [row.row.fields["idx"] for row in evaluate.limited(task, rows, 41) if row.row is not None]
        assert len(chosen) == 40
        assert chosen == sorted(chosen) != list(range(40))
        assert all({i // size * size + k for k in range(size)} <= set(chosen) for i in chosen)
        assert len(evaluate.limited(task, rows, 1)) == size


def test_digests_tell_drawn_rows_from_first_ones(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    stages = build_stages(prepared(evaluate={"limit": 5}), tmp_path, Silent())
    assert [stage.name for stage in stages if "rows" in stage.depends] == ["score", "couple", "evaluate"]


def test_a_probe_is_fitted_on_drawn_rows(
    prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, seen = prepared(evaluate={"probe": True, "limit": 20, "models": ["small_probe"]}), dict[str, list[int]]()

    def fit(_states: Any, right: dict[str, list[int]]) -> list[int]:
        seen.update(right)
        raise _Enough

    monkeypatch.setattr(evaluate, "MOST", 40)
    monkeypatch.setattr(evaluate, "prompt_states", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "fit_probe", fit)
    work, subject = _work(p, tmp_path), evaluate.subject_of(_work(p, tmp_path), "small")
    with pytest.raises(_Enough):
        evaluate._probe(work, subject, evaluate.limited(p.task, p.rows["test"], 20))
    assert (len(seen["train"]), len(seen["chosen"])) == (40, 20)
    assert 10 < sum(seen["train"]) < 30
    assert 3 < sum(seen["chosen"]) < 17
