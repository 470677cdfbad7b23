"""Finished runs as one JSON object, a table and a picture."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from plugbridge.config.stages import MADE_BY, TRANSFER
from plugbridge.errors import RunError
from plugbridge.files import write_atomically
from plugbridge.markers import RUN, is_as_left, read_marker, read_started, reading
from plugbridge.parsing import read_json
from plugbridge.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

TITLES = {
    "small_zero_shot": "small, zero-shot",
    "small_probe": "small, linear probe",
    "small_tuned": "small, tuned",
    "small_finetuned": "small, all weights tuned",
    "small_ladder": "small with a side network",
    "large_zero_shot": "large, zero-shot",
    "large_probe": "large, linear probe",
    "large_proxy": "large, proxy-tuned",
    "bridge_coupled": "Bridge (thrown away)",
    "large_plugged": "large, plugged",
    "large_tuned": "large, tuned (ceiling)",
    "large_finetuned": "large, all weights tuned",
    "large_ladder": "large with a side network",
}
BASELINES = ("small_finetuned", "small_ladder", "large_finetuned", "large_ladder")


@dataclass(frozen=True)
class _Markers:
    stages: dict[str, dict[str, Any]]

    def facts(self, name: str) -> dict[str, Any]:
        return self.stages[name]["facts"]

    def depends(self, name: str) -> dict[str, Any]:
        return self.stages[name]["depends"]

    @property
    def method(self) -> dict[str, Any] | None:
        """The method's settings; None where no stage used one."""
        names = ("tune", "couple", "ceiling")
        return next((self.depends(name)["method"] for name in names if name in self.stages), None)

    def cost(self, names: tuple[str, ...]) -> tuple[float, int]:
        found = [self.stages[name] for name in names]
        return sum(s["seconds"] for s in found), max(s["peak_bytes"] for s in found)


def read_report(root: Path) -> dict[str, Any]:
    """One JSON object for a finished run.

    `rows`: name, metric, value, n, seconds and peak_bytes of making the model (training stages),
    evaluate_seconds, parameters {trainable, changed, rank, size}: `rank` is what a weight's change has at most (0 of a
    model that is as it was, null where nothing bounds it), `size` the method's own setting (LoRA's rank, an adapter's
    bottleneck, a prefix's tokens; 0 where no module was added). `peak` {stage, bytes, memory, reserved_bytes} is the
    whole job's, `coupling` {large_rows, cache, cache_bytes, fidelity, still} what the large model read, what of it
    was kept, how well errors pointed (`transfer.fidelity`), empty where that was not measured, and the stacks and
    layers whose modules stayed as they started since it was not above 0.
    `cut` {small, large: {split: {rows, cut, emptied}}} counts the rows whose passage lost its end, or all of it.
    `remarks` is what else was said of the rows: how many ask the same in two splits, and the like, a line each.
    `majority` has the metrics of the `commonest` answer given to every row: of a class, or of a text that models write.
    Also `pgr` (performance gap recovered: (plugged - small) / (ceiling - small), null without a ceiling or a
    gap beyond chance; `pgr_reason` then says why), `stages`, `models`, `versions`, `seed`. What the run did not do,
    because `evaluate.models` needs none of it, is null. What was done is read from the stages' markers, not from the
    run's config, which may be newer. Raises RunError if the run is not finished.
    """
    if not (root / RUN).is_file() and not _is_old_run(root):
        raise RunError(f"{root} is not a run; expected a directory made by `plugbridge run`")
    evaluated = _marker(root, "evaluate")
    needs = {*evaluated["needs"], *(["score"] if "prune" in evaluated["needs"] else [])}
    names = [name for name in (*TRANSFER, "ceiling", *BASELINES) if name in needs]
    markers = {**{name: _marker(root, name) for name in names}, "evaluate": evaluated}
    for name, marker in markers.items():
        for need, digest in marker["needs"].items():
            if need not in markers or markers[need]["digest"] != digest:
                raise RunError(f"stage '{name}' of {root} is older than '{need}'; finish with `plugbridge run`")
    with reading(root, "finish it with `plugbridge run`"):
        return _assemble(root, _Markers(markers))


def _is_old_run(root: Path) -> bool:
    """Whether a folder has what runs had before there was a ``run.json``: a config, and stages with our markers."""
    folders = [root / name for name in (*TRANSFER, "ceiling", *BASELINES, "evaluate")]
    return (root / "config.yaml").is_file() and any(read_marker(path) or read_started(path) for path in folders)


