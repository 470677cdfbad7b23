"""Every setting acts or is refused: each key is changed in each mode where it may matter, and a difference is found."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from conftest import ReadOnce, save_model
from plugbridge.config import fields_help, parse_config
from plugbridge.errors import ConfigError
from plugbridge.preflight import check_settings, preflight, resolve
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.run import Stage, execute
from plugbridge.stages.build import build_stages, same_result
from plugbridge.stages.depends import rate_of_training
from plugbridge.stages.work import schedule_of
from plugbridge.transfer.acting import FREE, OF_STEPS, idle_sections, without_idle_steps
from plugbridge.tuners.table import METHODS

Raw = dict[str, Any]
TRAIN = {"steps": 2, "batch_size": 4, "learning_rate": 0.05}
LOOP = {"steps": 3, "batch_size": 5, "learning_rate": 0.01, "warmup": 0.9, "weight_decay": 0.5, "clip": 1e-3}
MODES: dict[str, Raw] = {
    "standalone": {"couple": {"plug": "random"}, "repair": TRAIN, "polish": {"evaluations": 3, "rows": 5}},
    "standalone, frozen": {"couple": {"mode": "standalone", "bridge": "freeze", "plug": "fresh"}},
    "ladder": {},
    "ladder_delta": {},
    "feedback": {"repair": TRAIN},
    "identity": {},
    "mezo": {},
    "backprop": {},
}
ALONE, FROM_SMALL = ("standalone", "ladder"), {"couple.plug": "ridge"}
NO_BRIDGE = ("ladder_delta", "feedback", "identity", "mezo", "backprop")

ACTS: list[tuple[str, Any, str, tuple[str, ...], Raw]] = [
    # key, another value, the stage whose results change, the modes where they do, what else is set
    *((f"tune.{key}", value, "tune", ("standalone",), {}) for key, value in LOOP.items()),
    ("tune.optimizer", "adafactor", "tune", ("standalone",), {}),
    ("method.name", "adapter", "tune", ("standalone",), {}),
    ("method.rank", 3, "tune", ("standalone",), {}),
    ("method.alpha", 9.0, "tune", ("standalone",), {}),
    ("method.dropout", 0.5, "tune", ("standalone",), {}),
    ("seed", 1, "tune", ("standalone",), {}),
    ("dtype", "bfloat16", "tune", ("standalone",), {}),
    ("score.importance", "magnitude", "score", ("standalone",), {}),
    ("score.samples", 3, "score", ("standalone",), {}),
    ("score.samples", 3, "score", ("standalone",), {"score.importance": "magnitude"}),
    ("prune", {"reduction": 4}, "prune", ("standalone",), {}),
    ("prune.whole", ["hidden"], "prune", ("standalone", "feedback"), {}),
    ("prune", {"budget": 0.5}, "prune", ("feedback",), {}),
    ("prune.shuffle", True, "prune", ("feedback",), {}),
    ("prune.channels", "pca", "prune", ("feedback",), {}),
    ("prune.bits", 3, "prune", ("feedback", "standalone, frozen"), {"repair": None}),
    ("prune.rounding", "nearest", "prune", ("feedback", "standalone, frozen"), {"repair": None, "prune.bits": 3}),
    ("couple.activations", "large", "couple", ("feedback",), {}),
    ("couple.error_bound", 0.5, "couple", ("feedback",), {"couple.activations": "large"}),
    ("couple.kept_bits", 4, "couple", ("feedback",), {"couple.activations": "large"}),
    ("couple.perturbation", 0.5, "couple", ("mezo",), {}),
    ("couple.optimizer", "adafactor", "couple", ("mezo",), {}),
    ("couple.layers", 0.3, "couple", ("mezo",), {}),
    ("repair.optimizer", "adafactor", "repair", ("standalone",), {}),
    ("repair.target", "logits", "repair", ("standalone",), {}),
    ("couple.optimizer", "adamw", "couple", ("standalone",), {}),
    ("couple.optimizer", "adafactor", "couple", ("feedback",), {}),
    ("couple.plug", "ridge", "couple", ("standalone", "feedback"), {}),
    ("couple.plug", "procrustes", "couple", ("standalone",), {}),
    ("couple.layer_map", "cka", "couple", ("feedback",), FROM_SMALL),
    ("couple.align_samples", 3, "couple", ("feedback",), FROM_SMALL),
    ("couple.plug_learning_rate", 0.3, "couple", ("feedback",), FROM_SMALL),
    ("couple.plug_learning_rate", 0.3, "couple", ("ladder",), {}),
    ("couple.plug_learning_rate", 0.3, "couple", ("ladder_delta",), {"couple.down": "learned"}),
    ("couple.down", "learned", "couple", ("standalone", "ladder", "ladder_delta"), {}),
    ("couple.layers", 0.3, "couple", ("standalone", "ladder_delta", "feedback", "backprop"), {}),
    ("couple.bridge", "freeze", "couple", ALONE, {}),
    ("couple.bridge_learning_rate", 0.3, "couple", ALONE, {}),
    ("method.alpha", 9.0, "couple", ("standalone", "ladder", "ladder_delta", "feedback", "identity"), {}),
    ("method.dropout", 0.5, "couple", ("standalone", "standalone, frozen", "ladder", "backprop"), {}),
    *((f"polish.{key}", value, "polish", ("standalone",), {}) for key, value in (("evaluations", 5), ("rows", 9))),
    ("evaluate.split", "validation", "evaluate", ("feedback",), {}),
    ("evaluate.limit", 7, "evaluate", ("feedback",), {}),
    ("evaluate.models", ["large_plugged"], "evaluate", ("feedback",), {}),
    ("evaluate.probe", True, "evaluate", ("feedback",), {}),
    ("evaluate.proxy", True, "evaluate", ("feedback",), {}),
    ("ceiling.steps", 3, "ceiling", ("feedback",), {"ceiling": TRAIN}),
    *((f"baselines.{size}_finetuned", {**TRAIN, "steps": 3}, f"{size}_finetuned", ("feedback",),
       {f"baselines.{size}_finetuned": TRAIN}) for size in ("small", "large")),
    *((f"baselines.{size}_ladder", {**TRAIN, "reduction": 2}, f"{size}_ladder", ("feedback",),
       {f"baselines.{size}_ladder": TRAIN}) for size in ("small", "large")),
]  # fmt: skip

REFUSED: list[tuple[str, Any, tuple[str, ...], Raw, str]] = [
    ("method.alpha", 9.0, ("feedback",), {"method.name": "prefix"}, "method.alpha is 9.0, but only lora has an alpha"),
    ("method.dropout", 0.5, ("standalone",), {"method.name": "adapter"}, "only lora has dropout"),
    ("method.dropout", 0.5, NO_BRIDGE[:-1], {}, r"method.dropout is 0.5, but in mode '\w+' the module runs without it"),
    ("prune.shuffle", True, NO_BRIDGE[2:], {}, r"prune.shuffle is True, but in mode '\w+' there is no Bridge"),
    ("prune.bits", 3, ("standalone", "feedback"), {}, "a packed Bridge cannot train, and `repair:` trains it"),
    ("prune.bits", 3, ("ladder",), {}, "a packed Bridge cannot train, and mode 'ladder' trains it"),
    ("prune.rounding", "nearest", ("feedback",), {}, "no weight is rounded"),
    ("prune.rounding", "nearest", ("feedback",), {"prune.bits": 3, "repair": None, "score.importance": "magnitude"},
     "no errors are known"),
    ("prune.whole", ["ffn"], ("identity", "mezo", "backprop"), {}, "there is no Bridge"),
    ("prune.whole", ["ffn"], ("feedback",), {"prune.reduction": 1}, "with prune.reduction: 1 everything stays whole"),
    ("prune.whole", ["hidden"], ("feedback",), {"prune.channels": "pca"}, "keeps the residual stream, so"),
    ("prune.bits", 3, ("identity", "mezo", "backprop"), {}, r"prune.bits is 3, but in mode '\w+' there is no Bridge"),
    ("couple.activations", "large", (*ALONE, "ladder_delta", *NO_BRIDGE[2:]), {}, "no error goes back through"),
    ("couple.fidelity_rows", 2, (*ALONE, *NO_BRIDGE[2:]), {}, "no error goes back through a Bridge to be compared"),
    ("couple.fidelity_every", 2, ("standalone",), {}, "only an error is compared"),
    ("couple.bridge_resident", False, (*ALONE, "ladder_delta", *NO_BRIDGE[2:]), {}, "no Bridge is read block by block"),
    ("couple.error_bound", 0.5, ("feedback", "standalone"), {}, "only with activations: large"),
    ("couple.kept_bits", 8, ("feedback", "standalone"), {}, "only with activations: large"),
    ("prune.channels", "pca", ("standalone",), {}, "must be a model by itself"),
    ("repair", TRAIN, ("identity", "mezo"), {}, r"a `repair:` section, but in mode '\w+' there is no Bridge to fit"),
    ("couple.perturbation", 0.1, tuple(mode for mode in MODES if mode != "mezo"), {}, "not moved to see the loss"),
    ("couple.bridge", "freeze", NO_BRIDGE, {}, r"couple.bridge is 'freeze', but in mode '\w+' the Bridge never trains"),
    ("couple.bridge_learning_rate", 0.3, (*NO_BRIDGE, "standalone, frozen"), {}, "but the Bridge does not train"),
    ("couple.align_samples", 3, tuple(MODES), {}, r"but plug: \w+ and layer_map: uniform are fitted to no states"),
    ("couple.layer_map", "cka", ("standalone, frozen", "ladder", *NO_BRIDGE), {}, "a fresh start takes none"),
    ("couple.plug_learning_rate", 0.3, ("standalone, frozen", *NO_BRIDGE), {}, "a fresh start has no plug"),
    ("couple.down", "learned", ("feedback", "identity", "mezo", "backprop"), {}, "no loss goes through down"),
    ("couple.cache", "memory", ("standalone", "feedback", "identity", "mezo", "backprop"), {}, "keeps no activations"),
    ("evaluate.models", ["bridge_coupled"], NO_BRIDGE, {}, "which needs a mode whose Bridge trains"),
    ("evaluate.probe", True, ("feedback",), {"evaluate.models": ["large_plugged"]}, "names neither 'small_probe' nor"),
    ("evaluate.proxy", True, ("feedback",), {"evaluate.models": ["large_plugged"]}, "does not name 'large_proxy'"),
    ("evaluate.models", ["large_proxy"], ("feedback",), {}, "names 'large_proxy', which needs evaluate.proxy: true"),
    ("couple.recompute", False, ("ladder", "ladder_delta", "mezo"), {}, "nothing is run again"),
    ("couple.recompute", False, ("backprop",), {}, "in mode 'backprop' every block is run again"),
    ("couple.recompute", False, ("standalone",), {"method.name": "prefix"}, "with prefixes nothing is run again"),
    ("couple.recompute", False, ("feedback",), {"couple.activations": "large"}, "activations: large nothing is run"),
    ("couple.recompute", False, ("feedback",), {"prune": {"reduction": 1, "bits": 3}, "repair": None},
     "couple.recompute is False, but in mode 'feedback' with activations: large nothing is run again"),
    *((f"couple.{key}", value, ("feedback",), {"couple": {"steps": 0}}, f"couple.{key} is {value!r}, but couple.steps")
      for key, value in (*LOOP.items(), ("micro_batch", 2), ("optimizer", "adafactor"),
                         ("recompute", False), ("fidelity_rows", 2), ("fidelity_every", 2),
                         ("bridge_resident", False)) if key != "steps"),
    *((f"couple.{key}", value, ("standalone",), {"couple": {"mode": "standalone", "steps": 0}}, "couple.steps is 0")
      for key, value in (("down", "learned"), ("bridge", "freeze"), ("plug_learning_rate", 0.3))),
    ("large", {"path": "large", "load_in": "8bit"}, ("feedback",), {"evaluate.models": ["small_tuned"]},
     "large.load_in is '8bit', but nothing that is asked for has the large model run forward only"),
    ("large", {"path": "large", "load_in": "4bit"}, ("standalone",),
     {"repair": None, "polish": None, "evaluate.models": ["bridge_coupled"]}, "large.load_in is '4bit'"),
    ("data", "somewhere", ("feedback",), {"task": "wordnet-kind"}, "rows of task 'wordnet-kind' come with plugbridge"),
    ("data", "somewhere", ("feedback",), {}, "data is 'somewhere', but the task's own files are named under `task`"),
]  # fmt: skip

UNCHANGED: list[tuple[str, Any, str, tuple[str, ...], Raw]] = [
    ("couple.fidelity_every", 1, "couple", ("feedback",), {}),
    ("couple.bridge_resident", False, "couple", ("feedback",), {}),
    ("couple.recompute", False, "couple", ("standalone", "feedback"), {}),
    ("couple.micro_batch", 1, "couple", ("standalone", "ladder_delta", "feedback", "mezo", "backprop"), {}),
    ("couple.checkpoint_every", 1, "couple", ("feedback",), {}),
    ("couple.cache", "memory", "couple", ("ladder", "ladder_delta"), {}),
    ("tune.micro_batch", 3, "tune", ("feedback",), {}),
    ("resident", "none", "score", ("feedback",), {}),
    ("resident", "none", "couple", ("backprop",), {}),
    ("score.keep", "memory", "score", ("feedback",), {"resident": "none"}),
    ("evaluate.batch_size", 3, "evaluate", ("feedback",), {}),
]

ELSEWHERE = {  # what the user brings; its tests are those of tasks and models
    "small", "large", "large.path", "large.load_in", "task", "data", "max_length", "special_tokens", "couple.mode",
    *(key for key, _, _ in fields_help() if key.startswith("task.")),
}  # fmt: skip
SAME_CODE = {f"{name}.{key}" for name in ("repair", "ceiling") for key in ("checkpoint_every", "micro_batch")}
ROUNDING = {"polish.batch_size"}
SECTIONS = {"repair", "polish", "ceiling", "prune.reduction", "prune.budget"}


def put(raw: Raw, key: str, value: Any) -> Raw:
    section, _, name = key.partition(".")
    return {**raw, section: {**(raw.get(section) or {}), name: value} if name else value}


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Every stage collects garbage first, which takes long where a whole test session's objects are about."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("settings")
    small = save_model("gpt2", root / "small", hidden=8, layers=2, heads=2, seed=1)
    large = save_model("gpt2", root / "large", hidden=16, layers=3, heads=4, seed=2)
    found = drops(small, 0.0), drops(large, 0.0)
    ReadOnce.folders.update(found)
    return found


def drops(folder: Path, share: float) -> str:
    """A model whose blocks drop such a share of their numbers in training."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"resid_pdrop": share, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


