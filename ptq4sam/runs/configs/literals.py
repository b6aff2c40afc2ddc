"""Configuration files in Python with `_base_`, as in OpenMMLab, read without running them.

A file consists of assignments of literals. `dict(a=1)`, `list(...)`, `tuple(...)`, earlier names,
subscripts, `+ - * / // %`, and `{{_base_.name}}` are understood; anything else (imports, other
calls, loops) is an error, since a configuration must not be able to do anything.

    _base_ = ["../_base_/coco.py"]        # relative to this file; a string or a list
    sam = dict(type="vit_b")              # merged into the base's `sam`, key by key
    prompting = dict(_delete_=True, ...)  # replaces the base's instead
    _weights = "ckpt/"                    # names with an underscore are only for this file
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ptq4sam.errors import ConfigError
from ptq4sam.records import FieldError, assign, split_assignment

Config = dict[str, Any]

BASE = "_base_"
DELETE = "_delete_"

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {"dict": dict, "list": list, "tuple": tuple}


def load_config(path: str | Path, options: Iterable[str] = ()) -> Config:
    """Read a configuration file, its bases, and overrides.

    Args:
        path: the file.
        options: "dotted.key=value"; a value is a Python literal, or text
            where it is none. Numbers in a key index lists.

    Returns:
        The merged names and values.

    Raises:
        ConfigError: a file is missing or holds more than literals, bases form a cycle, or an
            option does not fit.
    """
    config = _load(Path(path), ())
    for option in options:
        key, text = split_assignment(option)
        try:
            assign(config, key, _literal(text))
        except FieldError as error:
            raise ConfigError(f"{path}: option {option!r}: {error}") from None
    return config


def merge(base: Config, child: Config) -> Config:
    """Lay `child` over `base`; dictionaries merge key by key, unless one has `_delete_=True`.

    Raises:
        FieldError: a dictionary meets another kind of value.
    """
    merged = dict(base)
    for key, value in child.items():
        merged[key] = _merged_value(key, base.get(key), value)
    return merged


def _merged_value(key: str, base: object, child: object) -> object:
    if not isinstance(child, dict):
        return child
    child = dict(child)
    if child.pop(DELETE, False) or base is None:
        base = {}
    if not isinstance(base, dict):
        raise FieldError(
            key, f"{base!r} in the base, no dictionary to merge into; {DELETE}=True replaces it"
        )
    try:
        return merge(base, child)
    except FieldError as error:
        raise error.within(key) from None


def _load(path: Path, importers: tuple[Path, ...]) -> Config:
    resolved = path.resolve()
    if resolved in importers:
        chain = " -> ".join(p.name for p in (*importers[importers.index(resolved) :], resolved))
        raise ConfigError(f"{path}: configurations are bases of each other: {chain}")
    reader = _Reader(path)
    base: Config = {}
    for name in reader.bases():
        other = _load(path.parent / name, (*importers, resolved))
        both = sorted(base.keys() & other.keys())
        if both:
            raise ConfigError(f"{path}: {', '.join(both)} in more than one base; keep it in one")
        base.update(other)
    child = reader.values(base)
    try:
        return merge(base, child)
    except FieldError as error:
        raise ConfigError(f"{path}: {error}") from None


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


class _Reader:
    """Evaluates one file, without its bases."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: Config = {}
        self._base: Config = {}
        try:
            self._statements = ast.parse(path.read_text(encoding="utf-8")).body
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such configuration file") from None
        except SyntaxError as error:
            raise ConfigError(f"{path}:{error.lineno}: not Python: {error.msg}") from None
        except (OSError, ValueError, MemoryError, RecursionError) as error:
            raise ConfigError(f"{path}: cannot be read: {error or type(error).__name__}") from None

    def bases(self) -> list[str]:
        """The bases' paths as written."""
        for statement in self._statements:
            name, expression = _assignment(statement)
            if name != BASE or expression is None:
                continue
            value = self._evaluate(expression)
            names = [value] if isinstance(value, str) else value
            if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
                raise self._error(statement, f"{BASE} must be a path or a list of paths")
            for base in names:
                if not (self._path.parent / base).is_file():
                    raise self._error(statement, f"base {base!r} is not there")
            return list(names)
        return []

    def values(self, base: Config) -> Config:
        """All public names, where `{{_base_.x}}` refers to `base`."""
        self._base = base
        for statement in self._statements:
            if _is_docstring(statement):
                continue
            name, expression = _assignment(statement)
            if name is None or expression is None:
                raise self._error(statement, "only assignments NAME = VALUE are read here")
            if name != BASE:
                self._names[name] = self._evaluate(expression)
        return {name: value for name, value in self._names.items() if not name.startswith("_")}

    def _evaluate(self, node: ast.expr) -> Any:
        try:
            return self._visit(node)
        except (ArithmeticError, TypeError, ValueError, LookupError, RecursionError) as error:
            raise self._error(node, f"cannot be evaluated: {error}") from None

    def _visit(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return self._constant(node)
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [self._visit(item) for item in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        if isinstance(node, ast.Dict):
            return self._dictionary(node)
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.Subscript):
            return self._visit(node.value)[self._visit(node.slice)]
        if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
            return _SIGNS[type(node.op)](self._visit(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return self._arithmetic(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Set):
            return self._base_value(node)
        raise self._error(node, f"only literals are read here, not {ast.unparse(node)[:60]}")

    def _constant(self, node: ast.Constant) -> object:
        text = node.value
        if isinstance(text, str) and text.startswith("{{") and text.endswith("}}"):
            return self._base_path(node, text[2:-2].strip())
        return text

    def _dictionary(self, node: ast.Dict) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                result.update(self._visit(value))
            else:
                result[self._visit(key)] = self._visit(value)
        return result

    def _name(self, node: ast.Name) -> object:
        if node.id not in self._names:
            raise self._error(node, f"the name {node.id!r} is not defined above in this file")
        return self._names[node.id]

    def _arithmetic(self, node: ast.BinOp) -> object:
        left, right = self._visit(node.left), self._visit(node.right)
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        joined = isinstance(node.op, ast.Add) and type(left) is type(right)
        if not numbers and not (joined and isinstance(left, (str, list, tuple))):
            raise self._error(node, f"{left!r} and {right!r} cannot be combined")
        return _ARITHMETIC[type(node.op)](left, right)

    def _call(self, node: ast.Call) -> object:
        if not isinstance(node.func, ast.Name) or node.func.id not in _CONSTRUCTORS:
            raise self._error(
                node,
                f"{ast.unparse(node.func)}(...) is not run here; only dict, list and tuple are",
            )
        arguments = [self._visit(argument) for argument in node.args]
        keywords: Config = {}
        for keyword in node.keywords:
            value = self._visit(keyword.value)
            keywords.update(value if keyword.arg is None else {keyword.arg: value})
        return _CONSTRUCTORS[node.func.id](*arguments, **keywords)

    def _base_value(self, node: ast.Set) -> object:
        inner = node.elts[0]
        if len(node.elts) != 1 or not isinstance(inner, ast.Set) or len(inner.elts) != 1:
            raise self._error(node, "sets are not read here; {{_base_.name}} is")
        return self._base_path(node, ast.unparse(inner.elts[0]))

    def _base_path(self, node: ast.expr, dotted: str) -> object:
        first, *parts = dotted.split(".")
        if first != BASE or not parts:
            raise self._error(node, f"{{{{{dotted}}}}} is not understood; {{{{_base_.name}}}} is")
        value: Any = self._base
        for part in parts:
            if not isinstance(value, dict) or part not in value:
                raise self._error(node, f"{dotted} is not in a base: {part!r} is missing")
            value = value[part]
        return value

    def _error(self, node: ast.stmt | ast.expr, problem: str) -> ConfigError:
        return ConfigError(f"{self._path}:{node.lineno}: {problem}")


def _assignment(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: ast.expr = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    else:
        return None, None
    return (target.id, statement.value) if isinstance(target, ast.Name) else (None, None)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
