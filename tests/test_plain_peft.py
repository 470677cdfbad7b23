"""The plugged checkpoint is a standard one: plain peft reads it where plugbridge was never imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import logits_of, token_inputs
from plugbridge.config import parse_config
from plugbridge.models import layout_for, load_model
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.run import execute
from plugbridge.stages.build import build_stages
from plugbridge.tuners.module import attach, load_state, read

READER = """
import json, sys
sys.modules["bitsandbytes"] = None  # which peft imports where it is, for as long as all else takes
{extra}
assert not {{"peft", "torch"}} & sys.modules.keys()
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
torch.set_num_threads(1)
for job in json.load(open(sys.argv[1])):
    kind = AutoModelForSeq2SeqLM if "labels" in job["inputs"] else AutoModelForCausalLM
    model = PeftModel.from_pretrained(kind.from_pretrained(job["large"]), job["checkpoint"]).eval()
    with torch.no_grad():
        logits = model(**{{k: torch.tensor(v) for k, v in job["inputs"].items()}}).logits
    torch.save(logits, job["out"])
assert {imported} == ("plugbridge" in sys.modules)
"""


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _plugged(config: dict[str, Any], root: Path) -> tuple[Path, Any]:
    """Run everything; returns the checkpoint and the large model with it, loaded by our own code."""
    parsed = parse_config(config, "test")
    prepared = prepare(parsed, None)
    root.mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump(parsed.model_dump(mode="json")))
    before = _contents(Path(config["large"]))
    execute(root, build_stages(prepared, root, Silent()), None, lambda _stage, _what: None)
    assert _contents(Path(config["large"])) == before  # untouched, byte for byte
    model = load_model(config["large"])
    wrapped, _ = attach(model, prepared.method, layout_for(model), prepared.settings)
    load_state(wrapped, read(root / "plug" / "checkpoint"))
    return root / "plug" / "checkpoint", wrapped.eval()


@pytest.mark.parametrize(
    ("extra", "ways"),
    [
        ("", (("gpt2", "lora"), ("llama", "lora"), ("t5", "prefix"))),
        ("import plugbridge", (("gpt2", "adapter"), ("t5", "adapter"))),
    ],
)
def test_the_checkpoint_loads_in_another_process(
    extra: str, ways: tuple[tuple[str, str], ...], run_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    jobs: list[dict[str, Any]] = []
    wanted: list[torch.Tensor] = []
    for family, method in ways:
        config = run_config(family, method, ceiling=None, evaluate={"limit": 4, "models": ["large_plugged"]})
        checkpoint, model = _plugged(config, tmp_path / f"{family}-{method}")
        inputs = token_inputs(model)
        with torch.no_grad():
            wanted.append(model(**inputs).logits)
        jobs.append(
            {
                "large": config["large"],
                "checkpoint": str(checkpoint),
                "inputs": {key: value.tolist() for key, value in inputs.items()},
                "out": str(tmp_path / f"{family}-{method}.pt"),
            }
        )
        assert not torch.allclose(logits_of(model), logits_of(load_model(config["large"])), atol=1e-3)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    code = READER.format(extra=extra, imported=bool(extra))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "jobs.json")], check=True)
    for job, logits in zip(jobs, wanted, strict=True):
        assert torch.allclose(torch.load(job["out"]), logits, rtol=0, atol=1e-5), job["checkpoint"]
