"""Reports: why no gap is recovered, what the commonest answer is of, and the losses' picture."""

import json
import math
import os
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from plugbridge.markers import outputs_of, write_marker
from plugbridge.report import (
    commonest,
    draw,
    draw_fidelity,
    draw_losses,
    fidelity_said,
    loss_curves,
    recovered,
    smooth,
    telling,
    why_not_recovered,
)

VALUES = {"small_tuned": 0.3, "large_plugged": 0.5, "large_tuned": 0.6}


@pytest.mark.parametrize(
    ("change", "chosen", "n", "why"),
    [
        ({}, True, 1000, None),
        ({"large_tuned": None}, False, 1000, "no `ceiling:` section"),
        ({"small_tuned": None, "large_tuned": None}, True, 1000, "leaves out small_tuned, large_tuned"),
        ({"large_plugged": None}, True, 1000, "leaves out large_plugged"),
        ({"large_tuned": 0.2}, True, 1000, "no gap: the ceiling is 0.100 below"),
        ({"large_tuned": 0.31}, True, 1000, "the gap of 0.010 to the ceiling is no more than chance on 1,000 rows"),
        ({}, True, 10, "no more than chance on 10 rows"),
    ],
)
def test_a_gap_that_is_not_told_has_its_reason(change: dict[str, Any], chosen: bool, n: int, why: str | None) -> None:
    values = {name: value for name, value in {**VALUES, **change}.items() if value is not None}
    found = why_not_recovered(values, n, "accuracy", chosen)
    assert (found is None) == (why is None) == (recovered(values, n) is not None)
    assert why is None or why in (found or "")


def _report(**metrics: list[float]) -> dict[str, Any]:
    first = next(iter(metrics))
    names = ("small_tuned", "large_plugged")
    rows = [
        {"name": name, "metric": first, "n": 20, "metrics": {m: values[i] for m, values in metrics.items()}}
        for i, name in enumerate(names)
    ]
    common = dict.fromkeys(metrics, 0.1)
    return {"rows": rows, "majority": common, "split": "test", "task": "own", "method": "lora", "mode": "feedback",
            "models": {"bridge": None}}  # fmt: skip


def test_the_picture_shows_a_metric_that_tells_something(tmp_path: Path) -> None:
    written = _report(exact_match=[0.0, 0.0], token_f1=[0.2, 0.4]) | {"commonest": "text"}
    assert telling(written["rows"]) == "token_f1"
    assert commonest(written) == "commonest answer"
    assert telling(_report(exact_match=[0.0, 0.1], token_f1=[0.2, 0.4])["rows"]) == "exact_match"
    assert telling(_report(exact_match=[0.0, 0.0], token_f1=[0.0, 0.0])["rows"]) == "exact_match"
    assert commonest(_report(accuracy=[0.5, 0.6]) | {"commonest": "class"}) == "majority class"
    draw(written, tmp_path / "a.png")
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.05


def test_every_training_has_a_curve(tmp_path: Path) -> None:
    losses = {"couple": [2.0 / (1 + i) for i in range(30)], "tune": [1.0, 0.5, math.inf], "ceiling": [3.0], "plug": 3}
    for name, values in losses.items():
        (tmp_path / name).mkdir()
        known = [x if math.isfinite(x) else None for x in values] if isinstance(values, list) else values
        (tmp_path / name / "losses.json").write_text(json.dumps(known), encoding="utf-8")
    (tmp_path / "repair").mkdir()
    (tmp_path / "repair" / "losses.json").write_text("[", encoding="utf-8")
    assert loss_curves(tmp_path) == {"tune": [1.0, 0.5], "couple": losses["couple"], "ceiling": [3.0]}
    assert draw_losses(tmp_path, tmp_path / "losses.png")
    assert matplotlib.image.imread(tmp_path / "losses.png").std() > 0.05
    (tmp_path / "tune" / "losses.json").write_text(json.dumps([1e308, 1e308, -1e308, 10**400, 2.0, 1.0, 3.0]))
    assert loss_curves(tmp_path)["tune"] == [2.0, 1.0, 3.0]
    assert draw_losses(tmp_path, tmp_path / "losses.png")
    assert not draw_losses(tmp_path / "none", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_losses_that_are_not_as_they_were_left_have_no_curve_and_this_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tune", "couple", "ceiling", "repair"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "losses.json").write_text("[3.0, 2.0]", encoding="utf-8")
        made = {"digest": "d", "depends": {}, "facts": {}, "seconds": 1.0, "peak_bytes": 1, "needs": {}}
        write_marker(tmp_path / name / "done.json", {**made, "outputs": outputs_of(tmp_path / name)})
    assert list(loss_curves(tmp_path)) == ["tune", "repair", "couple", "ceiling"]
    assert not caplog.messages
    (tmp_path / "tune" / "losses.json").write_text("[9.0, 2.0]", encoding="utf-8")
    (tmp_path / "couple" / "losses.json").unlink()
    os.mkfifo(tmp_path / "couple" / "losses.json")
    (tmp_path / "repair" / "losses.json").unlink()
    assert list(loss_curves(tmp_path)) == ["ceiling"]
    assert caplog.messages == [
        f"{tmp_path / name / 'losses.json'} has changed since it was written; it has no curve"
        for name in ("tune", "repair", "couple")
    ]


def test_steps_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("plugbridge.report.save_picture", lambda figure, _path: drawn.append(figure))
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "losses.json").write_text("[3.0, 2.0, 1.0]", encoding="utf-8")
    assert draw_losses(tmp_path, tmp_path / "losses.png")
    ticks = list(drawn[0].axes[0].get_xticks())
    assert ticks == [round(tick) for tick in ticks]


def test_a_smooth_curve_keeps_its_length_and_its_level() -> None:
    assert smooth([1.0, 2.0, 3.0]) == [1.5, 2.0, 2.5]
    assert smooth([4.0] * 50) == [4.0] * 50
    assert len(smooth(list(map(float, range(100))))) == 100


def test_fidelity_is_said_and_drawn_where_it_was_measured(tmp_path: Path) -> None:
    found = [
        {
            "step": 0,
            "bridge": {"encoder": [0.9, 0.8], "decoder": [1.0]},
            "none": {"encoder": [0.1, 0.2], "decoder": [0.3]},
        },
        {
            "step": 40,
            "bridge": {"encoder": [0.7, 0.6], "decoder": [0.8]},
            "none": {"encoder": [0.0, -0.2], "decoder": [0.5]},
        },
    ]
    assert fidelity_said(found) == (
        "error through the Bridge: cosine with the exact gradient 0.90 at step 0, 0.70 at step 40 "
        "(without a Bridge 0.20, 0.10)"
    )
    assert draw_fidelity({"coupling": {"fidelity": found}}, tmp_path / "fidelity.png")
    assert matplotlib.image.imread(tmp_path / "fidelity.png").std() > 0.05
    for coupling in (None, {"fidelity": []}):
        assert not draw_fidelity({"coupling": coupling}, tmp_path / "none.png")
