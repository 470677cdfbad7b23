"""A model family as data: which weights a model has, and what their axes are called.

`load_family` reads one TOML file strictly: a key that no code reads is refused. `Layout` is a
family met with one model's configuration: the sizes of its axes and the place of each weight.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from plugbridge.errors import ConfigError, ModelError, ShapeError, first_problem
from plugbridge.parsing import shown
from plugbridge.tensors.patterns import axis_names, infer_sizes, parse

Scope = Literal["model", "stack", "layer"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Constraints(_Strict):
    """Relations between axis sizes that the model's code relies on; each side a product of axes."""

    equal: tuple[tuple[str, str], ...] = ()
    divisible: tuple[tuple[str, str], ...] = ()


class PrefixPlace(_Strict):
    """The stack whose self-attention takes past keys and values, and the axes of one such vector.

    peft's prefix tensor has `parts` entries a layer, of which attention reads the first: for
    encoder-decoder models it takes the entries in fours (self key, self value, cross key, cross value)
    and then drops the cross-attention's. Sized for `layers` only, as peft 0.21 does by default, the fours
    would run over the layers: layer i would read entry 2i mod layers.
    """

    stack: str
    axes: str
    parts: int = 1


class LogitScale(_Strict):
    """A factor ``size(axis) ** power`` in the model's code, undone in `weight` when the size changes."""

    flag: str
    weight: str
    axis: str
    power: float


class Context(_Strict):
    """The argument of a sublayer's function that carries another stack's output."""

    argument: str
    stack: str


class Sublayer(_Strict):
    """One step of the residual stream: ``h + function(norm(h))``.

    The function ends in one linear layer, named by the stack's role `attention_output` or `mlp_output`; nothing comes
    after it that is not linear. `inputs` are the axes of those further arguments of the function whose size depends
    on the model's; all others are passed on as they are.
    """

    norm: str
    function: str
    inputs: dict[str, str] = {}
    context: Context | None = None


class Stack(_Strict):
    """A run of like blocks: `path` with ``{}`` for the layer number; the stack ends in `final_norm`."""

    path: str
    layers: str
    sublayers: tuple[Sublayer, ...]
    final_norm: str
    roles: dict[str, tuple[str, ...]]
    weights: dict[str, str]

    def last_linear(self, sublayer: Sublayer) -> str:
        """The path inside the block of the linear layer that ends a sublayer's function. Raises ConfigError."""
        ends = (*self.roles.get("attention_output", ()), *self.roles.get("mlp_output", ()))
        found = [site for site in ends if site.startswith(f"{sublayer.function}.")]
        if len(found) != 1:
            roles = "roles attention_output and mlp_output"
            raise ConfigError(f"{roles} name {len(found)} layers of '{sublayer.function}', not the one that ends it")
        return found[0]


class Family(_Strict):
    """One family file. `linear` is the order in which its linear layers store (in, out).

    `buffers` are the ends of names of tensors that checkpoints may hold beside the weights and that no code reads:
    earlier versions of transformers stored them.
    """

    name: str
    model_type: str
    architecture: str
    kind: Literal["causal", "seq2seq"]
    linear: Literal["in out", "out in"]
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: str
    head: str
    config: dict[str, str]
    fixed: dict[str, int]
    constraints: Constraints
    scope: dict[str, Scope]
    prefix: PrefixPlace
    buffers: tuple[str, ...] = ()
    logit_scale: LogitScale | None = None
    weights: dict[str, str]
    stack: dict[str, Stack]


@dataclass(frozen=True)
class Place:
    """Where a weight or module sits: stack and layer are None outside of the stacks."""

    stack: str | None
    layer: int | None


@dataclass(frozen=True)
class Weight:
    """One weight of a model: its state-dict name, axes and place."""

    name: str
    pattern: str
    place: Place
    optional: bool


@cache
def load_family(name: str) -> Family:
    """Read ``families/<name>.toml``. Raises ConfigError for unknown names, keys or axes."""
    if name not in family_names():
        raise ConfigError(f"no family {shown(name)}; known: {', '.join(family_names())}")
    path = files("plugbridge.families") / f"{name}.toml"
    return parse_family(tomllib.loads(path.read_text(encoding="utf-8")), f"{name}.toml")


