"""What bash offers where a command line is typed, by the protocol of its completion."""

import time
from collections.abc import Callable

import pytest

from plugbridge.cli import main

Offers = Callable[[str], list[str]]


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Offers:
    """What is offered for the last word of a line, which bash has parted at blanks and equals signs."""

    def ask(line: str) -> list[str]:
        words = line.replace("=", " = ").split(" ")
        words = [word for number, word in enumerate(words) if word or number == len(words) - 1]
        monkeypatch.setattr("sys.argv", ["plugbridge"])
        monkeypatch.setenv("_PLUGBRIDGE_COMPLETE", "complete_bash")
        monkeypatch.setenv("_PLUGBRIDGE_COMPLETE_KEY", "")
        monkeypatch.setenv("COMP_WORDS", "\n".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 0
        return capfd.readouterr().out.split()

    return ask


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("plugbridge re", ["repair", "report", "reproduce"]),
        ("plugbridge bench ", ["quality", "frontier", "memory"]),
        ("plugbridge run --r", ["--redo"]),
        ("plugbridge run x.yaml --q", ["--quiet"]),
        ("plugbridge reproduce table", [f"table{number}" for number in range(1, 9)]),
        ("plugbridge reproduce table1 --mode lad", ["ladder", "ladder_delta"]),
        ("plugbridge reproduce table1 --task wordnet-kind", ["wordnet-kind", "wordnet-kind-moved"]),
        ("plugbridge bench memory --shapes t5", ["t5-3b", "t5-11b"]),
        ("plugbridge sweep x.yaml --by large_t", ["large_tuned"]),
        ("plugbridge submit run --model small_z", ["small_zero_shot"]),
        ("plugbridge run x.yaml --set method", ["method.name=", "method.rank=", "method.alpha=", "method.dropout="]),
        ("plugbridge run x.yaml --set method.name=", ["lora", "adapter", "prefix"]),
        ("plugbridge run x.yaml --set couple.mode=st", ["standalone"]),
        ("plugbridge run x.yaml --set task=wordnet-kind-", ["wordnet-kind-moved"]),
        ("plugbridge sweep x.yaml --vary dtype=", ["float32", "bfloat16"]),
        ("plugbridge run x.yaml --set evaluate.probe=t", ["true"]),
        ("plugbridge run x.yaml --set seed=1 --set prune.ch", ["prune.channels="]),
        ("plugbridge run x.yaml --set seed=1 --set prune.channels=gr", ["gradient_pca"]),
        ("plugbridge run x.yaml --set seed=", []),
        ("plugbridge run x.yaml --set nothing=", []),
    ],
)
def test_it_offers_what_can_stand_there(offers: Offers, line: str, wanted: list[str]) -> None:
    assert offers(line) == wanted


def test_it_offers_every_command_at_once(offers: Offers) -> None:
    offers("plugbridge ")
    begun = time.process_time()
    found = offers("plugbridge ")
    assert {"run", "plan", "bench", "families", "tasks", "methods"} <= set(found)
    assert time.process_time() - begun < 1


def test_other_shells_part_nothing(offers: Offers, monkeypatch: pytest.MonkeyPatch) -> None:
    from plugbridge.cli.completion import settings

    monkeypatch.delenv("_PLUGBRIDGE_COMPLETE_KEY", raising=False)
    assert settings("couple.mode=fe") == ["couple.mode=feedback"]
    assert settings("couple.mode") == ["couple.mode="]
