"""Pruning: exact where it can be, whole and consistent everywhere, counted truly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from conftest import FAMILIES, logits_of, make_model, make_tokenizer, token_inputs
from plugbridge.config.stages import Axis
from plugbridge.errors import ConfigError, ModelError
from plugbridge.families.spec import check_constraints
from plugbridge.memory.alive import Alive
from plugbridge.models import layout_for, load_model, parameter_count
from plugbridge.shrink.bridge import bridge_weights, empty_bridge, prune_model, shuffled, write_bridge
from plugbridge.shrink.importance import magnitude, residual_energy
from plugbridge.shrink.prune import plan_bridge, principal_basis, unit_sum
from plugbridge.shrink.sizes import budgeted_sizes, count_parameters, reduced_sizes, whole_axes
from plugbridge.tensors.patterns import axis_names
from plugbridge.tensors.writer import write_tensors


def _energy(model, layout):
    samples = [token_inputs(model, rows=1, seed=i) for i in range(3)]
    for sample in samples:
        sample["attention_mask"].fill_(1)
    return residual_energy(model, layout, samples, lambda s: model(**s))


def _prune(model, reduction: float):
    layout = layout_for(model)
    plan = plan_bridge(layout, magnitude(model, layout), reduced_sizes(layout, reduction))
    return prune_model(model, layout, plan, _energy(model, layout)), layout, plan


@pytest.mark.parametrize("family", FAMILIES)
def test_no_reduction_returns_the_model_itself(family: str) -> None:
    model = make_model(family)
    bridge, _, _ = _prune(model, 1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(bridge.state_dict()[name], tensor), name
    assert bridge.config.to_dict() == model.config.to_dict()
    assert torch.equal(logits_of(bridge), logits_of(model))


@torch.no_grad()
def _zero_units(model, layout) -> None:
    """Zero every second unit of every prunable axis, wherever it is written or read.

    A LayerNorm takes the mean over all channels off, so its residual writers are centred over the
    channels that stay: then the zeroed channels are zero after centring too.
    """
    table = layout.table()
    centred = layout.family.norm == "layernorm"
    norms = set(layout.norms())
    done: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in done:
            continue
        done.add(tensor.data_ptr())
        names = axis_names(table[name].pattern)
        view = tensor.view([layout.sizes[n] for n in names])
        for axis in names:
            if axis in layout.family.scope and not (axis == "hidden" and name.rpartition(".")[0] in norms):
                view.index_fill_(names.index(axis), torch.arange(1, layout.sizes[axis], 2), 0.0)
        writes = names[-1] == "hidden" and name.rpartition(".")[0] not in norms
        if centred and writes and "c_attn" not in name and "c_fc" not in name:
            kept = view[..., ::2]
            kept -= kept.mean(-1, keepdim=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_zeroed_units_changes_no_logit(family: str) -> None:
    model = make_model(family).double()
    layout = layout_for(model)
    _zero_units(model, layout)
    scores = {key: (torch.arange(values.numel()) % 2 == 0).double() for key, values in magnitude(model, layout).items()}
    plan = plan_bridge(layout, scores, reduced_sizes(layout, 2))
    bridge = prune_model(model, layout, plan, _energy(model, layout))
    assert parameter_count(bridge) < parameter_count(model)
    assert logits_of(model).abs().max() > 0.1
    # RMSNorm's mean square is float32 inside transformers, whatever the model's precision
    tolerance = 1e-12 if layout.family.norm == "layernorm" else 1e-5
    assert torch.allclose(logits_of(bridge), logits_of(model), rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bridge_is_a_model_directory_that_loads_by_itself(family: str, tmp_path: Path) -> None:
    bridge, layout, plan = _prune(make_model(family), 2)
    bridge.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    kind = AutoModelForSeq2SeqLM if layout.family.kind == "seq2seq" else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits_of(loaded), logits_of(bridge), atol=1e-6)
    assert layout_for(loaded).sizes == plan.sizes
    names = {name for name, _ in bridge.named_parameters()}
    assert count_parameters(layout, names, plan.sizes) == parameter_count(loaded)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_heads_and_one_residual_index_set(family: str) -> None:
    bridge, layout, plan = _prune(make_model(family), 2)
    model_axes = [a for a, s in layout.family.scope.items() if s == "model"]
    assert [key for key in plan.keep if "@" not in key] == model_axes
    assert plan.sizes["head_dim"] == layout.sizes["head_dim"]
    for key, kept in plan.keep.items():
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) == plan.sizes[key.partition("@")[0]]
    assert layout_for(bridge).sizes == plan.sizes


def test_the_best_units_stay_and_ties_go_to_the_lower_position() -> None:
    layout = layout_for(make_model("gpt2"))
    scores = {"ffn@decoder.0": torch.tensor([1.0] * 60 + [5.0, 0.0, 5.0, 1.0])}
    plan = plan_bridge(layout, scores, {**layout.sizes, "ffn": 4})
    assert plan.keep["ffn@decoder.0"].tolist() == [0, 1, 60, 62]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.12])
def test_a_budget_is_kept_and_used(family: str, share: float) -> None:
    model = make_model(family, hidden=32, heads=8)
    layout = layout_for(model)
    names = {name for name, _ in model.named_parameters()}
    budget = int(share * parameter_count(model))
    sizes = budgeted_sizes(layout, names, budget)
    assert count_parameters(layout, names, sizes) <= budget
    plan = plan_bridge(layout, magnitude(model, layout), sizes)
    assert parameter_count(prune_model(model, layout, plan, {})) == count_parameters(layout, names, sizes)


def test_an_ample_budget_keeps_the_whole_model() -> None:
    model = make_model("gpt2")
    layout = layout_for(model)
    names = {name for name, _ in model.named_parameters()}
    assert budgeted_sizes(layout, names, parameter_count(model)) == layout.sizes


def test_impossible_sizes_are_refused() -> None:
    model = make_model("gpt2")
    layout = layout_for(model)
    with pytest.raises(ConfigError, match="at least 1"):
        reduced_sizes(layout, 0.5)
    with pytest.raises(ConfigError, match="the smallest Bridge of this model has"):
        budgeted_sizes(layout, {n for n, _ in model.named_parameters()}, 10)


def test_paper_sizes_of_gpt2_xl_and_t5_3b() -> None:
    """Table 2's LLM/r as a budget, on the real configurations; no weights are needed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25))
    layout = layout_for(model)
    names = {name for name, _ in model.named_parameters()}
    assert count_parameters(layout, names, layout.sizes) == 1_557_611_200
    sizes = budgeted_sizes(layout, names, 1_557_611_200 // 16)
    count = count_parameters(layout, names, sizes)
    assert 0.8 * 1_557_611_200 / 16 < count <= 1_557_611_200 / 16
    assert sizes["hidden"] == sizes["heads"] * 64


def test_the_principal_basis_is_orthonormal_and_holds_the_most() -> None:
    x = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([5.0, 0.1, 3.0, 0.1, 0.1, 1.0], dtype=torch.float64)
    basis = principal_basis(x.T @ x, 2).double()
    assert torch.allclose(basis @ basis.T, torch.eye(2).double(), atol=1e-6)
    kept = (x @ basis.T).square().sum()
    assert kept > 0.95 * x.square().sum()
    assert kept >= x[:, [0, 2]].square().sum() - 1e-6


def test_second_moments_of_unequal_size_count_alike() -> None:
    moments = [torch.diag(torch.tensor([1.0, 3.0])).double(), torch.diag(torch.tensor([100.0, 0.0])).double()]
    assert torch.equal(unit_sum(iter(moments)), torch.diag(torch.tensor([1.25, 0.75])).double())


@torch.no_grad()
def _shuffled(family: str, seed: int, fill: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A Bridge's weights before and after; with `fill`, every weight counts its own entries."""
    bridge, layout, _ = _prune(make_model(family), 2)
    for parameter in bridge.parameters() if fill else ():
        parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
    before = {name: parameter.detach().clone() for name, parameter in bridge.named_parameters()}
    return before, dict(shuffled(before.items(), layout, seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffling_moves_the_entries_of_every_weight_in_the_blocks_and_nothing_else(family: str) -> None:
    before, after = _shuffled(family, 3)
    outside = set(layout_for(make_model(family)).family.weights) & set(before)  # embeddings, final norms, head
    assert 2 <= len(outside) < len(before)
    for name, tensor in after.items():
        if name in outside:
            assert torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor.flatten().sort().values, before[name].flatten().sort().values), name
            assert not torch.equal(tensor, before[name]), name


def test_a_shuffle_is_the_seeds_and_every_weights_own() -> None:
    (_, first), (_, again), (_, other) = (_shuffled("t5", seed, fill=True) for seed in (3, 3, 4))
    blocks = [name for name in first if ".block." in name]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in blocks)
    orders = [tuple(first[name].flatten().tolist()) for name in blocks]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_making_a_bridge_takes_the_bridge_and_one_weight(family: str, dtype: torch.dtype) -> None:
    with Alive() as alive:
        model = make_model(family, hidden=64, layers=8).to(dtype)
        layout = layout_for(model)
        plan = plan_bridge(layout, magnitude(model, layout), reduced_sizes(layout, 2))
        before = alive.now
        alive.peaks.clear()
        bridge = prune_model(model, layout, plan, {})
    assert bridge.dtype == dtype
    size = sum(parameter.nbytes for parameter in bridge.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert size <= alive.peak - before <= size + 3 * largest


def test_a_bridge_of_other_shapes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt2")
    layout = layout_for(model)
    plan = plan_bridge(layout, magnitude(model, layout), reduced_sizes(layout, 2))
    monkeypatch.setattr("plugbridge.shrink.bridge.bridge_config", lambda config, *_: config)
    with pytest.raises(ModelError, match=r"'transformer\.wte\.weight' has shape \(\d+, 8\) in the Bridge, not"):
        prune_model(model, layout, plan, {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bridge_written_weight_by_weight_is_what_transformers_saves(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    with Alive() as alive:
        model = make_model(family, hidden=64, layers=8).to(dtype)
        layout = layout_for(model)
        plan = plan_bridge(layout, magnitude(model, layout), reduced_sizes(layout, 2))
        empty = empty_bridge(model, layout, plan)
        before = alive.now
        alive.peaks.clear()
        (tmp_path / "written").mkdir()
        write_bridge(empty, bridge_weights(model, layout, plan, {}), tmp_path / "written")
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert alive.peak - before <= 3 * largest
    bridge = prune_model(model, layout, plan, {})
    bridge.save_pretrained(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {path.name for path in (tmp_path / "written").iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "written" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name
    written, saved = (load_file(str(tmp_path / folder / "model.safetensors")) for folder in ("written", "saved"))
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[name], saved[name]) for name in saved)
    again = load_model(str(tmp_path / "written"), dtype=dtype).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in bridge.state_dict().items())


def test_a_bridge_with_a_missing_or_wrong_weight_is_refused(tmp_path: Path) -> None:
    model = make_model("gpt2")
    layout = layout_for(model)
    plan = plan_bridge(layout, magnitude(model, layout), reduced_sizes(layout, 2))
    weights = list(bridge_weights(model, layout, plan, {}))
    with pytest.raises(ModelError, match="has no counterpart in the large model"):
        write_bridge(empty_bridge(model, layout, plan), weights[:-1], tmp_path)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights}
    with pytest.raises(ModelError, match=rf"'{weights[1][0]}' is torch.float32"):
        write_tensors(tmp_path / "x", shapes, weights[1:])
    with pytest.raises(ModelError, match=f"'{weights[-1][0]}' was not written"):
        write_tensors(tmp_path / "x", shapes, weights[:-1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole", [["hidden"], ["heads"], ["ffn"], ["hidden", "heads"]])
def test_what_is_to_stay_whole_stays_and_the_rest_is_reduced(family: str, whole: list[Axis], tmp_path: Path) -> None:
    model = make_model(family, hidden=32, layers=2, heads=8)
    layout = layout_for(model)
    sizes = reduced_sizes(layout, 4, whole)
    kept = whole_axes(layout, whole)
    assert all(any(axis.endswith(name) for axis in kept) for name in whole)
    for axis in layout.family.scope:
        assert (sizes[axis] == layout.sizes[axis]) == (axis in kept), axis
    assert not check_constraints(layout.family, sizes)
    names = {name for name, _ in model.named_parameters()}
    least = count_parameters(layout, names, reduced_sizes(layout, 32, whole))
    budget = (least + count_parameters(layout, names, layout.sizes)) // 2
    fitted = budgeted_sizes(layout, names, budget, whole)
    assert least <= count_parameters(layout, names, fitted) <= budget
    assert all(fitted[axis] == layout.sizes[axis] for axis in kept)
    prune_model(
        model, layout, plan_bridge(layout, magnitude(model, layout), sizes), _energy(model, layout)
    ).save_pretrained(tmp_path)
    assert layout_for(load_model(str(tmp_path))).sizes == sizes


def test_heads_are_as_many_as_divide_a_residual_stream_that_stays_whole() -> None:
    layout = layout_for(make_model("llama", hidden=48, layers=1, heads=12))
    sizes = reduced_sizes(layout, 12 / 5, ["hidden"])
    assert sizes["hidden"] == 48
    assert 48 % (sizes["kv_heads"] * sizes["group"]) == 0
    assert sizes["kv_heads"] < layout.sizes["kv_heads"]
