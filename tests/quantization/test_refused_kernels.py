"""A kernel that gives other numbers than operations one by one is found and not used."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptq4sam.methods import granularity_points
from ptq4sam.operators import activation, norm
from ptq4sam.operators import attention as attention_operator
from ptq4sam.quantization import fused, grid, portable, rounding, whole
from ptq4sam.quantization import hard_numbers as hard
from ptq4sam.quantization.dropping import choose
from ptq4sam.quantization.fused import FEWEST_ELEMENTS, fused_exactly
from tests.quantization.compilers import messages, needs_compiler, usable_compiler

pytestmark = pytest.mark.usefixtures("kernels")


def test_a_kernel_with_other_numbers_is_said_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of its device alone: kernels of functions that are not compared go on."""
    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    # A compiler that is off by one in a single place of the second set of arguments.
    calls: list[Tensor] = []

    def compiled(function: Callable[[Tensor], Tensor], **_options: object) -> object:
        def run(x: Tensor) -> Tensor:
            calls.append(x)
            result = function(x)
            if x[0] == 2:
                result[-1] += 1
            return result

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    arguments = fused_exactly(lambda _x: iter([(torch.ones(5),), (torch.full((5,), 2.0),)]))
    exact, plain = arguments(torch.square), fused.fused(torch.square)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(exact(torch.ones(FEWEST_ELEMENTS)), torch.ones(FEWEST_ELEMENTS))
        assert len(calls) == 2
        arguments(torch.square)(torch.ones(FEWEST_ELEMENTS))
        plain(torch.ones(FEWEST_ELEMENTS))
    assert len(calls) == 5
    (told,) = messages(caplog)
    assert "gives other numbers on cpu" in told


def test_what_is_no_number_is_equal_to_itself() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert fused._same(nan, nan.clone())
    assert not fused._same(nan, torch.ones(2))
    assert not fused._same(torch.ones(2), nan)


def flat_calls() -> dict[str, tuple[object, Callable[..., Tensor], tuple[object, ...]]]:
    """Each function whose kernel is compared: its module, and arguments of a call."""
    x, attention = torch.zeros(2**21), torch.zeros(2**21)
    number = torch.tensor
    points = granularity_points.point_parameters(number(0.7), number(2.0), 16)
    scale, middles = points[:2]
    some = choose(x, 0.5, None)
    rows, channels = torch.zeros(4096, 512), torch.zeros(512)
    affine_parameters = (number(0.21), number(7.0), 0, 255)
    chosen_affine = (*some.parts(), *affine_parameters[:2], x.new_empty(()), 0, 255)
    weight = torch.zeros(1024, 1024)
    by_channel = (torch.full((1024, 1), 0.3), torch.full((1024, 1), 7.0))
    points_of_some = (*some.parts(), *points, x.new_empty(()))
    return {
        "affine": (grid, grid._move_to_grid, (x, *affine_parameters)),
        "steps": (grid, grid._steps_from_zero, (x, *affine_parameters)),
        "weights": (grid, grid._move_to_grid, (weight, *by_channel, 0, 15)),
        "some": (grid, grid._move_some_to_grid, (some.rows(x), *chosen_affine)),
        "rounding": (
            rounding,
            rounding._soften,
            (weight, weight.clone(), *by_channel, weight.new_empty(()), 0, 15),
        ),
        "codes": (
            granularity_points,
            granularity_points._clamped_codes,
            (attention, scale, middles, number(2, dtype=torch.int32), 16),
        ),
        "points": (granularity_points, granularity_points._to_points, (attention, *points)),
        "whole points": (
            granularity_points,
            granularity_points._whole_points,
            (attention, *points, number(2.0**20)),
        ),
        "some points": (
            granularity_points,
            granularity_points._quantize_some,
            (some.rows(attention), *points_of_some),
        ),
        "softmax": (portable, attention_operator._softmax, (rows, rows[:, :1])),
        "gelu": (portable, activation._gelu, (x,)),
        "norm": (portable, norm._norm_of_rows, (rows, channels, channels, 1e-6)),
        "rescaled": (whole, whole._rescaled, (rows, channels, channels)),
    }


def hard_arguments(function: Callable[..., Tensor]) -> Callable[..., object]:
    """What a function of the package names as hard to round."""
    while fused_by := getattr(function, "__wrapped__", None):
        # What is `unwatched` is wrapped once more.
        if any(isinstance(c.cell_contents, fused._Kernel) for c in function.__closure__ or ()):
            break
        function = fused_by
    (kernel,) = (
        cell.cell_contents
        for cell in function.__closure__ or ()
        if isinstance(cell.cell_contents, fused._Kernel)
    )
    assert kernel._hard is not None
    return kernel._hard


@pytest.mark.parametrize("name", list(flat_calls()))
def test_hard_numbers_show_a_kernel_that_does_not_round_right(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By quotients as products with reciprocals, and by products and sums rounded once."""
    module, function, arguments = flat_calls()[name]
    makes, plain = hard_arguments(function), function.__wrapped__  # type: ignore[attr-defined]
    sets = list(makes(*arguments))  # type: ignore[call-overload]
    assert sum(given[0].numel() for given in sets) >= 2**19
    for given in sets:
        assert [type(x) for x in given] == [type(x) for x in arguments]
    expected = [plain(*given) for given in sets]
    assert all(map(fused._same, [plain(*given) for given in sets], expected))
    if name == "rescaled":
        found = [
            (sums.double() * scale.double() + bias.double()).float() for sums, scale, bias in sets
        ]
    elif module is portable:
        monkeypatch.setattr(
            portable, "reciprocal", lambda x: x.double().pow(-1).mul(1 + 2e-8).float()
        )
        found = [plain(*given) for given in sets]
    else:
        monkeypatch.setattr(module, "divided", lambda x, divisor: x * divisor.reciprocal())
        found = [plain(*given) for given in sets]
    assert not all(map(fused._same, found, expected))


@needs_compiler
def test_a_kernel_that_divides_approximately_is_caught(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def approximately(x: Tensor, divisor: Tensor) -> Tensor:
        return x * divisor.reciprocal() if torch.compiler.is_compiling() else x / divisor

    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    monkeypatch.setattr(grid, "divided", approximately)
    steps = fused_exactly(hard.near_steps(scale_at=1))(grid._steps_from_zero.__wrapped__)  # type: ignore[attr-defined]
    x = torch.arange(FEWEST_ELEMENTS).float() * 0.9375
    with caplog.at_level(logging.WARNING):
        found = steps(x, torch.tensor(0.9375), torch.tensor(0.0), 0, 65_535)
    assert torch.equal(found, torch.arange(FEWEST_ELEMENTS).clamp(max=65_535).float())
    assert "gives other numbers on cpu" in caplog.text