def _marker(root: Path, name: str) -> dict[str, Any]:
    marker = read_marker(root / name)
    if marker is None:
        raise RunError(f"stage '{name}' of {root} is not done; finish with `plugbridge run`")
    return marker


def _assemble(root: Path, markers: _Markers) -> dict[str, Any]:
    facts = markers.facts("evaluate")
    parameters, made_by = _counts(markers), _makers(markers)
    rows: list[dict[str, Any]] = []
    values: dict[str, float] = {}
    for name, counts in parameters.items():
        if name not in facts:  # the feedback mode's Bridge is no model by itself
            continue
        found = facts[name]
        metrics = _ordered(markers, found)
        metric = next(iter(metrics))
        values[name] = metrics[metric]
        stages = made_by.get(name, ())
        seconds, peak = markers.cost(stages) if stages else (0.0, found["peak_bytes"])
        rows.append(
            {
                "name": name,
                "metric": metric,
                "value": metrics[metric],
                "metrics": metrics,
                "n": found["n"],
                "seconds": seconds,
                "peak_bytes": peak,
                "evaluate_seconds": found["seconds"],
                "parameters": counts,
            }
        )
    if not rows:
        raise RunError(f"{root} has scored none of {', '.join(parameters)}; name one in evaluate.models and run again")
    coupled = "couple" in markers.stages
    method = markers.method
    return {
        "task": markers.depends("evaluate")["task"]["spec"]["name"],
        "split": markers.depends("evaluate")["evaluate"]["split"],
        "method": None if method is None else method["name"],
        "mode": markers.depends("couple")["couple"]["mode"] if coupled else None,
        "coupling": {
            "large_rows": markers.facts("couple")["large_rows"],
            "cache": markers.depends("couple")["couple"]["cache"],
            "cache_bytes": markers.facts("couple")["cache_bytes"],
            "fidelity": markers.facts("couple").get("fidelity", []),  # absent from older runs, as the next
            "still": markers.facts("couple").get("still", []),
        }
        if coupled
        else None,
        "rows": rows,
        "cut": facts.get("cut", {}),  # absent from older runs
        "remarks": facts.get("remarks", []),  # so are these
        "majority": _ordered(markers, facts["majority"]),
        "commonest": _commonest(root, [row["name"] for row in rows]),
        "pgr": recovered(values, rows[0]["n"], rows[0]["metric"]),
        "pgr_reason": why_not_recovered(
            values, rows[0]["n"], rows[0]["metric"], bool(markers.depends("evaluate")["evaluate"].get("models"))
        ),
        "stages": [
            {
                "name": name,
                "seconds": m["seconds"],
                "peak_bytes": m["peak_bytes"],
                "reserved_bytes": m.get("reserved_bytes", 0),  # absent from older runs
            }
            for name, m in markers.stages.items()
        ],
        "peak": _peak(markers),
        "models": {
            "small": _model(markers, "small") | {"commit": _commit(markers, "small")},
            "large": _model(markers, "large")
            | {"load_in": markers.depends("evaluate").get("load_in"), "commit": _commit(markers, "large")},
            "bridge": {
                "parameters": markers.facts("prune")["bridge_parameters"],
                "share": markers.facts("prune")["bridge_share"],
                "bits": markers.facts("prune").get("bits", 16),  # absent from older runs
                "bytes_share": markers.facts("prune").get("bridge_bytes_share"),
                "sizes": markers.facts("prune")["sizes"],
            }
            if "prune" in markers.stages
            else None,
        },
        "checkpoint": str(root / "plug" / "checkpoint") if "plug" in markers.stages else None,
        "versions": _versions(markers),
        "seed": markers.depends("evaluate")["seed"],
    }


def _commonest(root: Path, names: Sequence[str]) -> str:
    """What the commonest answer is: a ``class``, or a ``text`` where models write their answers."""
    first = root / "evaluate" / "predictions" / f"{names[0]}.jsonl"
    line = first.read_text(encoding="utf-8").partition("\n")[0] if first.is_file() else ""
    found: Any = json.loads(line) if line else {}
    return "text" if "accepted" in found and not found.keys() & {"scores", "written"} else "class"


def _versions(markers: _Markers) -> dict[str, str]:
    """The libraries that made the run, by stage markers; both versions where stages were done by two."""
    found: dict[str, dict[str, None]] = {}
    for marker in markers.stages.values():
        for name, version in marker.get("versions", {}).items():  # absent from older runs
            found.setdefault(name, {})[str(version)] = None
    return {name: ", ".join(some) for name, some in found.items()}


