"""What is refused before torch is imported, and that bitsandbytes is imported only for what is quantised."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import write_jsonl
from plugbridge.config import parse_config
from plugbridge.errors import ConfigError, DataError, ModelError
from plugbridge.preflight import check_runs, preflight
from plugbridge.sources import check_files, read_model_config

Raw = dict[str, Any]

CALLS = """
import json, sys
from plugbridge.cli import main
found = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["plugbridge", *words]
    try:
        main()
    except SystemExit as left:
        heavy = [name for name in ("torch", "transformers", "peft", "sklearn", "matplotlib") if name in sys.modules]
        found.append([words, left.code, heavy])
print(json.dumps(found), file=sys.stderr)
"""


def test_refusals_import_no_torch(run_config: Callable[..., Raw], toy: Raw, tmp_path: Path) -> None:
    """Every command's mistakes, one after another in one process, which then has imported none of what is heavy."""
    files: dict[str, str] = {}

    def write(name: str, **changes: Any) -> str:
        files[name] = str(tmp_path / f"{name}.yaml")
        Path(files[name]).write_text(yaml.safe_dump({**run_config(task=dict(toy)), **changes}), encoding="utf-8")
        return files[name]

    good = write("good")
    row = write_jsonl(tmp_path / "row.jsonl", [{"text": "w1", "label": "maybe"}] * 4)
    refused = [
        ["run", write("model", small=str(tmp_path / "none"))],
        ["run", write("family", large=str(_model(tmp_path / "other", {"model_type": "bert"})))],
        ["run", write("key", colour="red")],
        ["run", write("together", couple={"mode": "standalone"}, prune={"reduction": 2, "channels": "pca"})],
        ["run", write("rows", task={**toy, "train": str(tmp_path / "none.jsonl")})],
        ["run", write("label", task={**toy, "train": str(row)})],
        ["couple", good, "--set", "method.name=none"],
        ["plan", good, "--set", "couple.mode=none"],
        ["sweep", good, "--vary", "couple.mode=none"],
        ["report", str(tmp_path / "none")],
        ["bench", "quality", good],
        ["bench", "memory", "--shapes", "none"],
        ["reproduce", "table9"],
        ["reproduce", "table1", "--mode", "none"],
        ["reproduce", "table1", "--small", str(tmp_path / "none"), "--large", str(tmp_path / "none")],
    ]
    lists = [["methods"], ["families"], ["tasks"], ["explain"], ["--help"], ["run", "--help"]]
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps([*refused, *lists])], capture_output=True, text=True, cwd=tmp_path
    )
    found = json.loads(done.stderr.splitlines()[-1])
    assert [code for _, code, _ in found] == [2] * len(refused) + [0] * len(lists), done.stderr
    assert [words for words, _, heavy in found if heavy] == []


def _model(folder: Path, config: Raw, *names: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in names:
        (folder / name).write_text("", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"n_layer": -1}, "n_layer is -1; expected a whole number from 1 to 4,096"),
        ({"n_layer": 10_000_000}, "n_layer is 10000000"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_embd": True}, "n_embd is true"),
        ({"n_embd": "wide"}, 'n_embd is "wide"'),
        ({"n_embd": 7}, "not divisible by"),
    ],
)
def test_sizes_that_are_no_models(run_config: Callable[..., Raw], tmp_path: Path, change: Raw, wanted: str) -> None:
    config = run_config()
    raw = {**read_model_config(config["large"]), **change}
    large = _model(tmp_path / "large", raw, "model.safetensors", "tokenizer.json")
    with pytest.raises(ModelError, match=wanted):
        preflight(parse_config({**config, "large": str(large)}, "x"), None)


def test_a_folder_without_weights_or_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no weights; expected model\.safetensors"):
        check_files(str(_model(tmp_path / "a", {}, "tokenizer.json")))
    with pytest.raises(ModelError, match=r"has no tokenizer; expected tokenizer\.json"):
        check_files(str(_model(tmp_path / "b", {}, "model.safetensors")))
    check_files(str(_model(tmp_path / "c", {}, "model.safetensors")), own_tokenizer=True)
    check_files(str(_model(tmp_path / "d", {}, "pytorch_model.bin", "spiece.model")))
    check_files("of/the-hub")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_a_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    folder = _model(tmp_path / "model", {})
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match="cannot read the configuration of"):
        read_model_config(str(folder))


def test_a_hub_id_that_is_nowhere_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="gpt99 is no directory here, is not in the Hugging Face cache") as error:
        read_model_config("gpt99")
    assert "\n" not in str(error.value)


def test_runs_that_are_compared_are_refused_where_none_can_begin(
    run_config: Callable[..., Raw], tmp_path: Path
) -> None:
    good = parse_config(run_config(), "x")
    gone = good.model_copy(update={"large": str(tmp_path / "none")})
    check_runs([good, gone])  # the others are done, and it says why that one is not
    with pytest.raises(ModelError, match="does not exist"):
        check_runs([gone, gone])
    with pytest.raises(ConfigError, match="no coupling mode"):
        check_runs([good, good.model_copy(update={"couple": good.couple.model_copy(update={"mode": "none"})})])


def test_rows_are_read_before_any_model(run_config: Callable[..., Raw], toy: Raw, tmp_path: Path) -> None:
    task = {**toy, "validation": str(write_jsonl(tmp_path / "v.jsonl", [{"text": "w1"}]))}
    with pytest.raises(DataError, match="'before' is missing"):
        preflight(parse_config(run_config(task=task), "x"), None)


BITS = """
import sys
from plugbridge.imports import bring_back_bitsandbytes, leave_out_bitsandbytes
assert leave_out_bitsandbytes()
import peft
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from transformers.utils import is_bitsandbytes_available
assert not is_bnb_available() and not is_bnb_4bit_available() and not is_bitsandbytes_available()
assert sys.modules["bitsandbytes"] is None
library = bring_back_bitsandbytes()
assert library is sys.modules["bitsandbytes"] is peft.helpers.bnb
assert is_bnb_available() and is_bnb_4bit_available() and is_bitsandbytes_available()
assert bring_back_bitsandbytes() is library
assert not leave_out_bitsandbytes() and sys.modules["bitsandbytes"] is library
"""


def test_bitsandbytes_is_left_out_until_it_is_asked_for() -> None:
    pytest.importorskip("bitsandbytes")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BITS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
