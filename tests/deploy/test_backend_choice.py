"""Which runtime opens an exported model: the one that is measured to be fastest, within a time."""

from __future__ import annotations

import functools
import types
from pathlib import Path

import pytest
import torch

from ptq4sam.deploy import backends, open_exported
from ptq4sam.deploy.backends import encoding_seconds, open_backend
from ptq4sam.deploy.exported import ExportedSam
from ptq4sam.deploy.storage import save
from ptq4sam.deploy.targets import TARGETS
from ptq4sam.model.insertion import QuantizedSam

pytestmark = pytest.mark.usefixtures("shared_sessions")


def test_the_fastest_backend_is_taken(
    folder: tuple[QuantizedSam, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = folder
    # Each is opened once: a runtime takes seconds to compile its graphs.
    monkeypatch.setattr(backends, "open_exported", functools.cache(open_exported))
    for fast in TARGETS:
        seconds = dict.fromkeys(TARGETS, 1.0) | {fast: 0.5}
        monkeypatch.setattr(
            "ptq4sam.deploy.backends.encoding_seconds",
            lambda opened, limit, seconds=seconds: seconds[opened.runtime],
        )
        chosen = open_backend(path, "auto")
        assert isinstance(chosen, ExportedSam)
        assert chosen.runtime == fast
    save(model, path / "model.safetensors")
    assert open_backend(path / "model.safetensors", "auto").name == "tiny"


@pytest.mark.parametrize("runtime", TARGETS)
def test_an_encoding_that_takes_too_long_is_ended(
    runtime: str, folder: tuple[QuantizedSam, Path]
) -> None:
    sam = open_exported(folder[1], runtime)
    pixels = torch.randn(1, 3, sam.image_size, sam.image_size)
    (expected,) = sam.embed(pixels)
    with pytest.raises(TimeoutError):
        sam.embed(pixels, 0.0)
    # What was ended has no consequences, nor has a limit that is kept.
    assert torch.equal(sam.embed(pixels)[0], expected)
    assert torch.equal(sam.embed(pixels, 60.0)[0], expected)
    assert encoding_seconds(sam, 60.0, rounds=1) is not None
    assert encoding_seconds(sam, 0.0) is None


class SlowSam:
    """Encodes a picture in a number of seconds of a clock that it turns."""

    image_size = 8
    device = torch.device("cpu")
    manifest = types.SimpleNamespace(scheme=None, nncf=None)

    def __init__(self, clock: list[float], runtime: str, opening: float, encoding: float) -> None:
        self.runtime, self._clock, self._encoding = runtime, clock, encoding
        clock[0] += opening

    def embed(self, _pixels: torch.Tensor, seconds: float) -> None:
        self._clock[0] += min(seconds, self._encoding)
        if self._encoding > seconds:
            raise TimeoutError


@pytest.mark.parametrize(
    ("openvino", "onnxruntime", "expected", "told"),
    [
        ((1, 0.5), (1, 0.2), "onnxruntime", "onnxruntime encodes a picture in 0.200 s"),
        # Seconds of opening and encoding of a large SAM: one measurement has to do.
        ((9, 7), (4, 6), "onnxruntime", "openvino encodes a picture in 7.000 s"),
        ((9, 30), (4, 6), "onnxruntime", "openvino takes more than 10.0 s"),
        ((9, 7), (4, 30), "openvino", "onnxruntime takes more than"),
        ((9, 30), (4, 30), "openvino", "nothing is known: openvino is the fastest as a rule"),
        ((9, 7), (50, 6), "openvino", "onnxruntime was not measured"),
    ],
)
def test_the_choice_of_a_backend_has_an_end(
    openvino: tuple[float, float],
    onnxruntime: tuple[float, float],
    expected: str,
    told: str,
    folder: tuple[QuantizedSam, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = [0.0]
    seconds = {"openvino": openvino, "onnxruntime": onnxruntime}
    monkeypatch.setattr(
        backends,
        "open_exported",
        lambda _path, name, _precision: SlowSam(clock, name, *seconds[name]),
    )
    for function in ("monotonic", "perf_counter"):
        monkeypatch.setattr(backends.time, function, lambda: clock[0])
    with caplog.at_level("INFO", "ptq4sam"):
        chosen = open_backend(folder[1], "auto")
    assert isinstance(chosen, SlowSam)
    assert chosen.runtime == expected
    assert told in caplog.text
    assert f"chosen: {expected}" in caplog.text
    assert clock[0] <= sum(opening for opening, _ in seconds.values()) + backends.CHOICE_SECONDS


def test_one_runtime_alone_is_not_measured(
    folder: tuple[QuantizedSam, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_arguments: object) -> float:
        raise AssertionError("there is nothing to choose from")

    monkeypatch.setattr(backends, "encoding_seconds", measure)
    (folder[1] / "openvino.json").unlink()
    chosen = open_backend(folder[1], "auto")
    assert isinstance(chosen, ExportedSam)
    assert chosen.runtime == "onnxruntime"
