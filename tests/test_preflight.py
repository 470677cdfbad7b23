"""What is refused before torch is imported, and that bitsandbytes is imported only for what is quantised."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import write_jsonl
from plugbridge.config import load_config, parse_config
from plugbridge.errors import ConfigError, DataError, ModelError
from plugbridge.preflight import check_runs, preflight
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.run import StageResult, execute, locked
from plugbridge.sources import check_files, read_model_config
from plugbridge.stages.build import build_stages

Raw = dict[str, Any]

CALLS = """
import io, json, sys, time
from plugbridge.cli import main
from plugbridge.cli.terminal import err
begun, found = time.process_time(), []
for words in json.loads(sys.argv[1]):
    err.file, before = io.StringIO(), time.process_time()
    sys.argv = ["plugbridge", *words]
    try:
        main()
    except SystemExit as left:
        seconds = begun + time.process_time() - before
        heavy = [name for name in ("torch", "transformers", "peft", "sklearn", "matplotlib") if name in sys.modules]
        found.append([words, left.code, err.file.getvalue(), heavy, seconds])
print(json.dumps(found))
"""
MOST_SECONDS = 1.5
"""Of a processor, Python's start and imports among them."""
Call = tuple[list[str], str]


def test_refusals_import_no_torch(run_config: Callable[..., Raw], toy: Raw, tmp_path: Path) -> None:
    """Every command's mistakes, one after another in one process, which then has imported none of what is heavy."""

    def write(name: str, **changes: Any) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**run_config(task=dict(toy)), **changes}), encoding="utf-8")
        return str(path)

    good = write("good", couple={"steps": 4, "batch_size": 4, "plug": "random"})  # which starts from what tune leaves
    none = str(tmp_path / "none")
    row = write_jsonl(tmp_path / "row.jsonl", [{"text": "w1", "label": "maybe"}] * 4)
    standalone = {"couple": {"mode": "standalone"}, "prune": {"reduction": 2, "channels": "pca"}}
    refused: list[Call] = [
        (["run", write("model", small=none)], "does not exist"),
        (["run", write("family", large=str(_model(tmp_path / "other", {"model_type": "bert"})))], "no known family"),
        (["run", write("key", colour="red")], "colour"),
        (["run", write("together", **standalone)], "prune.channels"),
        (["run", write("rows", task={**toy, "train": f"{none}.jsonl"})], "none.jsonl"),
        (["run", write("label", task={**toy, "train": str(row)})], "row.jsonl:1"),
        (["couple", good, "--set", "method.name=none"], "no method 'none'"),
        (["plan", good, "--set", "couple.mode=none"], "no coupling mode"),
        (["plan", good, "--length", f"{10**15}"], ""),
        (["plan", good, "--length", "33"], "rows of 33 tokens are longer than the 32 that a run gives"),
        (["plan", good, "--threads", f"{10**15}"], ""),
        (["plan", good, "--set", "task.metrics=[none]"], "no metric 'none'"),
        (["sweep", good, "--vary", "couple.mode=none"], "no coupling mode"),
        (["report", none], "none is not a run"),
        (["submit", none, "--out", "board"], "none is not a run"),
        (["bench", "quality", good], ""),
        (["bench", "memory", "--shapes", "none"], "no shapes 'none'"),
        (["bench", "memory", "--threads", f"{10**15}"], ""),
        (["reproduce", "table9"], "no table 'table9'"),
        (["reproduce", "table1", "--mode", "none"], "no coupling mode"),
        (["reproduce", "table1", "--seed", f"{10**15}"], ""),
        (["reproduce", "table1", "--small", none, "--large", none], "does not exist"),
        (["couple", good, "--out", none], "stage 'couple' needs 'tune', which is not done"),
    ]
    done_before = _done(tmp_path / "done", Path(good))
    refused += [([words[0], good, "--out", str(done_before), *words[1:]], said) for words, said in OTHER]
    large = Path(run_config()["large"])
    for i, (name, content, said) in enumerate(BROKEN):
        refused.append((["run", write(f"m{i}", large=str(_broken(large, tmp_path / f"m{i}", name, content)))], said))
    lists = [["methods"], ["families"], ["tasks"], ["explain"], ["--help"], ["run", "--help"]]
    calls = [*(words for words, _ in refused), *lists]
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(calls)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for (words, said), (_, code, error, *_) in zip(refused, found, strict=False):
        assert (code, said in error) == (2, True), (words, said, error)
    assert [code for _, code, *_ in found[len(refused) :]] == [0] * len(lists)
    assert [words for words, _, _, heavy, _ in found if heavy] == []
    assert [(words, seconds) for words, *_, seconds in found if seconds > MOST_SECONDS] == []


