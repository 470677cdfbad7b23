"""Which settings would make a run fit."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from plugbridge.config import RunConfig, plain_value
from plugbridge.errors import ConfigError, ModelError
from plugbridge.memory.packed import BITS
from plugbridge.memory.rates import Rates, seconds_of
from plugbridge.memory.rows import Row
from plugbridge.models import pick_device
from plugbridge.plan.predictions import Predictions
from plugbridge.plan.works import Subjects, Work, peak_of, references_of, streamable, subjects_of, works_of
from plugbridge.preflight import resolve
from plugbridge.quantised import check_blocks
from plugbridge.transfer.acting import runs_again
from plugbridge.transfer.couple import find_mode
from plugbridge.transfer.needed import stages_of

Settings = Mapping[str, Any]
"""Values by dotted key, as `--set` takes them."""


@dataclass(frozen=True)
class Advice:
    """`settings` (``key=value``) with which all our stages fit; or a stage that is `stuck` with all that were tried."""

    settings: tuple[str, ...]
    stuck: str | None = None


@dataclass(frozen=True)
class Faster:
    """`settings` with which coupling takes a `share` of the time and fits, too: its peak is then `peak_bytes`."""

    settings: tuple[str, ...]
    peak_bytes: int
    share: float


@dataclass(frozen=True)
class Change:
    """Settings that save memory, and how the names of the stages begin that they concern."""

    settings: Settings
    stages: tuple[str, ...]


MICRO_BATCH = {name: f"{name}.micro_batch" for name in ("tune", "couple")}
ADAFACTOR: Settings = {"couple.optimizer": "adafactor"}
CACHE: Settings = {"couple.cache": "disk"}
STREAMED: Settings = {"resident": "none"}
KEPT: Settings = {"couple.recompute": False}
ROUNDED: Settings = {"couple.kept_bits": 8}
READ_BRIDGE: Settings = {"couple.bridge_resident": False}
GAIN = 0.95
"""The largest share of the time that is worth the memory."""
FREEZE: Settings = {"couple.bridge": "freeze"}
REDUCTIONS = (8, 16, 32)
BUDGETS = (1 / 32, 1 / 64, 1 / 128, 1 / 256)
"""Shares of the large model's parameters that a Bridge may have; those too small for a model are left out."""
LARGE = ("score", "prune", "repair", "couple", "polish", "evaluate")
CHANGES: tuple[Change, ...] = (
    Change({"evaluate.batch_size": 1}, ("evaluate", "tune: validation")),
    Change({"polish.batch_size": 1}, ("polish",)),
    Change({MICRO_BATCH["tune"]: 1}, ("tune (",)),
    Change({MICRO_BATCH["couple"]: 1}, ("couple",)),
    Change(STREAMED, LARGE),
    Change({"score.keep": "disk"}, ("score",)),
    Change(CACHE, ("couple (",)),
    Change({"couple.recompute": True}, ("couple",)),
    Change(READ_BRIDGE, ("couple (",)),
    Change(ROUNDED, ("couple (",)),
    Change({"couple.activations": "bridge", "couple.kept_bits": None}, ("couple (",)),
    Change(ADAFACTOR, ("couple",)),
    Change({"score.importance": "activation", "prune.channels": "auto"}, ("score",)),
    Change({"score.importance": "magnitude", "prune.channels": "auto"}, ("score",)),
    Change({"dtype": "bfloat16"}, ("tune", *LARGE)),
    Change(FREEZE, ("couple (",)),
    Change({"large.load_in": "4bit"}, ("repair", "couple", "polish", "evaluate")),
    Change({"prune.bits": 2}, ("couple (",)),
    *(Change({"prune.reduction": r}, ("prune", "repair", "couple")) for r in REDUCTIONS),
    *(Change({"prune.budget": share}, ("prune", "repair", "couple")) for share in BUDGETS),
)
"""Those first that change no result or little, and of them those that take the least time."""
COUNTS = {
    MICRO_BATCH["tune"]: "tune.batch_size",
    MICRO_BATCH["couple"]: "couple.batch_size",
    "evaluate.batch_size": "evaluate.batch_size",
    "polish.batch_size": "polish.batch_size",
}
"""Rows at a time, of which more are faster, and the key that says how many there are without advice."""
AHEAD = 2
"""Changes of a stage that are predicted before it is known whether they are needed."""
FULL = 0.9
"""How much of the memory more rows at a time may fill: what a run takes is not known exactly."""


