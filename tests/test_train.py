"""The training loop: every row once an epoch, the schedule's numbers, exact resume, no step past a bad loss."""

import math
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.optimization import Adafactor

from plugbridge.config.stages import OptimizerName
from plugbridge.errors import ModelError, TrainingDiverged
from plugbridge.interrupts import raise_stopped
from plugbridge.progress import Silent
from plugbridge.train import Schedule, _seal, batch_indices, fit, make_optimizer, rate_factor, rate_of

SCHEDULE = Schedule(
    steps=7, batch_size=4, learning_rates={"": 0.05, "wide/": 0.2}, warmup=0.3, weight_decay=0.01, clip=0.5,
    checkpoint_every=2, seed=3,
)  # fmt: skip
ROWS = [float(i) / 5 - 1 for i in range(10)]


class Killed(BaseException):
    """Stands for a process that ends."""


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "wide/a": torch.randn(3, generator=generator).requires_grad_(),
        "b": torch.randn(2, 3, generator=generator).requires_grad_(),
    }


def loss_of(p: dict[str, Tensor], stop: int | None = None) -> Callable[[list[float]], Tensor]:
    """A loss with noise (as dropout has); ends the process at its `stop`-th step."""
    calls = 0

    def loss(rows: list[float]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Killed
        noise = 1 + 0.3 * torch.randn(3)
        x = torch.tensor(rows)
        return ((x[:, None] * p["wide/a"] * noise + p["b"].sum(0) - 2 * x[:, None]) ** 2).mean()

    return loss


def train(p: dict[str, Tensor], folder: Path, loss: Callable[[list[float]], Tensor], **changes: Any) -> list[float]:
    return fit(p, ROWS, loss, replace(SCHEDULE, **changes), folder / "checkpoint.pt", Silent(), "toy")


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 7), (5, 3), (3, 8), (1, 2)])
def test_every_row_comes_once_an_epoch(count: int, batch: int) -> None:
    epochs = 6
    steps = epochs * count // math.gcd(count, batch)
    seen = [i for step in range(steps) for i in batch_indices(count, step, batch, seed=0)]
    chunks = [seen[i : i + count] for i in range(0, len(seen) - count + 1, count)]
    assert all(sorted(chunk) == list(range(count)) for chunk in chunks)
    assert Counter(map(len, (batch_indices(count, step, batch, 0) for step in range(5)))) == {batch: 5}
    if count > 4:
        assert chunks[0] != chunks[1]  # every epoch is shuffled anew
        assert batch_indices(count, 0, count, 0) != batch_indices(count, 0, count, 1)


def test_the_rate_rises_and_falls_as_written() -> None:
    schedule = replace(SCHEDULE, steps=10, warmup=0.2)
    found = [rate_factor(step, schedule) for step in range(10)]
    assert found[:3] == [0.5, 1.0, 1.0]
    assert found[6] == pytest.approx(0.5)  # half-way down the cosine
    assert found[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert found[2:] == sorted(found[2:], reverse=True)
    assert rate_factor(0, replace(SCHEDULE, warmup=0.0)) == 1.0
    assert rate_factor(0, replace(SCHEDULE, steps=1)) == 1.0


def test_the_longest_prefix_gives_the_rate() -> None:
    rates = {"": 1.0, "plug/": 2.0, "plug/decoder": 3.0}
    assert [rate_of(name, rates) for name in ("module/x", "plug/x", "plug/decoder:x")] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_fit_is_the_optimizer_with_clipping(tmp_path: Path, name: OptimizerName) -> None:
    ours, theirs = parameters(), parameters()
    losses = train(ours, tmp_path, loss_of(ours), optimizer=name)
    groups = [{"params": [theirs["wide/a"]], "lr": 0.2}, {"params": [theirs["b"]], "lr": 0.05}]
    optimizer = (
        torch.optim.AdamW(groups, weight_decay=0.01)
        if name == "adamw"
        else Adafactor(groups, weight_decay=0.01, relative_step=False, scale_parameter=False)
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, SCHEDULE))
    loss, expected = loss_of(theirs), []
    for step in range(SCHEDULE.steps):
        torch.manual_seed(SCHEDULE.seed * 1_000_003 + step)
        value = loss([ROWS[i] for i in batch_indices(len(ROWS), step, 4, SCHEDULE.seed)])
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(theirs.values(), SCHEDULE.clip)
        optimizer.step()
        scheduler.step()
        expected.append(float(value.detach()))
    assert losses == pytest.approx(expected)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("kills", [(1,), (2,), (3,), (4,), (5,), (6,), (7,), (4, 2, 1)])