OTHER: list[Call] = [
    (["run", "--set", "tune.steps=5"], "(tune, couple, plug, evaluate): tune.steps 4 → 5; give the same settings"),
    (["run", "--set", "seed=1"], "seed 0 → 1"),
    (["run", "--set", "couple.batch_size=2"], "would be done again (couple, plug, evaluate): couple.batch_size 4 → 2"),
    (["evaluate", "--set", "evaluate.limit=5"], "evaluate.limit null → 5"),
    (["couple", "--set", "tune.steps=5"], "needs 'tune', which was done with other settings: tune.steps 4 → 5; give"),
    (["couple", "--redo", "--set", "method.rank=4"], "method.rank 2 → 4"),
    (["repair"], "this run has no stage 'repair'"),
]
"""Commands over a finished run."""


def _done(root: Path, file: Path) -> Path:
    """A run in which every stage is done, as its markers say, and nothing was computed."""
    stages = build_stages(prepare(load_config(file), None), root, Silent())
    with locked(root, file):
        execute(root, [replace(stage, work=lambda _folder: StageResult({}, 0.0, 0)) for stage in stages], None, _silent)
    return root


def _silent(_stage: str, _what: str) -> None:
    pass


def _header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


DEEP = "[" * 5000
BROKEN: list[tuple[str, Raw | str | bytes, str]] = [
    ("config.json", {"activation_function": "os.system"}, "activation_function is 'os.system', which transformers"),
    ("config.json", {"n_head": 7}, "hidden = heads head_dim = 16 is not divisible by 7"),
    ("config.json", {"dtype": "float7"}, "dtype is 'float7'; expected a type of numbers"),
    ("config.json", {"quantization_config": {"quant_method": "none"}}, "are quantised already, as config.json says"),
    ("config.json", {"n_layer": -1}, "n_layer is -1; expected"),
    ("config.json", {"n_layer": 10_000_000}, "n_layer is 10000000; expected"),
    ("config.json", {"n_layer": 2}, "holds 12 tensors for which its config.json has no place, the first is"),
    ("config.json", {"n_layer": 4}, "lacks 12 weights, the first is 'transformer.h.3.attn.c_attn.bias'"),
    ("config.json", {"n_embd": 32}, "config.json says"),
    ("config.json", {"resid_pdrop": 3}, "resid_pdrop is 3; expected a share from 0 to 1"),
    ("config.json", {"layer_norm_epsilon": "small"}, 'layer_norm_epsilon is "small"; expected float'),
    ("config.json", {"rope_scaling": [1]}, "rope_scaling is [1]; expected an object"),
    ("model.safetensors", _header(DEEP), "its header is no safetensors header"),
    ("model.safetensors", _header("[Infinity]"), "Infinity is no number of JSON"),
    ("model.safetensors", _header("{}")[:-1], "model.safetensors is truncated"),
    ("model.safetensors", _header(json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})),
     "tensor 'x' ends at byte"),
    ("model.safetensors.index.json", DEEP, "is no index of a sharded checkpoint"),
    ("model.safetensors.index.json", '{"weight_map": {}}', "it has no weight_map with a tensor"),
    ("model.safetensors.index.json", '{"weight_map": {"x": "gone.safetensors"}}', "has no gone.safetensors, where"),
    ("pytorch_model.bin.index.json", '{"weight_map": {"x": "gone.bin"}}', "has no gone.bin, where"),
    ("tokenizer.json", "[]", "tokenizer.json holds no JSON object"),
    ("tokenizer.json", "{", "tokenizer.json: not JSON"),
    ("tokenizer.json", DEEP, "more than 64 levels of brackets"),
    ("tokenizer.json", '{"model": 3}', "tokenizer.json has no `model` with a vocabulary"),
    ("tokenizer.json", {"model": {"vocab": {"is": 7, "it": 6}}}, "token 'is' is 5 for small but 7 for large"),
    ("tokenizer.json", {"model": {"vocab": {"is": 5, "new": 99}}}, "the tokenizer has token 99 but the model only 32"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json holds no JSON object"),
    ("tokenizer_config.json", '{"a": NaN}', "NaN is no number of JSON"),
]  # fmt: skip
"""Files of a model's folder: what is changed in an object, or what is there instead."""


def _broken(model: Path, folder: Path, name: str, content: Raw | str | bytes) -> Path:
    shutil.copytree(model, folder)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    if isinstance(content, dict):
        content = json.dumps({**json.loads((folder / name).read_text(encoding="utf-8")), **content})
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


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
