"""Sweep files: a YAML grid over the settings of a trial.

base:                        # settings of every trial, see TrialSettings
  scheme: ../ptq4sam-l44.yaml
  steps: 200
grid:                        # every combination
  scheme.ptq4sam.BIG: [false, true]
  seed: [0, 1, 2]
  width:                     # a name of one's own: each value sets several keys
    W4A4: {scheme.w_qconfig.bit: 4, scheme.a_qconfig.bit: 4}
    W4A8: {scheme.w_qconfig.bit: 4, scheme.a_qconfig.bit: 8}
exclude:                     # combinations left out
  - {scheme.ptq4sam.BIG: true, width: W4A8}
include:                     # further trials, each on top of base
  - {scheme: ../minmax44.yaml, seed: 0}
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4sam.errors import ConfigError
from ptq4sam.nearest import nearest
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.records import FieldError, unknown_key
from ptq4sam.shipped import SWEEPS, find
from ptq4sam.sweep.settings import TrialSettings, known_keys
from ptq4sam.yaml_files import read_yaml

_log = logging.getLogger(__name__)

_SECTIONS = ("base", "grid", "include", "exclude")
_METHODS = "scheme.methods."
"""Begins the keys of methods, which are as many as methods have settings."""
Assignment = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        values: what tells it from the others, by axis.
        settings: all of it.
        key: identifies its settings.
    """

    values: dict[str, Any]
    settings: TrialSettings
    key: str

    @property
    def name(self) -> str:
        """Its values in one line."""
        return ", ".join(f"{short(axis)}={shown(value)}" for axis, value in self.values.items())


def short(axis: str) -> str:
    """The last part of a dotted key; of a method's setting also whose it is."""
    return axis.removeprefix("scheme.") if _METHODS in axis else axis.rpartition(".")[2]


def shown(value: object) -> str:
    """A value as tables show it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return "/".join(map(shown, value)) or "none"
    if isinstance(value, dict):
        return "/".join(f"{key}({_settings(own)})" for key, own in value.items()) or "none"
    return "-" if value is None else str(value)


def _settings(own: object) -> str:
    """What stands in the brackets behind a name: its settings, or its value."""
    if isinstance(own, dict):
        return " ".join(f"{key}={shown(value)}" for key, value in own.items())
    return shown(own)


@dataclass(frozen=True)
class Sweep:
    """What a sweep file describes.

    Attributes:
        name: the file's name without its ending.
        trials: in the order of the grid, then those included.
    """

    name: str
    trials: tuple[Trial, ...]

    @property
    def axes(self) -> list[str]:
        """Everything that tells trials apart."""
        return list(dict.fromkeys(axis for trial in self.trials for axis in trial.values))


def read_sweep(path: Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Read a sweep file.

    Args:
        path: the file, or the name of one that ships, as bimodal; schemes that it names are
            looked for beside it, then in the current folder and by their names.
        overrides: settings that go before those of `base`.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), a value cannot be used, or
            no trial is left.
    """
    path = find(path, SWEEPS, "sweep")
    content = read_yaml(path, "sweep file")
    try:
        return _Reader(path.parent, content, overrides or {}).sweep(path.stem)
    except FieldError as error:
        raise ConfigError(f"{path}: {error}") from None


