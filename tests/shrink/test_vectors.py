"""Vectors that matrices are multiplied by: the largest of each row, whole or streamed, as the Bridge has them."""

from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, make_model, make_tokenizer
from plugbridge.evaluate import log_likelihood
from plugbridge.models import find_checkpoint, layout_for
from plugbridge.progress import Silent
from plugbridge.shrink.importance import magnitude
from plugbridge.shrink.packing import matrices_of
from plugbridge.shrink.prune import plan_bridge
from plugbridge.shrink.shelf import Shelf
from plugbridge.shrink.sizes import reduced_sizes
from plugbridge.shrink.vectors import KEPT, Vectors, read_vectors, record_vectors, vector_bytes
from plugbridge.stages.shrink import units_of
from plugbridge.streaming import load_streamed
from plugbridge.tasks.encode import Encoded, Encoder, gold

ROWS = [Encoded((8, 9, 10, 5), ((3, 1), (4, 1)), 0), Encoded((11, 12), ((3, 1), (4, 1)), 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_the_gradients_at_what_matrices_give(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    layout = layout_for(model)
    encoder = Encoder(make_tokenizer(), layout.family.kind, None)
    exact: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}
    for path in matrices_of(model, layout):
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, path=path: given.__setitem__(path, out))
    vectors = Vectors(tmp_path / "v", "errors", layout, len(ROWS))
    with record_vectors(model, vectors, "errors"), record_vectors(model, vectors, "inputs"):
        for row in ROWS:
            value = log_likelihood(model, gold(encoder, [row]), encoder.kind).sum()
            gradients = torch.autograd.grad(value, list(given.values()), allow_unused=True)
            exact.update({path: g for path, g in zip(given, gradients, strict=True) if g is not None})
    plan = plan_bridge(layout, magnitude(model, layout), layout.sizes)
    for path, gradient in exact.items():
        found = read_vectors(tmp_path / "v", "errors", layout, plan, path)
        assert found is not None
        rows = gradient.reshape(-1, gradient.shape[-1])  # of the last row; every one of them, there are few
        assert torch.allclose(found[-len(rows) :].norm(), rows.norm(), rtol=1e-2), path
        assert found.shape[0] <= KEPT


@pytest.mark.parametrize(("family", "shelved"), [("gpt2", True), ("t5", False), ("llama", True)])
def test_streamed_models_leave_the_same(family: str, shelved: bool, tmp_path: Path) -> None:
    whole = make_model(family)
    whole.save_pretrained(tmp_path / "model")
    checkpoint = find_checkpoint(str(tmp_path / "model"))
    assert checkpoint is not None
    streamed, layout = load_streamed(str(tmp_path / "model"), checkpoint)
    encoder = Encoder(make_tokenizer(), layout.family.kind, None)
    for kind in ("errors", "inputs"):
        for name, model in (("whole", whole), ("streamed", streamed)):
            shelf = Shelf(tmp_path / "states.bin") if shelved and model is streamed else None
            vectors = Vectors(tmp_path / f"{kind} {name}", kind, layout, len(ROWS))
            units_of(model, layout, encoder, ROWS, "fisher", Silent(), shelf, 1, vectors)
        plan = plan_bridge(layout, magnitude(whole, layout), reduced_sizes(layout, 2))
        for path in matrices_of(whole, layout):
            one, two = (
                read_vectors(tmp_path / f"{kind} {name}", kind, layout, plan, path) for name in ("whole", "streamed")
            )
            assert (one is None) == (two is None)
            if one is not None and two is not None:
                axes = layout.linear_axes(path)[kind == "errors"]
                assert one.shape[-1] == two.shape[-1]
                assert torch.allclose(one.mT @ one, two.mT @ two, rtol=0.05, atol=1e-3 * float(one.square().sum())), (
                    axes
                )


def test_bytes_on_disk_are_counted(tmp_path: Path) -> None:
    model = make_model("gpt2")
    layout = layout_for(model)
    vectors = Vectors(tmp_path, "errors", layout, 1)
    for path in matrices_of(model, layout):
        _, outputs = model.get_submodule(path).get_parameter("weight").shape
        vectors.add(path, torch.ones(KEPT, outputs))
    vectors.close()
    headers = 2 * 1024
    assert 0 <= sum(file.stat().st_size for file in tmp_path.iterdir()) - vector_bytes(layout, "errors", 1) < headers
    assert vector_bytes(layout, "inputs", 100) == 2 * 2 * KEPT * (16 + 16 + 16 + 64)
    assert vector_bytes(layout, "errors", 2 * KEPT) == 2 * vector_bytes(layout, "errors", 1)
    assert vector_bytes(layout, None, 1) == 0


def test_of_each_row_the_largest_are_kept(tmp_path: Path) -> None:
    layout = layout_for(make_model("gpt2"))
    vectors = Vectors(tmp_path, "inputs", layout, KEPT // 2)
    sizes = torch.tensor([1.0, 5.0, 2.0, 4.0])
    vectors.add("transformer.h.0.mlp.c_fc", sizes[:, None] * torch.ones(4, 16))
    assert sorted(vectors.found["transformer.h.0.mlp.c_fc"][0][:, 0].tolist()) == [4.0, 5.0]
