"""A grid is data: strict, and every run that it names is a valid configuration."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from plugbridge.bench.grid import Group, groups_of, load_grid, nested, slug
from plugbridge.config import RunConfig
from plugbridge.errors import ConfigError
from plugbridge.preflight import _check_bridge_use, check_settings, resolve
from plugbridge.tasks.spec import load_task
from plugbridge.transfer.couple import find_mode
from plugbridge.tuners.table import find_method

QUALITY = Path(__file__).parents[2] / "configs" / "quality.yaml"
Raw = dict[str, Any]


def _raw() -> Raw:
    return {
        "pairs": {"tiny": {"small": "../small", "large": "org/large"}, "other": {"small": "a/b", "large": "a/c"}},
        "seeds": [0, 3],
        "base": {"couple.steps": 10, "prune.reduction": 2, "evaluate.probe": True},
        "methods": {"lora": {"couple.steps": 20, "method.rank": 2}},
        "variants": {
            "whole": {"set": {"couple.mode": "feedback"}},
            "half way": {"set": {"couple.layers": 0.5}},
            "none": {"control": True, "set": {"couple.steps": 0}},
        },
        "default": [{"pairs": ["tiny"], "methods": ["lora"], "tasks": ["rte"], "variants": ["whole", "none"]}],
    }


def _write(folder: Path, raw: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def _groups(folder: Path, raw: Raw, full: bool = False) -> list[Group]:
    return groups_of(load_grid(_write(folder, raw)), folder, full)


def _only(groups: list[Group], name: str) -> dict[str, RunConfig]:
    (found,) = [group for group in groups if group.name == name]
    assert len(dict(found.variants)) == len(found.variants)
    return dict(found.variants)


# dotted keys


@pytest.mark.parametrize(
    ("settings", "tree"),
    [
        ({}, {}),
        ({"a": 1, "b.c": 2, "b.d.e": 3, "b.d.f": 4}, {"a": 1, "b": {"c": 2, "d": {"e": 3, "f": 4}}}),
        ({"a.b": 1, "c": 2, "a": {"d": 3}}, {"a": {"d": 3}, "c": 2}),  # the later key counts
        ({"a.b": [1, {"x.y": None}], "a.c": {}}, {"a": {"b": [1, {"x.y": None}], "c": {}}}),
    ],
)
def test_dotted_keys_are_a_tree(settings: Raw, tree: Raw) -> None:
    assert nested(settings) == tree


@pytest.mark.parametrize(
    "value",
    [True, None, 0, 1e-5, 3e30, 0.75, "true", "null", "1e-3", "007", "", " a: b ", "x=y", "#1", "[", "ä\n\nb " * 60],
)
def test_a_value_keeps_its_type_and_every_character(value: Any) -> None:
    found = nested({"a.b": value})["a"]["b"]
    assert (found, type(found)) == (value, type(value))


# reading


def put(*path: Any, to: Any) -> Callable[[Raw], Any]:
    def change(raw: Any) -> None:
        *heads, last = path
        for head in heads:
            raw = raw[head]
        raw[last] = to

    return change


MISTAKES: dict[str, tuple[Callable[[Raw], Any], str]] = {
    "unknown key": (put("seed", to=[0]), "seed: Extra inputs are not permitted"),
    "unknown key of a pair": (put("pairs", "tiny", "medium", to="x"), "pairs.tiny.medium: Extra inputs are not"),
    "unknown key of a variant": (put("variants", "none", "contol", to=True), "variants.none.contol: Extra inputs"),
    "unknown key of a block": (put("default", 0, "seeds", to=[0]), "default.0.seeds: Extra inputs are not permitted"),
    "key missing": (lambda raw: raw.pop("pairs"), "pairs: Field required"),
    "pair without a model": (put("pairs", "tiny", to={"small": "x"}), "pairs.tiny.large: Field required"),
    "no seeds": (put("seeds", to=[]), "seeds: List should have at least 1 item"),
    "no variants": (put("default", 0, "variants", to=[]), "default.0.variants: List should have at least 1 item"),
    "wrong type": (put("seeds", to=["one"]), "seeds.0: Input should be a valid integer"),
    "unknown pair": (put("default", 0, "pairs", to=["tiny", "huge"]), "no pair 'huge'; known: tiny, other"),
    "unknown variant": (put("default", 0, "variants", to=["hole"]), "no variant 'hole'; known: whole, half way, none"),
    "unknown pair of full": (
        lambda raw: raw.update(full=[{**raw["default"][0], "pairs": ["huge"]}]),
        "no pair 'huge'; known: tiny, other",
    ),
    "empty": (lambda _: "", "expected keys and values"),
    "a list": (lambda _: "- pairs", "expected keys and values"),
    "not YAML": (lambda _: "pairs: [", "is not YAML"),
    "a pair that is a path": (
        put("pairs", "../x", to={"small": "a", "large": "b"}),
        "pair '../x': expected 1 to 100 letters",
    ),
    "a variant without letters": (
        put("variants", "../", to={}),
        "variant '../': expected 1 to 100 characters, a letter",
    ),
    "a name too long": (put("variants", "a" * 5000, to={}), "expected 1 to 100 characters"),
    "variants of one folder": (put("variants", "half-way", to={}), "'half way' and 'half-way' would share a folder"),
    "a key twice": (lambda _: "seeds: [0]\nseeds: [1]", "line 2: key 'seeds' stands twice"),
    "a tag": (lambda _: "pairs: !!map {}", "line 1: tag"),
    "a number that is a text": (put("seeds", to=["1"]), "seeds.0: Input should be a valid integer"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistaken_grid_is_one_line(tmp_path: Path, name: str) -> None:
    change, message = MISTAKES[name]
    raw = _raw()
    assert load_grid(_write(tmp_path, raw)).seeds == [0, 3]
    text = change(raw)
    path = _write(tmp_path, text if isinstance(text, str) else raw)
    with pytest.raises(ConfigError) as caught:
        load_grid(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert message in line
    assert "\n" not in line


def test_a_grid_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cannot read grid .*gone\.yaml: No such file or directory$"):
        load_grid(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("variants", "none", "set", to={"couple.step": 0}), "variant 'none': unknown key 'couple.step'; did you"),
        (put("base", "tune.steps", to=0), "variant 'whole': tune.steps: Input should be greater than or equal to 1"),
        (put("methods", "lora", "lora.rank", to=0), "variant 'whole': unknown key 'lora'; known keys: small, large"),
        (put("default", 0, "set", to={"prune.budget": 0.5}), "give one of `reduction` and `budget`, not both"),
        (put("seeds", to=[-1]), "variant 'whole': seed: Input should be greater than or equal to 0 (found -1)"),
    ],
)
def test_a_mistaken_setting_is_one_line(tmp_path: Path, change: Callable[[Raw], Any], message: str) -> None:
    raw = _raw()
    change(raw)
    with pytest.raises(ConfigError) as caught:
        _groups(tmp_path, raw)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_have_the_types_of_their_keys(tmp_path: Path) -> None:
    """They wait, as written, for the configuration that they are for."""
    raw = _raw()
    raw["base"]["couple.learning_rate"] = "RATE"
    raw["base"]["couple.cache"] = "CACHE"
    path = _write(tmp_path, yaml.safe_dump(raw).replace("RATE", "1e-3").replace("CACHE", "off"))
    config = groups_of(load_grid(path), tmp_path, False)[0].variants[0][1]
    assert (config.couple.learning_rate, config.couple.cache, config.couple.steps) == (0.001, "off", 20)


# groups


def test_groups_are_all_combinations(tmp_path: Path) -> None:
    raw = _raw()
    raw["default"][0].update(pairs=["tiny", "other"], methods=["lora", "prefix"], tasks=["rte", "cb"])
    groups = _groups(tmp_path, raw)
    wanted = {
        f"{pair}-{method}-{task}-s{seed}"
        for pair in ("tiny", "other") for method in ("lora", "prefix") for task in ("rte", "cb") for seed in (0, 3)
    }  # fmt: skip
    assert len(groups) == len(wanted)
    assert {group.name for group in groups} == wanted
    for group in groups:
        for _, config in group.variants:
            assert (config.method.name, config.task, config.seed) == (group.method, group.task, group.seed)
            assert config.large == {"tiny": "org/large", "other": "a/c"}[group.pair]


def test_what_is_nearer_to_a_run_counts(tmp_path: Path) -> None:
    """Variant over block over method over base over what a run is by itself."""
    raw = _raw()
    block = {**raw["default"][0], "methods": ["lora", "prefix"]}
    raw["default"] = [block, {**block, "tasks": ["cb"], "set": {"couple.steps": 30, "tune.steps": 7}}]
    groups = _groups(tmp_path, raw)
    steps = {
        (group.method, group.task, name): config.couple.steps
        for group in groups for name, config in group.variants if group.seed == 0
    }  # fmt: skip
    assert steps == {
        ("lora", "rte", "whole"): 20, ("prefix", "rte", "whole"): 10,
        ("lora", "cb", "whole"): 30, ("prefix", "cb", "whole"): 30,
        **{(method, task, "none"): 0 for method in ("lora", "prefix") for task in ("rte", "cb")},
    }  # fmt: skip
    by_default = RunConfig(small="a", large="b", task="rte")
    cb, rte = _only(groups, "tiny-prefix-cb-s0"), _only(groups, "tiny-prefix-rte-s3")
    assert (cb["whole"].tune.steps, rte["whole"].tune.steps) == (7, by_default.tune.steps)
    assert (_only(groups, "tiny-lora-rte-s0")["none"].method.rank, rte["none"].method.rank) == (2, None)


def test_an_override_holds_for_every_run(tmp_path: Path) -> None:
    overrides = ["couple.steps=7", "small=/elsewhere", "device=cpu"]
    for group in groups_of(load_grid(_write(tmp_path, _raw())), tmp_path, False, overrides):
        for _, config in group.variants:
            assert (config.couple.steps, config.small, config.device) == (7, "/elsewhere", "cpu")
    with pytest.raises(ConfigError, match="device"):
        groups_of(load_grid(_write(tmp_path, _raw())), tmp_path, False, ["device=moon"])


def test_the_grid_for_a_card_is_valid() -> None:
    path = QUALITY.with_name("quality_gpu.yaml")
    groups = groups_of(load_grid(path), path.parent, True)
    assert {group.method for group in groups} == {"lora", "adapter", "prefix"}
    assert {len(group.variants) for group in groups} == {5}
    for group in groups:
        for _, config in group.variants:
            _check_bridge_use(resolve(config))
            assert config.device == "cuda"


def test_paths_are_those_beside_the_grid(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "grids").mkdir()
    for config in _only(_groups(tmp_path / "grids", _raw()), "tiny-lora-rte-s0").values():
        assert config.small == str((tmp_path / "small").resolve())
        assert config.large == "org/large"  # a name on the hub


def test_the_first_variant_is_whole_and_the_others_score_what_is_new(tmp_path: Path) -> None:
    raw = _raw()
    raw["default"][0]["variants"] = ["half way", "whole", "none"]
    variants = _only(_groups(tmp_path, raw), "tiny-lora-rte-s0")
    assert list(variants) == ["half way", "whole", "none"]
    first, *others = variants.values()
    assert (first.evaluate.models, first.evaluate.probe) == (None, True)
    assert len(others) == 2
    for config in others:
        scored = ["large_plugged", *(["bridge_coupled"] if find_mode(config.couple.mode).trains_bridge else [])]
        assert (config.evaluate.models, config.evaluate.probe) == (scored, False)
        assert config.evaluate.batch_size == first.evaluate.batch_size


def test_blocks_that_overlap_are_one_group_with_every_variant_once(tmp_path: Path) -> None:
    raw = _raw()
    (block,) = raw["default"]
    raw["default"] = [
        {**block, "variants": ["none", "whole"]},
        {**block, "tasks": ["cb"]},
        {**block, "tasks": ["cb", "rte"], "variants": ["whole", "half way", "none"]},
    ]
    raw["full"] = [{**block, "pairs": ["other", "tiny"], "variants": ["half way"]}]
    groups = _groups(tmp_path, raw)
    names = [f"tiny-lora-{task}-s{seed}" for seed in (0, 3) for task in ("rte", "cb")]
    assert [group.name for group in groups] == names  # a whole seed first
    assert [list(_only(groups, name)) for name in names] == [
        ["none", "whole", "half way"], ["whole", "none", "half way"],
    ] * 2  # fmt: skip
    for name in names:
        scored = [config.evaluate.models is None for config in _only(groups, name).values()]
        assert scored == [True, False, False]
    everything = _groups(tmp_path, raw, full=True)
    others = ["other-lora-rte-s0", "other-lora-rte-s3"]
    assert [group.name for group in everything] == [*names[:2], others[0], *names[2:], others[1]]
    assert [group for group in everything if group.name not in others] == groups
    assert [list(_only(everything, name)) for name in others] == [["half way"]] * 2


# the shipped grid


@pytest.fixture(scope="module")
def shipped() -> dict[bool, list[Group]]:
    """The default groups, and all."""
    return {full: groups_of(load_grid(QUALITY), QUALITY.parent, full) for full in (False, True)}


@pytest.mark.parametrize("name", ["quality", "quality_bits", "quality_r4", "quality_gpu"])
def test_no_bridge_has_modules_where_the_variants_have_them_that_it_is_compared_with(name: str) -> None:
    path = QUALITY.with_name(f"{name}.yaml")
    for group in groups_of(load_grid(path), path.parent, True):
        found = [resolve(config).couple for _, config in group.variants]
        layers = {mode: {c.layers for c in found if c.mode == mode} for mode in ("feedback", "identity")}
        assert len(layers["feedback"]) <= 1  # and without a Bridge the same, whatever else there is of it
        assert not layers["identity"] or layers["feedback"] <= layers["identity"]


def test_every_run_of_the_shipped_grid_is_valid(shipped: dict[bool, list[Group]]) -> None:
    for group in shipped[True]:
        assert len({slug(name) for name, _ in group.variants}) == len(group.variants)  # a folder each
        first, *others = [config for _, config in group.variants]
        assert (first.evaluate.models, first.evaluate.probe) == (None, True)
        assert first.ceiling is not None
        for config in (first, *others):
            check_settings(resolve(config))
        for config in others:
            assert config.evaluate.models is not None
            alone = find_mode(config.couple.mode).trains_bridge
            assert config.evaluate.models == ["large_plugged", "bridge_coupled"][: 1 + alone]
        shared = {(c.small, c.large, c.seed, str(c.tune), str(c.ceiling)) for c in (first, *others)}
        assert len(shared) == 1  # so that the first variant's stages serve all
        assert load_task(group.task).name == group.task
        assert find_method(group.method).name == group.method
        for _, config in group.variants:
            assert (config.method.name, config.task, config.seed) == (group.method, group.task, group.seed)
            assert Path(config.small).is_dir()
            assert Path(config.large).is_dir()
            _check_bridge_use(resolve(config))  # and there is such a mode


@pytest.mark.parametrize("full", [False, True])
def test_the_shipped_grid_is_what_its_blocks_say(shipped: dict[bool, list[Group]], full: bool) -> None:
    grid, groups = load_grid(QUALITY), shipped[full]
    found = {group.name: [name for name, _ in group.variants] for group in groups}
    assert len(found) == len(groups)
    wanted: dict[str, set[str]] = {}
    for block in (*grid.default, *(grid.full if full else ())):
        for pair, method, task, seed in product(block.pairs, block.methods, block.tasks, grid.seeds):
            wanted.setdefault(f"{pair}-{method}-{task}-s{seed}", set()).update(block.variants)
    assert {name: set(variants) for name, variants in found.items()} == wanted
    controls = {name for name, variant in grid.variants.items() if variant.control}
    assert {"shuffled Bridge", "no Bridge", "plug without coupling"} <= controls
    assert not {"feedback", "ladder_delta", "standalone"} & controls


def test_the_full_grid_holds_the_default_one(shipped: dict[bool, list[Group]]) -> None:
    everything = {group.name: group.variants for group in shipped[True]}
    assert all(everything[group.name][: len(group.variants)] == group.variants for group in shipped[False])
    assert len(everything) > len(shipped[False])
