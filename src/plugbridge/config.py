"""The run's configuration: one strict, documented schema. Unknown keys are refused.

Field descriptions are the text of ``plugbridge explain`` and of docs/configuration.md.
"""

import difflib
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from plugbridge.errors import ConfigError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


LoadIn = Literal["8bit", "4bit"]
SHORTHAND = {"large": "path"}
"""Keys that hold a table or a string, and the table's key that a string stands for."""
BRANCHES = ("TaskConfig", "LargeConfig")
"""Tables that a string may stand for."""


class LargeConfig(_Strict):
    """The large model, and how its weights are loaded."""

    path: str = Field(description="Hugging Face id or local directory: what `large` is where it is no table")
    load_in: LoadIn | None = Field(
        default=None,
        description="quantise the weights wherever the large model only runs forward: `8bit` (LLM.int8) or `4bit` "
        "(NF4), through bitsandbytes; score, prune and ceiling read the weights as `dtype` says",
    )


class TaskConfig(_Strict):
    """The user's own task: a jsonl file, a prompt, and label words or a text to write."""

    file: str | None = Field(default=None, description="one jsonl file, split 80/10/10 by the seed")
    train: str | None = Field(default=None, description="jsonl file of training rows")
    validation: str | None = Field(default=None, description="jsonl file of validation rows")
    test: str | None = Field(default=None, description="jsonl file of test rows")
    prompt: str = Field(description="template such as '{text} Topic:'; fields of the row in braces")
    words: dict[str, str] | None = Field(
        default=None, description="label -> label word, with its leading space for GPT-2; or give `generate`"
    )
    generate: str | None = Field(
        default=None,
        description="template of the text to write, such as ' {label}', with its leading space for GPT-2; the label "
        "is then a text, or a list of texts that are all right, and training writes the first",
    )
    max_new_tokens: int = Field(default=32, ge=1, description="the most tokens that are written")
    metrics: list[str] | None = Field(
        default=None,
        min_length=1,
        description="what to measure, the first is the headline: accuracy and macro_f1, matthews, or f1 of two labels; "
        "of what is written exact_match and token_f1, or rouge_l (needs `plugbridge[rouge]`)",
    )
    label: str = Field(default="label", description="the field that holds the label")
    passage: str | None = Field(default=None, description="the field that may be cut when a prompt is too long")

    @model_validator(mode="after")
    def _one_source(self) -> "TaskConfig":
        three = [self.train, self.validation, self.test]
        if (self.file is None) == (not any(three)) or (any(three) and not all(three)):
            raise ValueError("give either `file`, or all of `train`, `validation` and `test`")
        if (self.words is None) == (self.generate is None):
            raise ValueError("give either `words` or `generate`")
        return self


class MethodConfig(_Strict):
    """The parameter-efficient method."""

    name: str = Field(default="lora", description="a method's name, see `plugbridge methods`")
    rank: int | None = Field(
        default=None, ge=1, description="LoRA rank, adapter bottleneck or prefix tokens; the method's default"
    )
    alpha: float | None = Field(default=None, gt=0, description="LoRA's alpha; 2 x rank by default")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout inside the module")


class TrainConfig(_Strict):
    """One training loop: AdamW, linear warmup, cosine decay."""

    steps: int = Field(default=300, ge=1, description="optimizer steps")
    batch_size: int = Field(default=32, ge=1, description="rows a step")
    learning_rate: float | None = Field(
        default=None, gt=0, description="peak learning rate of the module; the method's default"
    )
    warmup: float = Field(default=0.06, ge=0, lt=1, description="share of the steps with rising rate")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    clip: float = Field(default=1.0, gt=0, description="largest norm of all gradients together")
    checkpoint_every: int = Field(default=50, ge=1, description="steps between resumable checkpoints")


class ScoreConfig(_Strict):
    """How the large model's units are ranked."""

    importance: Literal["fisher", "activation", "magnitude"] = Field(
        default="fisher",
        description="fisher needs the large model's gradients (the paper); activation and magnitude "
        "run it forward only",
    )
    samples: int = Field(default=256, ge=1, description="training rows to score on")
    keep: Literal["memory", "disk"] = Field(
        default="memory",
        description="where scoring a streamed large model keeps its rows' states: `memory`, as many rows at a time as "
        "take no more than a block's weights, or `disk`, all rows at once, so that each block is read twice for fisher "
        "and once for what only runs forward, and memory does not grow with depth; results are the same",
    )


class PruneConfig(_Strict):
    """How small the Bridge is: a reduction of every axis, or a budget of parameters."""

    reduction: float | None = Field(
        default=None, ge=1, description="divide hidden size, heads and MLP width by this (the paper's r)"
    )
    budget: float | None = Field(
        default=None,
        gt=0,
        description="share of the large model's parameters (below 1), or their number; counted is what the "
        "mode uses: in feedback, ladder_delta and identity not the Bridge's embeddings and head, which are dropped",
    )

    channels: Literal["auto", "select", "pca", "gradient_pca"] = Field(
        default="auto",
        description="the Bridge's residual stream: `select` the best-scored channels, or project on the principal "
        "directions of what sublayers read (`pca`), or of that and the loss gradient (`gradient_pca`, needs "
        "importance: fisher); `auto` is select where the Bridge reads alone, else gradient_pca, else pca",
    )

    shuffle: bool = Field(
        default=False, description="a control: permute the entries of every weight in the Bridge's blocks"
    )

    @model_validator(mode="after")
    def _one_size(self) -> "PruneConfig":
        if (self.reduction is None) == (self.budget is None):
            raise ValueError("give exactly one of `reduction` and `budget`")
        return self


