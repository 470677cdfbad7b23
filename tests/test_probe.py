"""The linear probe reads what the head reads, and chooses its penalty on validation rows alone."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from conftest import FAMILIES, make_model, make_tokenizer
from plugbridge.evaluate import option_scores
from plugbridge.models import layout_for
from plugbridge.probe import PENALTIES, fit_option_probe, fit_probe, option_states, prompt_states
from plugbridge.progress import Silent
from plugbridge.tasks.encode import Encoded, Encoder
from test_evaluate import EOS, KIND, rows_of

# states


def _rows(kind: str) -> list[Encoded]:
    """Rows of different lengths with single-token options: what one pass scores."""
    return rows_of(kind, [(1, 1, 1)] * 7)


def _states(family: str, rows: list[Encoded], batch_size: int) -> tuple[torch.nn.Module, Tensor]:
    model = make_model(family)
    encoder = Encoder(make_tokenizer(), KIND[family], None)
    head = layout_for(model).family.head
    return model.get_submodule(head), prompt_states(model, head, encoder, rows, batch_size, Silent(), "")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_head_on_the_states_gives_the_scores(family: str) -> None:
    rows = _rows(KIND[family])
    assert len({len(row.prompt) for row in rows}) > 3
    wanted = option_scores(make_model(family), Encoder(make_tokenizer(), KIND[family], None), rows, 3, Silent(), "")
    for batch_size in (1, 3, 100):
        head, states = _states(family, rows, batch_size)
        assert states.shape == (len(rows), 16)
        table = torch.log_softmax(head(states), -1)
        for row, values, scores in zip(rows, table, wanted, strict=True):
            assert [float(values[option[0]]) for option in row.options] == pytest.approx(scores, abs=1e-5)
        assert not head._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_no_state_has_seen_its_answer(family: str) -> None:
    rows = _rows(KIND[family])
    others = [Encoded(row.prompt, tuple(reversed(row.options)), 0) for row in rows]
    (_, states), (_, same) = (_states(family, given, 3) for given in (rows, others))
    assert all(row.options != other.options for row, other in zip(rows, others, strict=True))
    assert torch.allclose(states, same, rtol=0, atol=1e-5)
    assert not torch.allclose(states[0], states[1], atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_head_runs_only_where_answers_begin(family: str) -> None:
    model, rows, seen = make_model(family), _rows("causal"), list[int]()
    model.get_submodule("lm_head").register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[1]))
    prompt_states(model, "lm_head", Encoder(make_tokenizer(), "causal", None), rows, 100, Silent(), "")
    assert seen == [len({len(row.prompt) for row in rows})]
    assert seen[0] < max(len(row.prompt) for row in rows)


def test_the_hook_is_gone_after_an_error() -> None:
    model = make_model("gpt2")
    encoder = Encoder(make_tokenizer(), "causal", None)
    with pytest.raises(IndexError):
        prompt_states(model, "lm_head", encoder, [Encoded((8, 99), ((3,), (4,)), 0)], 1, Silent(), "")
    assert not model.lm_head._forward_pre_hooks


SOME = [(1, 1), (2, 1), (3, 3, 1), (1, 1), (2, 4), (1, 2), (1, 1), (5, 2), (1, 1, 1, 3)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_at_the_options_ends_equal_a_plain_loop(family: str) -> None:
    model, kind = make_model(family), KIND[family]
    rows, encoder, head = rows_of(kind, SOME), Encoder(make_tokenizer(), kind, None), layout_for(model).family.head
    seen: list[Tensor] = []
    handle = model.get_submodule(head).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
    wanted: list[Tensor] = []
    for row in rows:
        for option in row.options:
            if kind == "causal":
                model(input_ids=torch.tensor([[*row.prompt, *option]]))
            else:  # the decoder starts with a mark of its own, so the end mark's place has read all before it
                marked = option if option[-1] == EOS else (*option, EOS)
                model(input_ids=torch.tensor([row.prompt]), labels=torch.tensor([marked]))
            wanted.append(seen.pop()[-1])
    handle.remove()
    for batch_size in (1, 4, 100):
        found = option_states(model, head, encoder, rows, batch_size, Silent(), "")
        assert [len(states) for states in found] == [len(row.options) for row in rows]
        assert torch.allclose(torch.cat(found), torch.stack(wanted), rtol=0, atol=1e-5)
    assert not model.get_submodule(head)._forward_pre_hooks


# answers


def _noisy(seed: int, rows: int) -> tuple[Tensor, list[int]]:
    """States in which one direction of many says something of the answer, and most say nothing."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, 12, generator=generator)
    right = states[:, 0] + 1.5 * torch.randn(rows, generator=generator) > 0
    return states, right.int().tolist()


def test_separable_states_are_told_apart() -> None:
    centres = torch.eye(3, 8) * 6
    states: dict[str, Tensor] = {}
    right: dict[str, list[int]] = {}
    for seed, name in enumerate(("train", "validation", "chosen")):
        generator = torch.Generator().manual_seed(seed)
        answers = torch.randint(3, (30,), generator=generator)
        states[name] = centres[answers] + 0.3 * torch.randn(30, 8, generator=generator)
        right[name] = answers.tolist()
    assert set(right["train"]) == {0, 1, 2}
    assert fit_probe(states, {name: right[name] for name in ("train", "validation")}) == right["chosen"]


