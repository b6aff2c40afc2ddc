"""What a method is: settings of its own, and up to three places where it may change a model."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from ptq4sam.errors import ConfigError
from ptq4sam.quantization.registry import METHODS
from ptq4sam.records import NoSettings, Record, nearest_of

__all__ = ["HOOKS", "METHODS", "Calibration", "Hook", "Method"]

S = TypeVar("S", bound=Record)

Hook = Literal["before_ranges", "after_ranges", "after_reconstruction"]
HOOKS: tuple[Hook, ...] = typing.get_args(Hook)


@dataclass(frozen=True)
class Calibration:
    """What hooks work on.

    Attributes:
        sam: the model with its quantizers (a QuantizedSam).
        items: calibration pictures with their boxes.
        run: passes one picture through the model as it is.
        exact: after reconstruction, the calibrated model with its quantizers off, which is the
            float model but for what methods changed; before, the model itself.
        run_exact: passes one picture through that.
    """

    sam: Any
    items: Sequence[Any]
    run: Callable[[Any], None]
    exact: Any = None
    run_exact: Callable[[Any], None] = lambda _item: None


class Method(Generic[S]):
    """Base of all methods; a hook that is not overridden does nothing.

    What a hook changes is in the targets of reconstruction and in the file, so that before
    reconstruction it should leave the float output as it is.

    Args:
        settings: a record of `settings_type`.
    """

    settings_type: ClassVar[type[Record]] = NoSettings
    """What a scheme may say of it."""
    slots: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Formats of slots that go with it, as in a scheme's `slots`."""

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def before_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Change weights before ranges are observed, with all quantizers off.

        Returns:
            Paths of what was changed; none where the model has nothing for it.
        """
        del calibration
        return ()

    def after_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Change ranges or weights when all quantizers have ranges; see `before_ranges`."""
        del calibration
        return ()

    def after_reconstruction(self, calibration: Calibration) -> Sequence[str]:
        """Correct the model when all weights are on their grids; see `before_ranges`."""
        del calibration
        return ()


def _check(name: str, method: Any) -> None:
    """Refuse what would never be called, or whose settings no scheme could say.

    Raises:
        ConfigError: it is no Method, overrides no hook (and brings no formats of slots), or its
            settings are no record.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ConfigError(f"method {name!r} is {method!r}: derive a class from Method")
    told = f"method {name!r} ({method.__name__})"
    if not method.slots and all(getattr(method, h) is getattr(Method, h) for h in HOOKS):
        raise ConfigError(f"{told} overrides no hook, {_has_instead(method)}")
    kind = method.settings_type
    meant = next(
        (
            said
            for base in getattr(method, "__orig_bases__", ())
            for said in typing.get_args(base)
            if isinstance(said, type) and said is not kind
        ),
        None,
    )
    if kind is NoSettings and meant is not None:
        raise ConfigError(f"{told} says no settings_type: add settings_type = {meant.__name__}")
    if not (isinstance(kind, type) and issubclass(kind, Record)):
        said = getattr(kind, "__name__", repr(kind))
        raise ConfigError(
            f"{told} has settings_type {said}, a record is needed: derive it from "
            "ptq4sam.records.Record, with @dataclass(frozen=True) above it"
        )
    if "__dataclass_fields__" not in vars(kind):
        raise ConfigError(
            f"{told} has settings_type {kind.__name__}, which is no dataclass: put "
            "@dataclass(frozen=True) above it"
        )


def _has_instead(method: type) -> str:
    """What of a class's own is nearest to a hook, for the end of a message."""
    own = [name for name, what in vars(method).items() if callable(what) and name[0] != "_"]
    for name in own:
        near = nearest_of(name, HOOKS)
        if near.startswith("did"):
            return f"but it has {name}: {near}"
    return f"which are {', '.join(HOOKS)}: define one of them"


METHODS.check = _check
