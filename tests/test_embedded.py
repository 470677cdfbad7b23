"""The embedded models come with the package: their files, the demonstration's configuration, and what names them."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from plugbridge.bench.asked import Asked, choice_of
from plugbridge.config import load_config
from plugbridge.embedded import config_file, embedded
from plugbridge.errors import ModelError
from plugbridge.sources import check_files, check_source

ROOT = Path(__file__).parents[1]


def test_every_file_of_the_pairs_is_package_data() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    patterns = tool["setuptools"]["package-data"]["plugbridge"]
    folder = embedded("demo.yaml").parent
    files = [folder / name for name in ("demo.yaml", "LICENCE.md")]
    for family in ("gpt2", "t5"):
        files += [path for path in embedded(family).glob("*/*") if path.is_file()]
    names = [str(path.relative_to(folder.parent)) for path in files]
    assert len(names) > 20
    matched = {name for name in names for pattern in patterns if fnmatch(name, pattern)}
    assert [name for name in names if name not in matched] == []


def test_the_demonstration_is_a_word_for_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no checkout
    config = load_config(config_file(Path("demo")), ())
    for source in (config.small, config.large_path):
        check_source(source)
        check_files(source)
    (tmp_path / "demo").write_text("a file of the user's", encoding="utf-8")
    assert config_file(Path("demo")) == Path("demo")
    assert config_file(Path("demo.yaml")) == Path("demo.yaml")


@pytest.mark.parametrize("pair", ["gpt2", "gpt2-medium", "t5-3b"])
def test_a_table_of_the_demonstration_has_its_pair_anywhere(
    pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = Asked("table1", None, True, "feedback", None, 0, (), None, tmp_path, tmp_path / "t.md", False, "x")
    chosen = choice_of(asked, pair).pair
    for source in (chosen.small, chosen.large):
        check_files(source)


def test_a_package_without_its_pairs_says_so() -> None:
    with pytest.raises(ModelError, match="the installed package is not whole"):
        embedded("nosuch")
