"""What a method is: settings of its own, and up to three places where it may change a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from ptq4sam.quantization.registry import METHODS
from ptq4sam.records import NoSettings, Record

__all__ = ["METHODS", "Calibration", "Method"]

S = TypeVar("S", bound=Record)


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
