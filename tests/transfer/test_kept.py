"""What a forward pass keeps, in few bits: how far values move, what stays as it is, what memory it saves."""

from dataclasses import replace

import pytest
import torch
from test_transfer import ROWS, coupling_of

from conftest import FAMILIES, make_model, pack_model
from plugbridge.memory.case import Case
from plugbridge.memory.predict import predict
from plugbridge.memory.rows import few_bits
from plugbridge.memory.shapes import gpt2
from plugbridge.transfer.coupling import Coupling
from plugbridge.transfer.kept import SMALL, KeptBits, Rounded, kept_in, rounded
from plugbridge.transfer.through import through_loss


@pytest.mark.parametrize(("bits", "levels"), [(8, 255), (4, 15)])
@pytest.mark.parametrize(("shape", "size"), [((3, 5, 128), 64), ((2, 4, 7, 48), 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_move_by_half_a_step_of_their_group(
    bits: KeptBits, levels: int, shape: tuple[int, ...], size: int, dtype: torch.dtype
) -> None:
    values = (torch.randn(shape) * torch.rand(shape[:-1]).unsqueeze(-1) + 3).to(dtype)
    values[0] = 0.5  # groups without a range
    kept = rounded(values, bits)
    assert kept.numbers.nbytes == values.numel() * bits // 8
    found = kept.values()
    assert (found.dtype, found.shape) == (dtype, values.shape)
    groups, back = (each.float().reshape(-1, size) for each in (values, found))
    span = (groups.amax(1) - groups.amin(1)).unsqueeze(1)
    slack = groups.abs().amax(1, keepdim=True) * 2**-7  # of least and step in 16 bits
    assert bool(((back - groups).abs() <= span / levels / 2 + slack).all())
    assert torch.allclose(found[0], values[0], rtol=2**-7)


def test_groups_of_an_odd_size_are_kept_in_eight_bits() -> None:
    kept = rounded(torch.randn(6, 33), 4)
    assert kept.numbers.numel() == 6 * 33
    assert kept.values().shape == (6, 33)


def test_only_activations_are_rounded() -> None:
    weight, module = torch.randn(64, 64), torch.randn(64, 64, requires_grad=True) * 1.0
    x = torch.randn(40, 64, requires_grad=True) * 1.0
    seen: list[object] = []
    original = rounded

    def spy(tensor: torch.Tensor, bits: KeptBits) -> Rounded:
        seen.append(tensor.shape)
        return original(tensor, bits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plugbridge.transfer.kept.rounded", spy)
        with kept_in(8, [module]):
            ((x @ weight).exp() @ module).sum()
            (x[:1] * x[:1]).sum()
    assert seen == [(40, 64)]  # what exp gave, once for itself and the product; the weight, the module and few are not
    assert x[:1].numel() < SMALL


def _coupling(family: str, bits: KeptBits | None) -> Coupling:
    coupling = coupling_of(family, "lora", reduction=1)
    pack_model(coupling.bridge, coupling.large, 3)  # pyright: ignore[reportArgumentType]
    large = make_model(family, hidden=16, layers=2, heads=4, seed=3)
    return replace(coupling, large_model=large, train_bridge=False, activations="large", kept_bits=bits)


def _gradient(family: str, bits: KeptBits | None, way: str = "bridge") -> torch.Tensor:
    coupling = _coupling(family, bits)
    ways, tensors = through_loss(coupling), list(coupling.parameters().values())
    found = torch.autograd.grad(getattr(ways, way)(ROWS), tensors)
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_keep_the_direction_and_the_exact_way_is_exact(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugbridge.transfer.kept.SMALL", 1)
    plain, eight, four = (_gradient(family, bits) for bits in (None, 8, 4))
    cosines = [float(torch.cosine_similarity(plain, other, dim=0)) for other in (eight, four)]
    assert 1 - 1e-7 > cosines[0] > 0.999
    assert cosines[0] > cosines[1]
    assert torch.equal(_gradient(family, None, "exact"), _gradient(family, 8, "exact"))


def test_memory_is_a_quarter_of_what_is_kept() -> None:
    case = Case(gpt2(64, 32, 4, 128, 256), 8, 256)
    row = few_bits(case, gpt2(32, 2, 4, 128, 256), "feedback", 3)
    peaks = [predict(replace(row.case, kept_bits=bits), row.make).peak for bits in (None, 8, 4)]
    whole = 32 * 10 * 64 * 8 * 256 * 4  # norms' inputs, query, key and value, attention's output, what GELU reads
    saved = [(peaks[0] - peak) / whole for peak in peaks[1:]]
    assert 0.65 < saved[0] < 1 - 8.5 / 32 + 0.1 < saved[1] < 1 - 4.5 / 32 + 0.1  # a LoRA's inputs besides
