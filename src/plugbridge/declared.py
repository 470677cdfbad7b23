"""What the installed transformers declares in its source, read as text: importing it takes seconds, and torch with it.

Where something is not found there, nothing is known of it, and it is left to the library itself.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

KINDS = ("bool", "int", "float", "str", "list", "dict")


@cache
def activations() -> frozenset[str] | None:
    """Names of the activations that there are."""
    for node in _statements("activations.py"):
        if isinstance(node, ast.Assign) and _is_called(node, "ACT2CLS"):
            keys = node.value.keys if isinstance(node.value, ast.Dict) else []
            return frozenset(str(key.value) for key in keys if isinstance(key, ast.Constant)) or None
    return None


@cache
def fields_of(model_type: str) -> dict[str, frozenset[str]]:
    """The kinds of values (`KINDS`, and ``None``) that each key of a model's configuration may have."""
    if not model_type.isidentifier():
        return {}
    found: dict[str, frozenset[str]] = {}
    for node in _statements(f"models/{model_type}/configuration_{model_type}.py"):
        if isinstance(node, ast.ClassDef) and any(_names_model(inner, model_type) for inner in node.body):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    kinds = frozenset(_kinds(field.annotation))
                    if "" not in kinds:
                        found[field.target.id] = kinds
    return found


def kind_of(value: object) -> str:
    """The kind of a JSON value, by the names of `fields_of`."""
    return "None" if value is None else type(value).__name__


def _names_model(node: ast.stmt, model_type: str) -> bool:
    return isinstance(node, ast.Assign) and _is_called(node, "model_type") and _is_text(node.value, model_type)


def _is_called(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def _is_text(node: ast.expr, text: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == text


def _kinds(annotation: ast.expr) -> Iterator[str]:
    """Kinds of values that an annotation lets; an empty text for what is none of them."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        yield from _kinds(annotation.left)
        yield from _kinds(annotation.right)
    elif isinstance(annotation, ast.Constant) and annotation.value is None:
        yield "None"
    else:
        named = annotation.value if isinstance(annotation, ast.Subscript) else annotation
        yield named.id if isinstance(named, ast.Name) and named.id in KINDS else ""


def _statements(path: str) -> list[ast.stmt]:
    package = find_spec("transformers")
    origin = package.origin if package is not None else None
    try:
        return ast.parse((Path(origin or "").parent / path).read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return []
