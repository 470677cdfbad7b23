"""One operation on named axes: select is a 0/1 projection, the identity changes nothing."""

import pytest
import torch

from plugbridge.errors import ShapeError
from plugbridge.tensors.axes import Project, Select, reduce_to, selection_matrix, transform
from plugbridge.tensors.patterns import axis_names, infer_sizes, parse, shape_of

PATTERNS = [
    ("hidden (qkv heads head_dim)", {"hidden": 5, "qkv": 3, "heads": 4, "head_dim": 2}),
    ("(kv_heads group head_dim) hidden", {"kv_heads": 4, "group": 2, "head_dim": 3, "hidden": 5}),
    ("(heads head_dim)", {"heads": 4, "head_dim": 3}),
    ("hidden", {"hidden": 6}),
    ("rank hidden", {"rank": 2, "hidden": 6}),
]


def _tensor(pattern: str, sizes: dict[str, int]) -> torch.Tensor:
    return torch.randn(shape_of(pattern, sizes), dtype=torch.float64)


def test_parse() -> None:
    assert parse("hidden (qkv heads head_dim)") == (("hidden",), ("qkv", "heads", "head_dim"))
    assert axis_names("(a b) c") == ("a", "b", "c")


@pytest.mark.parametrize("pattern", ["(a b", "a b)", "a ((b))", "a ()", "a a", "(a b) b"])
def test_broken_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ShapeError):
        parse(pattern)


@pytest.mark.parametrize(("pattern", "sizes"), PATTERNS)
def test_select_equals_a_zero_one_projection(pattern: str, sizes: dict[str, int]) -> None:
    tensor = _tensor(pattern, sizes)
    for axis, size in sizes.items():
        index = torch.randperm(size)[: max(1, size // 2)]
        selected = transform(tensor, pattern, {axis: Select(index)}, sizes)
        matrix = selection_matrix(Select(index), size, torch.float64)
        projected = transform(tensor, pattern, {axis: Project(matrix)}, sizes)
        assert torch.equal(selected, projected)
        assert selected.shape == shape_of(pattern, {**sizes, axis: len(index)})


@pytest.mark.parametrize(("pattern", "sizes"), PATTERNS)
def test_identity_changes_nothing(pattern: str, sizes: dict[str, int]) -> None:
    tensor = _tensor(pattern, sizes)
    eyes = {axis: Project(torch.eye(size, dtype=torch.float64)) for axis, size in sizes.items()}
    every = {axis: Select(torch.arange(size)) for axis, size in sizes.items()}
    assert torch.equal(transform(tensor, pattern, eyes, sizes), tensor)
    assert torch.equal(transform(tensor, pattern, every, sizes), tensor)
    assert torch.equal(transform(tensor, pattern, {"absent": every[next(iter(sizes))]}, sizes), tensor)


def test_projection_equals_einsum_by_hand() -> None:
    sizes = {"hidden": 5, "qkv": 3, "heads": 4, "head_dim": 2}
    tensor = _tensor("hidden (qkv heads head_dim)", sizes)
    heads = torch.randn(3, 4, dtype=torch.float64)
    hidden = torch.randn(2, 5, dtype=torch.float64)
    ops = {"heads": Project(heads), "hidden": Project(hidden)}
    found = transform(tensor, "hidden (qkv heads head_dim)", ops, sizes)
    wanted = torch.einsum("dqhe,gh,cd->cqge", tensor.reshape(5, 3, 4, 2), heads, hidden)
    assert torch.allclose(found, wanted.reshape(2, 18), rtol=0, atol=1e-12)


def test_neighbouring_axes_are_projected_as_one() -> None:
    sizes = {"qkv": 3, "heads": 4, "head_dim": 2}
    tensor = _tensor("(qkv heads head_dim)", sizes)
    maps = torch.randn(3, 6, 8, dtype=torch.float64)
    joint = {"qkv heads head_dim": Project(torch.block_diag(*maps))}
    found = transform(tensor, "(qkv heads head_dim)", joint, sizes)
    assert torch.allclose(found, torch.einsum("qab,qb->qa", maps, tensor.reshape(3, 8)).reshape(-1))


def test_projection_is_differentiable() -> None:
    matrix = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    tensor = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t, m: transform(t, "rank hidden", {"hidden": Project(m)}, {}), (tensor, matrix)
    )


def test_sizes_are_inferred_and_mismatches_refused() -> None:
    assert infer_sizes("hidden ffn", (3, 7), {"hidden": 3}) == {"hidden": 3, "ffn": 7}
    with pytest.raises(ShapeError, match="not divisible"):
        infer_sizes("(a b)", (7,), {"a": 2})
    with pytest.raises(ShapeError, match="not known"):
        infer_sizes("(a b)", (6,), {})
    with pytest.raises(ShapeError, match="dimensions"):
        infer_sizes("a b", (6,), {})
    with pytest.raises(ShapeError, match="give 4"):
        infer_sizes("a", (6,), {"a": 4})


@pytest.mark.parametrize(("pattern", "sizes"), PATTERNS)
def test_reduction_sums_everything_else(pattern: str, sizes: dict[str, int]) -> None:
    tensor = _tensor(pattern, sizes)
    names = axis_names(pattern)
    expanded = tensor.reshape([sizes[name] for name in names])
    for i, axis in enumerate(names):
        wanted = expanded.movedim(i, 0).reshape(sizes[axis], -1).sum(1)
        assert torch.allclose(reduce_to(tensor, pattern, axis, sizes), wanted)
