"""How well does the error through the Bridge point where backpropagation does?

Cosine of the module gradient that a coupling mode gives with the exact one (backpropagation), per layer, on 128
training rows of `wordnet-kind` for modules at large width (identity plug) a little off their start. In feedback the
error goes back through the Bridge, in standalone the Bridge reads the rows alone; nothing has trained in it.

    python benchmarks/gradient_cosine.py --table docs/results/gradient_cosine.md
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from plugbridge.config import load_config
from plugbridge.evaluate import log_likelihood
from plugbridge.families.spec import Layout
from plugbridge.files import write_text
from plugbridge.models import load_model, quiet_transformers
from plugbridge.prepare import Prepared, prepare
from plugbridge.shrink.bridge import prune_model
from plugbridge.shrink.importance import fisher, record_second_moments, residual_energy
from plugbridge.shrink.prune import BridgePlan, plan_bridge, principal_basis
from plugbridge.shrink.sizes import reduced_sizes
from plugbridge.tasks.encode import gold
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling
from plugbridge.transfer.plug import plug_shapes
from plugbridge.tuners.module import Module, Slot, attach, state_of, unpack

ROOT = Path(__file__).resolve().parent.parent
ROWS = 128


def start(prepared: Prepared, layout: Layout, seed: int) -> Module:
    """A module at large width whose zero maps were moved a little off zero."""
    torch.manual_seed(seed)
    model = load_model(prepared.config.large)
    wrapped, _ = attach(model, prepared.method, layout, prepared.settings)
    state = {key: t if t.count_nonzero() else 0.02 * torch.randn_like(t) for key, t in state_of(wrapped).items()}
    return unpack(prepared.method, layout, state)


def gradients(
    prepared: Prepared,
    layout: Layout,
    plan: BridgePlan,
    module: Module,
    mode: str = "feedback",
    energy: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[Slot, Tensor]:
    """Module gradients of one batch through the Bridge of a plan; `energy` as for `prune_model`."""
    module = {slot: tensor.clone().requires_grad_(True) for slot, tensor in module.items()}
    eyes = {
        key: torch.eye(wide).repeat(stacked, 1, 1)
        for key, (stacked, wide, _) in plug_shapes(prepared.method, layout, layout, module).items()
    }
    coupling = Coupling(
        method=prepared.method, settings=prepared.settings, small=layout, large=layout, plan=plan,
        bridge=prune_model(load_model(prepared.config.large), layout, plan, energy), encoder=prepared.large_encoder,
        module=module, plug=eyes, down={}, train_bridge=False, large_model=load_model(prepared.config.large),
    )  # fmt: skip
    loss = MODES[mode].start(coupling)(prepared.large_rows["train"][:ROWS])
    return dict(zip(module, torch.autograd.grad(loss, list(module.values())), strict=True))


def cosines(found: dict[Slot, Tensor], exact: dict[Slot, Tensor]) -> dict[tuple[str, int], float]:
    """Cosine per (stack, layer)."""
    result: dict[tuple[str, int], float] = {}
    for key in sorted({(slot.stack, slot.layer) for slot in exact}, key=lambda k: (k[0] == "decoder", k[1])):
        pairs = [(found[s].flatten(), exact[s].flatten()) for s in exact if (s.stack, s.layer) == key]
        a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
        result[key] = float(torch.cosine_similarity(a, b, dim=0))
    return result


def table(family: str, method: str, reductions: list[float], mode: str) -> list[str]:
    """Markdown rows for one pair and method."""
    prepared = prepare(load_config(ROOT / "configs" / f"{family}-{method}.yaml"), None)
    large, layout = prepared.load(prepared.config.large)
    kind = prepared.large_encoder.kind

    def likelihood(row: Any) -> Tensor:
        return log_likelihood(large, gold(prepared.large_encoder, [row]), kind).sum()

    with record_second_moments(large, layout) as moments:
        scores = fisher(large, layout, prepared.large_rows["train"][:ROWS], likelihood)
    activity, error = (moments.total(name) for name in ("activity", "error"))
    assert activity is not None
    assert error is not None
    activity, error = activity / activity.trace(), error / error.trace()
    rows = prepared.large_rows["train"][:ROWS]
    energy = residual_energy(large, layout, rows, likelihood) if mode == "standalone" else {}
    module = start(prepared, layout, 0)
    exact = gradients(prepared, layout, plan_bridge(layout, scores, layout.sizes), module)
    generator = torch.Generator().manual_seed(0)
    lines: list[str] = []
    for reduction in reductions:
        plan = plan_bridge(layout, scores, reduced_sizes(layout, reduction))
        size = plan.sizes["hidden"]
        noise = torch.linalg.qr(torch.randn(layout.sizes["hidden"], size, generator=generator)).Q.mT.contiguous()
        kinds = {
            "random projection": noise, "select (Fisher)": None, "pca": principal_basis(activity, size),
            "gradient_pca": principal_basis(activity + error, size),
        }  # fmt: skip
        for name, basis in kinds.items():
            if MODES[mode].reads_alone and basis is not None:
                continue  # a projected Bridge is no model by itself
            chosen = plan if basis is None else replace(plan, basis={"hidden": basis})
            values = list(cosines(gradients(prepared, layout, chosen, module, mode, energy), exact).values())
            cells = " ".join(f"{value:.2f}" for value in values)
            mean = sum(values) / len(values)
            lines.append(f"| {family} | {method} | {reduction:g} | {name} | {mean:.3f} | {cells} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["gpt2", "t5"])
    parser.add_argument("--methods", nargs="+", default=["lora", "adapter", "prefix"])
    parser.add_argument("--reductions", nargs="+", type=float, default=[2, 4, 8])
    parser.add_argument("--mode", choices=("feedback", "standalone"), default="feedback")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    quiet_transformers()
    lines = [line for f in args.families for m in args.methods for line in table(f, m, args.reductions, args.mode)]
    head = "| family | method | r | channels | mean cosine | per layer, first to last (T5: encoder, then decoder) |"
    command = f"Made by\n\n    python benchmarks/gradient_cosine.py {' '.join(sys.argv[1:])}\n\n"
    about = (__doc__ or "").partition("    python")[0]
    text = f"# Gradient cosine, {args.mode}\n\n" + about + command + "\n".join([head, "|---" * 6 + "|", *lines]) + "\n"
    if args.table:
        write_text(args.table, text)


if __name__ == "__main__":
    main()