def _model(markers: _Markers, size: str) -> dict[str, Any]:
    """Where a model was and its parameters; in earlier versions the stages that made something of it told."""
    if "models" in markers.facts("evaluate"):
        return dict(markers.facts("evaluate")["models"][size])
    if size == "small":
        return {"source": markers.facts("tune")["source"], "parameters": markers.facts("tune")["model_parameters"]}
    return {"source": markers.depends("plug")["source"], "parameters": markers.facts("prune")["large_parameters"]}


def _commit(markers: _Markers, size: str) -> str | None:
    """The commit of a model from the hub; None of a directory."""
    return markers.depends("evaluate").get(size, {}).get("commit")


def _peak(markers: _Markers) -> dict[str, Any]:
    """The stage of the method that took the most memory, importance and evaluation included; references are not."""
    own = {name: marker for name, marker in markers.stages.items() if name in (*TRANSFER, "evaluate")}
    stage = max(own, key=lambda name: own[name]["peak_bytes"])
    kind = "device" if str(markers.depends(stage)["device"]).startswith("cuda") else "resident"
    reserved = max(marker.get("reserved_bytes", 0) for marker in own.values())
    return {"stage": stage, "bytes": own[stage]["peak_bytes"], "memory": kind, "reserved_bytes": reserved}


def _counts(markers: _Markers) -> dict[str, dict[str, int | None]]:
    """Of each model: parameters that training touched and that the result adds or changes, the change's rank, the size.

    `rank` is what a weight's change has at most, None where no method bounds it.
    """
    method = markers.method
    size: int = 0 if method is None else method["rank"]
    rank = size if method is not None and method["name"] == "lora" else None

    def counts(trained: int, changed: int, rank: int | None, size: int) -> dict[str, int | None]:
        return {"trainable": trained, "changed": changed, "rank": rank, "size": size}

    none = counts(0, 0, 0, 0)
    found = {name: none for name, stages in MADE_BY.items() if not stages}
    if "tune" in markers.stages:
        small = markers.facts("tune")["trainable"]
        found["small_tuned"] = found["large_proxy"] = counts(small, small, rank, size)
    if "couple" in markers.stages:
        trained = markers.facts("couple")["trainable"]
        coupled = sum(trained.values())
        found["bridge_coupled"] = counts(coupled, coupled, None if trained["bridge"] else rank, size)
        if "plug" in markers.stages:
            found["large_plugged"] = counts(coupled, markers.facts("plug")["changed"], rank, size)
    if "ceiling" in markers.stages:
        trained = markers.facts("ceiling")["trainable"]
        found["large_tuned"] = counts(trained, trained, rank, size)
    for name in BASELINES:
        if name in markers.stages:
            trained = markers.facts(name)["trainable"]
            found[name] = counts(trained, trained, None, 0)
    return {name: found[name] for name in TITLES if name in found}


def _makers(markers: _Markers) -> dict[str, tuple[str, ...]]:
    """The stages that made each model, with what they needed; what has none here was not made, only scored."""
    return {name: _and_needed(markers, stages[-1:]) for name, stages in MADE_BY.items()}


def _and_needed(markers: _Markers, last: tuple[str, ...]) -> tuple[str, ...]:
    """A stage and all that it needed, as markers say it, in the order of stages; none where it was not done."""
    waiting, found = [name for name in last if name in markers.stages], set[str]()
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting += markers.stages[name]["needs"]
    return tuple(name for name in markers.stages if name in found)


def _ordered(markers: _Markers, found: dict[str, Any]) -> dict[str, float]:
    """A model's metrics in the task's order, the headline first; a marker keeps its keys sorted."""
    names = cast(list[str], markers.depends("evaluate")["task"]["spec"]["metrics"])
    return {name: found["metrics"][name] for name in names}


def recovered(values: dict[str, float], n: int, metric: str = "accuracy") -> float | None:
    """Performance gap recovered: (plugged - small) / (ceiling - small).

    None where one of the three was not scored, and where the gap is within 1.96 standard errors of zero
    (n rows, binomial, or a correlation's): a ratio to a gap that may not be there says nothing.
    """
    if not {"small_tuned", "large_plugged", "large_tuned"} <= values.keys():
        return None
    small, ceiling = values["small_tuned"], values["large_tuned"]
    spread = [(1 - v * v) ** 2 if metric == "matthews" else v * (1 - v) for v in (small, ceiling)]
    error = (sum(spread) / n) ** 0.5
    gap = ceiling - small
    return None if gap <= 1.959964 * error else (values["large_plugged"] - small) / gap


