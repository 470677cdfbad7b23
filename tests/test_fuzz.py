"""Whatever a user hands over ends in a value or in one line: hypothesis looks for anything else, alike in every run.

Each kind of input goes through the one place where it is parsed. Cases are made of what has broken parsers before.
"""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import FAMILIES, save_model
from plugbridge.bench.grid import groups_of, load_grid
from plugbridge.bench.sweep import combinations
from plugbridge.cli.options import path_in
from plugbridge.config import TaskConfig, apply_override, fields_help, load_config, parse_config
from plugbridge.config.document import parse_yaml
from plugbridge.errors import PlugbridgeError
from plugbridge.families.spec import family_of
from plugbridge.folders import OBJECTS, check_config, read_vocabulary
from plugbridge.markers import check_places, check_root
from plugbridge.memory.sizes import parse_bytes
from plugbridge.models import find_checkpoint, layout_for, load_model, load_tokenizer
from plugbridge.parsing import parse_json
from plugbridge.sources import read_model_config
from plugbridge.tasks.encode import Encoder
from plugbridge.tasks.own import own_rows, own_task
from plugbridge.tasks.read import Csv, LabelledLines, Tsv, read_rows
from plugbridge.tasks.rows import make_row, read_flat
from plugbridge.tasks.spec import load_task

MORE = int(os.environ.get("PLUGBRIDGE_FUZZ", "0"))
"""How many cases of each kind are asked for, other ones in every run, instead of the few that are always the same."""


def cases(count: int) -> Callable[[Any], Any]:
    """So many examples, the same in every run; a folder is shared by all of them."""
    return settings(
        max_examples=MORE or count, derandomize=not MORE, print_blob=bool(MORE), database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def one_line(work: Callable[[], Any]) -> None:
    """Some work ends well or in one line of bounded length."""
    try:
        work()
    except PlugbridgeError as error:
        said = str(error)
        assert said.strip()
        assert "\n" not in said
        assert len(said) < 1200  # of a text that a user gave, a part
        assert not re.search(r"(\S)\1{999}", said)
        said.encode("utf-8", "backslashreplace")


# what has broken parsers

SCALARS = [
    "null", "~", "true", "yes", "off", "017", "0o17", "0x1f", "1:30", "1_000", ".inf", "-.inf", ".nan", "1e999", "-1",
    "1e-3", "0", "-0.0", "2024-13-45", "2024-01-01", "9" * 5000, "1" + "0" * 14, str(10**9), str(10**12), "''", '""',
    "!!float abc", "!!python/object/apply:os.system [x]", "!x y", "&a b", "*a", "&a [*a]", "<<", "|", ">", "%", "@",
    "`", '"a\\0b"', '"\\ud800"', '"\\U00110000"', "a\0b", "\ud800", "\udcff", "\x85", "\u2028", "\ufeff", "😀",
    "a" * 5000, "~nosuchuser/x",
    "/proc/self/mem/x", "/dev/full", ".", "..", "/", "a/b/c", "os.system", "{word}", "{}", "{word",
    "{a.b}", "[", "]", "{", "}", "[" * 3000, "{a: " * 200, "- " * 500, ",", ":", "- a", "? a", "#", "\t", "\n", " ",
    "---", "...", "'", '"', "{a: 1, a: 2}", "[1, [2, [3]]]", "{path: x, load_in: 4bit}", "{file: x}", "Infinity", "NaN",
]  # fmt: skip
scalars = st.one_of(st.sampled_from(SCALARS), st.text(max_size=12), st.integers(), st.floats().map(str)).map(str)
KEYS = [key for key, _, _ in fields_help()]
keys = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(
        ["task.words.a", "task.words", "task.words.U.S.", "seed.x", "small.path", "", ".", "a", "tune.", "<<"]
    ),
    st.text(max_size=8),
)
choices = st.tuples(keys, st.lists(scalars, max_size=4).map(",".join)).map("=".join)


@st.composite
def edited(draw: Callable[[Any], Any], text: str, pieces: list[str]) -> str:
    """A text in which some places hold something else."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        until = at + draw(st.sampled_from([0, 0, 1, 2, 10, 1000]))
        text = text[:at] + draw(st.sampled_from(pieces)) + text[until:]
    return text


CONFIG = """\
small: a   # the model that is tuned
large: {path: b, load_in: 4bit}
task: {file: x.jsonl, prompt: '{word} is', words: {even: " yes", odd: ' no', 0: |-
  maybe}}
