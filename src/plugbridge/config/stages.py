"""The settings of the method and of every stage: one table each."""

from typing import Literal

from pydantic import Field, model_validator

from plugbridge.config.strict import BATCH, ROWS, STEPS, WIDTH, Name, StrictConfig

OptimizerName = Literal["adamw", "adafactor"]


class MethodConfig(StrictConfig):
    """The parameter-efficient method."""

    name: Name = Field(default="lora", description="a method's name, see `plugbridge methods`")
    rank: int | None = Field(
        default=None, ge=1, le=WIDTH, description="LoRA rank, adapter bottleneck or prefix tokens; the method's default"
    )
    alpha: float | None = Field(default=None, gt=0, description="LoRA's alpha; 2 x rank by default")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout inside the module, of lora and in modes that train through it"
    )


class TrainConfig(StrictConfig):
    """One training loop: linear warmup, cosine decay."""

    steps: int = Field(default=300, ge=1, le=STEPS, description="optimizer steps")
    batch_size: int = Field(default=32, ge=1, le=BATCH, description="rows a step")
    learning_rate: float | None = Field(
        default=None, gt=0, description="peak learning rate of the module; the method's default"
    )
    warmup: float = Field(default=0.06, ge=0, lt=1, description="share of the steps with rising rate")
    optimizer: OptimizerName = Field(
        default="adamw",
        description="`adafactor` keeps a row and a column of second moments of every matrix, where `adamw` keeps two "
        "moments of each of its entries: half the memory or less where all weights train, the Bridge's or a model's",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    clip: float = Field(default=1.0, gt=0, description="largest norm of all gradients together")
    checkpoint_every: int = Field(default=50, ge=1, le=STEPS, description="steps between resumable checkpoints")


class PartsConfig(TrainConfig):
    """A training whose steps may go through the models in parts."""

    micro_batch: int | None = Field(
        default=None,
        ge=1,
        le=BATCH,
        description="rows that go through the models at a time; all of a step's rows by default. Fewer need less "
        "memory and give the same gradient",
    )


class ScoreConfig(StrictConfig):
    """How the large model's units are ranked."""

    importance: Literal["fisher", "activation", "magnitude"] = Field(
        default="fisher",
        description="fisher needs the large model's gradients (the paper); activation and magnitude "
        "run it forward only",
    )
    samples: int = Field(default=256, ge=1, le=ROWS, description="training rows to score on, drawn by the seed")
    keep: Literal["memory", "disk"] = Field(
        default="disk",
        description="where scoring a streamed large model keeps its rows' states: `disk`, all rows at once, so that "
        "each block is read twice for fisher and once for what only runs forward, and memory does not grow with depth; "
        "or `memory`, as many rows at a time as take no more than a block's weights, and second moments of every "
        "sublayer beside them; results are the same",
    )


PackBits = Literal[16, 8, 4, 3, 2]
Axis = Literal["hidden", "heads", "ffn"]
Activations = Literal["bridge", "large"]
Passing = Literal["inputs", "errors"]
"""What a matrix is multiplied by: what it reads going forward, or the errors that come back."""


class PruneConfig(StrictConfig):
    """How small the Bridge is: a reduction of every axis, or a budget of parameters, and bits of a weight.

    Where neither size is given it is decided by the mode (`preflight.resolve`).
    """

    reduction: float | None = Field(
        default=None,
        ge=1,
        le=WIDTH,
        description="divide hidden size, heads and MLP width by this (the paper's r). Where neither this nor a budget "
        "is given it is 1 for feedback without a `repair`, and wherever `bits` are given, else 4",
    )
    budget: float | None = Field(
        default=None,
        gt=0,
        le=10**13,
        description="share of the large model's parameters (below 1), or their number; counted is what the "
        "mode uses: in feedback, ladder_delta and identity not the Bridge's embeddings and head, which are dropped",
    )

    whole: list[Axis] = Field(
        default=[],
        description="what is not reduced: `hidden`, the residual stream (heads and MLP units pruned alone is LoRAM's "
        "shape; GPT-2 ties its heads to it), `heads`, or `ffn`, the MLP's units",
    )

    channels: Literal["auto", "select", "pca", "gradient_pca"] = Field(
        default="auto",
        description="the Bridge's residual stream: `select` the best-scored channels, or project on the principal "
        "directions of what sublayers read (`pca`), or of that and the loss gradient (`gradient_pca`, needs "
        "importance: fisher); `auto` is select where the Bridge reads alone, else gradient_pca, else pca",
    )

    bits: PackBits | None = Field(
        default=None,
        description="bits of a weight in the matrices of the Bridge's blocks: 16 leaves them in the large model's "
        "precision; fewer are packed, with a scale for 64 weights. By default 3 for feedback where no size is given, "
        "else 16",
    )

    rounding: Literal["calibrated", "nearest"] = Field(
        default="calibrated",
        description="how packed weights are rounded: `calibrated` to what they are multiplied by (GPTQ), for which "
        "`score` keeps vectors: the errors that come back, with importance: fisher, or in standalone the layers' "
        "inputs; or each to its `nearest` level",
    )

    shuffle: bool = Field(
        default=False, description="a control: permute the entries of every weight in the Bridge's blocks"
    )

    @property
    def weight_bits(self) -> PackBits:
        """Bits of a weight in the blocks' matrices; 16 where nothing was said."""
        return 16 if self.bits is None else self.bits

    @model_validator(mode="after")
    def _one_size(self) -> "PruneConfig":
        if self.reduction is not None and self.budget is not None:
            raise ValueError("give one of `reduction` and `budget`, not both")
        return self


class RepairConfig(TrainConfig):
    """Fitting the Bridge to the large model before coupling, from its forward passes over the training prompts."""

    steps: int = Field(default=200, ge=1, le=STEPS, description="optimizer steps")
    learning_rate: float | None = Field(
        default=None, gt=0, description="peak learning rate of the Bridge's weights; 0.001 by default"
    )
    target: Literal["response", "logits"] = Field(
        default="response",
        description="`response`: every pruned sublayer answers a push as the large one does (for feedback); "
        "`logits`: the Bridge predicts the large model's next tokens (for standalone)",
    )


class CoupleConfig(PartsConfig):
    """How module, plug and Bridge train together."""

    steps: int = Field(default=300, ge=0, le=STEPS, description="optimizer steps; 0 plugs the module in as it starts")
    optimizer: OptimizerName | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        description="as `tune.optimizer`; by default adafactor where standalone's Bridge trains, which takes half the "
        "memory and transfers no worse (docs/results/optimizers.md), else adamw",
    )

    mode: Name = Field(
        default="feedback",
        description="what the Bridge is for: `feedback`, it carries back the error of the large model's own forward "
        "pass; `standalone`, it reads tokens by itself (the paper); `ladder` and `ladder_delta`, it reads the large "
        "model's activations; `identity`, a control without it; `mezo`, none either: two forward passes of the large "
        "model tell how far a step goes along a random direction (Malladi et al. 2023); `backprop`, none: exact "
        "gradients through the large model itself, block by block",
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
        default=256,
        ge=2,
        le=ROWS,
        description="training rows, drawn by the seed, whose states plug and layer map are fitted to",
    )
    plug_learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate of plug and down")
    down: Literal["select", "learned"] = Field(default="select", description="from large width to the Bridge's")
    layers: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of each stack's layers, from the top, whose modules train and are used; by default 0.75 for "
        "feedback with activations: bridge, 0.5 for ladder_delta, else 1",
    )
    cache: Literal["off", "memory", "disk"] = Field(
        default="off", description="where ladder keeps the large model's activations, so that it reads each row once"
    )
    recompute: bool = Field(
        default=True,
        description="run again for their gradients what holds a module: in feedback with activations: bridge the large "
        "model's sublayers, in standalone the Bridge's blocks (not with prefixes); false keeps what the first run left "
        "and in feedback what norms are at the Bridge's width: less time, more memory (a streamed large model always "
        "runs them again)",
    )
    activations: Activations | None = Field(
        default=None,
        description="whose activations and attention feedback sends the error back through: `bridge`, those of the "
        "Bridge's sublayers, run on what the large model's norms gave, which keeps little; or `large`, those of the "
        "large model's own forward pass, kept until the error comes back, so that only the Bridge's matrices differ "
        "from backpropagation's. By default large for a packed Bridge, else bridge",
    )
    kept_bits: Literal[8, 4] | None = Field(
        default=None,
        description="with activations: large, bits in which what the large model's forward pass computed is kept until "
        "the error comes back, rounded in groups of 64 (GACT, Liu et al. 2022): `8`, a quarter of float32's bytes, "
        "or `4`, which points worse; by default as it is",
    )
    error_bound: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="with activations: large, the share of the error's squared norm that may be left behind at every "
        "matrix by sending only the positions that carry most of it; at 0 those without any error are left out",
    )
    perturbation: float = Field(
        default=1e-3,
        gt=0,
        description="how far mezo moves the module's entries either way to see the loss change: this times a standard "
        "normal number each",
    )
    fidelity_rows: int = Field(
        default=8,
        ge=0,
        le=ROWS,
        description="training rows, drawn by the seed, on which feedback's gradient is compared with the exact one "
        "before the first step and after the last; 0 for none. With importance: fisher only, which takes the large "
        "model's gradients anyway. In layers where the cosine is not above 0 at the start, modules stay as they are",
    )
    fidelity_every: int = Field(
        default=0, ge=0, le=STEPS, description="steps after which that is done again during training; 0 for never"
    )
    bridge_resident: bool = Field(
        default=True,
        description="whether all of the Bridge is in memory; false, in feedback, has the matrices of one of its blocks "
        "there, and reads one more ahead: each once for every `micro_batch` of rows",
    )
    bridge: Literal["train", "freeze"] = Field(default="train", description="whether the Bridge's own weights train")
    bridge_learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate of the Bridge's weights")


