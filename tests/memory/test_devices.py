"""Steps on a card that is not there: fake tensors on a second device show every tensor left on the CPU."""

import subprocess
import sys

import pytest
from torch.utils import backend_registration

# torch registers a device for a whole process, so the steps run in one of their own
STEPS = """
import warnings

warnings.simplefilter("ignore")
import torch
import transformers.modeling_utils as modelling
from torch.utils import backend_registration

backend_registration._setup_privateuseone_for_python_backend("card")
modelling.get_torch_context_manager_or_global_device = lambda: torch.device("card")
real = torch.tensor  # which goes past the fakes; transformers' caches begin as torch.tensor([])
torch.tensor = lambda data, **given: (
    torch.empty(0, **given) if data == [] and given.get("device") is not None else real(data, **given)
)

from plugbridge.memory.case import Case
from plugbridge.memory.predict import trace
from plugbridge.memory.shapes import gpt2, t5
from plugbridge.memory.steps import STEPS

gpt, both = gpt2(16, 1, 2, 64, 32), t5(16, 1, 2, 8, 32, 64)
for name, config, channels, importance in (
    ("score", gpt, "select", "fisher"),
    ("score", gpt, "select", "activation"),
    ("repair", gpt, "gradient_pca", "fisher"),
    ("couple, feedback", gpt, "gradient_pca", "fisher"),
    ("couple, feedback", both, "gradient_pca", "fisher"),
    ("couple, ladder", both, "select", "fisher"),
    ("couple, ladder_delta", both, "gradient_pca", "fisher"),
):
    case = Case(config, 2, 8, reduction=2, channels=channels, importance=importance, device="card")
    assert trace(case, STEPS[name]).peak > 0, name
    print(name)
"""


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch has no such device"
)
def test_no_step_mixes_devices() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "couple, ladder_delta"
