"""A page that somebody else wrote, and what stands beside it, is never written over."""

import json
from pathlib import Path

import pytest

from plugbridge.bench.pages import check_page
from plugbridge.errors import ConfigError

OURS = "# Sweep\n\nMade by\n\n    plugbridge sweep c.yaml\n"


@pytest.mark.parametrize(
    ("there", "first"),
    [
        ({"README.md": "# Mine\n"}, "README.md"),
        ({"README.md": b"\xff"}, "README.md"),
        ({"README.png": "a picture"}, "README.png"),
        ({"README.json": '[{"a": 1}]'}, "README.json"),
        ({"README.json": '{"command": 1}'}, "README.json"),
        ({"README_rows.json": "[]"}, "README_rows.json"),
    ],
)
def test_a_page_of_somebody_elses_is_refused(tmp_path: Path, there: dict[str, str | bytes], first: str) -> None:
    for name, text in there.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=rf"{first} was not made by plugbridge; move it away"):
        check_page(tmp_path / "README.md")


def test_a_page_of_ours_is_written_again(tmp_path: Path) -> None:
    page = tmp_path / "sweep.md"
    check_page(page)
    page.with_suffix(".json").write_text(json.dumps([{"command": "plugbridge bench memory"}]), encoding="utf-8")
    check_page(page)  # interrupted before the page was written
    page.write_text(OURS, encoding="utf-8")
    page.with_suffix(".png").touch()
    check_page(page)
    with pytest.raises(ConfigError, match=r"a page is a Markdown file, such as .*sweep\.md"):
        check_page(page.with_suffix(".json"))


def test_the_pages_of_the_repository_are_ours() -> None:
    results = Path(__file__).parents[2] / "docs" / "results"
    for name in ("memory.md", "quality.md", "plan_accuracy.md", "paper/table1.md", "paper/fig1a.md", "paper/table6.md"):
        check_page(results / name)
