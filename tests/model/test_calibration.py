"""What hooks of methods say, and what becomes of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from ptq4sam.errors import ConfigError
from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.model.calibration import CalibrationItem, calibrate
from ptq4sam.model.insertion import insert_quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.records import NoSettings
from ptq4sam.sam.model import Sam

Items = list[CalibrationItem]
Returning = Callable[[Any], None]


@pytest.fixture
def returning(monkeypatch: pytest.MonkeyPatch) -> Returning:
    """Registers a method "mine" whose hook returns something."""
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))

    def register(what: Any) -> None:
        @METHODS.register("mine")
        class _Mine(Method[NoSettings]):
            def after_ranges(self, calibration: Calibration) -> Any:
                return what

    return register


@pytest.mark.parametrize("what", [None, "decoder", 3, [1]])
def test_a_hook_that_does_not_say_what_it_changed_is_named(
    sam: Sam, items: Items, make_scheme: Callable[..., Scheme], returning: Returning, what: Any
) -> None:
    returning(what)
    quantized = insert_quantizers(sam, make_scheme(methods=["mine"]))
    told = "method mine: after_ranges returned .*: let it return a list of the paths"
    with pytest.raises(ConfigError, match=told):
        calibrate(quantized, items[:1])


def test_how_many_places_changed_is_told_and_which_is_a_detail(
    sam: Sam,
    items: Items,
    make_scheme: Callable[..., Scheme],
    returning: Returning,
    caplog: pytest.LogCaptureFixture,
) -> None:
    places = tuple(f"place{i}" for i in range(53))
    returning(places)
    caplog.set_level(logging.DEBUG, "ptq4sam")
    quantized = insert_quantizers(sam, make_scheme(methods=["mine"]))
    calibrate(quantized, items[:1])
    assert quantized.applied["mine"] == list(places)
    told = {record.getMessage(): record.levelname for record in caplog.records}
    assert told["mine changed 53 places"] == "INFO"
    assert told[f"mine changed {', '.join(places)}"] == "DEBUG"
