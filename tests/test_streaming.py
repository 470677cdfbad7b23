"""A model run block by block from disk is the model itself, and never there as a whole."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from conftest import FAMILIES, METHODS, logits_of, make_model, make_tokenizer, second_peak, token_inputs
from plugbridge.errors import ModelError
from plugbridge.evaluate import option_scores
from plugbridge.families.spec import Layout
from plugbridge.models import find_checkpoint, layout_for, load_config, load_model, parameter_count
from plugbridge.progress import Silent
from plugbridge.shrink.bridge import prune_model
from plugbridge.shrink.importance import activation, magnitude, record_second_moments, residual_energy
from plugbridge.shrink.prune import plan_bridge
from plugbridge.shrink.sizes import reduced_sizes
from plugbridge.streaming import Absent, Window, load_converted, load_streamed, values_of, window_of
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.transfer.states import Place, States, watch
from plugbridge.tuners.module import attach
from plugbridge.tuners.table import METHODS as TABLE
from plugbridge.tuners.table import MethodSettings

LAYERS = 3
ROWS = [Encoded((8, 9, 10), ((3, 1), (4, 1)), 0), Encoded((11, 12), ((3, 1), (4, 1)), 1)]


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model. Its weights are copied: mapped files begin anywhere, and BLAS rounds otherwise there."""
    model = load_model(str(folder), dtype=dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def converted(folder: Path, dtype: torch.dtype) -> PreTrainedModel | None:
    checkpoint = find_checkpoint(str(folder))
    assert checkpoint is not None
    return load_converted(str(folder), checkpoint, dtype=dtype)


def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Layout, Window]:
    checkpoint = find_checkpoint(str(folder))
    assert checkpoint is not None
    model, layout = load_streamed(str(folder), checkpoint, dtype=dtype)
    window = window_of(model)
    assert window is not None
    return model, layout, window


