"""How float32 products are set to be rounded, by either family of torch's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ptq4sam import numerics
from ptq4sam.errors import ConfigError
from ptq4sam.numerics import description, float32_products, reproducible, require_float64
from ptq4sam.runs.settings import find_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
backends: Any = torch.backends
newer = pytest.mark.skipif(
    not hasattr(backends.cudnn, "conv"), reason="this torch has only the older settings"
)

pytestmark = pytest.mark.filterwarnings("ignore:Please use the new API settings")


def settings() -> dict[str, object]:
    """All of them, as far as they can be read."""
    found: dict[str, object] = {
        "deterministic": backends.cudnn.deterministic,
        "benchmark": backends.cudnn.benchmark,
    }
    reads: dict[str, Callable[[], object]] = {
        "matmul": torch.get_float32_matmul_precision,
        "allow_tf32": lambda: backends.cudnn.allow_tf32,
    }
    if hasattr(backends.cudnn, "conv"):
        reads |= {
            "cuda.matmul": lambda: backends.cuda.matmul.fp32_precision,
            "mkldnn.matmul": lambda: backends.mkldnn.matmul.fp32_precision,
            "cudnn.conv": lambda: backends.cudnn.conv.fp32_precision,
            "cudnn.rnn": lambda: backends.cudnn.rnn.fp32_precision,
        }
    for name, read in reads.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "mixed"
    return found


@pytest.fixture(autouse=True)
def as_at_start() -> Iterator[None]:
    before, of_all = settings(), getattr(backends, "fp32_precision", None)
    with numerics._put_back():
        yield
        if of_all is not None:
            backends.fp32_precision = of_all
    assert settings() == before


def by_older(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)


def by_newer() -> None:
    backends.cuda.matmul.fp32_precision = "tf32"


def by_newer_convolutions() -> None:
    backends.cudnn.conv.fp32_precision = "ieee"


def by_newest() -> None:
    backends.fp32_precision = "tf32"


ALL = [
    pytest.param(lambda: None, id="as at start"),
    pytest.param(lambda: by_older("high"), id="high"),
    pytest.param(lambda: by_older("medium"), id="medium"),
    pytest.param(by_newer, id="newer", marks=newer),
    pytest.param(by_newer_convolutions, id="newer convolutions", marks=newer),
    pytest.param(by_newest, id="all", marks=newer),
]


@pytest.mark.parametrize("somebody", ALL)
def test_all_is_ieee_within_and_as_it_was_behind(somebody: Callable[[], None]) -> None:
    somebody()
    before = settings()
    with reproducible():
        assert float32_products(CPU) == float32_products(CUDA) == "ieee"
        assert numerics.float32_convolutions() == "ieee"
        assert backends.cudnn.deterministic
        assert not backends.cudnn.benchmark
        # torch.compile reads the older ones.
        assert torch.get_float32_matmul_precision() == "highest"
        assert not backends.cudnn.allow_tf32
    assert settings() == before


def test_settings_come_back_after_an_error() -> None:
    by_older("high")
    with pytest.raises(ZeroDivisionError), reproducible():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "high"


def test_less_than_ieee_is_seen() -> None:
    assert float32_products(CPU) == float32_products(CUDA) == "ieee"
    by_older("high")
    assert float32_products(CUDA) == "tf32"
    by_older("medium")
    assert float32_products(CPU) == "bf16"


@newer
def test_less_than_ieee_is_seen_by_newer_settings_too() -> None:
    by_newer()
    assert float32_products(CUDA) == "tf32"
    backends.mkldnn.matmul.fp32_precision = "bf16"
    assert float32_products(CPU) == "bf16"


def test_a_description_has_all_that_last_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert description(CPU) == {"device": "cpu", "float32 products": "ieee"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")
    by_older("high")
    found = description(CUDA)
    assert found["device"] == "cuda NVIDIA H200"
    assert found["float32 products"] == "tf32"
    assert {"float32 convolutions", "deterministic convolutions", "cuda", "triton"} <= set(found)


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_a_device_without_float64_is_refused(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    ones, zeros = torch.ones, torch.zeros

    def made(*shape: int, dtype: torch.dtype | None = None, device: torch.device) -> torch.Tensor:
        assert device.type == "mps"
        if dtype is torch.float64:
            raise error("Cannot convert a MPS Tensor to float64 dtype")
        return zeros(*shape)

    monkeypatch.setattr(torch, "zeros", made)
    monkeypatch.setattr(torch, "ones", made)
    with pytest.raises(ConfigError, match="'mps', which has no float64 numbers") as refused:
        find_device("mps")
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(torch, "ones", ones)
    require_float64(CPU)


def test_versions_of_packages_that_are_not_there() -> None:
    assert numerics._version("a-package-that-is-not-there") == "none"
    assert numerics._version("torch") != "none"


def test_a_device_that_fails_is_not_said_to_have_no_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_sizes: int, **_options: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(RuntimeError, match="no kernel image"):
        require_float64(CPU)
