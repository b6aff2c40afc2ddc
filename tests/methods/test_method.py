"""Methods that could never work are refused when they are registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from ptq4sam.errors import ConfigError
from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.quantization.registry import Registry
from ptq4sam.records import NoSettings, Record


@dataclass(frozen=True)
class Clip(Record):
    share: float = 0.9


class NoDataclass(Record):
    share: float = 0.9


@dataclass(frozen=True)
class NoRecord:
    share: float = 0.9


class Hooked(Method[Clip]):
    settings_type = Clip

    def after_ranges(self, calibration: Calibration) -> Sequence[str]:
        return [str(calibration)]


class Misspelt(Method[NoSettings]):
    def helper(self) -> None: ...

    def after_range(self, calibration: Calibration) -> Sequence[str]:
        return [str(calibration)]


class Hookless(Method[NoSettings]): ...


class FormatsAlone(Method[NoSettings]):
    slots: ClassVar = {"softmax": {"grid": "logarithmic"}}


class Silent(Method[Clip]):
    after_ranges = Hooked.after_ranges


class OfNoDataclass(Hooked):
    settings_type = NoDataclass


class OfNoRecord(Hooked):
    settings_type = NoRecord  # type: ignore[assignment]


@pytest.fixture
def register() -> Callable[[Any], None]:
    registry: Registry[Any] = Registry("method")
    registry.check = METHODS.check
    return lambda kind: registry.register("mine")(kind) and None


@pytest.mark.parametrize("kind", [Hooked, FormatsAlone])
def test_usable_ones_are_taken(register: Callable[[Any], None], kind: Any) -> None:
    register(kind)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Misspelt, "overrides no hook, but it has after_range: did you mean 'after_ranges'?"),
        (Hookless, "overrides no hook, which are before_ranges, .*: define one of them"),
        (Silent, "says no settings_type: add settings_type = Clip"),
        (OfNoDataclass, r"which is no dataclass: put @dataclass\(frozen=True\) above it"),
        (OfNoRecord, "has settings_type NoRecord, a record is needed: derive it from"),
        (NoRecord, "derive a class from Method"),
    ],
)
def test_others_are_refused(register: Callable[[Any], None], kind: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"method 'mine' .*{told}"):
        register(kind)
