"""One row per PEFT method: how to configure it, and what the axes of its tensors are.

A tensor's axes may name the axes of the linear layer it belongs to: ``{in}`` and ``{out}``;
``{kv}`` stands for the axes of one past key or value vector. Folding, pruning and plugging need
no more than this row. What a row configures is imported when it does: the table itself, and every check by it, needs
neither peft nor torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from plugbridge.errors import ConfigError
from plugbridge.families.spec import Layout
from plugbridge.parsing import shown

if TYPE_CHECKING:
    from peft import PeftConfig, TaskType


@dataclass(frozen=True)
class MethodSettings:
    """The few numbers a user sets. `rank` is LoRA's rank, the adapter's bottleneck, or prefix tokens."""

    rank: int
    alpha: float
    dropout: float = 0.0


@dataclass(frozen=True)
class Method:
    """One PEFT method.

    `roles` are the family roles whose modules it changes; `tensors` maps a tensor's name to its
    axes; `learning_rate` is the default for a fresh module (validation accuracies by rate:
    docs/results/learning_rates.md); `stacked` says that one tensor holds all layers; `effect` names the tensors
    that scale what the module does.
    """

    name: str
    title: str
    source: str
    library: Literal["peft", "plugbridge"]
    roles: tuple[str, ...]
    tensors: dict[str, str]
    learning_rate: float
    rank: int
    configure: Callable[[Layout, tuple[str, ...], MethodSettings], "PeftConfig"]
    stacked: bool = False
    effect: tuple[str, ...] = ()


def _task_type(layout: Layout) -> "TaskType":
    from peft import TaskType

    return TaskType.CAUSAL_LM if layout.family.kind == "causal" else TaskType.SEQ_2_SEQ_LM


def _targets(layout: Layout, roles: tuple[str, ...]) -> list[str]:
    found: dict[str, None] = {}
    for stack in layout.family.stack.values():
        for role in roles:
            found.update(dict.fromkeys(stack.roles[role]))
    return list(found)


def _lora(layout: Layout, roles: tuple[str, ...], settings: MethodSettings) -> "PeftConfig":
    from peft import LoraConfig

    return LoraConfig(
        task_type=_task_type(layout),
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  # peft takes any number
        lora_dropout=settings.dropout,
        target_modules=_targets(layout, roles),
        fan_in_fan_out=layout.family.linear == "in out",
    )


def _adapter(layout: Layout, roles: tuple[str, ...], settings: MethodSettings) -> "PeftConfig":
    from plugbridge.tuners.bottleneck import BottleneckConfig

    return BottleneckConfig(
        task_type=_task_type(layout),
        bottleneck=settings.rank,
        target_modules=_targets(layout, roles),
    )


def _prefix(layout: Layout, roles: tuple[str, ...], settings: MethodSettings) -> "PeftConfig":
    from peft import PrefixTuningConfig

    place = layout.family.prefix
    heads, head_dim = (layout.sizes[axis] for axis in place.axes.split())
    return PrefixTuningConfig(
        task_type=_task_type(layout),
        num_virtual_tokens=settings.rank,
        num_layers=layout.layers[place.stack] * place.parts,
        num_attention_heads=heads,
        token_dim=heads * head_dim,  # T5's inner width is not d_model
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="lora",
            title="LoRA",
            source="Hu et al. 2021, section 4",
            library="peft",
            roles=("attention_input",),
            tensors={"lora_A.weight": "rank {in}", "lora_B.weight": "{out} rank"},
            learning_rate=3e-3,
            rank=8,
            configure=_lora,
            effect=("lora_B.weight",),
        ),
        Method(
            name="adapter",
            title="Adapter",
            source="Houlsby et al. 2019, section 2.1",
            library="plugbridge",
            roles=("attention_output", "mlp_output"),
            tensors={
                "adapter_down.weight": "bottleneck {out}",
                "adapter_down.bias": "bottleneck",
                "adapter_up.weight": "{out} bottleneck",
                "adapter_up.bias": "{out}",
            },
            learning_rate=3e-3,
            rank=8,
            configure=_adapter,
            effect=("adapter_up.weight", "adapter_up.bias"),
        ),
        Method(
            name="prefix",
            title="Prefix tuning",
            source="Li and Liang 2021, section 4",
            library="peft",
            roles=(),
            tensors={"prompt_embeddings": "tokens (layers kv {kv})"},
            learning_rate=1e-1,
            rank=8,
            configure=_prefix,
            stacked=True,
            effect=("prompt_embeddings",),
        ),
    )
}


def find_method(name: str) -> Method:
    """A method by name. Raises ConfigError."""
    if name not in METHODS:
        raise ConfigError(f"no method {shown(name)}; known: {', '.join(METHODS)}")
    return METHODS[name]


def describe(method: Method) -> dict[str, Any]:
    """One row for ``plugbridge methods --json``."""
    return {
        "name": method.name,
        "title": method.title,
        "source": method.source,
        "library": method.library,
        "learning_rate": method.learning_rate,
        "rank": method.rank,
        "tensors": dict(method.tensors),
    }
