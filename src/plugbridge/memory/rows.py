"""Which steps stand beside each other: what one could do with a large model, and our stages by mode and method."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from plugbridge.config.stages import PackBits
from plugbridge.errors import ConfigError
from plugbridge.memory.case import Case
from plugbridge.memory.steps import STEPS, MakeStep
from plugbridge.models import parameter_count
from plugbridge.shrink.sizes import budgeted_sizes, reduced_sizes
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.kept import KeptBits
from plugbridge.tuners.table import METHODS, Method, MethodSettings

OURS = "ours"
STREAMED = "streamed"
HALF = "bf16"
PARTS = "row by row"
FROZEN = "frozen Bridge"
ADAMW = "AdamW"
SHARE = 1 / 16
"""The Bridge's parameters over the large model's (Jin et al. 2023, Table 2), the default of `prune.budget`."""
PROXY = "proxy-tuning"
FEW_BITS: tuple[PackBits, ...] = (4, 3, 2)
LORA, QLORA = "LoRA", "QLoRA (4 bit, checkpointing, bf16)"


@dataclass(frozen=True)
class Row:
    """One step to be counted: `method` is what is done with the model, `stage` the part of it."""

    method: str
    stage: str
    case: Case
    make: MakeStep

    @property
    def name(self) -> str:
        """Method and stage."""
        return f"{self.method}: {self.stage}"


def baselines(case: Case, methods: tuple[str, ...] = ("lora",)) -> list[Row]:
    """Ways to tune the large model itself, on the same batch and length."""
    lora = _with(case, METHODS["lora"])
    half = replace(lora, dtype=torch.bfloat16)
    rows = [Row("full fine-tuning", "train", case, STEPS["full fine-tuning"])]
    rows += [Row(METHODS[name].title, "train", _with(case, METHODS[name]), STEPS["tuned"]) for name in methods]
    rows += [
        Row("LoRA, checkpointing", "train", lora, STEPS["tuned, checkpointing"]),
        Row("LoRA, checkpointing, bf16", "train", half, STEPS["tuned, checkpointing"]),
        Row(QLORA, "train", replace(half, bits="4bit"), STEPS["tuned, checkpointing"]),
        Row("Ladder Side-Tuning", "train", replace(case, reduction=8, sizes=None), STEPS["ladder side-tuning"]),
    ]  # fmt: skip
    return rows


def _with(case: Case, method: Method) -> Case:
    return replace(case, method=method, settings=MethodSettings(method.rank, 2.0 * method.rank))


def bridged(case: Case, reads_tokens: bool = False) -> Case:
    """A case with a Bridge of `SHARE`, or the smallest there is; embeddings and head count where it reads tokens."""
    return replace(case, sizes=_sizes(case.config.to_json_string(), case, reads_tokens))


_known: dict[tuple[str, bool], dict[str, int]] = {}


def _sizes(config: str, case: Case, reads_tokens: bool) -> dict[str, int]:
    if (config, reads_tokens) not in _known:
        model, layout = case.on_meta()
        names = {name for name, _ in model.named_parameters()} - (set() if reads_tokens else layout.vocabulary())
        try:
            sizes = budgeted_sizes(layout, names, int(SHARE * parameter_count(model)))
        except ConfigError:
            sizes = reduced_sizes(layout, max(layout.sizes.values()))
        _known[config, reads_tokens] = sizes
    return _known[config, reads_tokens]


def coupled(case: Case, small: PreTrainedConfig, mode_name: str, method: str = "lora", variant: str = "") -> Row:
    """Coupling in one mode, with the mode's own defaults; `FROZEN` and `ADAMW` are variants."""
    mode = MODES[mode_name]
    chosen = replace(
        _with(bridged(case, mode.reads_tokens), METHODS[method]),
        trained=top_layers(case.layers, mode.layers),
        channels="select" if mode.reads_alone else "gradient_pca",
        train_bridge=variant != FROZEN,
        optimizer=mode.optimizer if variant == "" else "adamw",
        small=None if mode.plug == "fresh" else small,
        together=mode.exact,
    )
    name = ", ".join(filter(None, (f"{OURS}: {METHODS[method].title}", mode_name, variant)))
    return Row(name, "couple", chosen, STEPS[f"couple, {mode_name}"])


def few_bits(
    case: Case,
    small: PreTrainedConfig,
    mode_name: str,
    bits: PackBits,
    kept: KeptBits | None = None,
    read: bool = False,
    own: bool = False,
) -> Row:
    """Coupling through a frozen Bridge of full width in few bits, modules in every layer.

    Activations are `kept` in few bits, or are the Bridge's `own`; the Bridge is in memory, or `read` from disk.
    """
    row = coupled(case, small, mode_name)
    chosen = replace(
        row.case, trained={}, sizes=None, reduction=1, packed=bits, channels="select", train_bridge=False,
        activations="large" if mode_name == "feedback" and not own else "bridge", optimizer="adamw", small=None,
        kept_bits=kept, bridge_streamed=read,
    )  # fmt: skip
    said = [f"activations in {kept} bits"] if kept is not None else []
    said += ["its own activations"] * own + ["Bridge from disk"] * read
    return replace(row, method=", ".join((row.method, f"{bits} bits", *said)), case=chosen)