def test_a_killed_training_resumes_bit_for_bit(tmp_path: Path, kills: tuple[int, ...], name: OptimizerName) -> None:
    whole, resumed = parameters(), parameters()
    expected = train(whole, tmp_path / "whole", loss_of(whole), optimizer=name)
    for kill in kills:
        with pytest.raises(Killed):
            train(resumed, tmp_path / "killed", loss_of(resumed, stop=kill), optimizer=name)
        resumed = parameters()  # a new process starts from the first values
        torch.manual_seed(kill)
    assert train(resumed, tmp_path / "killed", loss_of(resumed), optimizer=name) == expected
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name])


def test_adafactor_keeps_a_row_and_a_column_of_a_matrix() -> None:
    kept: dict[OptimizerName, int] = {}
    names: tuple[OptimizerName, ...] = ("adamw", "adafactor")
    for name in names:
        matrix = torch.randn(30, 50).requires_grad_()
        optimizer = make_optimizer(name, [{"params": [matrix], "lr": 0.1}], 0.0)
        matrix.square().sum().backward()
        optimizer.step()
        state = optimizer.state[matrix].values()
        kept[name] = sum(value.numel() for value in state if isinstance(value, Tensor) and value.dim() > 0)
    assert kept == {"adamw": 2 * 30 * 50, "adafactor": 30 + 50}


def test_resume_does_only_the_steps_that_are_left(tmp_path: Path) -> None:
    first = parameters()
    with pytest.raises(Killed):
        train(first, tmp_path, loss_of(first, stop=6))
    second = parameters()
    with pytest.raises(Killed):  # four of seven steps were in the checkpoint: this is the last
        train(second, tmp_path, loss_of(second, stop=3))
    third = parameters()
    assert len(train(third, tmp_path, loss_of(third, stop=2))) == 7  # now one was left


def test_the_last_step_is_kept_until_its_result_is(tmp_path: Path) -> None:
    first, second = parameters(), parameters()
    losses = train(first, tmp_path, loss_of(first), checkpoint_every=100)
    assert train(second, tmp_path, loss_of(second, stop=1), checkpoint_every=100) == losses
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    train(second, tmp_path, loss_of(second, stop=1))
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before  # nothing was done, nothing is written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", ["step", "update"])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_an_interrupt_keeps_the_step_it_is_at(
    tmp_path: Path, number: signal.Signals, where: str, name: OptimizerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, changes = signal.signal(signal.SIGTERM, raise_stopped), {"checkpoint_every": 100, "optimizer": name}
    hup = signal.signal(signal.SIGHUP, raise_stopped)
    whole = parameters()
    losses = train(whole, tmp_path / "whole", loss_of(whole), **changes)
    p = parameters()
    kill = signalling(number, 4)
    with monkeypatch.context() as patch:
        loss = loss_of(p)
        if where == "step":
            noisy, loss = loss, lambda rows: kill() or noisy(rows)
        else:
            patch.setattr("plugbridge.train.make_optimizer", lambda *args: killing_optimizer(kill, *args))
        with pytest.raises(KeyboardInterrupt):
            train(p, tmp_path, loss, **changes)
    p = parameters()
    said: list[str] = []
    monkeypatch.setattr("plugbridge.train.log.info", lambda text, *args: said.append(text % args))
    assert train(p, tmp_path, loss_of(p), **changes) == losses
    assert said[0].startswith(f"resuming at step {3 if where == 'step' else 4}")  # an update in progress is ended
    assert all(torch.equal(p[key], whole[key]) for key in whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGHUP, hup)


def signalling(number: signal.Signals, call: int) -> Callable[[], None]:
    """What sends this process a signal when it is called so often."""
    calls = iter(range(1, 100))
    return lambda: os.kill(os.getpid(), number) if next(calls) == call else None


def killing_optimizer(kill: Callable[[], None], *args: Any) -> torch.optim.Optimizer:
    """An optimizer that is signalled when the first tensor of an update has its new value."""
    optimizer = make_optimizer(*args)
    step = optimizer.step

    def update() -> None:
        step()
        kill()

    optimizer.step = update
    return optimizer


def test_a_second_interrupt_of_a_kind_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for an update that would be half, nor for the checkpoint."""
    p = parameters()
    begun: list[int] = []

    def impatient() -> None:
        begun.append(1)
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("plugbridge.train.make_optimizer", lambda *args: killing_optimizer(impatient, *args))
        with pytest.raises(KeyboardInterrupt):
            train(p, tmp_path, loss_of(p))
    losses = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]
    assert len(losses) == 2  # the one from before: half an update is none
    q = parameters()
    whole = parameters()
    assert train(q, tmp_path, loss_of(q)) == train(whole, tmp_path / "whole", loss_of(whole))


def test_an_interrupt_of_another_kind_leaves_time_for_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is interrupted sends SIGTERM to the process of its stage, which has seen Ctrl-C as well."""
    p, save = parameters(), torch.save

    def slow(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args)

    monkeypatch.setattr("plugbridge.train.torch.save", slow)
    kill, loss = signalling(signal.SIGINT, 2), loss_of(p)
    with pytest.raises(KeyboardInterrupt):
        train(p, tmp_path, lambda rows: kill() or loss(rows), checkpoint_every=100)
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]) == 1


