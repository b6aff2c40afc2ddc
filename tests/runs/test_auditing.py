"""A model whose audit has findings is refused, and what of it is not of this package is named."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from ptq4sam.errors import CalibrationError
from ptq4sam.families import build_sam
from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.model.audit import AuditReport, Finding
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.quantization.observers import MinMaxObserver
from ptq4sam.quantization.registry import OBSERVERS
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.records import NoSettings
from ptq4sam.runs import auditing
from ptq4sam.runs.auditing import audit_run, require_passed
from ptq4sam.runs.phases import Phases
from tests.tiny_runs import SCHEMES

FINDINGS = tuple(Finding(f"place{i}", "is off") for i in range(49))
REPORT = AuditReport(layers=1, activations=1, forwards=2, findings=FINDINGS, encoder="float")


def quantized(*overrides: str) -> QuantizedSam:
    scheme = Scheme.from_yaml(SCHEMES / "minmax44.yaml").with_overrides(*overrides)
    return insert_quantizers(build_sam("vit_nano").eval(), scheme, False)


def test_what_is_not_of_this_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (METHODS, OBSERVERS):
        monkeypatch.setattr(registry, "_items", dict(registry._items))

    @METHODS.register("mine")
    class _Mine(Method[NoSettings]):
        def after_ranges(self, calibration: Calibration) -> Sequence[str]:
            return [str(calibration)]

    @OBSERVERS.register("MineObserver")
    class _MineObserver(MinMaxObserver): ...

    with pytest.raises(CalibrationError, match=r"of a quantized model; please report this$"):
        require_passed(REPORT, quantized())
    told = "model; method mine, observer MineObserver, not of this package, is in it: check"
    with pytest.raises(CalibrationError, match=told):
        require_passed(REPORT, quantized("methods=[mine]", "a_qconfig.observer=MineObserver"))


def test_of_many_findings_some_are_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auditing, "audit_model", lambda _sam: REPORT)
    caplog.set_level(logging.DEBUG, "ptq4sam")
    audit_run(Phases(), quantized())
    shown = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(shown) == 11
    assert shown[1] == "  place0: is off"
    assert shown[-1] == "  and 40 more"
    assert "  place48: is off" in [r.getMessage() for r in caplog.records]