class PolishConfig(StrictConfig):
    """Tuning a factor for every place of the plugged module, by forward passes of the large model."""

    evaluations: int = Field(default=100, ge=2, le=STEPS, description="losses to measure")
    rows: int = Field(default=256, ge=1, le=ROWS, description="training rows to measure a loss on, drawn by the seed")
    batch_size: int = Field(default=64, ge=1, le=BATCH, description="rows a forward pass")


class LadderConfig(PartsConfig):
    """Ladder Side-Tuning: a side network pruned from the model, kept at inference."""

    reduction: float = Field(default=8, ge=1, le=WIDTH, description="divide hidden size, heads and MLP width by this")


class BaselinesConfig(StrictConfig):
    """What else one could do with either model, through the same loop."""

    small_finetuned: PartsConfig | None = Field(
        default=None, description="train all weights of the small model; settings as `tune`'s, rate 1e-4 by default"
    )
    large_finetuned: PartsConfig | None = Field(default=None, description="train all weights of the large model")
    small_ladder: LadderConfig | None = Field(
        default=None,
        description="Ladder Side-Tuning of the small model; settings as `tune`'s and `reduction`, 8 by default; "
        "rate 3e-3 by default",
    )
    large_ladder: LadderConfig | None = Field(default=None, description="Ladder Side-Tuning of the large model")


