"""Tasks for a reader: one JSON object each, and the table of docs/tasks.md."""

from collections.abc import Mapping
from typing import Any

from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.spec import Task


def describe(task: Task) -> dict[str, Any]:
    """What there is to know of a task before it is run."""
    return {
        "name": task.name,
        "title": task.title,
        "source": task.source,
        "licence": task.licence,
        "shipped": task.shipped,
        "metrics": list(task.metrics),
        "files": dict(task.files),
        "or_files": [dict(names) for names in task.or_files],
        "folder": task.folder,
        "hub": None if task.hub is None else f"{task.hub.path}/{task.hub.name}",
        "leaderboard": None if task.leaderboard is None else task.leaderboard.file,
        "forms": {kind: task.form(kind).model_dump(mode="json", exclude_none=True) for kind in ("causal", "seq2seq")},
    }


def answers(form: PromptForm) -> str:
    """How a form is answered, in words."""
    if form.generate is not None:
        judged = ", right or wrong by what it names" if form.judge is not None else ""
        return f"writes `{form.generate}`{judged}"
    if form.options_from is not None:
        return f"`{form.option}` for each of `{form.options_from}`"
    return ", ".join(f"`{text}`" for text in (form.words or {}).values() or form.options or ())


def _files(task: Task, names: Mapping[str, str]) -> str:
    return ", ".join(f"`{task.folder}/{name}` ({split})" for split, name in names.items())


def tasks_markdown(tasks: list[Task]) -> str:
    """A section for every task: source, files, metrics, and its prompts."""
    lines: list[str] = []
    for task in tasks:
        names = ", or ".join(_files(task, layout) for layout in (task.files, *task.or_files))
        lines += [f"### {task.name}", "", f"{task.title}. {task.source}. Licence: {task.licence}.", ""]
        lines += [f"- files: {names}", f"- metrics: {', '.join(task.metrics)}"]
        for kind, name in (("causal", "autoregressive"), ("seq2seq", "T5")):
            form = task.form(kind)
            prompts = [form.prompt] if form.prompt is not None else list((form.prompts or {}).values())
            shown = " or ".join(f"`{(prompt or '').replace(chr(10), '⏎')}`" for prompt in prompts)
            lines.append(f"- {name}: {shown} → {answers(form)}")
        lines.append("")
    return "\n".join(lines)
