"""The run's configuration: one strict, documented schema. Unknown keys are refused.

Field descriptions are the text of ``plugbridge explain`` and of docs/configuration.md.
"""

from plugbridge.config.document import plain_value
from plugbridge.config.fields import field_values, fields_help, fields_markdown
from plugbridge.config.inputs import BRANCHES, SHORTHAND, LargeConfig, LoadIn, TaskConfig
from plugbridge.config.load import (
    apply_override,
    first_fault,
    load_config,
    parse_config,
    read_yaml,
    resolve_paths,
    set_value,
)
from plugbridge.config.schema import RunConfig
from plugbridge.config.stages import (
    MADE_BY,
    TRANSFER,
    BaselinesConfig,
    CoupleConfig,
    EvaluateConfig,
    LadderConfig,
    MethodConfig,
    PartsConfig,
    PolishConfig,
    PruneConfig,
    RepairConfig,
    ScoreConfig,
    ScoredModel,
    TrainConfig,
)

__all__ = [
    "BRANCHES",
    "MADE_BY",
    "SHORTHAND",
    "TRANSFER",
    "BaselinesConfig",
    "CoupleConfig",
    "EvaluateConfig",
    "LadderConfig",
    "LargeConfig",
    "LoadIn",
    "MethodConfig",
    "PartsConfig",
    "PolishConfig",
    "PruneConfig",
    "RepairConfig",
    "RunConfig",
    "ScoreConfig",
    "ScoredModel",
    "TaskConfig",
    "TrainConfig",
    "apply_override",
    "field_values",
    "fields_help",
    "fields_markdown",
    "first_fault",
    "load_config",
    "parse_config",
    "plain_value",
    "read_yaml",
    "resolve_paths",
    "set_value",
]