def parse_family(raw: Mapping[str, Any], source: str) -> Family:
    """Check one family's data. Raises ConfigError that names the source and the wrong key."""
    try:
        family = Family.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(first_problem(error, source)) from error
    patterns = [*family.weights.values()]
    for stack in family.stack.values():
        patterns.extend(stack.weights.values())
    axes = {name for pattern in patterns for name in axis_names(pattern)}
    for axis in family.scope:
        if axis not in axes:
            raise ConfigError(f"{source}: scope names axis '{axis}', which no weight has")
    for name, stack in family.stack.items():
        for sublayer in stack.sublayers:
            try:
                stack.last_linear(sublayer)
            except ConfigError as error:
                raise ConfigError(f"{source}: stack.{name}: {error}") from None
    if family.prefix.stack not in family.stack:
        raise ConfigError(f"{source}: prefix.stack '{family.prefix.stack}' is not a stack")
    return family


def family_names() -> list[str]:
    """Names of all shipped families, sorted."""
    root = files("plugbridge.families")
    return sorted(p.name.removesuffix(".toml") for p in root.iterdir() if p.name.endswith(".toml"))


def known_family(model_type: Any) -> Family | None:
    """The family of a Hugging Face `model_type`, if there is one."""
    return next((found for found in map(load_family, family_names()) if found.model_type == model_type), None)


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`. Raises ModelError if none is known."""
    family = known_family(model_type)
    if family is not None:
        return family
    known = ", ".join(family_names())
    raise ModelError(
        f"model type {shown(model_type)} is of no known family (known: {known}); "
        "a family is one TOML file, see docs/architecture.md"
    )


def check_families(small: Family, large: Family) -> None:
    """Refuse a pair of two families. Raises ModelError."""
    if small.name != large.name:
        raise ModelError(f"small is a {small.name} model but large is a {large.name} model; both must be of one family")


MOST = {"layers": 4096, "sizes": 2**26}
"""What no model of these families comes near: a larger number in a `config.json` is a mistake, and would take long."""


def check_numbers(source: str, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse a `config.json` whose sizes are no model's; one that says nothing has a default. Raises ModelError."""
    layers = {stack.layers for stack in family.stack.values()}
    for attribute in (*family.config, *layers):
        value = config.get(attribute)
        most = MOST["layers" if attribute in layers else "sizes"]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most):
            raise ModelError(
                f"config.json of {source}: {attribute} is {json.dumps(value)[:40]}; expected a whole number from 1 to "
                f"{most:,}"
            )


def _product(expression: str, sizes: Mapping[str, int]) -> int:
    result = 1
    for name in expression.split():
        result *= sizes[name]
    return result


def solve_sizes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """Axis sizes that a configuration gives, solved from products of axes.

    Axes that only the weights' shapes tell (GPT-2's `ffn` when `n_inner` is unset) are left out.
    Raises ModelError when two attributes disagree.
    """
    sizes = dict(family.fixed)
    equations = [
        (expression, int(config[attribute]), attribute)
        for attribute, expression in family.config.items()
        if config.get(attribute) is not None
    ]
    for _ in range(len(equations) + len(family.constraints.equal) + 1):
        for expression, value, attribute in equations:
            _solve_one(expression, value, sizes, f"{attribute} = {value}")
        for left, right in family.constraints.equal:
            for known, unknown in ((left, right), (right, left)):
                if all(name in sizes for name in known.split()):
                    value = _product(known, sizes)
                    _solve_one(unknown, value, sizes, f"{left} = {right} = {value}")
    return sizes


def _solve_one(expression: str, value: int, sizes: dict[str, int], what: str) -> None:
    unknown = [name for name in expression.split() if name not in sizes]
    known = 1
    for name in expression.split():
        known *= sizes.get(name, 1)
    if not unknown and known != value:
        raise ModelError(f"the model's configuration contradicts itself: {what}, but axes give {known}")
    if len(unknown) == 1:
        if value % known:
            raise ModelError(f"the model's configuration is not usable: {what} is not divisible by {known}")
        sizes[unknown[0]] = value // known


@dataclass(frozen=True)
class Layout:
    """A family met with one model: axis sizes, layer counts, and every weight it must have."""

    family: Family
    sizes: dict[str, int]
    layers: dict[str, int]

    def weights(self) -> Iterator[Weight]:
        """Every weight the family can have in this model, optional ones included."""
        for key, pattern in self.family.weights.items():
            yield Weight(key.removesuffix("?"), pattern, Place(None, None), key.endswith("?"))
        for stack_name, stack in self.family.stack.items():
            for layer in range(self.layers[stack_name]):
                for key, pattern in stack.weights.items():
                    name = f"{stack.path.format(layer)}.{key.removesuffix('?')}"
                    yield Weight(name, pattern, Place(stack_name, layer), key.endswith("?"))

    def table(self) -> dict[str, Weight]:
        """Weights by state-dict name."""
        return {weight.name: weight for weight in self.weights()}

    def vocabulary(self) -> set[str]:
        """Names of the weights with a row for every token: embeddings and head."""
        return {weight.name for weight in self.weights() if "vocab" in axis_names(weight.pattern)}

    def sites(self, role: str) -> Iterator[tuple[str, Place]]:
        """Modules that play a role (``attention_input`` …), as (module path, place)."""
        for stack_name, stack in self.family.stack.items():
            for layer in range(self.layers[stack_name]):
                for site in stack.roles[role]:
                    yield f"{stack.path.format(layer)}.{site}", Place(stack_name, layer)

    def norms(self) -> Iterator[str]:
        """Paths of every norm module that reads the residual stream."""
        for stack_name, stack in self.family.stack.items():
            for layer in range(self.layers[stack_name]):
                for sublayer in stack.sublayers:
                    yield f"{stack.path.format(layer)}.{sublayer.norm}"
            yield stack.final_norm

    def functions(self) -> Iterator[tuple[str, str | None]]:
        """Paths of every sublayer's function, each with the argument that carries another stack's output."""
        for stack_name, stack in self.family.stack.items():
            for layer in range(self.layers[stack_name]):
                for sublayer in stack.sublayers:
                    context = sublayer.context.argument if sublayer.context is not None else None
                    yield f"{stack.path.format(layer)}.{sublayer.function}", context

    def place_of(self, module: str) -> tuple[Place, str]:
        """Place of a module path, and its path inside the block. Raises ShapeError if outside."""
        for stack_name, stack in self.family.stack.items():
            head = stack.path.partition("{}")[0]
            if module.startswith(head):
                number, _, rest = module[len(head) :].partition(".")
                if number.isdigit():
                    return Place(stack_name, int(number)), rest
        raise ShapeError(f"'{module}' is in no stack of family '{self.family.name}'")

    def block_of(self, path: str) -> tuple[str, int] | None:
        """Stack and layer of a module or weight inside a block; None outside."""
        try:
            place, _ = self.place_of(path)
        except ShapeError:
            return None
        return cast(tuple[str, int], (place.stack, place.layer))

    def linear_axes(self, module: str) -> tuple[str, str]:
        """(in, out) axes of a linear module, each one dimension of its weight's pattern."""
        place, rest = self.place_of(module)
        assert place.stack is not None
        weights = self.family.stack[place.stack].weights
        pattern = weights.get(f"{rest}.weight", weights.get(f"{rest}.weight?", ""))
        dims = [f"({' '.join(dim)})" if len(dim) > 1 else "".join(dim) for dim in parse(pattern)]
        if len(dims) != 2:
            raise ShapeError(f"'{module}' is not a linear layer of family '{self.family.name}'")
        return (dims[0], dims[1]) if self.family.linear == "in out" else (dims[1], dims[0])


def layout_of_config(config: Mapping[str, Any]) -> Layout:
    """What a configuration alone tells: family, layers, and the axis sizes it gives."""
    family = family_of(str(config.get("model_type")))
    layers = {name: int(config[stack.layers]) for name, stack in family.stack.items()}
    return Layout(family, solve_sizes(family, config), layers)


def layout_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Meet a model: find its family, solve its axis sizes, check every weight's name and shape.

    `config` is the Hugging Face configuration as a dict, `shapes` the state dict's shapes by name.
    Raises ModelError for an unknown family, an unexpected or missing weight, or a wrong shape.
    """
    layout = layout_of_config(config)
    family, sizes = layout.family, layout.sizes
    table = layout.table()
    for name in shapes:
        if name not in table:
            raise ModelError(f"family '{family.name}' does not know weight {shown(name)} of this model")
    for name, weight in table.items():
        if name in shapes:
            try:
                sizes.update(infer_sizes(weight.pattern, shapes[name], sizes, name))
            except ShapeError as error:
                raise ModelError(f"{error}; is this really a {family.name} model?") from error
        elif not weight.optional:
            raise ModelError(f"weight {shown(name)} of family '{family.name}' is not in this model")
    return layout


def check_constraints(family: Family, sizes: Mapping[str, int]) -> str | None:
    """The first constraint of the family that these sizes break, in words; None if all hold."""
    for left, right in family.constraints.equal:
        if _product(left, sizes) != _product(right, sizes):
            return f"{left} = {_product(left, sizes)} must equal {right} = {_product(right, sizes)}"
    for left, right in family.constraints.divisible:
        if _product(left, sizes) % _product(right, sizes):
            return f"{left} = {_product(left, sizes)} must be divisible by {right} = {_product(right, sizes)}"
    return None


def config_changes(family: Family, sizes: Mapping[str, int]) -> dict[str, int]:
    """Configuration attributes for new axis sizes."""
    return {attribute: _product(expression, sizes) for attribute, expression in family.config.items()}
