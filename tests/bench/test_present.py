"""The page and the picture say what the cells say."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from plugbridge.bench.present import draw_cells, page
from plugbridge.bench.quality import Cell, write_cells

METHOD = Cell(
    family="gpt2", method="lora", mode="feedback", bridge_share=0.0625, down="gradient_pca", start="fresh", task="rte",
    seeds=[0, 1, 2], metric="accuracy", value=0.6125, low=0.5875, high=0.6375,
    pgr=0.454, pgr_low=-0.104, pgr_high=1.207,
    control=None, command="plugbridge bench quality x.yaml", variant="feedback", n=277, majority=0.527,
    large_rows=12800, seconds=42.4, peak_bytes=3 * 2**20,
)  # fmt: skip
CONTROL = replace(METHOD, mode="identity", control="no Bridge", variant="no Bridge", pgr=0.25)
REFERENCE = replace(
    METHOD, mode="none", bridge_share=None, down=None, start=None, pgr=1.0, pgr_low=1.0, pgr_high=1.0,
    control="large tuned", variant="large tuned", large_rows=None, seconds=None, peak_bytes=None,
)  # fmt: skip
NO_GAP = {"pgr": None, "pgr_low": None, "pgr_high": None}


def _table(text: str, heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without the two of its head."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_a_page_has_every_number_where_it_belongs() -> None:
    other = replace(METHOD, task="cb", family="t5", n=56, seeds=[0], **NO_GAP)
    text = page([REFERENCE, METHOD, CONTROL, other], "Title", " about \n", METHOD.command)
    assert text.startswith("# Title\n\nabout\n\nMade by\n\n    plugbridge bench quality x.yaml\n")
    assert _table(text, "rte, gpt2, lora") == [
        ["large tuned", "", "0.613 <sub>0.588 to 0.637</sub>", "+1.00 <sub>+1.00 to +1.00</sub>", "", "", "", ""],
        ["**feedback**", "feedback, fresh start", "0.613 <sub>0.588 to 0.637</sub>",
         "+0.45 <sub>-0.10 to +1.21</sub>", "6.2 %", "12,800", "42", "3"],
        ["control: no Bridge", "identity, fresh start", "0.613 <sub>0.588 to 0.637</sub>",
         "+0.25 <sub>-0.10 to +1.21</sub>", "6.2 %", "12,800", "42", "3"],
    ]  # fmt: skip
    assert _table(text, "cb, t5, lora")[0][3] == ""  # no gap to recover
    assert "277 test rows, seeds 0, 1, 2, majority class 0.527." in text
    assert "56 test rows, seeds 0, majority class 0.527." in text


def test_a_page_of_validation_rows_says_so() -> None:
    chosen = replace(METHOD, split="validation")
    text = page([chosen], "Title", "Accuracy on test rows.", METHOD.command)
    assert "Accuracy on validation rows." in text
    assert "277 validation rows, seeds" in text
    assert "test rows" in page([chosen, METHOD], "Title", "Accuracy on test rows.", METHOD.command)


def test_a_page_sets_differences_beside_every_variant() -> None:
    above = replace(METHOD, differences={"no Bridge": (0.204, 0.031, 0.377)})
    text = page([REFERENCE, above, CONTROL], "Title", "about", METHOD.command)
    assert "| | coupling | accuracy | PGR | PGR above no Bridge | Bridge share |" in text
    rows = _table(text, "rte, gpt2, lora")
    assert [row[4] for row in rows] == ["", "+0.20 <sub>+0.03 to +0.38</sub>", ""]
    assert rows[1][5] == "6.2 %"


def test_a_page_says_what_was_not_run() -> None:
    missing = {"rte, gpt2, lora": ["feedback", "no Bridge"], "cb, t5, lora": [], "cb, t5, prefix": []}
    text = page([METHOD], "Title", "", "", 20, 12, missing)
    assert "12 of the grid's 20 runs are done." in text
    assert "\n- rte, gpt2, lora: feedback; no Bridge\n- all of: cb, t5, lora; cb, t5, prefix\n" in text
    assert "runs are done" not in page([METHOD], "Title", "", "", 20, 20, {})


def test_the_summary_is_the_mean_of_the_cells_that_have_a_pgr() -> None:
    cells = [
        REFERENCE, METHOD, replace(METHOD, family="t5", pgr=0.654), replace(METHOD, task="cb", **NO_GAP),
        replace(METHOD, method="adapter", pgr=-0.5), CONTROL, replace(CONTROL, method="adapter", **NO_GAP),
    ]  # fmt: skip
    assert _table(page(cells, "", "", ""), "PGR, mean over families and tasks") == [
        ["**feedback**", "+0.55 (2)", "-0.50 (1)"],
        ["control: no Bridge", "+0.25 (1)", ""],
    ]


@pytest.mark.parametrize(
    "cells",
    [
        [],
        [REFERENCE],
        [replace(METHOD, **NO_GAP)],
        [METHOD],
        [METHOD, CONTROL, REFERENCE, replace(METHOD, method="adapter"), replace(CONTROL, family="t5")],
        [replace(METHOD, pgr=0.5, pgr_low=0.5, pgr_high=0.5), replace(CONTROL, pgr=-9.0, pgr_low=-20.0, pgr_high=9.0)],
    ],
    ids=["none", "references", "no gap", "one", "several", "odd"],
)
def test_every_set_of_cells_has_a_picture(cells: list[Cell], tmp_path: Path) -> None:
    draw_cells(cells, tmp_path / "cells.png")
    assert (tmp_path / "cells.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["cells.png"]


def test_the_data_are_the_cells(tmp_path: Path) -> None:
    write_cells([METHOD, CONTROL], tmp_path / "cells.json")
    assert json.loads((tmp_path / "cells.json").read_text()) == [asdict(METHOD), asdict(CONTROL)]