def advise(
    config: RunConfig, length: int, memory: int, tight: dict[str, int], predictions: Predictions | None = None
) -> Advice:
    """The first settings, each added to those before it that help, with which all our stages fit.

    `tight` are the peaks of the stages that do not fit. The search ends with the first stage that is left without a
    setting to try. Of rows at a time it says as many as fit, a power of two. A model that `resident: auto` streams in
    so much memory is told to be streamed, since a run may find more.
    """
    search = _Search(config, length, memory, tight, Predictions() if predictions is None else predictions)
    return search.run()


class _Search:
    def __init__(
        self, config: RunConfig, length: int, memory: int, tight: dict[str, int], predictions: Predictions
    ) -> None:
        self.asked, self.config = config, config
        self.length, self.memory = length, memory
        self.tight = dict(tight)
        self.predictions = predictions
        self.chosen: dict[str, Any] = {}
        self.met: dict[str, tuple[Subjects, list[Work]]] = {}
        if streams_here(config, length, memory):
            self._choose(changed(config, STREAMED), STREAMED, {})

    def run(self) -> Advice:
        while True:
            if (stuck := self._settle()) is not None:
                return Advice((), stuck)
            self._widen()
            peaks = self._all_peaks()
            over = {name: peak for name, peak in peaks.items() if peak > self.memory}
            if not over:
                said = {key: value for key, value in self.chosen.items() if value != _value(self.asked, key)}
                return Advice(tuple(written(*pair) for pair in said.items()))
            self.tight |= over  # what fitted until others were helped

    def _settle(self) -> str | None:
        """Choose settings until no stage is over; returns one that stays so."""
        self._expect()
        for number, change in enumerate(CHANGES):
            if not self._over():
                return None
            if (stuck := self._stuck(number)) is not None:
                return stuck
            tried, peaks = self._peaks(self._over(), change)
            if any(peak < 0.98 * self.tight[name] for name, peak in peaks.items()):
                self._choose(tried, change.settings, peaks)
        return next(iter(self._over()), None)

    def _all_peaks(self) -> dict[str, int]:
        """The peaks of all our stages as they are now."""
        _, works = self._met(self.config)
        traces = self.predictions.all([work.row for work in works])
        return {work.row.method: peak_of(work, found) for work, found in zip(works, traces, strict=True)}

    def _over(self) -> list[str]:
        return [name for name, peak in self.tight.items() if peak > self.memory]

    def _choose(self, tried: RunConfig, settings: Settings, peaks: Mapping[str, int]) -> None:
        self.config = tried
        self.tight |= peaks
        for key in settings:
            self.chosen.pop(key, None)  # what is said last of a key comes last
        self.chosen |= settings

    def _peaks(self, names: Collection[str], change: Change) -> tuple[RunConfig, dict[str, int]]:
        """A configuration with a change, and the peaks of those of the named stages that it may help."""
        tried, works = self._tried(self.config, names, change)
        return tried, {work.row.method: peak_of(work, self.predictions.of(work.row)) for work in works}

    def _expect(self) -> None:
        """Predict what the search asks for if a stage's first change helps too little, and its second is tried."""
        reached: dict[str, tuple[RunConfig, int]] = dict.fromkeys(self._over(), (self.config, 0))
        for _ in range(AHEAD):
            found: list[Row] = []
            for name, (config, number) in reached.items():
                for later in range(number, len(CHANGES)):
                    tried, works = self._tried(config, [name], CHANGES[later])
                    if works:
                        found.extend(work.row for work in works)
                        reached[name] = tried, later + 1
                        break
            self.predictions.expect(found)

    def _tried(self, config: RunConfig, names: Collection[str], change: Change) -> tuple[RunConfig, list[Work]]:
        """A configuration with a change, and those of the named stages that it may help; none if it cannot be."""
        helped = [name for name in names if _may_help(config, name, change)]
        if not helped:
            return config, []
        try:
            tried = changed(config, change.settings)
            subjects, works = self._met(tried)
            if tried.load_in is not None and self.asked.load_in is None:
                check_blocks("", *subjects.large.on_meta(), tried.load_in, pick_device(tried.device))
        except (ConfigError, ModelError):  # such as a Bridge too small for the model's heads
            return config, []
        if tried.load_in is not None and subjects.parameters * BITS[tried.load_in] / 8 > self.memory:
            return config, []  # the weights alone do not fit: nothing to trace
        return tried, [work for work in works if work.row.method in helped]

    def _met(self, config: RunConfig) -> tuple[Subjects, list[Work]]:
        """A configuration met with its models, and our stages, each found once. Raises ConfigError or ModelError."""
        key = config.model_dump_json()
        if key not in self.met:
            subjects = subjects_of(config, self.length, self.memory)
            self.met[key] = subjects, list(works_of(subjects))
        return self.met[key]

    def _stuck(self, number: int) -> str | None:
        """The first stage that neither this change nor a later one may help."""
        later = CHANGES[number:]
        return next((name for name in self._over() if not any(_may_help(self.config, name, c) for c in later)), None)

    def _widen(self) -> None:
        """Of rows at a time take as many as fit."""
        single = [
            change for change in CHANGES for key in change.settings if key in COUNTS and self.chosen.get(key) == 1
        ]
        for guess in [_counted(change, count) for change in single for count in (2, _value(self.asked, _key(change)))]:
            _, works = self._tried(self.config, self._concerned(guess), guess)
            self.predictions.expect([work.row for work in works])
        for change in single:
            for count in self._counts(change):
                guess = _counted(change, count)
                tried, peaks = self._peaks(self._concerned(guess), guess)
                if peaks and all(peak <= FULL * self.memory for peak in peaks.values()):
                    self._choose(tried, guess.settings, peaks)
                    break

    def _concerned(self, change: Change) -> list[str]:
        return [name for name in self.tight if name.startswith(change.stages)]

    def _counts(self, change: Change) -> Iterator[int | None]:
        """Rows at a time worth a trial, if what two take more than one is what each more takes: the most first."""
        key = _key(change)
        asked: int | None = _value(self.asked, key)
        most = asked or _value(self.asked, COUNTS[key])
        room, count = round(FULL * self.memory), most
        for name, peak in self._peaks(self._concerned(change), _counted(change, 2))[1].items():
            each = max(1, peak - self.tight[name])
            count = min(count, 1 + max(0, room - self.tight[name]) // each)
        if count == most:
            yield asked
        power = (min(count, most - 1)).bit_length() - 1
        yield from (2**exponent for exponent in range(power, 0, -1))


def _key(change: Change) -> str:
    """The one key that a change sets."""
    (key,) = change.settings
    return key


def _counted(change: Change, count: int | None) -> Change:
    """A change of rows at a time, to another count."""
    return Change({_key(change): count}, change.stages)


def left_out(
    config: RunConfig, advice: Advice | None, length: int, memory: int, predictions: Predictions
) -> tuple[str, ...]:
    """Settings that leave out the references that do not fit, with what is advised, and that do not score them."""
    works = list(references_of(subjects_of(_advised(config, advice), length, memory)))
    traces = predictions.all([work.row for work in works])
    over = [w.row.method.partition(":")[0] for w, t in zip(works, traces, strict=True) if peak_of(w, t) > memory]
    names = list(dict.fromkeys(over))
    found = [f"{name if name == 'ceiling' else f'baselines.{name}'}=null" for name in names]
    gone = {"large_tuned" if name == "ceiling" else name for name in names}
    models = config.evaluate.models
    if models is not None and gone & set(models):
        stay = [name for name in models if name not in gone]
        found.append(f"evaluate.models=[{', '.join(stay)}]" if stay else "evaluate.models=null")
    return tuple(found)


def faster(
    config: RunConfig, advice: Advice | None, length: int, memory: int, rates: Mapping[torch.dtype, Rates],
    predictions: Predictions,
) -> Faster | None:  # fmt: skip
    """What coupling gains from memory that is left, with what is advised; None where that is not enough or nothing."""
    if (
        "couple" not in stages_of(config)
        or not config.couple.recompute
        or (advice is not None and advice.stuck is not None)
    ):
        return None
    now = _advised(config, advice)
    if not runs_again(resolve(now)):
        return None
    both = [_coupling(one, length, memory) for one in (now, changed(now, KEPT))]
    if both[0].row.case.streamed and find_mode(now.couple.mode).runs_large:
        return None  # its blocks are gone when their gradients come
    traces = predictions.all([work.row for work in both])
    before, after = (seconds_of(trace, rates) for trace in traces)
    peak = peak_of(both[1], traces[1])
    if peak > FULL * memory or after >= GAIN * before:
        return None
    return Faster(tuple(written(*setting) for setting in KEPT.items()), peak, after / before)


def _coupling(config: RunConfig, length: int, memory: int) -> Work:
    works = works_of(subjects_of(config, length, memory))
    return next(work for work in works if work.row.method.startswith("couple ("))


def _advised(config: RunConfig, advice: Advice | None) -> RunConfig:
    """A configuration with the settings of an advice."""
    settings = dict(setting.split("=", 1) for setting in (advice.settings if advice is not None else ()))
    return changed(config, {key: plain_value(value) for key, value in settings.items()})


def streams_here(config: RunConfig, length: int, memory: int) -> bool:
    """Whether a model is streamed because this is all the memory there is."""
    by_itself = config.resident == "auto" and config.load_in is None
    return by_itself and subjects_of(config, length, memory).large.streamed


def _value(config: RunConfig, key: str) -> Any:
    if key == "large.load_in":
        return config.load_in
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


def written(key: str, value: object) -> str:
    """A setting as `--set` reads it."""
    plain = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    return f"{key}={plain}"


def _may_help(config: RunConfig, name: str, change: Change) -> bool:
    """Whether a change concerns a stage and changes anything; quantised weights do not stream."""
    if not name.startswith(change.stages):
        return False
    trains = find_mode(config.couple.mode).trains_bridge and config.couple.bridge == "train"
    if change.settings in (ADAFACTOR, FREEZE) and not trains:
        return False  # a module's moments are nothing to save
    if change.settings == CACHE and config.couple.cache != "memory":
        return False  # without a cache there is less still
    if change.settings == ROUNDED and resolve(config).couple.activations != "large":
        return False  # nothing is kept
    reduction = change.settings.get("prune.reduction")
    if reduction is not None and config.prune.reduction is not None and reduction <= config.prune.reduction:
        return False  # it would be larger, or the same
    if "large.load_in" in change.settings and not installed("bitsandbytes"):
        return False
    if change.settings == STREAMED and not streamable(config):
        return False
    if config.prune.budget is not None and change.settings.get("prune.budget", 0) >= config.prune.budget:
        return False  # it would be larger, or the same
    try:
        tried, now = resolve(changed(config, change.settings)), resolve(changed(config, {}))
    except ConfigError:  # such as a budget beside the reduction that is asked for
        return False
    return tried != now and (tried.resident != "none" or tried.load_in is None)


def installed(package: str) -> bool:
    """Whether there is a package, of which nothing is imported."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def changed(config: RunConfig, settings: Settings) -> RunConfig:
    """A configuration with some settings changed. Raises ConfigError where they do not go together."""
    raw = config.model_dump()
    if isinstance(raw["large"], str):
        raw["large"] = {"path": raw["large"]}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (raw if section == "" else raw[section])[name] = value
    try:
        return RunConfig.model_validate(raw)
    except ValueError as error:  # keys that were checked one by one
        raise ConfigError(f"{', '.join(settings)}: not usable together with this configuration") from error