@pytest.mark.parametrize("damage", ["zeroed", "shape", "names", "losses", "optimizer", "no seal", "text"])
def test_a_checkpoint_of_something_else_is_named(tmp_path: Path, damage: str) -> None:
    p, path = parameters(), tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        train(p, tmp_path, loss_of(p, stop=4))
    if damage == "zeroed":
        content = bytearray(path.read_bytes())
        kept = torch.load(path, weights_only=True)["parameters"]["wide/a"]
        at = content.index(kept.detach().numpy().tobytes())
        content[at : at + 4] = bytes(4)
        path.write_bytes(bytes(content))
    else:
        state = torch.load(path, weights_only=True)
        seal = state.pop("seal")
        spoiled: dict[str, Any] = {
            "shape": {"parameters": {**state["parameters"], "b": torch.zeros(1)}},
            "names": {"parameters": {"b": state["parameters"]["b"]}},
            "losses": {"losses": None},
            "optimizer": {"optimizer": {"state": {}, "param_groups": []}},
        }
        state |= spoiled.get(damage, {})
        found = {**state, "seal": _seal(state) if damage != "no seal" else seal[:-1]}
        torch.save("checkpoint" if damage == "text" else found, path)
    with pytest.raises(ModelError, match="is damaged or of another training; delete it"):
        train(parameters(), tmp_path, loss_of(p))


def test_no_gradient_stays(tmp_path: Path) -> None:
    p = parameters()
    train(p, tmp_path, loss_of(p))
    assert [tensor.grad for tensor in p.values()] == [None, None]


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    p = parameters()
    with pytest.raises(ModelError, match=r"checkpoint.pt is damaged or of another training; delete it to start"):
        train(p, tmp_path, loss_of(p))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda p: p["b"].sum() * torch.nan, "toy: the loss is nan at step 3 of 7; try a learning rate below 0.2"),
        (lambda p: p["b"].sum() * torch.inf, "toy: the loss is .*inf at step 3 of 7"),
        (lambda p: (p["b"] - p["b"].detach()).sqrt().sum(), "toy: the gradient's norm is .* at step 3 of 7"),
    ],
)
def test_a_bad_loss_changes_nothing(tmp_path: Path, bad: Callable[[dict[str, Tensor]], Tensor], message: str) -> None:
    p = parameters()
    good, calls, before = loss_of(p), 0, dict[str, Tensor]()

    def loss(rows: list[float]) -> Tensor:
        nonlocal calls
        calls += 1
        before.update({name: tensor.detach().clone() for name, tensor in p.items()})
        return bad(p) if calls == 3 else good(rows)

    with pytest.raises(TrainingDiverged, match=message):
        train(p, tmp_path, loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in p.items())
    assert calls == 3


def test_a_last_update_that_overflows_is_no_result(tmp_path: Path) -> None:
    p = {"a": torch.full((2,), -3.3e38).requires_grad_()}
    rates = {"steps": 1, "learning_rates": {"": 3e37}, "weight_decay": 0.0}
    with pytest.raises(
        TrainingDiverged, match=r"toy: 'a' is NaN or infinite after the last step; try a learning rate below 3e\+37$"
    ):
        train(p, tmp_path, lambda _rows: (p["a"] - p["a"].detach()).sum(), **rates)


def test_a_first_loss_is_not_the_rates_fault(tmp_path: Path) -> None:
    p = parameters()
    with pytest.raises(TrainingDiverged, match=r"loss is nan at step 1 of 7, before anything was learned$") as e:
        train(p, tmp_path, lambda _rows: p["b"].sum() * torch.nan)
    assert not e.value.learned


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_a_step_in_parts_is_the_whole_step(tmp_path: Path, size: int) -> None:
    found: list[tuple[list[float], dict[str, Tensor]]] = []
    for micro_batch in (None, size):
        p = parameters()

        def loss(rows: list[float], p: dict[str, Tensor] = p) -> Tensor:
            weights = torch.tensor([weight_of(row) for row in rows])
            x = torch.tensor(rows)
            return ((x[:, None] * p["wide/a"] + p["b"].sum(0)).square().mean(1) * weights).sum() / weights.sum()

        folder = tmp_path / str(micro_batch)
        schedule = replace(SCHEDULE, micro_batch=micro_batch)
        found.append((fit(p, ROWS, loss, schedule, folder / "checkpoint.pt", Silent(), "toy", weight_of), p))
    (losses, wanted), (in_parts, p) = found
    assert in_parts == pytest.approx(losses, rel=1e-5)
    assert all(torch.allclose(p[name], wanted[name], atol=1e-5) for name in wanted)


def weight_of(row: float) -> int:
    """A row's weight in its batch."""
    return 1 + int(row > 0)
