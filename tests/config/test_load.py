"""A configuration's values have the types of their keys; texts are what was written, in a file and behind `--set`."""

from pathlib import Path
from typing import Any

import pytest

from plugbridge.config import TaskConfig, apply_override, load_config, parse_config, set_value
from plugbridge.config.document import parse_yaml
from plugbridge.errors import ConfigError

BASE = "small: a\nlarge: b\ntask: {file: x.jsonl, prompt: '{text} is', words: {a: ' x', b: ' y'}}\n"


def read(text: str, *overrides: str) -> dict[str, Any]:
    raw = parse_yaml(text, "c.yaml")
    for override in overrides:
        raw = apply_override(raw, override)
    return parse_config(raw, "c.yaml").model_dump()


def at(found: dict[str, Any], key: str) -> Any:
    value: Any = found
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("task.words.c= music", "task.words.c", " music"),
        ("task.words.c=' music'", "task.words.c", " music"),
        ('task.words.c=" mu\\tsic"', "task.words.c", " mu\tsic"),
        ("task.words.c=true", "task.words.c", "true"),
        ("task.words.c=017", "task.words.c", "017"),
        ("task.words.c=null", "task.words.c", "null"),
        ("task.words.c= # no remark", "task.words.c", " # no remark"),
        ("task.words.c='tis", "task.words.c", "'tis"),
        ("task.words.c=a=b", "task.words.c", "a=b"),
        ("task.prompt={text} Topic:", "task.prompt", "{text} Topic:"),
        ("task.prompt= {text}: - ", "task.prompt", " {text}: - "),
        ("task.label=1.0", "task.label", "1.0"),
        ("task.words={0: ' no', 1: ' yes'}", "task.words", {"0": " no", "1": " yes"}),
        ("small=017", "small", "017"),
        ("large={path: x, load_in: 4bit}", "large", {"path": "x", "load_in": "4bit"}),
        ("large.load_in= 8bit", "large", {"path": "b", "load_in": "8bit"}),
        ("task=rte", "task", "rte"),
        ("data=null", "data", None),
        ("data=", "data", None),
        ("couple.steps=500", "couple.steps", 500),
        ("couple.steps= 0x10 # sixteen", "couple.steps", 16),
        ("couple.learning_rate=1e-3", "couple.learning_rate", 0.001),
        ("couple.layers=1", "couple.layers", 1.0),
        ("couple.cache=off", "couple.cache", "off"),
        ("evaluate.models=[large_plugged]", "evaluate.models", ["large_plugged"]),
        ("evaluate.probe=true", "evaluate.probe", True),
        ("polish={}", "polish.evaluations", 100),
        ("ceiling.steps=3", "ceiling.steps", 3),
        ("repair=null", "repair", None),
    ],
)
def test_an_override_has_the_type_of_its_key(override: str, key: str, value: Any) -> None:
    found = at(read(BASE, override), key)
    assert (found, type(found)) == (value, type(value))


def test_a_label_may_have_dots() -> None:
    assert read(BASE, "task.words.U.S.= us")["task"]["words"] == {"a": " x", "b": " y", "U.S.": " us"}


def test_texts_are_as_written() -> None:
    text = "small: 1.0\nlarge: on\ntask: {file: x, label: 2024-01-01, prompt: '{t}', words: {true: 1:30, 017: yes}}"
    found = read(text)
    assert (found["small"], found["large"]) == ("1.0", "on")
    assert found["task"]["words"] == {"true": "1:30", "017": "yes"}
    assert found["task"]["label"] == "2024-01-01"
    assert read(BASE + "couple: {mode: ladder, cache: off}")["couple"]["cache"] == "off"


WRONG: dict[str, str] = {
    "seed=017": "c.yaml: seed: Input should be a valid integer (found '017')",
    "seed='5'": "seed: Input should be a valid integer (found '5')",
    "seed=true": "seed: Input should be a valid integer (found True)",
    "seed=1:30": "seed: Input should be a valid integer (found '1:30')",
    "seed=" + "9" * 5000: "seed: Input should be a valid integer (found '999",
    "seed=100000000000000": "seed: Input should be less than or equal to 4294967295 (found 100000000000000)",
    "tune.steps=1e3": "tune.steps: Input should be a valid integer (found 1000.0)",
    "tune.steps=": "tune.steps: Input should be a valid integer (found None)",
    "trust_remote_code=yes": "trust_remote_code: Input should be a valid boolean (found 'yes')",
    "trust_remote_code=1": "trust_remote_code: Input should be a valid boolean (found 1)",
    "method.alpha=.inf": "method.alpha: Input should be a valid number (found '.inf')",
    "prune.budget=.nan": "prune.budget: Input should be a valid number (found '.nan')",
    "tune.weight_decay=1e999": "tune.weight_decay: Input should be a valid number (found '1e999')",
    "method.rank=1000000000": "method.rank: Input should be less than or equal to 65536",
    "tune.batch_size=1000000000000": "tune.batch_size: Input should be less than or equal to 65536",
    "small=": "small: String should have at least 1 character",
    "small=" + "a" * 5000: "small: String should have at most 4096 characters",
    "method.name=" + "a" * 5000: "method.name: String should have at most",
    "task=" + "a" * 5000: "task: String should have at most",
    "evaluate.models=large_plugged": "evaluate.models: Input should be a valid list (found 'large_plugged')",
    "k" * 5000 + "=1": "unknown key 'kkk",
    "seed=!!float abc": "--set 'seed=!!float abc': line 1: tag",
    "seed={a: 1, a: 2}": "key 'a' stands twice",
    "seed": "expected key=value, such as couple.steps=500",
    "=1": "expected key=value, such as couple.steps=500",
    "tune.=1": "expected key=value, such as couple.steps=500",
    "task.words.c=\udcff": "half of a surrogate pair",
}


@pytest.mark.parametrize("override", WRONG, ids=lambda text: ascii(text[:40]))
def test_a_value_that_its_key_cannot_have_is_one_line(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(BASE, override)
    assert WRONG[override] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_labels_from_python_are_texts_and_kept_apart() -> None:
    raw = {"file": "x", "prompt": "{t}", "words": {0: "a", 1: "b"}}
    assert TaskConfig.model_validate(raw).words == {"0": "a", "1": "b"}
    for words, message in (({0: "a", "0": "b"}, "a label stands twice"), ({True: "a", "b": "b"}, "a truth value")):
        with pytest.raises(ConfigError, match=message):
            parse_config({"small": "a", "large": "b", "task": {**raw, "words": words}}, "c")


def test_what_is_set_leaves_the_rest_as_it_was() -> None:
    raw = parse_yaml("tune: &t {steps: 1}\ncouple: *t", "c")
    assert set_value(raw, "couple.steps", 5) == {"tune": {"steps": "1"}, "couple": {"steps": 5}}
    assert raw["couple"] == {"steps": "1"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("~nosuchuser/x", "small: '~nosuchuser/x' can be no path: "),
        ("./" + "a" * 300, "can be no path: File name too long"),
        ("./a\0b", "has a NUL character"),
    ],
)
def test_what_can_be_no_path_is_one_line(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(BASE, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml", (f"small={source}",))
    assert message in str(caught.value)