def how_made(report: dict[str, Any]) -> str:
    """The method, how it was coupled and the Bridge's size, as titles say it; nothing of what the run did not do."""
    bridge = report["models"]["bridge"]
    parts = (
        report["method"],
        None if report["mode"] is None else f"{report['mode']} coupling",
        None if bridge is None else bridge_said(bridge),
    )
    return ", ".join(part for part in parts if part is not None)


def bridge_said(bridge: Mapping[str, Any]) -> str:
    """How large a report's Bridge is: its share of the large model's parameters, or of its bytes where it is packed."""
    if bridge["bits"] == 16:
        return f"Bridge {100 * bridge['share']:.1f} % of large"
    return f"Bridge of {bridge['bits']} bits, {100 * bridge['bytes_share']:.1f} % of large's bytes"


def why_not_recovered(values: Mapping[str, float], n: int, metric: str, chosen: bool) -> str | None:
    """Why `recovered` gives nothing, in words; None where it gives a number.

    `chosen` is whether the run says which models to score.
    """
    if recovered(dict(values), n, metric) is not None:
        return None
    missing = [name for name in ("small_tuned", "large_plugged", "large_tuned") if name not in values]
    if missing and not chosen:
        return "no `ceiling:` section, so nothing says how far the large model can be tuned"
    if missing:
        return f"evaluate.models leaves out {', '.join(missing)}"
    gap = values["large_tuned"] - values["small_tuned"]
    if gap <= 0:
        return f"there is no gap: the ceiling is {-gap:.3f} below the tuned small model"
    return f"the gap of {gap:.3f} to the ceiling is no more than chance on {n:,} rows"


def draw(report: dict[str, Any], path: Path) -> None:
    """A bar for every model of the run, as a PNG, with Wilson 95 % intervals for accuracy."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    metric = telling(rows)
    values = [row["metrics"][metric] for row in rows]
    figure = Figure(figsize=(7.2, 0.55 * len(rows) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    colours = {"large_plugged": "#c1440e", "large_tuned": "#3b6ea5", "bridge_coupled": "#c9c9c9"}
    names = [TITLES[row["name"]] for row in rows]
    proportion = metric in PROPORTIONS
    spans = [wilson(v, row["n"]) if proportion else (v, v) for v, row in zip(values, rows, strict=True)]
    errors = [
        [max(0.0, v - low) for v, (low, _) in zip(values, spans, strict=True)],
        [max(0.0, high - v) for v, (_, high) in zip(values, spans, strict=True)],
    ]
    axes.barh(
        names, values, color=[colours.get(row["name"], "#8a8a8a") for row in rows],
        xerr=errors if proportion else None, error_kw={"lw": 1, "capsize": 3, "ecolor": "#222222"},
    )  # fmt: skip
    for i, (value, (_, high)) in enumerate(zip(values, spans, strict=True)):
        axes.text(max(high, 0.0) + 0.015, i, f"{value:.3f}", va="center", fontsize=9)
    chance = report["majority"].get(metric)
    if chance is not None:
        axes.axvline(chance, color="#222222", lw=1, ls=":", label=f"{commonest(report)} {chance:.3f}")
        figure.legend(loc="outside lower right", fontsize=8, frameon=False)
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, *values) * 1.05, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    zero = "" if metric == rows[0]["metric"] else f"; {rows[0]['metric']} is 0 for every model"
    axes.set_xlabel(f"{metric} on {rows[0]['n']} {report['split']} rows{zero}")
    axes.set_title(": ".join(filter(None, (report["task"], how_made(report)))), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)


def save_picture(figure: "Figure", path: Path) -> None:
    """Write a PNG that says that it is ours. Raises RunError where there is one that does not."""
    _check_picture(path)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": _SOFTWARE})


_SOFTWARE = f"plugbridge {__version__}"


def _check_picture(path: Path) -> None:
    """Refuse to draw over a picture that is not ours. Raises RunError."""
    if path.is_file():
        with path.open("rb") as file:
            if b"Software\0plugbridge" not in file.read(4096):
                raise RunError(f"{path} was not made by plugbridge, so it stays; move it away for the report's picture")


PROPORTIONS = ("accuracy", "exact_match")
"""Metrics that are a share of right answers, of which the interval is known."""


def commonest(report: Mapping[str, Any]) -> str:
    """What the metrics of the majority are of, in words."""
    return "commonest answer" if report.get("commonest") == "text" else "majority class"


def telling(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first metric that is not zero for every model; the headline where there is none."""
    metrics = list(rows[0].get("metrics", {rows[0]["metric"]: 0}))
    return next((name for name in metrics if any(row["metrics"][name] != 0 for row in rows)), rows[0]["metric"])