ScoredModel = Literal[
    "small_zero_shot", "small_probe", "small_tuned", "small_finetuned", "small_ladder",
    "large_zero_shot", "large_probe", "large_proxy", "bridge_coupled", "large_plugged", "large_tuned",
    "large_finetuned", "large_ladder",
]  # fmt: skip

TRANSFER = ("tune", "score", "prune", "repair", "couple", "polish", "plug")
"""The method's stages in order; repair and polish where the configuration has them."""
MADE_BY: dict[str, tuple[str, ...]] = {
    "small_zero_shot": (),
    "small_probe": (),
    "small_tuned": ("tune",),
    "small_finetuned": ("small_finetuned",),
    "small_ladder": ("small_ladder",),
    "large_zero_shot": (),
    "large_probe": (),
    "large_proxy": ("tune",),
    "bridge_coupled": TRANSFER[:-2],
    "large_plugged": TRANSFER,
    "large_tuned": ("ceiling",),
    "large_finetuned": ("large_finetuned",),
    "large_ladder": ("large_ladder",),
}
"""The stages that make each model; what has none is only scored."""


class EvaluateConfig(StrictConfig):
    """Scoring on the test split."""

    batch_size: int = Field(default=64, ge=1, le=BATCH, description="rows a forward pass")
    split: Literal["test", "validation"] = Field(default="test", description="validation while you choose settings")
    limit: int | None = Field(
        default=None, ge=1, le=ROWS, description="score only so many rows, drawn alike whatever the seed"
    )
    models: list[ScoredModel] | None = Field(
        default=None,
        min_length=1,
        description="score only these models, such as large_plugged, and run only the stages that make them",
    )
    probe: bool = Field(
        default=False,
        description="also a linear probe of either model: logistic regression on its last hidden states, where the "
        "answer begins, or at the end of every option where rows have their own; fitted on 10,000 training "
        "rows at most; a reference",
    )
    proxy: bool = Field(
        default=False,
        description="also the large model with what tuning changed in the small one's logits added to its own at "
        "every token (proxy-tuning, Liu et al. 2024): none of its weights changes, but the small model has to stay; a "
        "reference",
    )
