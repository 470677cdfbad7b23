"""The run's configuration as a whole: the keys at the top of its YAML file."""

from typing import Literal

from pydantic import Field

from plugbridge.config.inputs import LargeConfig, LoadIn, TaskConfig
from plugbridge.config.stages import (
    BaselinesConfig,
    CoupleConfig,
    EvaluateConfig,
    MethodConfig,
    PartsConfig,
    PolishConfig,
    PruneConfig,
    RepairConfig,
    ScoreConfig,
)
from plugbridge.config.strict import Name, StrictConfig


class RunConfig(StrictConfig):
    """A whole run. `small`, `large` and `task` are required."""

    small: Name = Field(description="Hugging Face id or local directory of the model that is tuned")
    large: Name | LargeConfig = Field(description="Hugging Face id or local directory of the model that is only run")
    task: Name | TaskConfig = Field(description="a task's name (see `plugbridge tasks`), or your own rows")
    data: Name | None = Field(
        default=None, description="directory of task files, or `hub`; --data and PLUGBRIDGE_DATA override"
    )
    max_length: int | None = Field(
        default=None,
        ge=8,
        le=10_000_000,
        description="tokens of a row at most, an autoregressive model's longest answer included; "
        "the task's passage is cut to fit, never its question. By default what its positions hold (T5: no limit)",
    )
    special_tokens: bool = Field(
        default=True,
        description="begin every prompt with the special tokens that the tokenizer puts in front of a text, such as "
        "`<bos>`, once; many models read text badly without. T5's prompts end with `</s>` in any case",
    )
    method: MethodConfig = Field(default_factory=MethodConfig)
    tune: PartsConfig = Field(default_factory=PartsConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    prune: PruneConfig = Field(default_factory=PruneConfig)
    repair: RepairConfig | None = Field(default=None, description="fit the Bridge to the large model before coupling")
    couple: CoupleConfig = Field(default_factory=CoupleConfig)
    polish: PolishConfig | None = Field(
        default=None, description="tune a factor for every place of the plugged module, forward only"
    )
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    ceiling: PartsConfig | None = Field(
        default=None, description="also tune the large model itself, with gradients, as the ceiling"
    )
    baselines: BaselinesConfig = Field(default_factory=BaselinesConfig)
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="one seed for data order, initialisation and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to run")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="precision of the models' weights")
    resident: Literal["auto", "all", "none"] = Field(
        default="auto",
        description="whether the large model is in memory as a whole where it is scored, pruned or only runs forward: "
        "`all`, or `none`: one block at a time from its safetensors, the next one read ahead; `auto` is all where the "
        "weights fit in half of the device's free memory. Results are the same, but for which numbers dropout drops. "
        "ceiling and mode backprop then train the module block by block; baselines.large_finetuned always loads the "
        "large model",
    )
    trust_remote_code: bool = Field(
        default=False, description="run code that comes with a model; off unless you say so"
    )

    @property
    def large_path(self) -> str:
        """The large model's id or directory, however `large` was written."""
        return self.large.path if isinstance(self.large, LargeConfig) else self.large

    @property
    def load_in(self) -> LoadIn | None:
        """How the large model's weights are quantised where it only runs forward."""
        return self.large.load_in if isinstance(self.large, LargeConfig) else None
