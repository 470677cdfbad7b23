"""A family's patterns cover every weight of its Hugging Face model; family files are read strictly."""

import copy
import tomllib
from importlib.resources import files

import pytest

from conftest import FAMILIES, make_model
from plugbridge.errors import ConfigError, ModelError
from plugbridge.families.spec import (
    check_constraints,
    config_changes,
    family_names,
    family_of,
    layout_of,
    load_family,
    parse_family,
)
from plugbridge.models import layout_for, shapes_of
from plugbridge.tensors.patterns import shape_of


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_cover_every_name_and_shape(family: str) -> None:
    model = make_model(family, layers=3)
    layout = layout_for(model)
    table = layout.table()
    shapes = shapes_of(model)
    assert set(shapes) <= set(table)
    assert {n for n, w in table.items() if not w.optional} <= set(shapes)
    for name, shape in shapes.items():
        assert shape_of(table[name].pattern, layout.sizes) == shape, name
    # every shape is told by its axes alone: no two axes of one weight share a size by accident only
    assert check_constraints(layout.family, layout.sizes) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_sizes_say_the_same(family: str) -> None:
    model = make_model(family)
    layout = layout_for(model)
    for attribute, value in config_changes(layout.family, layout.sizes).items():
        assert getattr(model.config, attribute) in (value, None), attribute


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_and_norms_are_modules_of_the_model(family: str) -> None:
    model = make_model(family)
    layout = layout_for(model)
    modules = dict(model.named_modules())
    for role in ("attention_input", "attention_output", "mlp_output"):
        sites = list(layout.sites(role))
        assert sites
        for path, place in sites:
            assert path in modules
            assert layout.place_of(path)[0] == place
            layout.linear_axes(path)
    assert {n for n, m in modules.items() if "Norm" in type(m).__name__} == set(layout.norms())


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_follow_layers_that_write_the_residual(family: str) -> None:
    layout = layout_for(make_model(family))
    for role in ("attention_output", "mlp_output"):
        assert {layout.linear_axes(path)[1] for path, _ in layout.sites(role)} == {"hidden"}


def test_every_shipped_family_loads_and_is_found_by_its_model_type() -> None:
    assert family_names() == ["gpt2", "llama", "t5"]
    for name in family_names():
        family = load_family(name)
        assert family.name == name
        assert family_of(family.model_type) is family


def test_unknown_family_and_model_type() -> None:
    with pytest.raises(ConfigError, match="known: gpt2, llama, t5"):
        load_family("bert")
    with pytest.raises(ModelError, match="model type 'bert'"):
        family_of("bert")


def _raw(name: str = "gpt2") -> dict:
    return tomllib.loads((files("plugbridge.families") / f"{name}.toml").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(colour="red"), "colour"),
        (lambda raw: raw["stack"]["decoder"].update(colour="red"), "colour"),
        (lambda raw: raw.pop("kind"), "kind"),
        (lambda raw: raw["scope"].update(width="layer"), "no weight has"),
        (lambda raw: raw["scope"].update(ffn="everywhere"), "ffn"),
        (lambda raw: raw["prefix"].update(stack="encoder"), "not a stack"),
    ],
)
def test_a_family_file_is_read_strictly(change, message: str) -> None:
    raw = copy.deepcopy(_raw())
    change(raw)
    with pytest.raises(ConfigError, match=message):
        parse_family(raw, "gpt2.toml")


def test_unknown_missing_and_misshapen_weights_are_refused() -> None:
    model = make_model("gpt2")
    config, shapes = model.config.to_dict(), shapes_of(model)
    with pytest.raises(ModelError, match="does not know weight 'extra'"):
        layout_of(config, {**shapes, "extra": (1,)})
    with pytest.raises(ModelError, match=r"'transformer\.ln_f\.bias' .* is not in this model"):
        layout_of(config, {n: s for n, s in shapes.items() if n != "transformer.ln_f.bias"})
    with pytest.raises(ModelError, match="really a gpt2 model"):
        layout_of(config, {**shapes, "transformer.ln_f.bias": (17,)})
    with pytest.raises(ModelError, match="not divisible by 3"):
        layout_of({**config, "n_embd": 16, "n_head": 3}, shapes)
