"""What benchmarks that look at finished runs of feedback share: the run's coupling, its modules, the command line."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from plugbridge.config import load_config
from plugbridge.families.spec import Layout
from plugbridge.files import write_json, write_text
from plugbridge.models import quiet_transformers
from plugbridge.prepare import Prepared, prepare
from plugbridge.shrink.packing import load_bridge
from plugbridge.stages.couple import read_coupled
from plugbridge.stages.work import read_plan
from plugbridge.transfer.coupling import Coupling, drop_vocabulary, require_gradients
from plugbridge.transfer.start import fresh_start
from plugbridge.tuners.module import Module


def opened(root: Path, data: Path | None) -> tuple[Prepared, Layout, dict[str, Module]]:
    """A run's models and rows, the large model's layout, and its module at the `start` and at the `end`."""
    prepared = prepare(load_config(root / "config.yaml"), data)
    torch.manual_seed(prepared.config.seed)
    layout = prepared.without_weights[prepared.config.large_path][1]
    start = fresh_start(prepared.method, prepared.settings, layout, prepared.load_to_fit()[0]).module
    return prepared, layout, {"start": start, "end": read_coupled(root / "couple" / "coupled.safetensors")[0]}


def coupling_of(root: Path, prepared: Prepared, module: Module) -> Coupling:
    """The coupling of a run with a module in it."""
    large, layout = prepared.load_run_only()
    bridge = load_bridge(root / "prune" / "bridge")
    drop_vocabulary(bridge, layout)
    coupling = Coupling(
        method=prepared.method, settings=prepared.settings, small=layout, large=layout, plan=read_plan(root),
        bridge=bridge, encoder=prepared.large_encoder, module={slot: t.clone() for slot, t in module.items()},
        plug={}, down={}, train_bridge=False, large_model=large, activations="large",
    )  # fmt: skip
    require_gradients(coupling)
    return coupling


def measure_runs(
    about: str,
    measured: Callable[[Path, Path | None], dict[str, Any]],
    page: Callable[[list[dict[str, Any]], str], str],
) -> None:
    """Ask which runs, measure each, and write the page of what was found and asked for, JSON beside it."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of feedback with activations: large")
    parser.add_argument("--data", type=Path, help="directory of the tasks' files")
    parser.add_argument("--table", type=Path, help="Markdown file to write, with a JSON file beside it")
    args = parser.parse_args()
    quiet_transformers()
    found = [measured(root, args.data) for root in args.runs]
    asked = shlex.join(map(str, args.runs)) + " --data DIR" * (args.data is not None)
    print(page(found, asked))
    if args.table:
        write_text(args.table, page(found, asked))
        write_json(args.table.with_suffix(".json"), found)
