"""What else one could do with a model: the references of the paper's tables, by the same loop.

`finetuned` trains every weight. `ladder` is Ladder Side-Tuning (Sung et al. 2022, section 3): a small side
network, pruned from the model, climbs beside it and is kept at inference; the model itself only runs forward.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from plugbridge.config import LadderConfig, TrainConfig
from plugbridge.evaluate import mean_loss
from plugbridge.files import folder_atomically, write_json
from plugbridge.markers import reading
from plugbridge.models import parameter_count
from plugbridge.shrink.bridge import prune_model
from plugbridge.shrink.prune import plan_bridge
from plugbridge.shrink.sizes import reduced_sizes
from plugbridge.stages.depends import rate_of_baseline
from plugbridge.stages.shrink import measure_units
from plugbridge.stages.work import Work, accuracy, schedule_of, train
from plugbridge.tasks.encode import Encoded, Encoder, gold
from plugbridge.tasks.spec import Split
from plugbridge.transfer.ladder import Heights, LadderNetwork, start_ladder

LADDER = "ladder.safetensors"


@dataclass(frozen=True)
class Subject:
    """One of the pair as a baseline takes it: where it is, and the rows as its encoder gave them."""

    size: Literal["small", "large"]
    source: str
    encoder: Encoder
    rows: dict[Split, list[Encoded]]


def subject_of(work: Work, size: Literal["small", "large"]) -> Subject:
    """The small or the large model of a run."""
    p = work.prepared
    if size == "small":
        return Subject(size, p.config.small, p.encoder, p.rows)
    return Subject(size, p.config.large_path, p.large_encoder, p.large_rows)


def finetune(work: Work, size: Literal["small", "large"]) -> dict[str, Any]:
    """Train all weights of a model; the tuned model is a directory of its own."""
    p, subject = work.prepared, subject_of(work, size)
    settings = getattr(p.config.baselines, f"{size}_finetuned")
    model, _ = p.load(subject.source)
    model.train()
    model.requires_grad_(True)
    rate = rate_of_baseline("finetuned", settings)
    facts = _train(work, subject, dict(model.named_parameters()), model, settings, rate, f"fine-tune {size}")
    with folder_atomically(work.folder / "model") as folder:
        model.save_pretrained(str(folder))
        subject.encoder.tokenizer.save_pretrained(str(folder))
    return facts


def climb(work: Work, size: Literal["small", "large"]) -> dict[str, Any]:
    """Train a side network and its ladder beside a model that only runs forward."""
    p, subject = work.prepared, subject_of(work, size)
    settings: LadderConfig = getattr(p.config.baselines, f"{size}_ladder")
    model, layout = p.load_large() if size == "large" else p.load(subject.source)
    units = measure_units(work, model, layout, subject.encoder, subject.rows["train"])
    plan = plan_bridge(layout, units.scores, reduced_sizes(layout, settings.reduction))
    model.requires_grad_(False)
    side = prune_model(model, layout, plan, units.energy)
    side.requires_grad_(True)
    side.train()
    ladder = {key: tensor.to(p.device).requires_grad_(True) for key, tensor in start_ladder(layout, plan).items()}
    network = LadderNetwork(model, layout, side, side, ladder)
    model.eval()
    parameters = {f"side/{name}": tensor for name, tensor in side.named_parameters()} | ladder
    rate = rate_of_baseline("ladder", settings)
    facts = _train(work, subject, parameters, network, settings, rate, f"ladder beside {size}")
    with folder_atomically(work.folder / "side") as folder:
        side.save_pretrained(str(folder))
        save_file({key: t.detach().cpu().contiguous() for key, t in ladder.items()}, str(folder / LADDER))
    return {**facts, "model_parameters": parameter_count(model)}


def _train(
    work: Work,
    subject: Subject,
    parameters: dict[str, nn.Parameter] | dict[str, Tensor],
    network: nn.Module,
    settings: TrainConfig,
    rate: float,
    title: str,
) -> dict[str, Any]:
    p, encoder = work.prepared, subject.encoder

    def loss(batch: list[Encoded]) -> Tensor:
        return mean_loss(network, gold(encoder, batch).to(p.device), encoder.kind)

    torch.manual_seed(p.config.seed)
    schedule = schedule_of(settings, p.config.seed, {"": rate})
    losses = train(work, [network], parameters, subject.rows["train"], loss, schedule, title)
    network.eval()
    validation = accuracy(work, network, encoder, subject.rows["validation"], f"validate: {title}")
    write_json(work.folder / "losses.json", losses)
    return {
        "source": subject.source,
        "trainable": sum(tensor.numel() for tensor in parameters.values()),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "validation": validation,
    }


def load_finetuned(work: Work, name: str) -> PreTrainedModel:
    """A fine-tuned model as its stage left it."""
    return work.prepared.load(str(work.root / name / "model"))[0].eval()


def load_ladder(work: Work, name: str, size: Literal["small", "large"]) -> LadderNetwork:
    """A model with its side network."""
    p, folder = work.prepared, work.root / name / "side"
    model, layout = p.load_large() if size == "large" else p.load(subject_of(work, size).source)
    side, _ = p.load(str(folder))
    with reading(folder / LADDER) as path:
        ladder: Heights = {key: tensor.to(p.device) for key, tensor in load_file(str(path)).items()}
    return LadderNetwork(model, layout, side, side, ladder).eval()