def blocks_in_place(model: nn.Module, layout: Layout) -> set[tuple[str | None, int | None]]:
    """Stack and layer of every block that has a matrix in memory."""
    table = layout.table()
    return {
        (table[name].place.stack, table[name].place.layer)
        for name, p in model.named_parameters()
        if p.dim() > 1 and not isinstance(p, Absent) and table[name].place.stack is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_the_resident_ones(
    sharded: Callable[[str], Path], tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    wanted = logits_of(resident(sharded(family), dtype=dtype))
    model, layout, window = streamed(sharded(family), dtype)
    assert layout == layout_for(make_model(family, layers=LAYERS))
    for _ in range(2):
        assert torch.equal(logits_of(model), wanted)
    blocks = sum(layout.layers.values())
    assert window.reads <= 2 * blocks + 1  # each block once a pass, and one ahead
    resident(sharded(family)).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert torch.equal(logits_of(streamed(tmp_path, dtype)[0]), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_is_in_place_and_at_most_one_read_ahead(sharded: Callable[[str], Path], family: str) -> None:
    model, layout, window = streamed(sharded(family))
    seen: list[set[tuple[str | None, int | None]]] = []
    held: list[int] = []
    read = window._read

    def counted(block: int) -> list[Tensor]:
        held.append(len(blocks_in_place(model, layout)))
        return read(block)

    window._read = counted  # type: ignore[method-assign]
    for path, _ in layout.functions():
        model.get_submodule(path).register_forward_hook(lambda *_: seen.append(blocks_in_place(model, layout)))
    assert blocks_in_place(model, layout) == set()
    logits_of(model)
    assert all(len(blocks) == 1 for blocks in seen)
    assert len(set.union(*seen)) == sum(layout.layers.values())
    assert max(held) <= 1  # a read begins while at most one block is there
    absent = [p for p in model.parameters() if isinstance(p, Absent)]
    assert all(p.untyped_storage().nbytes() == p.itemsize and bool(p.isnan().all()) for p in absent)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_counts_and_reads_as_the_whole_model(sharded: Callable[[str], Path], family: str) -> None:
    plain = resident(sharded(family))
    model, _, _ = streamed(sharded(family))
    logits_of(model)
    assert parameter_count(model) == parameter_count(plain)
    assert (model.dtype, model.device) == (plain.dtype, plain.device)
    for (name, a), (other, b) in zip(plain.named_parameters(), values_of(model), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_while_one_value_is_used_the_next_one_is_read(sharded: Callable[[str], Path]) -> None:
    model, _, window = streamed(sharded("gpt2"))
    begun: list[str] = []

    def noted(name: str, read: Callable[[], Tensor]) -> Tensor:
        begun.append(name)
        return read()

    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if isinstance(parameter, Absent):
            parameter.read = partial(noted, name, parameter.read)
    for at, (name, _) in enumerate(values_of(model)):
        window.reader.submit(int).result()  # what it was given before is done
        assert begun == [n for n in list(parameters)[: at + 2] if isinstance(parameters[n], Absent)], name
    assert begun


def test_after_a_block_that_could_not_be_read_none_is_taken_for_there(sharded: Callable[[str], Path]) -> None:
    """A block that is gone must not be run as NaN."""
    model, _, window = streamed(sharded("gpt2"))
    window.need(0)
    first = model.get_submodule("transformer.h.0.mlp.c_fc").get_parameter("weight").clone()
    read = window._read

    def broken(block: int) -> list[Tensor]:
        raise ModelError(f"block {block} is broken")

    window._ahead = None
    window._read = broken  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="block 2 is broken"):
        window.need(2)
    window._read = read  # type: ignore[method-assign]
    window.need(0)
    assert torch.equal(model.get_submodule("transformer.h.0.mlp.c_fc").get_parameter("weight"), first)


def test_a_checkpoint_of_the_model_without_its_head(tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    assert torch.equal(logits_of(streamed(tmp_path)[0]), logits_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_scores_of_options(sharded: Callable[[str], Path], family: str) -> None:
    plain, (model, layout, _) = resident(sharded(family)), streamed(sharded(family))
    encoder = Encoder(make_tokenizer(), layout.family.kind, None)
    layers = [(stack, layer) for stack, count in layout.layers.items() for layer in range(count)]
    sites = {
        place: site
        for _, (place, site) in ((path, layout.place_of(path)) for path, _ in layout.sites("attention_input"))
    }
    places = [Place("blocks", *at) for at in layers]
    places += [Place(kind, at.stack, at.layer, site) for at, site in sites.items() for kind in ("inputs", "outputs")]
    places += [Place("outputs", *at) for at in layers if at[0] == layout.family.prefix.stack]
    for row in ROWS:
        one: States = {}
        other: States = {}
        watch(plain, layout, encoder, row, places, one.__setitem__)
        watch(model, layout, encoder, row, places, other.__setitem__)
        assert one.keys() == other.keys() == set(places)
        assert all(torch.equal(one[place], other[place]) for place in places)
    rows = [*ROWS, Encoded((9, 12, 10, 8), ((3, 4, 1), (4, 3, 1)), 0)]
    scores = [option_scores(m, encoder, rows, 2, Silent(), "") for m in (plain, model)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_module_is_the_same_and_changes_as_little(
    sharded: Callable[[str], Path], family: str, method: str
) -> None:
    made: list[dict[str, Tensor]] = []
    logits: list[Tensor] = []
    for model in (resident(sharded(family)), streamed(sharded(family))[0]):
        torch.manual_seed(4)
        wrapped, _ = attach(model, TABLE[method], layout_for(model), MethodSettings(rank=2, alpha=4.0))
        made.append({name: p.detach() for name, p in wrapped.named_parameters() if p.requires_grad})
        with torch.no_grad():
            logits.append(wrapped.eval()(**token_inputs(model)).logits)
    assert all(torch.equal(made[1][name], tensor) for name, tensor in made[0].items())
    assert torch.equal(*logits)


@pytest.mark.parametrize("channels", ["select", "pca"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_without_gradients_and_the_bridge_are_the_same(
    sharded: Callable[[str], Path], family: str, channels: str
) -> None:
    found: list[dict[str, Tensor]] = []
    for model in (resident(sharded(family)), streamed(sharded(family))[0]):
        layout = layout_for(model)
        samples = [token_inputs(model, rows=1, seed=seed) for seed in range(2)]
        with record_second_moments(model, layout) as moments:
            energy = residual_energy(model, layout, samples, lambda s, m=model: m(**s))
        scores = activation(model, layout, samples, lambda s, m=model: m(**s))
        plan = plan_bridge(layout, magnitude(model, layout), reduced_sizes(layout, 2))
        if channels == "pca":
            plan = replace(plan, basis={"hidden": torch.linalg.qr(torch.randn(16, 16)).Q[: plan.sizes["hidden"]]})
            torch.manual_seed(0)
        activity = moments.total("activity")
        assert activity is not None
        bridge = prune_model(model, layout, plan, energy).state_dict() if channels == "select" else {}
        found.append({**scores, **energy, "activity": activity, **plan.keep, **bridge})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_a_shard_that_changes_between_two_blocks_is_noticed(sharded: Callable[[str], Path], tmp_path: Path) -> None:
    make_model("gpt2", layers=LAYERS).save_pretrained(tmp_path, max_shard_size="6KB")
    model, _, _ = streamed(tmp_path)
    logits_of(model)
    for shard in tmp_path.glob("*.safetensors"):
        os.utime(shard, ns=(0, 0))
    with pytest.raises(ModelError, match=r"\.safetensors has changed .* tensor 'transformer\.h\.\d\."):
        logits_of(model)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.save_pretrained(tmp_path)
    checkpoint = find_checkpoint(str(tmp_path))
    assert checkpoint is not None
    name = "transformer.h.1.mlp.c_fc.weight"
    entries = dict(checkpoint.entries)
    entry = entries.pop(name)
    with pytest.raises(ModelError, match=f"lacks weight '{name}'; is the checkpoint complete"):
        load_streamed(str(tmp_path), replace(checkpoint, entries=entries))
    other = replace(checkpoint, entries={**entries, name: replace(entry, shape=(64, 16))})
    with pytest.raises(ModelError, match=rf"tensor '{name}' in .* has shape \(64, 16\), config.json says \(16, 64\)"):
        load_streamed(str(tmp_path), other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_another_precision_than_its_files_is_the_one_that_transformers_loads(
    sharded: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    half = load_model(str(sharded(family)), dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half", max_shard_size="20KB")
    for folder, dtype in ((sharded(family), torch.bfloat16), (tmp_path / "half", torch.float32)):
        model, wanted = converted(folder, dtype), load_model(str(folder), dtype=dtype)
        assert model is not None
        assert not model.training
        assert model.state_dict().keys() == wanted.state_dict().keys()
        own = dict(model.named_parameters())
        for name, parameter in wanted.named_parameters():  # tied ones once
            assert own[name].dtype == parameter.dtype == dtype
            assert own[name].requires_grad
            assert torch.equal(own[name], parameter)
        assert len(own) == len(list(wanted.named_parameters()))
        assert torch.equal(logits_of(model), logits_of(resident(folder, dtype)))


def test_what_transformers_loads_as_well_is_left_to_it(sharded: Callable[[str], Path], tmp_path: Path) -> None:
    assert converted(sharded("gpt2"), torch.float32) is None
    tensors = dict(load_model(str(sharded("gpt2"))).state_dict())
    kept = {name: tensor.clone() for name, tensor in tensors.items() if name != "lm_head.weight"}
    load_config(str(sharded("gpt2"))).save_pretrained(str(tmp_path))
    masked = {**kept, "transformer.h.0.attn.bias": torch.ones(4, 4, dtype=torch.bool)}  # as old files have it
    save_file(masked, str(tmp_path / "model.safetensors"))
    assert converted(tmp_path, torch.float32) is None
    known = find_checkpoint(str(sharded("gpt2")))
    assert known is not None
    renamed = {name.replace("wte", "other"): entry for name, entry in known.entries.items()}
    assert load_converted(str(sharded("gpt2")), replace(known, entries=renamed), dtype=torch.bfloat16) is None


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_tied_weights_that_the_files_hold_twice_are_tied(
    sharded: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    whole = load_model(str(sharded(family)))
    held = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    assert len(held) > len(list(whole.parameters()))
    save_file(held, str(tmp_path / "model.safetensors"))
    whole.config.save_pretrained(str(tmp_path))
    model = converted(tmp_path, torch.bfloat16)
    assert model is not None
    assert parameter_count(model) == parameter_count(load_model(str(tmp_path))) == parameter_count(whole)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    disk = streamed(tmp_path)[0]
    assert parameter_count(disk) == parameter_count(whole)
    assert torch.equal(logits_of(disk), logits_of(resident(tmp_path)))
    held["lm_head.weight"] += 1  # which is no tie then, for transformers neither
    save_file(held, str(tmp_path / "model.safetensors"))
    apart = converted(tmp_path, torch.bfloat16)
    assert apart is not None
    assert parameter_count(apart) == parameter_count(load_model(str(tmp_path))) > parameter_count(whole)


@pytest.mark.skipif(sys.platform != "linux", reason="only there peaks can be reset")
def test_converting_takes_the_model_and_one_tensor(clean: Callable[..., int], tmp_path: Path) -> None:
    model = make_model("gpt2", hidden=256, layers=8, heads=4)
    model.save_pretrained(tmp_path)
    whole = 2 * parameter_count(model)
    peak = clean(partial(second_peak, partial(converted, tmp_path, torch.bfloat16)))
    assert whole <= peak < 1.5 * whole  # with the files beside it, 3 times