method: &m {name: lora, rank: 8, alpha: 16.0}
tune: &t
  steps: 3
  learning_rate: 1e-3
ceiling: *t
evaluate: {models: [large_plugged, small_tuned], split: validation, limit: null}
seed: 1
trust_remote_code: false
"""


# configurations


@cases(400)
@given(edited(CONFIG, SCALARS))
def test_config_text(text: str) -> None:
    one_line(lambda: parse_config(parse_yaml(text, "c.yaml"), "c.yaml"))


@cases(200)
@given(st.lists(st.tuples(keys, scalars), min_size=1, max_size=2))
def test_overrides(tmp_path_factory: pytest.TempPathFactory, sets: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    if not path.exists():
        path.write_text(CONFIG, encoding="utf-8")
    one_line(lambda: load_config(path, tuple(f"{key}={value}" for key, value in sets)))


@cases(100)
@given(
    st.lists(st.one_of(scalars, st.tuples(keys, st.lists(scalars, max_size=4).map(",".join)).map("=".join)), max_size=3)
)
def test_varied_values(varied: list[str]) -> None:
    def configs() -> None:
        for name, sets in combinations(varied).items():
            assert "/" not in name
            assert len(name.encode()) < 256
            raw: Any = parse_yaml(CONFIG, "c")
            for text in sets:
                raw = apply_override(raw, text)
            parse_config(raw, "c")

    one_line(configs)


GRID = yaml.safe_dump(
    {
        "pairs": {"tiny": {"small": "a", "large": "b"}},
        "seeds": [0, 3],
        "base": {"couple.steps": 10, "prune.reduction": 2},
        "methods": {"lora": {"method.rank": 2}},
        "variants": {
            "whole": {"set": {"couple.mode": "feedback"}},
            "none": {"control": True, "set": {"couple.steps": 0}},
        },
        "default": [{"pairs": ["tiny"], "methods": ["lora"], "tasks": ["rte"], "variants": ["whole", "none"]}],
    }
)


@cases(100)
@given(edited(GRID, SCALARS))
def test_grids(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "grid.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    one_line(lambda: groups_of(load_grid(path), path.parent, True))


@cases(50)
@given(st.one_of(scalars, st.from_regex(r"[0-9]{1,9}\.?[0-9]* ?[KMGT]?i?B?", fullmatch=True)))
def test_amounts_of_memory(text: str) -> None:
    one_line(lambda: parse_bytes(text))


# rows

JUNK = [
    "NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000, "[]", "{}", "null", "true", '"\\ud800"', '"\\u0000"', '"',
    "\\", "\x00", "\x85", "\u2028", "\ufeff", ",", ":", "[", "]", "{", "}", '{"word": 1, "word": 2}', "\r", "\n", "\t",
'""', '"word"', '"label"', '"answers"', '"options"', '"even"', "-1", "0.5", '"' + "n" * 5000 + '"',
    '"' + "9" * 5000 + '"', '["a", "a"]',
    "[[[1]]]",
]  # fmt: skip
ROWS = '{"word": "w1", "label": "odd", "n": 1.5}\n{"word": "w2", "label": "even", "n": [1, {"a": null}]}\n' * 8
WORDS = {"prompt": "is {word} : {n}", "words": {"even": "yes", "odd": "no"}}
TEXT = {"prompt": "is {word} :", "generate": " {label}", "passage": "word"}


@cases(300)
@given(edited(ROWS, JUNK), st.sampled_from([WORDS, TEXT]))
def test_own_rows(tmp_path_factory: pytest.TempPathFactory, text: str, answer: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    config = TaskConfig.model_validate({"file": str(path), **answer})
    one_line(lambda: own_rows(config, own_task(config), "causal", 0))


TABLES = [
    Tsv(name="tsv", columns=("text", "label")),
    Csv(name="csv", columns=("label", "text"), bare=True),
    LabelledLines(name="labelled lines", columns=("label", "text"), encoding="latin-1"),
]


@cases(100)
@given(edited('text\tlabel\nlabel,text\n0 a b\n1,"c, ""d\n"""\ne\t1\n', JUNK), st.sampled_from(TABLES))
def test_tables(tmp_path_factory: pytest.TempPathFactory, text: str, form: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    one_line(lambda: list(read_rows(path, form)))


ANSWER = {"idx": 0, "text": "c", "label": 1}
NESTED: dict[str, Any] = {
    "multirc": {
        "idx": 0,
        "passage": {"text": "a", "questions": [{"idx": 0, "question": "b", "answers": [ANSWER]}]},
    },
    "record": {
        "idx": 0,
        "passage": {"text": "a b", "entities": [{"start": 0, "end": 0}, {"start": 2, "end": 2}]},
        "qas": [{"idx": 0, "query": "@placeholder c", "answers": [{"start": 0, "end": 0, "text": "a"}]}],
    },
    "wsc": {"idx": 0, "text": "a b c", "label": True, "target": {"span1_index": 0, "span1_text": "a", "span2_index": 2,
                                                                 "span2_text": "c"}},
    "wic": {"idx": 0, "word": "a", "sentence1": "a b", "sentence2": "b a", "label": True, "start1": 0, "end1": 1,
            "start2": 2, "end2": 3, "version": 1.1},
    "copa": {"idx": 0, "premise": "a.", "choice1": "b.", "choice2": "c.", "question": "cause", "label": 1},
}  # fmt: skip


@cases(200)
@given(st.data())
def test_rows_of_known_tasks(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(NESTED)))
    path = tmp_path_factory.getbasetemp() / "task.jsonl"
    text = data.draw(edited(json.dumps(NESTED[name]), JUNK))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    task = load_task(name)
    for kind in ("causal", "seq2seq"):
        one_line(lambda kind=kind: [make_row(task, task.form(kind), w, raw) for w, raw in read_flat(task, path)])