class RepairConfig(TrainConfig):
    """Fitting the Bridge to the large model before coupling, from the large model's forward passes."""

    steps: int = Field(default=200, ge=1, description="optimizer steps")
    learning_rate: float | None = Field(
        default=None, gt=0, description="peak learning rate of the Bridge's weights; 0.001 by default"
    )
    target: Literal["response", "logits"] = Field(
        default="response",
        description="`response`: every pruned sublayer answers a push as the large one does (for feedback); "
        "`logits`: the Bridge predicts the large model's next tokens (for standalone)",
    )


class CoupleConfig(TrainConfig):
    """How module, plug and Bridge train together."""

    steps: int = Field(default=300, ge=0, description="optimizer steps; 0 plugs the module in as it starts")

    mode: str = Field(
        default="feedback",
        description="what the Bridge is for: `feedback`, it carries back the error of the large model's own forward "
        "pass; `standalone`, it reads tokens by itself (the paper); `ladder` and `ladder_delta`, it reads the large "
        "model's activations; `identity`, a control without it",
    )
    plug: Literal["random", "ridge", "procrustes", "fresh"] | None = Field(
        default=None,
        description="how coupling starts: `random`, the small model's module behind a random plug (the paper); "
        "`ridge`, `procrustes`, behind one fitted to both models' states; `fresh`, nothing of the small "
        "model. By default random for standalone, else fresh",
    )
    layer_map: Literal["uniform", "cka"] = Field(
        default="uniform",
        description="which small layer each large layer copies: evenly, or the one whose states are most alike",
    )
    align_samples: int = Field(
        default=256, ge=2, description="training rows whose states plug and layer map are fitted to"
    )
    plug_learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate of plug and down")
    down: Literal["select", "learned"] = Field(default="select", description="from large width to the Bridge's")
    layers: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of each stack's layers, from the top, whose modules train and are used; by default 0.75 for "
        "feedback, 0.5 for ladder_delta, else 1",
    )
    cache: Literal["off", "memory", "disk"] = Field(
        default="off", description="where ladder keeps the large model's activations, so that it reads each row once"
    )
    bridge: Literal["train", "freeze"] = Field(default="train", description="whether the Bridge's own weights train")
    bridge_learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate of the Bridge's weights")


class PolishConfig(_Strict):
    """Tuning a factor for every place of the plugged module, by forward passes of the large model."""

    evaluations: int = Field(default=100, ge=2, description="losses to measure")
    rows: int = Field(default=256, ge=1, description="training rows to measure a loss on")
    batch_size: int = Field(default=64, ge=1, description="rows a forward pass")


class LadderConfig(TrainConfig):
    """Ladder Side-Tuning: a side network pruned from the model, kept at inference."""

    reduction: float = Field(default=8, ge=1, description="divide hidden size, heads and MLP width by this")


class BaselinesConfig(_Strict):
    """What else one could do with either model, through the same loop."""

    small_finetuned: TrainConfig | None = Field(
        default=None, description="train all weights of the small model; settings as `tune`'s, rate 3e-4 by default"
    )
    large_finetuned: TrainConfig | None = Field(default=None, description="train all weights of the large model")
    small_ladder: LadderConfig | None = Field(
        default=None,
        description="Ladder Side-Tuning of the small model; settings as `tune`'s and `reduction`, 8 by default; "
        "rate 3e-3 by default",
    )
    large_ladder: LadderConfig | None = Field(default=None, description="Ladder Side-Tuning of the large model")


ScoredModel = Literal[
    "small_zero_shot", "small_probe", "small_tuned", "small_finetuned", "small_ladder",
    "large_zero_shot", "large_probe", "bridge_coupled", "large_plugged", "large_tuned", "large_finetuned",
    "large_ladder",
]  # fmt: skip


class EvaluateConfig(_Strict):
    """Scoring on the test split."""

    batch_size: int = Field(default=64, ge=1, description="rows a forward pass")
    split: Literal["test", "validation"] = Field(default="test", description="validation while you choose settings")
    limit: int | None = Field(default=None, ge=1, description="score only the first rows")
    models: list[ScoredModel] | None = Field(
        default=None, min_length=1, description="score only these models, such as large_plugged"
    )
    probe: bool = Field(
        default=False,
        description="also a linear probe of either model: logistic regression on its last hidden states, a reference",
    )