def peers(case: Case, small: PreTrainedConfig) -> list[Row]:
    """What stands beside the modes with a narrow Bridge: Bridges of few bits, none, and the honest competitors.

    In memory, and of feedback, no Bridge and backpropagation also streamed.
    """
    rows = [few_bits(case, small, mode, bits) for mode in ("feedback", "standalone") for bits in FEW_BITS]
    rows += [few_bits(case, small, "feedback", 3, kept=8), few_bits(case, small, "feedback", 3, own=True)]
    rows += [coupled(case, small, mode) for mode in ("identity", "backprop", "mezo")]
    streamed = replace(case, streamed=True)
    disk = [few_bits(streamed, small, "feedback", bits) for bits in FEW_BITS]
    disk.append(few_bits(streamed, small, "feedback", 3, kept=8))
    disk += [few_bits(streamed, small, "feedback", 3, read=True, own=own) for own in (False, True)]
    disk += [coupled(streamed, small, mode) for mode in ("identity", "backprop", "mezo")]
    rows += [replace(row, method=f"{row.method}, {STREAMED}") for row in disk]
    return [*rows, Row(PROXY, "evaluate", replace(_with(case, METHODS["lora"]), small=small), STEPS["evaluate, proxy"])]


def top_layers(layers: Mapping[str, int], share: float) -> dict[str, int]:
    """How many layers of each stack hold modules that train."""
    return {stack: math.ceil(share * count) for stack, count in layers.items()}


def small_steps(large: Case, small: Case, modes: tuple[str, ...], half: bool) -> list[Row]:
    """Our stages as a run with little memory does them: the large model on disk, few rows at a time.

    In float32, or both models in bfloat16 (`half`); Bridge and modules are float32.
    """
    dtype = torch.bfloat16 if half else large.dtype
    case = replace(large, streamed=True, dtype=dtype)
    shelved, parts = replace(case, at_once=0), replace(case, micro_batch=1)
    rows = [
        Row(OURS, "tune (small)", replace(small, dtype=dtype, micro_batch=1), STEPS["tuned"]),
        Row(OURS, "score (fisher)", replace(shelved, importance="fisher"), STEPS["score"]),
        Row(OURS, "score (fisher), states in memory", replace(case, importance="fisher"), STEPS["score"]),
        Row(OURS, "score (activation)", replace(shelved, importance="activation"), STEPS["score"]),
        Row(OURS, "prune", replace(bridged(case), channels="gradient_pca"), STEPS["prune"]),
        *(coupled(case, small.config, mode) for mode in modes if MODES[mode].runs_large),
        *(coupled(parts, small.config, mode) for mode in modes),
        *(coupled(parts, small.config, "standalone", variant=variant) for variant in (ADAMW, FROZEN)),
        Row(OURS, "evaluate", replace(case, batch=1), STEPS["evaluate"]),
    ]
    found: list[Row] = []
    for row in rows:
        words = [STREAMED, *([HALF] if half else []), *([PARTS] if row.case.micro_batch is not None else [])]
        found.append(replace(row, method=", ".join((row.method, *words))))
    return found


@dataclass(frozen=True)
class Job:
    """A whole run: its stages' rows, and how much of the large model's bf16 weights it may take, if that matters."""

    name: str
    stages: tuple[tuple[str, str], ...]
    limit: float | None = None


def resident_jobs() -> list[Job]:
    """Runs of ours that have the whole large model in memory."""
    common = tuple((OURS, stage) for stage in ("tune (small)", "score (fisher)", "prune", "evaluate"))
    lora = METHODS["lora"].title
    return [Job(mode, (*common, (f"{OURS}: {lora}, {mode}", "couple"))) for mode in ("feedback", "standalone")]


def jobs() -> list[Job]:
    """Runs whose peaks the targets are about, in bfloat16 and in float32."""
    found: list[Job] = []
    standalone = [", ".join(filter(None, ("standalone", variant))) for variant in ("", FROZEN, ADAMW)]
    for mode, limit in (("feedback", 0.5), *((name, 0.35) for name in standalone)):
        for words in (f"{STREAMED}, {HALF}", STREAMED):
            stages = [(f"{OURS}, {words}, {PARTS}", "tune (small)")]
            stages += [(f"{OURS}, {words}", stage) for stage in ("score (fisher)", "prune", "evaluate")]
            stages.append((f"{OURS}: {METHODS['lora'].title}, {mode}, {words}, {PARTS}", "couple"))
            found.append(Job(f"{mode}, {words}", tuple(stages), limit))
    return found


def run_stages() -> set[tuple[str, str]]:
    """Method and stage of every row that a whole run of ours has."""
    return {stage for job in (*resident_jobs(), *jobs()) for stage in job.stages}


def common_stages(large: Case, small: Case) -> list[Row]:
    """Our stages that are the same in every mode."""
    return [
        Row(OURS, "tune (small)", small, STEPS["tuned"]),
        Row(OURS, "score (fisher)", replace(large, importance="fisher"), STEPS["score"]),
        Row(OURS, "score (activation)", replace(large, importance="activation"), STEPS["score"]),
        Row(OURS, "prune", replace(bridged(large), channels="gradient_pca"), STEPS["prune"]),
        Row(OURS, "evaluate", large, STEPS["evaluate"]),
    ]