# models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("fuzz") / "model", hidden=8, layers=1, heads=2)


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model("gpt2", tmp_path_factory.mktemp("fuzz") / "pickled", hidden=8, layers=1, heads=2)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [16, 18]},
}
INDEX = {"metadata": {"total_size": 18}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
HEADER_JUNK = [*JUNK, '"F32"', '"../x"', "18", "16", '"a"', "1e2", '"I4"', str(2**63), str(10**30)]


@cases(250)
@given(edited(json.dumps(HEADER), HEADER_JUNK), st.sampled_from([0, 0, 0, 1, -1, 2**40, 2**63]))
def test_headers(tmp_path_factory: pytest.TempPathFactory, text: str, wrong: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "header"
    folder.mkdir(exist_ok=True)
    header = text.encode("utf-8", "surrogatepass")
    length = max(0, len(header) + wrong).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(length + header + bytes(18))

    def read() -> None:
        checkpoint = find_checkpoint(str(folder))
        assert checkpoint is not None
        checkpoint.require_readable()
        for name in checkpoint.entries:
            checkpoint.read(name)

    one_line(read)


@cases(150)
@given(edited(json.dumps(INDEX), HEADER_JUNK))
def test_indices(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    one_line(lambda: find_checkpoint(str(folder)))


VALUES: list[Any] = [
    -1, 0, 1, 3, 2.5, True, None, "x", "os.system", [], {}, [1], {"a": 1}, 10**7, 10**12, 2**63, -(10**30), 1e308,
    "a" * 5000, "\ud800", [[[[]]]], "../..", "a\0b", float("nan"), float("inf"),
]  # fmt: skip


@cases(120)
@given(st.data())
def test_model_configurations(model: Path, data: st.DataObject) -> None:
    """Names and shapes are read, no weights: what `prepare` does first."""
    path = model / "config.json"
    before = path.read_text()
    raw = json.loads(before)
    for _ in range(data.draw(st.integers(1, 2))):
        raw[data.draw(st.sampled_from([*raw, "n_inner", "auto_map", "quantization_config"]))] = data.draw(
            st.sampled_from(VALUES)
        )
    text = json.dumps(raw) if data.draw(st.booleans()) else data.draw(edited(before, JUNK))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own, of values that it takes
            one_line(lambda: layout_for(load_model(str(model), device="meta")))
    finally:
        path.write_text(before)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    return {family: save_model(family, folder / family, hidden=8, layers=1, heads=2) for family in FAMILIES}


@cases(25)
@given(st.data())
def test_networks(networks: dict[str, Path], data: st.DataObject) -> None:
    """What one value of `config.json` makes of finite weights: a model that runs, or a refusal."""
    folder = networks[data.draw(st.sampled_from(FAMILIES))]
    path = folder / "config.json"
    before = path.read_text(encoding="utf-8")
    raw = json.loads(before)
    raw[data.draw(st.sampled_from(list(raw)))] = data.draw(st.sampled_from(VALUES))
    path.write_text(json.dumps(raw), encoding="utf-8", errors="surrogatepass")

    def run() -> None:
        found = read_model_config(str(folder))
        check_config(str(folder), family_of(found.get("model_type")), found)
        model: Any = load_model(str(folder)).train()
        ids = torch.tensor([[3, 4, 5]])
        begun = {}
        if family_of(found["model_type"]).kind == "seq2seq":
            begun = {"decoder_input_ids": torch.full((1, 1), model.config.decoder_start_token_id)}
        assert model(ids, **begun).logits.isfinite().all()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one_line(run)
    finally:
        path.write_text(before, encoding="utf-8")


TOKENIZER_JUNK = [
    *JUNK, "4294967296", '"BPE"', '"Unigram"', '"WordPiece"', '"ByteLevel"', '"Split"', '"Replace"', '{"Regex": "("}',
    '{"Regex": "(a*)*b"}', '"auto_map"', '"T5TokenizerFast"', '"os.system"', '"truncation"', '"type"', '"vocab"',
]  # fmt: skip


@cases(40)
@given(st.data())
def test_tokenizers(model: Path, data: st.DataObject) -> None:
    """As `preflight` and `prepare` read them, and a text by what was read."""
    files = [path for path in sorted(model.iterdir()) if path.name in OBJECTS]
    path = data.draw(st.sampled_from(files))
    before = path.read_text(encoding="utf-8")
    path.write_bytes(data.draw(edited(before, TOKENIZER_JUNK)).encode("utf-8", "surrogatepass"))

    def read() -> None:
        read_vocabulary(str(model))
        encoder = Encoder(load_tokenizer(str(model)), "causal", 16)
        encoder.text("is w1 : yes")
        assert encoder.front is not None

    try:
        one_line(read)
    finally:
        path.write_text(before, encoding="utf-8")


@cases(12)
@given(st.data())
def test_pickles(pickled: Path, data: st.DataObject) -> None:
    """Weights that `torch.save` wrote, or something else did."""
    path = pickled / "pytorch_model.bin"
    before = path.read_bytes()
    at = data.draw(st.integers(0, len(before)))
    until = at + data.draw(st.sampled_from([0, 1, 2, 100, len(before)]))
    path.write_bytes(before[:at] + data.draw(st.binary(max_size=9)) + before[until:])
    try:
        one_line(lambda: load_model(str(pickled)))
    finally:
        path.write_bytes(before)


# places


@cases(60)
@given(
    st.text(max_size=8) | st.lists(st.sampled_from([*SCALARS, "c.yaml", "folder", "loop"]), max_size=3).map("/".join)
)
def test_places_for_runs(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Looked at, and nothing is written."""
    folder = tmp_path_factory.getbasetemp() / "places"
    (folder / "folder").mkdir(parents=True, exist_ok=True)
    (folder / "c.yaml").write_text(CONFIG, encoding="utf-8")
    if not (folder / "loop").is_symlink():
        (folder / "loop").symlink_to("loop")

    def look() -> None:
        root = path_in("--out")(text)
        check_root(root)
        check_places(root, {"tune"})

    with contextlib.chdir(folder):
        one_line(look)
    assert sorted(path.name for path in folder.iterdir()) == ["c.yaml", "folder", "loop"]


# JSON by itself


@cases(150)
@given(st.one_of(edited(json.dumps(NESTED), JUNK), st.text(max_size=20)))
def test_json_is_as_strict_as_it_says(text: str) -> None:
    """What is taken is what any other reader of JSON takes, and can be written again."""

    def read() -> None:
        value = parse_json(text, "x", PlugbridgeError)
        assert json.loads(json.dumps(value, allow_nan=False)) == value == json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")

    one_line(read)