class _Reader:
    def __init__(self, folder: Path, content: object, overrides: Mapping[str, Any]) -> None:
        self._folder = folder
        sections = _mapping(content, "")
        for key in sections:
            if key not in _SECTIONS:
                raise unknown_key(str(key), _SECTIONS)
        self._base = {**_mapping(sections.get("base", {}), "base"), **overrides}
        self._axes = _axes(_mapping(sections.get("grid", {}), "grid"))
        for key in self._base:
            _require_known(key, "base")
        for key in overrides.keys() & self._axes.keys():
            _log.warning(
                "%s=%s was asked for, but the grid has values of its own", key, overrides[key]
            )
        self._exclude = [self._partial(one, "exclude") for one in _list(sections, "exclude")]
        self._include = [self._partial(one, "include") for one in _list(sections, "include")]

    def _partial(self, mapping: object, section: str) -> Assignment:
        values = _mapping(mapping, section)
        for key in values:
            if section == "exclude" and key not in self._axes:
                raise unknown_key(str(key), self._axes).within(section)
            if key not in self._axes:
                _require_known(key, section)
        return values

    def sweep(self, name: str) -> Sweep:
        products = itertools.product(*self._axes.values()) if self._axes else ()
        combinations = [dict(zip(self._axes, values, strict=True)) for values in products]
        for left_out in self._exclude:
            left = [
                one for one in combinations if any(one[axis] != v for axis, v in left_out.items())
            ]
            if len(left) == len(combinations):
                _log.warning("exclude %s leaves out no trial", left_out)
            combinations = left
        trials = [self._trial(one) for one in (*combinations, *self._include)]
        if not trials:
            raise FieldError(
                "grid",
                "no trial is left: give at least one value for each axis, and do not exclude all",
            )
        return Sweep(name, tuple(_without_repetitions(trials)))

    def _trial(self, values: Assignment) -> Trial:
        assignment = dict(self._base)
        for axis, value in values.items():
            axis_values = self._axes.get(axis)
            if isinstance(axis_values, _Named):
                assignment.update(axis_values.settings(value))
            else:
                assignment[axis] = value
        try:
            settings = self._settings(assignment)
        except FieldError as error:
            where = ", ".join(f"{short(key)}={shown(value)}" for key, value in values.items())
            raise ConfigError(f"trial {where or 'of base'}: {error}") from None
        return Trial(values, settings, settings.key())

    def _settings(self, assignment: Assignment) -> TrialSettings:
        mapping: dict[str, Any] = {}
        # A section before what is in it.
        for key in sorted(assignment, key=lambda key: key.count(".")):
            value = assignment[key]
            if key == "scheme" and isinstance(value, str):
                beside = self._folder / value
                value = Scheme.from_yaml(beside if beside.exists() else value).to_dict()
            if "." in key and key.split(".")[0] not in mapping:
                if key.startswith("scheme."):
                    raise FieldError("scheme", f"missing; {key} changes one: name a file in base")
                mapping[key.split(".")[0]] = {}
            # Trials must not change what the next one begins with.
            TrialSettings.set_in(mapping, key, copy.deepcopy(value))
        return TrialSettings.from_dict(mapping)


class _Named(Sequence[str]):
    """Values of an axis with a name of its own: each sets several keys."""

    def __init__(self, axis: str, values: Mapping[str, Any]) -> None:
        self._values = {
            str(label): _mapping(v, f"grid.{axis}.{label}") for label, v in values.items()
        }
        for label, settings in self._values.items():
            for key in settings:
                _require_known(key, f"grid.{axis}.{label}")

    def settings(self, label: object) -> Assignment:
        """What a value sets."""
        if str(label) not in self._values:
            raise unknown_key(str(label), self._values)
        return self._values[str(label)]

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        """The label at a place."""
        return list(self._values)[index]


def _axes(grid: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    axes: dict[str, Sequence[Any]] = {}
    for axis, values in grid.items():
        if isinstance(values, Mapping):
            axes[axis] = _Named(axis, values)
        else:
            _require_known(axis, "grid")
            axes[axis] = values if isinstance(values, list) else [values]
        if not axes[axis]:
            raise FieldError(
                f"grid.{axis}", "no value is given, so that there is no trial: add one"
            )
    return axes


def _require_known(key: object, section: str) -> None:
    known = list(known_keys())
    if key in known or str(key).startswith(_METHODS):
        return
    if f"scheme.{key}".startswith(_METHODS):
        raise FieldError(f"{section}.{key}", f"unknown key; did you mean 'scheme.{key}'?")
    # Most forget the section that a key is in.
    inside = [name for name in known if name.endswith(f".{key}")]
    if inside:
        raise FieldError(f"{section}.{key}", f"unknown key; did you mean {inside[0]!r}?")
    leaves = {short(name): name for name in known}
    close, leaf = nearest(str(key), known, cutoff=0.8), nearest(short(str(key)), leaves)
    if close is not None or leaf is not None:
        hint = close or leaves[str(leaf)]
        raise FieldError(f"{section}.{key}", f"unknown key; did you mean {hint!r}?")
    raise unknown_key(str(key), (name for name in known if "." not in name)).within(section)


def _mapping(value: object, section: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FieldError(section, f"{value!r} given, keys and values are needed")
    return {str(key): item for key, item in value.items()}


def _list(sections: Mapping[str, Any], name: str) -> list[Any]:
    value = sections.get(name) or []
    if not isinstance(value, list):
        raise FieldError(name, "a list of mappings is needed")
    return value


def _without_repetitions(trials: Iterable[Trial]) -> list[Trial]:
    found: dict[str, Trial] = {}
    for trial in trials:
        if trial.key in found:
            _log.warning("trial %s is the same as %s", trial.name, found[trial.key].name)
        found.setdefault(trial.key, trial)
    return list(found.values())
