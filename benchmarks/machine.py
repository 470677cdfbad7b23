"""What this machine is, for the numbers that are measured on it; says in one line what is missing.

python benchmarks/machine.py --device cuda --json docs/results/gpu/machine.json
"""

import argparse
import json
import os
import platform
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
UNUSED = {"cma"}
"""Dependencies that no benchmark imports."""


def missing() -> list[str]:
    """Requirements of plugbridge that this Python does not meet, each with what is there."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: list[str] = []
    for requirement in map(Requirement, project["dependencies"]):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        if requirement.name not in UNUSED and (version is None or not requirement.specifier.contains(version, True)):
            found.append(f"{requirement} ({'absent' if version is None else f'{version} is there'})")
    return found


def describe(device: str) -> dict[str, Any]:
    """The machine as JSON."""
    found: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    if device == "cuda":
        torch: Any = import_module("torch")
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "card_bytes": card.total_memory, "cuda": torch.version.cuda}
    return found


def main() -> None:
    """Check, and write the description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    try:
        absent = missing()
    except ImportError:
        absent = ["packaging (absent)"]
    if absent:
        sys.exit(f"error: {sys.executable} lacks {', '.join(absent)}; set PYTHON, or put wheels into WORK/wheels")
    if args.device == "cuda" and not import_module("torch").cuda.is_available():
        sys.exit(f"error: torch {metadata.version('torch')} of {sys.executable} sees no CUDA card; run it where one is")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(describe(args.device), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
