"""The command line: every command on a toy run, and one clear line for every mistake."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import METHODS, VOCAB, make_tokenizer, save_model, write_jsonl
from plugbridge import __version__
from plugbridge.cli import main
from plugbridge.cli.options import yaml_files
from plugbridge.config import RunConfig, fields_help
from plugbridge.errors import RunError
from plugbridge.report import recovered
from plugbridge.run import locked


class NoRoom(NamedTuple):
    """What `shutil.disk_usage` says of a full disk."""

    total: int = 1
    used: int = 1
    free: int = 0


STAGES = ["tune", "score", "prune", "couple", "plug", "evaluate"]
ROWS = ["small_zero_shot", "small_tuned", "large_zero_shot", "large_plugged"]
Raw = dict[str, Any]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Run one command in an empty directory; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLUGBRIDGE_DATA", raising=False)
    for module in ("terminal", "run", "plan", "sweep", "bench", "reproduce", "report"):  # pytest has the log
        monkeypatch.setattr(f"plugbridge.cli.{module}.log_here", lambda quiet: None)
    monkeypatch.setattr("plugbridge.plan.beside._cores", lambda: 1)  # test_plan.py has a plan of two processes

    def run(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plugbridge", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def config(run_config: Callable[..., Raw], tmp_path: Path, toy: Raw) -> Callable[..., Path]:
    """Write a run's YAML file, with changes."""

    def write(**changes: Any) -> Path:
        train = {"steps": 2, "batch_size": 4}
        raw = run_config(tune=train, couple=dict(train), ceiling=None, evaluate={"limit": 8}, task=dict(toy))
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**raw, **changes}), encoding="utf-8")
        return tmp_path / "toy.yaml"

    return write