class RunConfig(_Strict):
    """A whole run. `small`, `large` and `task` are required."""

    small: str = Field(description="Hugging Face id or local directory of the model that is tuned")
    large: str | LargeConfig = Field(description="Hugging Face id or local directory of the model that is only run")
    task: str | TaskConfig = Field(description="a task's name (see `plugbridge tasks`), or your own rows")
    data: str | None = Field(
        default=None, description="directory of task files, or `hub`; --data and PLUGBRIDGE_DATA override"
    )
    method: MethodConfig = Field(default_factory=MethodConfig)
    tune: TrainConfig = Field(default_factory=TrainConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    prune: PruneConfig = Field(default_factory=lambda: PruneConfig(reduction=4))
    repair: RepairConfig | None = Field(default=None, description="fit the Bridge to the large model before coupling")
    couple: CoupleConfig = Field(default_factory=CoupleConfig)
    polish: PolishConfig | None = Field(
        default=None, description="tune a factor for every place of the plugged module, forward only"
    )
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    ceiling: TrainConfig | None = Field(
        default=None, description="also tune the large model itself, with gradients, as the ceiling"
    )
    baselines: BaselinesConfig = Field(default_factory=BaselinesConfig)
    seed: int = Field(default=0, ge=0, description="one seed for data order, initialisation and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to run")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="precision of the models' weights")
    resident: Literal["auto", "all", "none"] = Field(
        default="auto",
        description="whether the large model is in memory as a whole where it is scored, pruned or only runs forward: "
        "`all`, or `none`: one block at a time from its safetensors, the next one read ahead; `auto` is all where the "
        "weights fit in half of the device's free memory. Results are the same. ceiling and baselines.large_finetuned "
        "train the large model and always load it",
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


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) and hasattr(model, "model_fields") else None
        if field is None:
            continue
        options = [field.annotation, *get_args(field.annotation)]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        model = inner[0] if inner else model
    return list(model.model_fields)


def explain(error: ValidationError, source: str) -> str:
    """The first problem of a configuration in one line: where, what, and what to write instead."""
    problems = error.errors()
    # `task` and `large` may be a string or a table: for a table the string branch's complaint says nothing
    first = next((p for p in problems if p["loc"][-1] != "str"), problems[0])
    # pydantic names the branch of a union too: `TaskConfig`, or the validator behind it
    location = tuple(part for part in first["loc"] if not any(name in str(part) for name in BRANCHES))
    where = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"{source}: unknown key '{where}'; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{source}: '{where}' is required and not given"
    return f"{source}: {where or 'config'}: {message}" + (
        f" (found {first['input']!r})" if not isinstance(first["input"], dict) else ""
    )


def parse_config(raw: Any, source: str) -> RunConfig:
    """Check a configuration. Raises ConfigError with one line."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected keys and values, found {type(raw).__name__}")
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, source)) from error


def read_yaml(path: Path, what: str) -> Any:
    """A YAML file's content. Raises ConfigError."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, apply ``key.sub=value`` overrides, resolve paths against the file's folder.

    Raises ConfigError.
    """
    raw = read_yaml(path, "config")
    for override in overrides:
        raw = apply_override(raw, override)
    config = parse_config(raw, str(path))
    return resolve_paths(config, path.resolve().parent)


def apply_override(raw: Any, override: str) -> Any:
    """Set one value: ``couple.steps=500``. Raises ConfigError for a malformed override."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected key=value, such as couple.steps=500")
    target: Any = raw if isinstance(raw, dict) else {}
    root = target
    *path, last = key.strip().split(".")
    for part in path:
        inner: Any = target.get(part)
        if not isinstance(inner, dict):
            inner = {SHORTHAND[part]: inner} if part in SHORTHAND and isinstance(inner, str) else {}
            target[part] = inner
        target = cast(dict[str, Any], inner)
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML") from error
    return root


def resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Make relative paths absolute that exist beside the config file; hub ids stay as they are."""

    def model(source: str) -> str:
        path = (folder / Path(source).expanduser()).resolve()
        return str(path) if path.exists() or source.startswith((".", "~", "/")) else source

    def file(source: str | None) -> str | None:
        return None if source is None else str((folder / Path(source).expanduser()).resolve())

    task = config.task
    if isinstance(task, TaskConfig):
        changes = {name: file(getattr(task, name)) for name in ("file", "train", "validation", "test")}
        task = task.model_copy(update=changes)
    path = model(config.large_path)
    return config.model_copy(
        update={
            "small": model(config.small),
            "large": config.large.model_copy(update={"path": path}) if isinstance(config.large, LargeConfig) else path,
            "task": task,
            "data": config.data if config.data == "hub" else file(config.data),
        }
    )


def fields_help() -> list[tuple[str, str, str]]:
    """(key, default, description) of every configuration field, in the schema's order."""
    rows: list[tuple[str, str, str]] = []
    for name, field in RunConfig.model_fields.items():
        options = [field.annotation, *get_args(field.annotation)]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if field.description:
            rows.append((name, _default(field), field.description))
        for model in inner:
            for key, sub in model.model_fields.items():
                rows.append((f"{name}.{key}", _default(sub), sub.description or ""))
    return rows


def fields_markdown() -> str:
    """`fields_help` as a Markdown table."""
    lines = [f"| `{key}` | {default} | {text} |" for key, default, text in fields_help()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *lines]) + "\n"


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    return "-" if field.default is None else str(field.default)