def test_the_penalty_is_the_one_that_validation_likes_best() -> None:
    """Validation rows whose right answers are one penalty's answers choose that penalty."""
    train, right = _noisy(0, 30)
    validation, chosen = _noisy(1, 200)[0], _noisy(2, 200)[0]
    scaler = StandardScaler().fit(train.double().numpy())
    answers: dict[float, list[list[int]]] = {}
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty).fit(scaler.transform(train.double().numpy()), right)
        parts = [scaler.transform(part.double().numpy()) for part in (validation, chosen)]
        answers[penalty] = [model.predict(part).tolist() for part in parts]
    assert len({tuple(found) for _, found in answers.values()}) == len(PENALTIES)  # the choice matters
    states = {"train": train, "validation": validation, "chosen": chosen}
    for liked, wanted in answers.values():
        assert fit_probe(states, {"train": right, "validation": liked}) == wanted


def test_of_equals_the_strongest_penalty_is_taken() -> None:
    train, right = _noisy(0, 30)
    chosen = _noisy(2, 200)[0]
    sure = torch.zeros(2, 12)
    sure[:, 0] = torch.tensor([-30.0, 30.0])  # any penalty gets these right
    found = fit_probe({"train": train, "validation": sure, "chosen": chosen}, {"train": right, "validation": [0, 1]})
    scaler = StandardScaler().fit(train.double().numpy())
    strongest = LogisticRegression(C=min(PENALTIES)).fit(scaler.transform(train.double().numpy()), right)
    assert found == strongest.predict(scaler.transform(chosen.double().numpy())).tolist()


def test_neither_units_nor_the_other_rows_change_an_answer() -> None:
    train, right = _noisy(0, 60)
    (validation, liked), (chosen, _) = _noisy(1, 60), _noisy(2, 60)
    states = {"train": train, "validation": validation, "chosen": chosen}
    answers = {"train": right, "validation": liked}
    found = fit_probe(states, answers)
    assert 0 < sum(found) < 60
    scale, shift = 10.0 ** torch.linspace(-3, 3, 12), torch.linspace(-5, 5, 12)
    assert fit_probe({n: t.double() * scale + shift for n, t in states.items()}, answers) == found
    assert fit_probe({**states, "chosen": chosen[:1]}, answers) == found[:1]


# rows with options of their own


def _own_options(seed: int, rows: int) -> tuple[list[Tensor], list[set[int]]]:
    """Two to four options a row, around a point of the row's own; the right ones are far along one direction."""
    generator = torch.Generator().manual_seed(seed)
    states: list[Tensor] = []
    right: list[set[int]] = []
    for i in range(rows):
        own = torch.randn(2 + i % 3, 8, generator=generator) + 0.5 * torch.randn(8, generator=generator)
        rights = {i % 2} if i % 5 else {0, 1}
        for k in rights:
            own[k, 3] += 6
        states.append(own)
        right.append(rights)
    return states, right


def test_an_option_is_chosen_by_its_own_state() -> None:
    parts = {name: _own_options(seed, 60) for seed, name in enumerate(("train", "validation", "chosen"))}
    states = {name: own for name, (own, _) in parts.items()}
    known = {name: parts[name][1] for name in ("train", "validation")}
    found = fit_option_probe(states, known)
    assert sum(choice in rights for choice, rights in zip(found, parts["chosen"][1], strict=True)) > 55
    turned = {**states, "chosen": [own.flip(0) for own in states["chosen"]]}
    again = fit_option_probe(turned, known)
    assert [len(own) - 1 - choice for own, choice in zip(states["chosen"], again, strict=True)] == found
    nothing: list[set[int]] = [set() for _ in known["train"]]
    assert set(fit_option_probe(states, {**known, "train": nothing})) == {0}


def test_the_penalty_of_options_is_the_one_that_validation_likes_best() -> None:
    generator = torch.Generator().manual_seed(0)
    states = {name: [torch.randn(3, 12, generator=generator) for _ in range(40)] for name in ("train", "validation")}
    right = [{i % 3} for i in range(40)]
    train = torch.cat(states["train"]).double().numpy()
    scaler = StandardScaler().fit(train)
    verdicts = [int(k in rights) for rights in right for k in range(3)]
    answers: dict[float, list[int]] = {}
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=2000).fit(scaler.transform(train), verdicts)
        rows = [scaler.transform(own.double().numpy()) for own in states["validation"]]
        answers[penalty] = [int(model.decision_function(row).argmax()) for row in rows]
    assert len({tuple(found) for found in answers.values()}) > 1  # the choice matters
    for wanted in answers.values():
        liked = {"train": right, "validation": [{choice} for choice in wanted]}
        assert fit_option_probe({**states, "chosen": states["validation"]}, liked) == wanted