def stamps(root: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


def mistake(result: tuple[int, str, str]) -> str:
    """The one line of a refused command, after those that say what it began to load."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    err = re.sub(r"^plugbridge .*\n  loading .*\n", "", err)
    assert err.count("\n") == 1, err
    assert err.startswith("error: "), err
    return err.removeprefix("error: ").rstrip("\n")


def test_every_command_refuses_settings_alike(call: Call, config: Callable[..., Path]) -> None:
    path = config(method={"name": "lora", "dropout": 0.1}, couple={"mode": "feedback"})
    said = (
        "method.dropout is 0.1, but in mode 'feedback' the module runs without it, or its error would be another "
        "network's (it acts in standalone, ladder, backprop); leave it out"
    )
    for words in (["run", path], ["plan", path], ["couple", path], ["sweep", path, "--vary", "seed=1,2"],
                  ["sweep", "demo", "--vary", "seed=1,2", "--set", "method.dropout=0.1"],
                  ["reproduce", "table1", "--demo", "--mode", "feedback", "--set", "method.dropout=0.1"]):  # fmt: skip
        assert mistake(call(*words)) == said


# what there is


def test_version_and_help(call: Call) -> None:
    assert call("--version") == (0, f"{__version__}\n", "")
    code, out, _ = call("--help")
    assert code == 0
    assert all(name in out for name in ["run", *STAGES, "ceiling", "report", "families", "tasks", "methods", "explain"])


def test_the_help_has_a_first_file_and_completion(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert all(text in out for text in ("small: gpt2", "plugbridge run config.yaml", "--install-completion"))


def test_the_shell_completes_yaml_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("config.yaml", "count.txt", "configs/a.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    assert yaml_files("con") == ["config.yaml", "configs/"]
    assert yaml_files("configs/") == ["configs/a.yml"]
    assert yaml_files("nowhere/x") == []


@pytest.mark.parametrize(
    ("command", "names", "columns"),
    [
        ("families", {"gpt2", "t5", "llama"}, {"name", "model_type", "architecture", "kind", "axes"}),
        ("tasks", {"rte", "cb", "copa", "wordnet-kind"}, {"name", "title", "source", "licence", "shipped", "metrics"}),
        ("methods", set(METHODS), {"name", "title", "source", "library", "learning_rate", "rank", "tensors"}),
    ],
)
def test_lists(call: Call, command: str, names: set[str], columns: set[str]) -> None:
    code, out, err = call(command, "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert names <= {row["name"] for row in rows}
    assert all(columns <= set(row) for row in rows)
    code, out, _ = call(command)
    assert code == 0
    assert all(name in out for name in names)


def test_explain_names_every_key(call: Call) -> None:
    code, out, _ = call("explain")
    keys = [key for key, _, _ in fields_help()]
    assert code == 0
    assert all(key.split(".")[-1] in out for key in keys)
    assert {key.split(".")[0] for key in keys} == set(RunConfig.model_fields)


# a whole run


def no_room(*_: Any) -> None:
    raise RunError("no room")


def test_stages_one_by_one_and_then_the_report(call: Call, config: Callable[..., Path], tmp_path: Path) -> None:
    path, root = config(), tmp_path / "runs" / "toy"
    refused = mistake(call("couple", path))
    assert "stage 'couple' needs 'prune', which is not done; run `plugbridge prune` first" in refused
    assert not root.exists()
    for stage in STAGES:
        code, out, err = call(stage, path)
        assert (code, out) == (0, f"{stage}: done, in runs/toy/{stage}\n"), err
        assert [line.partition(":")[0] for line in err.splitlines()[2:]] == [f"  {stage}"] * 2
    before = stamps(root)
    code, out, err = call("run", path)
    assert code == 0
    assert err.splitlines()[2:] == [f"  {i + 1}/6 {stage}: done before, skipped" for i, stage in enumerate(STAGES)]
    pictures = ("report.png", "losses.png", "fidelity.png")
    written = {str(root / name) for name in ("config.yaml", "environment.json", *pictures)}
    assert {k: v for k, v in stamps(root).items() if k not in written} == {
        k: v for k, v in before.items() if k not in written
    }
    assert "large, plugged" in out
    assert "PeftModel.from_pretrained(model, 'runs/toy/plug/checkpoint')" in out
    assert all((root / name).read_bytes().startswith(b"\x89PNG") for name in pictures)

    code, out, err = call("report", "runs/toy", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert set(found) == {
        "task", "split", "method", "mode", "rows", "majority", "pgr", "stages", "models", "checkpoint", "versions",
        "seed", "cut", "remarks", "peak", "coupling", "pgr_reason", "commonest",
    }  # fmt: skip
    assert [row["name"] for row in found["rows"]] == ROWS
    for row in found["rows"]:
        assert set(row) == {
            "name", "metric", "value", "metrics", "n", "seconds", "peak_bytes", "evaluate_seconds", "parameters",
        }  # fmt: skip
        assert set(row["parameters"]) == {"trainable", "changed", "rank", "size"}
        assert (row["metric"], row["n"]) == ("accuracy", 8)
    assert [stage["name"] for stage in found["stages"]] == STAGES
    assert all(set(stage) == {"name", "seconds", "peak_bytes", "reserved_bytes"} for stage in found["stages"])
    own = {stage["name"]: stage["peak_bytes"] for stage in found["stages"] if stage["name"] != "ceiling"}
    top = {"stage": max(own, key=own.__getitem__), "bytes": max(own.values()), "memory": "resident"}
    assert found["peak"] == {**top, "reserved_bytes": 0}
    assert set(found["models"]) == {"small", "large", "bridge"}
    assert (found["task"], found["method"], found["seed"], found["pgr"]) == ("own", "lora", 0, None)
    assert {"plugbridge", "torch", "transformers", "peft"} <= set(found["versions"])

    # mistakes leave the finished run alone; so do settings that no stage was run with
    before = stamps(root)
    for command, changes, message in (
        ("run", {"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ("run", {"small": "/no/such/model"}, "does not exist"),
        (
            "plug",
            {"seed": 1},
            "needs 'couple', which was done with other settings: seed 0 → 1; give the same settings, or",
        ),
        (
            "run",
            {"seed": 1},
            "other work, which would be done again (tune, score, prune, couple, plug, evaluate): seed 0",
        ),
        ("ceiling", {}, "this run has no stage 'ceiling'"),
    ):
        assert message in mistake(call(command, config(**changes)))
    with locked(root):
        assert "another process is working in runs/toy" in mistake(call("run", path))
    other = path.with_name("other.yaml")
    other.write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plugbridge.run.check_room", no_room)
        assert "no room" in mistake(call("run", other, "--out", root, "--redo"))
    assert stamps(root) == before

    # a report never mixes two settings
    assert call("tune", config(seed=1), "-q", "--redo") == (0, "tune: done, in runs/toy/tune\n", "")
    assert mistake(call("report", root, "--json")).endswith("is older than 'tune'; finish with `plugbridge run`")
    (root / "plug" / "done.json").unlink()
    assert "stage 'plug' of" in mistake(call("report", root))


def test_a_plan_in_words(call: Call, config: Callable[..., Path]) -> None:
    asked = config(device="cpu", resident="none", evaluate={"limit": 8})
    code, out, _ = call("plan", asked, "--length", 8, "--memory", "100GB", "--threads", 1)
    assert code == 0
    for said in (
        "all of the above",
        "processor with 1 thread: ",
        "of the streamed model from disk",
        "evaluate.limit says",
    ):
        assert said in out
    assert "(a batch): of" in out  # tuning's validation rows
    assert "does not fit" not in out
    _, out, _ = call("plan", asked, "--length", 8, "--memory", "1MB")
    assert "0.0 GiB is less than Python and its libraries take by themselves" in out
    assert "fits with" not in out


def test_a_plan_ends_with_a_command_that_fits(
    call: Call, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"steps": 2, "batch_size": 512}
    asked = config(device="cpu", resident="all", couple=train, ceiling=train, baselines={"large_finetuned": train})
    own = ("--set", "couple.mode=ladder", "--set", "seed=7")
    monkeypatch.setattr("plugbridge.plan.make._baseline", lambda _dtype: 2**20)
    _, out, err = call("plan", asked, *own, "--length", 16, "--json")
    assert not err
    peaks = sorted(stage["peak_bytes"] for stage in json.loads(out)["stages"] if stage["ours"])
    room = 2**20 + peaks[-1] // 2
    monkeypatch.setattr("shutil.disk_usage", lambda _path: NoRoom())
    _, out, _ = call("plan", asked, *own, "--length", 16, "--memory", room)
    assert "not needed for the transfer and does not fit: ceiling, baselines.large_finetuned" in out
    assert "the run may write" in out
    assert "here are 0 MiB free" in out
    (line,) = (line for line in out.splitlines() if line.startswith("  plugbridge run"))
    assert line.startswith(f"  plugbridge run {asked} --set couple.mode=ladder --set seed=7 --set ")
    words = line.split()[3:]
    assert any(word.startswith("couple.micro_batch=") for word in words)
    assert {"ceiling=null", "baselines.large_finetuned=null"} < set(words)
    _, out, _ = call("plan", asked, *words, "--length", 16, "--memory", room, "--json")
    found = json.loads(out)
    assert all(stage["fits"] for stage in found["stages"] if stage["ours"] or stage["reference"])
    assert found["advice"] is None


def test_the_gap_recovered_is_null_where_there_may_be_no_gap() -> None:
    values = {"small_tuned": 0.4, "large_plugged": 0.5, "large_tuned": 0.6}
    assert recovered(values, 1000) == pytest.approx(0.5)
    assert recovered(values, 20) is None  # 0.2 is within chance of 20 rows
    assert recovered({**values, "large_tuned": 0.3}, 1000) is None
    assert recovered({name: v for name, v in values.items() if name != "large_tuned"}, 1000) is None


def test_set_quiet_ceiling_and_an_odd_name(call: Call, config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(ceiling={"steps": 1, "batch_size": 4})
    root = tmp_path / "[bold]:cat:"
    words = ("--out", root.name, "--quiet", "--set", "tune.steps=1", "--set", "score.importance=magnitude")
    code, out, err = call("run", path, *words)
    assert (code, err) == (0, "")
    assert f"plugged checkpoint: {root.name}/plug/checkpoint\n" in out
    used = yaml.safe_load((root / "config.yaml").read_text())
    assert (used["tune"]["steps"], used["score"]["importance"]) == (1, "magnitude")
    assert len(json.loads((root / "tune" / "losses.json").read_text())) == 1
    _, out, _ = call("report", root, "--json")
    found = json.loads(out)
    assert [row["name"] for row in found["rows"]] == [*ROWS, "large_tuned"]
    values = {row["name"]: row["value"] for row in found["rows"]}
    assert found["pgr"] == recovered(values, 30)
    assert call("report", root)[0] == 0


def test_an_interrupt_says_how_to_go_on(
    call: Call, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("plugbridge.run.execute", interrupt)
    code, _, err = call("run", config())
    assert code == 130
    assert err.endswith("interrupted; run the same command again to resume\n")


# bad input: a table of (name, how to spoil a config, what the line must say)

Spoil = Callable[[Raw, Path], Any]


def put(key: str, value: Any) -> Spoil:
    def spoil(raw: Raw, _: Path) -> None:
        *path, last = key.split(".")
        for part in path:
            raw = raw.setdefault(part, {})
        raw[last] = value

    return spoil


def copied(raw: Raw, which: str, tmp: Path) -> Path:
    raw[which] = str(shutil.copytree(raw[which], tmp / which))
    return Path(raw[which])


def model_file(which: str, name: str, change: Callable[[Path], Any]) -> Spoil:
    return lambda raw, tmp: change(copied(raw, which, tmp) / name)


def tokenizer(which: str, change: Callable[[Path], Any]) -> Spoil:
    return lambda raw, tmp: change(copied(raw, which, tmp))


def weights(which: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(path: Path) -> None:
        state = load_file(str(path))
        change(state)
        save_file(state, str(path), metadata={"format": "pt"})

    return model_file(which, "model.safetensors", spoil)


def config_json(**changes: Any) -> Spoil:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")

    return model_file("small", "config.json", change)


def rows(split: str, text: str | bytes) -> Spoil:
    def spoil(raw: Raw, tmp: Path) -> None:
        path = tmp / f"{split}.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        raw["task"][split] = str(path)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(raw: Raw, tmp: Path) -> None:
        for one in spoils:
            one(raw, tmp)

    return spoil


def other_pad(path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(path)


def swapped(a: str, b: str) -> list[str]:
    return [{a: b, b: a}.get(word, word) for word in VOCAB]


def one_file(count: int) -> Spoil:
    def spoil(raw: Raw, tmp: Path) -> None:
        path = write_jsonl(tmp / "all.jsonl", [{"word": "w1", "label": "odd"}] * count)
        raw["task"] = {"file": str(path), "prompt": "is it : {word}", "words": raw["task"]["words"]}

    return spoil


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


GOOD = '{"word": "w1", "before": "w2", "label": "odd"}\n'
LONG = put("task.prompt", "is it : {word} " * 40)
MISTAKES: dict[str, tuple[Spoil, str]] = {
    "no directory": (put("small", "/no/such/model"), "model directory /no/such/model does not exist"),
    "no relative directory": (put("large", "./gone"), "gone does not exist"),
    "no hub model": (put("small", "nosuchmodel"), "nosuchmodel is no directory here, is not in the Hugging Face cache"),
    "no hub model of a user": (
        put("large", "no/suchmodel"),
        "no/suchmodel is no directory here, is not in the Hugging Face",
    ),
    "a file": (put("small", __file__), "is a file; expected a Hugging Face model directory"),
    "no config.json": (lambda raw, tmp: raw.update(small=str(tmp)), "has no config.json; expected a Hugging Face"),
    "config.json not JSON": (model_file("small", "config.json", halve), "cannot read the configuration"),
    "config.json a list": (
        model_file("small", "config.json", lambda p: p.write_text("[]", encoding="utf-8")),
        "cannot read the configuration",
    ),
    "unknown family": (config_json(model_type="bert"), "model type 'bert' is of no known family (known: gpt2,"),
    "unknown type": (config_json(model_type="nosuch"), "model type 'nosuch' is of no known family"),
    "remote code": (
        config_json(model_type="nosuch", auto_map={"AutoConfig": "evil.Config"}),
        "model type 'nosuch' is of no known family",
    ),
    "positions do not fit": (config_json(n_positions=64), "cannot load the model in"),
    "layers missing": (config_json(n_layer=2), "lacks 12 weights, the first is 'transformer.h.1."),
    "weights missing": (
        weights("large", lambda state: state.pop("transformer.h.1.mlp.c_fc.weight")),
        "lacks 1 weights, the first is 'transformer.h.1.mlp.c_fc.weight'; is the checkpoint complete?",
    ),
    "weights cut": (model_file("small", "model.safetensors", halve), "model.safetensors is truncated: tensor '"),
    "weights of large cut": (model_file("large", "model.safetensors", halve), "is truncated: tensor 'transformer."),
    "weights gone": (
        model_file("large", "model.safetensors", Path.unlink),
        "has no weights; expected model.safetensors",
    ),
    "weights not safetensors": (
        model_file("small", "model.safetensors", lambda p: p.write_text("hello", encoding="utf-8")),
        "model.safetensors is truncated: it has 5 bytes and no whole header",
    ),
    "no tokenizer": (
        tokenizer("small", lambda p: [f.unlink() for f in p.glob("tokenizer*")]),
        "has no tokenizer; expected tokenizer.json",
    ),
    "tokenizer cut": (model_file("small", "tokenizer.json", halve), "cannot read the tokenizer"),
    "tokenizer sizes": (
        tokenizer("small", lambda p: make_tokenizer(VOCAB[:-1]).save_pretrained(p)),
        "small's tokenizer has 31 tokens, large's has 32; a module can only move between",
    ),
    "tokenizer order": (
        tokenizer("large", lambda p: make_tokenizer(swapped("w3", "w4")).save_pretrained(p)),
        "token 'w3' is 11 for small but 12 for large",
    ),
    "tokenizer pad": (tokenizer("large", other_pad), "pad_token_id is 0 for small but 1 for large"),
    "tokenizer of another model": (
        both(
            *(tokenizer(w, lambda p: make_tokenizer([*VOCAB, "more"]).save_pretrained(p)) for w in ("small", "large"))
        ),
        "the tokenizer has token 32 but the model only 32 embeddings",
    ),
    "unknown key": (put("coupel", {}), "unknown key 'coupel'; did you mean 'couple'?"),
    "unknown inner key": (put("tune.step", 3), "unknown key 'tune.step'; did you mean 'steps'?"),
    "unknown task key": (put("task.promt", ""), "unknown key 'task.promt'; did you mean 'prompt'?"),
    "not YAML": (lambda *_: "small: [", "is not YAML"),
    "not a table": (lambda *_: "- small", "expected keys and values, found a list"),
    "empty": (lambda *_: "", "expected keys and values, found nothing"),
    "null": (lambda *_: "null", "expected keys and values, found nothing"),
    "no words": (put("task.words", {}), "`words` has no two labels, so there is nothing to choose; give at least two"),
    "key missing": (lambda raw, _: raw.pop("small") and None, "'small' is required and not given"),
    "task key missing": (lambda raw, _: raw["task"].pop("prompt") and None, "'task.prompt' is required and not given"),
    "wrong type": (put("tune.steps", "many"), "tune.steps: Input should be a valid integer"),
    "wrong type of task": (put("task", [3]), "c.yaml: task: expected keys and values"),
    "too small": (put("tune.batch_size", 0), "tune.batch_size: Input should be greater than or equal to 1 (found 0)"),
    "no such choice": (put("device", "tpu"), "device: Input should be 'auto', 'cpu' or 'cuda' (found 'tpu')"),
    "reduction and budget": (put("prune.budget", 0.5), "prune: give one of `reduction` and `budget`, not both"),
    "budget too small": (put("prune", {"budget": 10}), "a budget of 10 parameters is too small: the smallest Bridge"),
    "unknown method": (put("method.name", "lorra"), "no method 'lorra'; known: lora, adapter, prefix"),
    "unknown mode": (put("couple.mode", "duet"), "no coupling mode 'duet'; known: standalone"),
    "unknown task": (
        put("task", "rta"),
        "no task 'rta'; known: agnews, agnews-alps, ax-b, ax-g, boolq, cb, cola, copa, mrpc, multirc, record, rte",
    ),
    "dropout of an adapter": (
        put("method", {"name": "adapter", "dropout": 0.1}),
        "method.dropout is 0.1, but only lora has dropout",
    ),
    "task without data": (put("task", "rte"), "task 'rte' needs its files; give --data DIR or set PLUGBRIDGE_DATA"),
    "data nowhere": (
        both(put("task", "cb"), put("data", "nowhere")),
        "nowhere/CB does not hold train.jsonl, val.jsonl",
    ),
    "two sources": (put("task.file", "x.jsonl"), "task: give either `file`, or all of `train`"),
    "line not JSON": (rows("train", GOOD + '{"word": '), "train.jsonl:2: not JSON"),
    "line not an object": (rows("test", GOOD + "\n[1]\n"), "test.jsonl:3: expected a JSON object, found list"),
    "field missing": (
        rows("train", GOOD + '{"before": "w3", "label": "odd"}'),
        "train.jsonl:2: field 'word' is missing; the row has",
    ),
    "label missing": (rows("train", '{"word": "w1", "before": "w2"}'), "train.jsonl:1: field 'label' is missing"),
    "unknown label": (
        rows("validation", GOOD + '{"word": "w1", "before": "w3", "label": "prime"}'),
        "validation.jsonl:2: label 'prime' has no label word; known labels: even, odd",
    ),
    "not UTF-8": (rows("train", b"\xff\xfe"), "train.jsonl:1: not UTF-8 text (byte 0 of the file)"),
    "no file": (put("task.train", "/no/such.jsonl"), "cannot read task file /no/such.jsonl: No such file or directory"),
    "empty file": (rows("test", ""), "split 'test' is empty"),
    "blank file": (rows("train", "\n \n"), "split 'train' is empty"),
    "file of one prompt": (one_file(3), "all.jsonl read alike, 'is it : w1'; nothing can be learnt from them"),
    "label without a word": (put("task.words", {"even": "yes", "uneven": "no"}), "label 'odd' has no label word"),
    "cache": (put("couple.cache", True), "couple.cache: Input should be 'off', 'memory' or 'disk'"),
    "empty word": (put("task.words", {"even": "yes", "odd": " "}), "the label word of 'odd' is empty"),
    "equal words": (put("task.words", {"even": "yes", "odd": "yes"}), "'even' and 'odd' have the same word 'yes'"),
    "words equal in tokens": (
        put("task.words", {"even": "perhaps", "odd": "maybe"}),
        "'perhaps' and 'maybe' are the same tokens (unknown to the tokenizer)",
    ),
    "prompt too long": (LONG, "train.jsonl:1: the prompt takes 160 tokens but the model has room for 31"),
    "passage missing": (
        both(LONG, put("task.passage", "text")),
        "task.passage is 'text', which task.prompt does not name",
    ),
    "prompt empty": (put("task.prompt", ""), "task.prompt is '', without a field, so all rows would be alike"),
    "prompt broken": (put("task.prompt", "{word"), "prompt template '{word' is not usable"),
    "prompt by number": (put("task.prompt", "{}"), "must use plain {field} names"),
    "prompt with a format": (put("task.prompt", "{word:d}"), "must use plain {field} names"),
    "prompt with a conversion": (put("task.prompt", "{word!x}"), "must use plain {field} names"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    call: Call, run_config: Callable[..., Raw], toy: Raw, tmp_path: Path, name: str
) -> None:
    spoil, message = MISTAKES[name]
    raw = run_config(task=dict(toy))
    text = spoil(raw, tmp_path)
    (tmp_path / "c.yaml").write_text(text if isinstance(text, str) else yaml.safe_dump(raw), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert message in mistake(call("run", "c.yaml", "--out", "run"))
    assert sorted(tmp_path.rglob("*")) == before


def test_two_families(call: Call, config: Callable[..., Path], pairs: Callable[[str], tuple[Path, Path]]) -> None:
    line = mistake(call("run", config(large=str(pairs("t5")[1])), "--out", "run"))
    assert line == "small is a gpt2 model but large is a t5 model; both must be of one family"
    assert not Path("run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_card(call: Call, config: Callable[..., Path]) -> None:
    assert "device is 'cuda' but torch sees no CUDA card" in mistake(call("run", config(device="cuda")))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("owned"),)


def test_a_pickle_cannot_run_code(call: Call, config: Callable[..., Path], tmp_path: Path) -> None:
    source = save_model("gpt2", tmp_path / "evil", hidden=8, layers=1, heads=2)
    (source / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Evil()}, source / "pytorch_model.bin")
    assert "cannot load the model in" in mistake(call("run", config(small=str(source)), "--out", "run"))
    assert not Path("owned").exists()
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "gone.yaml"), "cannot read config gone.yaml: No such file or directory"),
        (("run", "."), "cannot read config .: it is a directory, not a file"),
        (("run", "toy.yaml", "--set", "seed"), "--set 'seed': expected key=value"),
        (("run", "toy.yaml", "--set", "tune.stepz=4"), "unknown key 'tune.stepz'; did you mean 'steps'?"),
        (("run", "toy.yaml", "--set", "seed=["), "--set 'seed=[' is not YAML: "),
        (("run", "toy.yaml", "--set", "task=rte", "--data", "gone"), "gone/RTE does not hold train.jsonl, val.jsonl"),
        (("run", "toy.yaml", "--out", "file"), "file is a file; --out must name a run directory"),
        (("run", "toy.yaml", "--out", "file/run"), "file is a file; --out must name a run directory"),
        (("run", "toy.yaml", "--out", "foreign"), "foreign is not empty and not a run; choose another --out"),
        (("report", "[/b]:cat:"), "[/b]:cat: is not a run; expected a directory made by `plugbridge run`"),
        (("report", "foreign"), "foreign is not a run"),
        (("bench", "memory", "--only", "LoRA", "--only", "lara"), "--only lara: no row's name holds that; rows: full "),
    ],
)
def test_a_mistaken_command_is_one_line(
    call: Call, config: Callable[..., Path], tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    config()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine", encoding="utf-8")
    before = stamps(tmp_path)
    assert message in mistake(call(*words))
    assert stamps(tmp_path) == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "done", "message"),
    [
        (put("tune.learning_rate", 1e30), [], "tune small: the loss is nan at step 2 of 2; try a learning rate below"),
        (put("couple.learning_rate", 1e30), ["tune", "score", "prune"], "couple (feedback): the loss is nan at step"),
        (
            weights("small", lambda s: s["transformer.wte.weight"].fill_(torch.nan)),
            [],
            "tune small: the loss is nan at step 1 of 2, before anything was learned: tensor 'transformer.wte.",
        ),
        (weights("large", lambda s: s["transformer.wpe.weight"].fill_(torch.nan)), ["tune"], "finite: tensor 'transfo"),
    ],
)  # fmt: skip
def test_a_loss_that_is_not_finite_stops_the_stage(
    call: Call, config: Callable[..., Path], tmp_path: Path, change: Spoil, done: list[str], message: str
) -> None:
    raw = yaml.safe_load(config().read_text())
    change(raw, tmp_path)
    code, out, err = call("run", config(**raw), "--out", "run")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert [stage for stage in STAGES if (tmp_path / "run" / stage / "done.json").exists()] == done