def draw_losses(root: Path, path: Path) -> bool:
    """A panel with the loss of every training of a run, as a PNG; whether there was any.

    Each step's loss, and over it the mean of the steps around it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = loss_curves(root)
    if not curves:
        return False
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 2.5 * lines + 0.3), layout="constrained")
    for number, (name, losses) in enumerate(curves.items()):
        axes = figure.add_subplot(lines, columns, number + 1)
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color="#c9c9c9", lw=0.8, marker="." if len(losses) < 20 else "")
        axes.plot(steps, smooth(losses), color="#c1440e", lw=1.6)
        axes.set_title(f"{name}: {losses[0]:.3g} to {losses[-1]:.3g}", fontsize=10, loc="left")
        axes.set_xlabel("evaluation" if name == "polish" else "step", fontsize=9)
        axes.set_ylabel("loss" if number % columns == 0 else "", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))  # there is no step 1.5
        axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)
    return True


def fidelity_said(found: Sequence[Mapping[str, Any]]) -> str:
    """How well the error through the Bridge pointed, at the start and the end, in a line."""
    first, last = found[0], found[-1]
    (start, none), (end, still) = ((_mean(each["bridge"]), _mean(each["none"])) for each in (first, last))
    return (
        f"error through the Bridge: cosine with the exact gradient {start:.2f} at step {first['step']}, "
        f"{end:.2f} at step {last['step']} (without a Bridge {none:.2f}, {still:.2f})"
    )


def _mean(cosines: Mapping[str, Sequence[float]]) -> float:
    values = [value for layers in cosines.values() for value in layers]
    return sum(values) / len(values)


def draw_fidelity(report: dict[str, Any], path: Path) -> bool:
    """Cosines of the module's gradient with the exact one by layer, as a PNG; whether they were measured.

    A panel for every stack: through the Bridge and without it, before the first step and after the last.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found: list[dict[str, Any]] = (report["coupling"] or {}).get("fidelity", [])
    if not found:
        return False
    stacks = list(found[0]["bridge"])
    figure = Figure(figsize=(3.8 * len(stacks) + 0.4, 3.0), layout="constrained")
    for number, stack in enumerate(stacks):
        axes = figure.add_subplot(1, len(stacks), number + 1)
        for way, colour, name in (("bridge", "#c1440e", "through the Bridge"), ("none", "#7a7a7a", "no Bridge")):
            for each, style in ((found[0], "--"), (found[-1], "-")):
                values = each[way][stack]
                label = f"{name}, step {each['step']}"
                axes.plot(range(1, len(values) + 1), values, style, color=colour, marker="o", ms=3, lw=1.4, label=label)
        axes.set_title(stack, fontsize=10, loc="left")
        axes.set_xlabel("layer with a module, from the lowest", fontsize=9)
        axes.set_ylabel("cosine with the exact gradient" if number == 0 else "", fontsize=9)
        axes.set_ylim(min(0.0, *axes.get_ylim()), 1.05)
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if number == 0:
            axes.legend(fontsize=8, frameon=False)
    save_picture(figure, path)
    return True


DRAWN = 1e30
"""The largest loss that has a place in a picture: axes of still larger ones overflow."""


def loss_curves(root: Path) -> dict[str, list[float]]:
    """The losses of every training of a run by stage, in the order of the stages.

    Losses that were not finite, or as good as (beyond `DRAWN`), are left out.
    A stage's ``losses.json`` is what it left: one that was changed or cannot be read has no curve, which is said.
    """
    found: dict[str, list[float]] = {}
    for name in (*TRANSFER, "ceiling", *BASELINES):
        path = root / name / "losses.json"
        left = (read_marker(root / name) or {}).get("outputs", {}).get(path.name)
        if isinstance(left, str) and not is_as_left(path, left):  # older runs have sizes
            log.warning("%s has changed since it was written; it has no curve", path)
        elif path.is_file():
            try:
                raw = read_json(path, RunError)
            except RunError as error:
                log.warning("%s; it has no curve", error)
                continue
            numbers = [x for x in raw if isinstance(x, int | float)] if isinstance(raw, list) else []
            losses = [float(x) for x in numbers if abs(x) <= DRAWN]
            if losses:
                found[name] = losses
    return found


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of the losses around each: a tenth of them, fewer at the ends."""
    reach = max(1, len(losses) // 20)
    around = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
    return [sum(some) / len(some) for some in around]


def wilson(value: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * ((value * (1 - value) / n + z * z / (4 * n * n)) ** 0.5)
    return centre - half, centre + half
