"""Whole runs with `large.load_in`, how it is written, and what it redoes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import save_model
from plugbridge import quantised
from plugbridge.config import load_config, parse_config
from plugbridge.errors import ConfigError, ModelError
from plugbridge.prepare import prepare
from plugbridge.report import read_report
from plugbridge.run import facts_of
from test_durability import redone_by, start

pytest.importorskip("bitsandbytes")
Raw = dict[str, Any]
TRAIN = {"steps": 2, "batch_size": 4}
AFTER = {"couple", "plug", "evaluate"}


@pytest.fixture
def quick(run_config: Callable[..., Raw]) -> Callable[..., Raw]:
    """A small run's configuration with the large model in some bits."""

    def build(family: str = "gpt2", method: str = "lora", load_in: str = "8bit", **changes: Any) -> Raw:
        defaults = {"tune": TRAIN, "couple": TRAIN, "ceiling": None, "evaluate": {"limit": 8}}
        raw = run_config(family, method, **{**defaults, **changes})
        return {**raw, "large": {"path": raw["large"], "load_in": load_in}}

    return build


@pytest.mark.parametrize(
    ("family", "method", "couple"),
    [
        ("gpt2", "lora", {"mode": "feedback", "plug": "ridge", "layer_map": "cka", "align_samples": 6}),
        ("t5", "adapter", {"mode": "feedback"}),
        ("gpt2", "prefix", {"mode": "ladder_delta", "cache": "memory"}),
        ("llama", "lora", {"mode": "ladder"}),
    ],
)
def test_a_run_in_eight_bits(
    quick: Callable[..., Raw], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    family: str, method: str, couple: Raw,
) -> None:  # fmt: skip
    loaded: list[str] = []
    load = quantised.load_quantised

    def counted(source: str, load_in: Any, **options: Any) -> Any:
        loaded.append(load_in)
        return load(source, load_in, **options)

    monkeypatch.setattr("plugbridge.prepare.load_quantised", counted)
    optional = {"repair": TRAIN, "polish": {"evaluations": 2, "rows": 4}} if couple["mode"] == "feedback" else {}
    probe = {"limit": 8, "probe": True}
    raw = quick(family, method, couple={**TRAIN, **couple}, evaluate=probe, **optional)
    start(raw, tmp_path / "run")
    report = read_report(tmp_path / "run")
    assert report["models"]["large"]["load_in"] == "8bit"
    assert report["models"]["large"]["parameters"] == facts_of(tmp_path / "run", "prune")["large_parameters"]
    assert {"large_zero_shot", "large_plugged", "large_probe"} <= {row["name"] for row in report["rows"]}
    fitted = couple.get("plug") == "ridge"  # a fresh start needs shapes alone
    expected = ["start"] * fitted + ["couple", "zero-shot", "plugged", "probe"]
    assert len(loaded) == len(expected) + len(optional) + (couple["mode"] == "ladder")


def test_a_run_in_four_bits_and_bfloat16(quick: Callable[..., Raw], tmp_path: Path) -> None:
    raw = quick("t5", load_in="4bit", dtype="bfloat16")
    raw["large"]["path"] = str(save_model("t5", tmp_path / "large", hidden=64, layers=2, heads=16, seed=2))
    start(raw, tmp_path / "run")
    assert facts_of(tmp_path / "run", "evaluate")["large_plugged"]["n"] == 8
    saved = load_file(str(tmp_path / "run" / "couple" / "coupled.safetensors"))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("couple", "redone"),
    [
        ({"mode": "feedback"}, AFTER),
        ({"mode": "standalone"}, {"evaluate"}),
        ({"mode": "standalone", "plug": "ridge"}, AFTER),
    ],
)
def test_bits_redo_what_depends_on_them(
    quick: Callable[..., Raw], tmp_path: Path, couple: Raw, redone: set[str]
) -> None:
    eight = quick(couple={**TRAIN, **couple}, ceiling=TRAIN)
    path = eight["large"]["path"]
    plain, table = {**eight, "large": path}, {**eight, "large": {"path": path}}
    assert redone_by(plain, table, tmp_path) == set()
    assert redone_by(plain, eight, tmp_path) == redone
    optional = {"repair": TRAIN, "polish": {"evaluations": 2}}
    assert redone_by({**plain, **optional}, {**eight, **optional}, tmp_path) == {*redone, "repair", "polish", *AFTER}


def test_the_bits_are_written_in_the_file_or_set(quick: Callable[..., Raw], tmp_path: Path) -> None:
    raw = quick()
    path = raw["large"]["path"]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    whole = load_config(file)
    assert (whole.large_path, whole.load_in) == (path, "8bit")
    file.write_text(yaml.safe_dump({**raw, "large": path}))
    assert (load_config(file).large, load_config(file).load_in) == (path, None)
    assert load_config(file, ("large.load_in=8bit",)) == whole
    assert load_config(file, ("large.load_in=4bit",)).load_in == "4bit"
    assert parse_config(whole.model_dump(mode="json"), "written") == whole


def test_paths_in_the_table_are_read_from_the_files_folder(quick: Callable[..., Raw], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**quick(), "large": {"path": "models", "load_in": "4bit"}}))
    assert load_config(file).large_path == str(tmp_path / "models")


@pytest.mark.parametrize(
    ("large", "message"),
    [
        ({"path": "x", "load_in": "2bit"}, r"large\.load_in: Input should be '8bit' or '4bit' \(found '2bit'\)"),
        ({"path": "x", "loadin": "8bit"}, r"unknown key 'large\.loadin'; did you mean 'load_in'\?"),
        ({"load_in": "8bit"}, r"'large\.path' is required and not given"),
    ],
)
def test_mistakes_in_the_table_are_named(quick: Callable[..., Raw], large: Raw, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**quick(), "large": large}, "test")


def test_what_cannot_be_loaded_is_refused_before_any_work(quick: Callable[..., Raw]) -> None:
    with pytest.raises(ModelError, match="reads 16 channels"):
        prepare(parse_config(quick(load_in="4bit"), "test"), None)
