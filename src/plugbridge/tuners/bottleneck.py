"""Houlsby bottleneck adapters (Houlsby et al. 2019, section 2.1) as a peft method.

An adapter follows the attention output projection and the MLP output projection, before the
residual connection: ``y = base(x);  y + up(act(down(y)))``. `up` starts at zero, so that a fresh
adapter changes nothing.
"""

from dataclasses import dataclass, field
from typing import Any, cast

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from plugbridge.tuners.register import extend_peft

METHOD = "bottleneck_adapter"


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of Houlsby adapters.

    `bottleneck` is the inner width, `activation` a name of transformers' `ACT2FN`.
    """

    bottleneck: int = field(default=8, metadata={"help": "inner width of the adapter"})
    activation: str = field(default="gelu_new", metadata={"help": "non-linearity between the two maps"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "linear layers whose output the adapters read"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to leave alone"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[METHOD.upper()]
        if isinstance(self.target_modules, list):
            self.target_modules = cast(Any, set(self.target_modules))


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer followed by bottleneck adapters."""

    adapter_layer_names = ("adapter_down", "adapter_up")
    other_param_names = ("bottleneck",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.width = _out_features(self.get_base_layer())
        self.bottleneck: dict[str, int] = {}
        self.adapter_down = nn.ModuleDict()
        self.adapter_up = nn.ModuleDict()
        self.act: dict[str, nn.Module] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.add(adapter_name, config)

    def add(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add one adapter; it starts as a no-op."""
        if config.bottleneck < 1:
            raise ValueError(f"bottleneck is {config.bottleneck} but must be at least 1")
        self.bottleneck[adapter_name] = config.bottleneck
        self.adapter_down[adapter_name] = nn.Linear(self.width, config.bottleneck)
        self.adapter_up[adapter_name] = nn.Linear(config.bottleneck, self.width)
        self.act[adapter_name] = ACT2FN[config.activation]
        down, up = self.adapter_down[adapter_name], self.adapter_up[adapter_name]
        nn.init.normal_(cast(nn.Linear, down).weight, std=self.width**-0.5)
        nn.init.zeros_(cast(nn.Linear, down).bias)
        nn.init.zeros_(cast(nn.Linear, up).weight)
        nn.init.zeros_(cast(nn.Linear, up).bias)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("a bottleneck adapter is not linear and cannot be merged into a weight")

    def unmerge(self) -> None:
        raise NotImplementedError("a bottleneck adapter is never merged")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.adapter_down:
                down, up = self.adapter_down[name], self.adapter_up[name]
                inner = result.to(cast(nn.Linear, down).weight.dtype)
                result = result + up(self.act[name](down(inner))).to(result.dtype)
        return result


def _out_features(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, Conv1D):
        return int(layer.nf)
    raise TypeError(f"a bottleneck adapter follows a linear layer, not {type(layer).__name__}")


class BottleneckModel(BaseTuner):
    """peft tuner that puts bottleneck adapters behind the target modules."""

    prefix = "adapter_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {  # noqa: RUF012  # peft's own annotation
        "gpt2": ["attn.c_proj", "mlp.c_proj"],
        "t5": ["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"],
        "llama": ["self_attn.o_proj", "mlp.down_proj"],
    }

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.add(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


BOTTLENECK = extend_peft(METHOD, BottleneckConfig, BottleneckModel, prefix="adapter_")
