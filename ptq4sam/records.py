"""Records: frozen dataclasses that check their fields and read themselves from plain mappings.

A record knows the names, types and limits of its fields. Everything that a user writes (schemes,
experiment configurations, overrides on the command line) becomes a record in this one place, and
every mistake becomes one line: which key, what was given, what is allowed.
"""

from __future__ import annotations

import contextlib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from ptq4sam.errors import ConfigError
from ptq4sam.nearest import nearest

R = TypeVar("R", bound="Record")


class FieldError(ConfigError):
    """A field is not usable; knows the dotted path of its key.

    Attributes:
        key: dotted path, as "recon.iters".
        problem: what is wrong with it.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key, self.problem = key, problem

    def within(self, outer: str) -> FieldError:
        """The same error, with the key seen from one level further out."""
        return FieldError(f"{outer}.{self.key}" if self.key else outer, self.problem)


@dataclass(frozen=True)
class Record:
    """Base of the records.

    A field may be a bool, int, float, str, Path, Literal, tuple (of fixed length, or of any of one
    kind), a dict with names as keys or another record, or one of several of these or None; an
    object is taken as it is. `_validate` says what else must hold.

    Raises:
        FieldError: a field has the wrong type or an impossible value.
    """

    def __post_init__(self) -> None:
        kinds = _kinds(type(self))
        for field in fields(self):
            try:
                value = _convert(getattr(self, field.name), kinds[field.name])
            except FieldError as error:
                raise error.within(field.name) from None
            object.__setattr__(self, field.name, value)
        self._validate()

    def _validate(self) -> None:
        """Check limits, and complete what follows from other fields."""

    @classmethod
    def _renamed(cls, mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        """A mapping that is read, with other ways to write its keys replaced by the fields'."""
        return mapping

    def _require(self, holds: bool, key: str, allowed: str) -> None:
        if not holds:
            raise FieldError(key, f"{_shown(getattr(self, key))} given, allowed: {allowed}")

    @classmethod
    def from_dict(cls: type[R], mapping: object, source: str | Path | None = None) -> R:
        """Read a record from a mapping.

        Args:
            mapping: keys are field names; nested records are mappings in turn.
            source: file or other origin, for messages.

        Raises:
            ConfigError: a key is unknown or missing, or a value is not usable.
        """
        try:
            return _read(cls, mapping)
        except FieldError as error:
            if source is None:
                raise
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_section(cls: type[R], mapping: object) -> R:
        """As `from_dict`, for records within records.

        Raises:
            FieldError: a key is unknown or missing, or a value is not usable.
        """
        return _read(cls, mapping)

    @classmethod
    def set_in(cls, mapping: dict[str, Any], key: str, value: object) -> None:
        """Set a field in a mapping that will be read, as `assign`.

        Raises:
            FieldError: there is no such place.
        """
        assign(mapping, key, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping of numbers, strings and lists; `from_dict` reads it back."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def with_overrides(self: R, *assignments: str) -> R:
        """A copy with some fields replaced.

        Args:
            assignments: "dotted.key=value"; the value is written as in YAML.

        Raises:
            ConfigError: a key is unknown or a value not usable.
        """
        mapping = self.to_dict()
        for assignment in assignments:
            key, text = split_assignment(assignment)
            try:
                self.set_in(mapping, key, yaml.safe_load(text))
            except yaml.YAMLError:
                raise ConfigError(f"override {assignment!r}: the value is not YAML") from None
            except FieldError as error:
                raise ConfigError(f"override {assignment!r}: {error}") from None
        return self.from_dict(mapping, f"override {' '.join(assignments)}")


@dataclass(frozen=True)
class NoSettings(Record):
    """Of what has none."""


def split_assignment(assignment: str) -> tuple[str, str]:
    """Split "dotted.key=value".

    Raises:
        ConfigError: it is not of that form.
    """
    key, sign, text = assignment.partition("=")
    if not sign or not all(key.strip().split(".")):
        raise ConfigError(f"override {assignment!r}: write it as key=value, as recon.iters=500")
    return key.strip(), text.strip()


def assign(mapping: dict[str, Any], key: str, value: object) -> None:
    """Set `mapping["a"]["b"]` for the key "a.b"; numbers index lists.

    Raises:
        FieldError: a part of the path before the last is not there or holds no fields.
    """
    *outer, last = key.split(".")
    target: Any = mapping
    for depth, part in enumerate(outer):
        target = _item(target, part, ".".join(outer[: depth + 1]))
    if isinstance(target, list):
        _item(target, last, key)
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    elif target is None:
        raise FieldError(".".join(outer), f"there is no such section in which to set {last!r}")
    else:
        raise FieldError(".".join(outer), f"{_shown(target)} has no field {last!r} to set")


def unknown_key(key: str, known: Iterable[str]) -> FieldError:
    """The error for a key that does not exist, naming the nearest one that does."""
    return FieldError(key, f"unknown key; {nearest_of(key, known)}")


def nearest_of(name: str, known: Iterable[str]) -> str:
    """The end of a message on a name that is not known: the nearest one, or all."""
    known = list(known)
    close = nearest(name, known)
    if close is not None:
        return f"did you mean {close!r}?"
    return f"known are {', '.join(known)}" if known else "there is none"


def _item(target: object, part: str, path: str) -> Any:
    if isinstance(target, dict) and part in target:
        return target[part]
    if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
        return target[int(part)]
    if isinstance(target, dict):
        outer = path.rpartition(".")[0]
        error = unknown_key(part, map(str, target))
        raise error.within(outer) if outer else error
    what = f"index {part} of {len(target)} items" if isinstance(target, list) else "not there"
    raise FieldError(path, what)


def _read(kind: type[R], mapping: object) -> R:
    if not isinstance(mapping, Mapping):
        raise FieldError("", f"{_shown(mapping)} given, keys and values are needed")
    mapping = kind._renamed(mapping)
    known = {field.name: field for field in fields(kind)}
    for key in mapping:
        if key not in known:
            raise unknown_key(str(key), known)
    kinds = _kinds(kind)
    for name, field in known.items():
        if name not in mapping and _is_required(field):
            raise FieldError(name, f"missing; {_named(kinds[name])} is needed")
    return kind(**mapping)


_KINDS: dict[type[Record], dict[str, Any]] = {}


def _kinds(record: type[Record]) -> dict[str, Any]:
    """The kind of each field. Annotations are text, which takes long to read."""
    if record not in _KINDS:
        _KINDS[record] = typing.get_type_hints(record)
    return _KINDS[record]


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _convert(value: object, kind: Any) -> object:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert_to_one(value, kind)
    if origin is Literal:
        if value not in arguments:
            raise FieldError("", f"{_shown(value)} given, {_named(kind)} is needed")
        return value
    if origin is tuple:
        return _convert_tuple(value, kind)
    if origin is dict:
        return _convert_mapping(value, arguments[1])
    if kind is object:
        # Whoever knows what it is converts it, in `_validate`.
        return value
    if isinstance(kind, type) and issubclass(kind, Record):
        return value if isinstance(value, kind) else _read(kind, value)
    return _convert_plain(value, kind)


def _convert_to_one(value: object, union: Any) -> object:
    """To the first of several kinds that fits; of a single kind the error says what it misses."""
    inner = [kind for kind in typing.get_args(union) if kind is not types.NoneType]
    for kind in inner[:-1]:
        with contextlib.suppress(FieldError):
            return _convert(value, kind)
    try:
        return _convert(value, inner[-1])
    except FieldError:
        if len(inner) == 1:
            raise
    raise FieldError("", f"{_shown(value)} given, {_named(union)} is needed")


def _convert_mapping(value: object, kind: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise FieldError("", f"{_shown(value)} given, names and values are needed")
    converted = {}
    for key, item in value.items():
        try:
            converted[key] = _convert(item, kind)
        except FieldError as error:
            raise error.within(key) from None
    return converted


def _convert_tuple(value: object, kind: Any) -> object:
    kinds = typing.get_args(kind)
    if isinstance(value, (list, tuple)):
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(value) == len(kinds):
            return tuple(_convert(v, k) for v, k in zip(value, kinds, strict=True))
    raise FieldError("", f"{_shown(value)} given, {_named(kind)} is needed")


def _convert_plain(value: object, kind: Any) -> object:
    if kind is float:
        return _convert_float(value)
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FieldError("", f"{_shown(value)} given, {_named(kind)} is needed")
    return value


def _convert_float(value: object) -> float:
    # PyYAML reads 4e-5, without a decimal point, as a string.
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise FieldError("", f"{_shown(value)} given, a number is needed")


_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}


def _named(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} items"
    if origin in (Union, types.UnionType):
        return " or ".join(_named(argument) for argument in arguments)
    return "nothing" if kind is types.NoneType else _NAMES.get(kind, "a section")


def _shown(value: object) -> str:
    text = repr(str(value)) if isinstance(value, Path) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(value: object) -> object:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