@pytest.fixture
def base(run_config: Callable[..., Raw], models: tuple[str, str]) -> Callable[[str, Raw], Raw]:
    def make(mode: str, more: Raw) -> Raw:
        raw = run_config(small=models[0], large=models[1], ceiling=None, tune=TRAIN)
        raw["couple"] = {**TRAIN, "mode": mode}
        for key, value in MODES[mode].items():
            raw[key] = {**raw.get(key, {}), **value}
        for key, value in more.items():
            raw = put(raw, key, value)
        return raw

    return make


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of finished runs by their settings: stages are done once and copied."""
    return {"": tmp_path_factory.mktemp("done")}


def until(raw: Raw, root: Path, stage: str) -> list[Stage]:
    """A stage and those that it needs, in order."""
    stages = build_stages(prepare(parse_config(raw, "test"), None), root, Silent(), "any")
    wanted = {stage}
    for each in reversed(stages):
        if each.name in wanted:
            wanted |= set(each.needs)
    return [each for each in stages if each.name in wanted]


def results(raw: Raw, stage: str, done: dict[str, Path]) -> dict[str, Any]:
    """What a stage leaves, done anew on a copy of what is done already."""
    key = f"{stage} {sorted(raw.items(), key=str)}"
    if key not in done:
        root = done[""] / str(len(done))
        near = done.get(" ".join(["near", cast(Raw, raw["couple"])["mode"]]))
        if near is not None:
            shutil.copytree(near, root, ignore=shutil.ignore_patterns("old"))
            shutil.rmtree(root / stage, ignore_errors=True)
        execute(root, until(raw, root, stage), None, lambda _stage, _what: None, redo=True)
        done[key] = root
        done[f"near {raw['couple']['mode']}"] = root
    folder = done[key] / stage
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            found |= {f"{path.relative_to(folder)} {name}": tensor for name, tensor in load_file(path).items()}
        elif path.suffix == ".jsonl" or path.name in ("factors.json", "losses.json"):
            found[str(path.relative_to(folder))] = path.read_text(encoding="utf-8")
    assert found
    return found


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        return a.shape == b.shape and torch.equal(a, b) if both else a == b

    return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Optimizers turn entries round whose gradient is rounding alone: tensors are compared as a whole, and losses."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            a, b = value.double(), other[name].double()
            assert float((a - b).norm()) <= 0.05 * float(a.norm()) + 1e-6, name
        elif name == "losses.json":
            assert json.loads(other[name]) == pytest.approx(json.loads(value), rel=1e-3)


@pytest.mark.parametrize(
    ("mode", "key", "value", "stage", "more"),
    [(mode, key, value, stage, more) for key, value, stage, modes, more in ACTS for mode in modes],
)
def test_a_setting_acts(
    base: Callable[[str, Raw], Raw], done: dict[str, Path], mode: str, key: str, value: Any, stage: str, more: Raw
) -> None:
    raw = base(mode, more)
    assert not equal(results(raw, stage, done), results(put(raw, key, value), stage, done))


@pytest.mark.parametrize(
    ("mode", "key", "value", "stage", "more"),
    [(mode, key, value, stage, more) for key, value, stage, modes, more in UNCHANGED for mode in modes],
)
def test_a_setting_that_changes_how_a_run_goes_changes_no_result(
    base: Callable[[str, Raw], Raw], done: dict[str, Path], mode: str, key: str, value: Any, stage: str, more: Raw
) -> None:
    raw = base(mode, more)
    assert_close(results(raw, stage, done), results(put(raw, key, value), stage, done))


@pytest.mark.parametrize(
    ("mode", "key", "value", "more", "said"),
    [(mode, key, value, more, said) for key, value, modes, more, said in REFUSED for mode in modes],
)
def test_a_setting_that_cannot_act_is_refused(
    base: Callable[[str, Raw], Raw], mode: str, key: str, value: Any, more: Raw, said: str
) -> None:
    raw = base(mode, more)
    check_settings(resolve(parse_config(raw, "test")))
    with pytest.raises(ConfigError, match=said):
        check_settings(resolve(parse_config(put(raw, key, value), "test")))


@pytest.mark.parametrize("key", [*LOOP, "optimizer"])
@pytest.mark.parametrize("name", ["tune", "repair", "couple", "ceiling"])
def test_every_training_has_the_numbers_of_its_section(base: Callable[[str, Raw], Raw], name: str, key: str) -> None:
    """What a number does in the one loop is tried in `tune`."""
    raw = base("standalone", {"ceiling": TRAIN})
    found: list[Any] = []
    for value in (raw[name].get(key), {**LOOP, "optimizer": "adamw" if name == "couple" else "adafactor"}[key]):
        changed = raw if value is None else put(raw, f"{name}.{key}", value)
        settings = getattr(resolve(parse_config(changed, "test")), name)
        rate = settings.learning_rate if name == "repair" else rate_of_training(settings, METHODS["lora"])
        found.append(schedule_of(settings, 0, {"": rate}))
    assert found[0] != found[1]


def test_every_setting_is_among_these() -> None:
    loops = {f"{name}.{key}" for name in ("repair", "couple", "ceiling") for key in (*LOOP, "optimizer")}
    known = (
        loops
        | {key for key, *_ in (*ACTS, *REFUSED, *UNCHANGED)}
        | ELSEWHERE
        | SAME_CODE
        | ROUNDING
        | SECTIONS
        | {*FREE}
    )
    assert {key for key, _, _ in fields_help()} - known == set()


@pytest.mark.parametrize("mode", MODES)
def test_what_a_run_writes_down_of_its_settings_is_not_refused(base: Callable[[str, Raw], Raw], mode: str) -> None:
    config = parse_config(base(mode, {}), "test")
    for written in (config, resolve(config)):  # every default is in it
        check_settings(resolve(parse_config(written.model_dump(mode="json"), "test")))


def test_of_stages_that_are_not_run_settings_may_stay(base: Callable[[str, Raw], Raw]) -> None:
    raw = put(put(base("feedback", {}), "couple.align_samples", 3), "method.dropout", 0.5)
    check_settings(resolve(parse_config(put(raw, "evaluate.models", ["small_tuned"]), "test")))


def test_runs_to_be_compared_may_inherit_what_only_steps_read(base: Callable[[str, Raw], Raw]) -> None:
    raw = base("standalone", {"couple.steps": 0, "couple.bridge": "freeze", "couple.down": "learned"})
    with pytest.raises(ConfigError, match=r"couple.learning_rate is 0\.05, but couple.steps is 0; leave it out"):
        check_settings(resolve(parse_config(raw, "test")))
    found = without_idle_steps(parse_config(raw, "test"))
    check_settings(resolve(found))
    plain = parse_config(put(raw, "couple", {"mode": "standalone", "plug": "random", "steps": 0}), "test")
    assert found.couple == plain.couple
    steps = parse_config(put(raw, "couple.steps", 3), "test")
    assert without_idle_steps(steps) == steps


def test_what_only_tokenizers_models_and_rows_tell_is_said(
    base: Callable[[str, Raw], Raw], caplog: pytest.LogCaptureFixture
) -> None:
    raw = base("feedback", {})
    for key, value, said in (
        ("special_tokens", False, "special_tokens is false, which changes nothing: the tokenizer puts none in front"),
        ("max_length", 10_000, "max_length is 10,000, which changes nothing: the models' positions hold"),
        ("task.score", "first", "task.score is first, which changes nothing: all options are single tokens"),
        ("task.score", "sum", ""),
        ("max_length", 16, ""),
    ):
        caplog.clear()
        prepare(parse_config(put(raw, key, value), "test"), None)
        assert [line.startswith(said) for line in caplog.messages if "changes nothing" in line] == [True] * bool(said)


@pytest.mark.parametrize("mode", MODES)
def test_sections_for_a_bridge_that_is_not_there_are_said(base: Callable[[str, Raw], Raw], mode: str) -> None:
    raw = base(mode, {})
    raw["score"], raw["prune"] = {"samples": 3}, {"reduction": 2}
    none = mode in ("identity", "mezo", "backprop")
    for changed, said in ((raw, "`score:` and `prune:` change"), ({**raw, "score": {}}, "`prune:` changes")):
        found = idle_sections(parse_config(changed, "test"))
        assert found == (f"{said} nothing: in mode '{mode}' there is no Bridge" if none else None)
    assert idle_sections(parse_config({**raw, "score": {}, "prune": {}}, "test")) is None
    assert idle_sections(parse_config(put(raw, "evaluate.models", ["small_tuned"]), "test")) is None


def test_of_no_steps_all_settings_but_these_act(
    base: Callable[[str, Raw], Raw], done: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plugbridge.preflight.check_acting", lambda _config: None)  # which refuses them
    raw = put(base("standalone", {}), "couple", {"mode": "standalone", "plug": "random", "steps": 0})
    other = {**LOOP, "micro_batch": 2, "optimizer": "adafactor", "plug_learning_rate": 0.3, "down": "learned",
             "bridge": "freeze", "bridge_learning_rate": 0.3, "activations": "large", "error_bound": 0.5,
             "kept_bits": 8, "perturbation": 0.5, "recompute": False, "bridge_resident": False, "fidelity_rows": 2,
             "fidelity_every": 2}  # fmt: skip
    del other["steps"]
    assert {*OF_STEPS} == {*other}
    del other["bridge_learning_rate"]  # of a Bridge that trains
    changed = put(raw, "couple", {**raw["couple"], **other})
    assert equal(results(raw, "plug", done), results(changed, "plug", done))


def test_data_in_the_environment_is_nothing_to_a_task_that_ships_its_rows(
    base: Callable[[str, Raw], Raw], tmp_path: Path
) -> None:
    config = parse_config(base("feedback", {"task": "wordnet-kind"}), "test")
    for data in (tmp_path, Path("hub")):
        assert preflight(config, data).rows["train"]


@pytest.mark.parametrize(("mode", "dropout", "named"), [
    ("standalone", 0.5, {"tune", "couple", "ceiling", "large_finetuned"}), ("standalone", 0.0, {"large_finetuned"}),
    ("standalone, frozen", 0.5, {"tune", "couple", "ceiling", "large_finetuned"}),
    ("feedback", 0.0, {"large_finetuned"}),
])  # fmt: skip
def test_rows_at_a_time_are_in_the_digest_where_dropout_makes_them_matter(
    base: Callable[[str, Raw], Raw], tmp_path: Path, mode: str, dropout: float, named: set[str]
) -> None:
    raw = base(mode, {"method.dropout": dropout})
    raw["large"] = drops(save_model("gpt2", tmp_path / "large", hidden=16, layers=3, heads=4), 0.1)
    raw["ceiling"], raw["baselines"] = {**TRAIN, "micro_batch": 2}, {"large_finetuned": {**TRAIN, "micro_batch": 2}}
    raw = put(put(raw, "tune.micro_batch", 2), "couple.micro_batch", 2)
    stages = build_stages(prepare(parse_config(raw, "test"), None), tmp_path, Silent())
    found = {stage.name for stage in stages if stage.depends.get("micro_batch") == 2}
    both = {"ceiling", "couple"} if mode == "standalone" else {"ceiling"}
    assert found == named | both  # the large model's own dropout acts in these, too


def test_results_of_other_rows_at_a_time_are_others_where_numbers_are_dropped(
    base: Callable[[str, Raw], Raw], tmp_path: Path
) -> None:
    def same(key: str, value: int, mode: str = "standalone", **more: Any) -> bool:
        raw = base(mode, {"method.dropout": 0.0, **more})
        one, other = (parse_config(each, "test") for each in (raw, put(raw, key, value)))
        return same_result(resolve(one), resolve(other))

    large = drops(save_model("gpt2", tmp_path / "large", hidden=16, layers=3, heads=4), 0.1)
    keys = ("tune.micro_batch", "couple.micro_batch")
    assert [same(key, 2) for key in keys] == [True, True]
    assert [same(key, 2, **{"method.dropout": 0.5}) for key in keys] == [False, False]
    assert [same(key, 2, large=large) for key in keys] == [False, False]
    assert [same(key, 2, large=str(tmp_path / "gone")) for key in keys] == [False, False]
    assert [same(key, 2, "feedback", large=large) for key in keys] == [False, True]  # of couple: nothing is dropped
    assert same("tune.micro_batch", 4, large=large)  # all of a step's rows
    assert not same("tune.steps", 4)
