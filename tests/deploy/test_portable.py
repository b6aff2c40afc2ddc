"""Portable functions give torch's bits in every runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.points import cut_points
from ptq4sam.quantization import portable
from tests.deploy.runtime_graphs import RUNTIMES, dialect, given, run_graph

Function = Callable[..., Any]


def norm(x: Any, weight: Any, bias: Any) -> Any:
    return portable.layer_norm(x, 96, weight, bias, 1e-6)


def whole_digits(x: Any) -> Any:
    return portable.of_digits(*portable.digits((x * 1e5).clamp(-(2.0**20), 2.0**20).round()))


def waves(x: Any) -> Any:
    sine, cosine = portable.turn(x)
    return sine + cosine * 2.0


def pieces(x: Any) -> Any:
    return portable.rounded_sum([x * 4096.0, x.abs() * 64.0, x])


CASES: dict[str, tuple[Function, float]] = {
    "softmax": (portable.softmax, 5.0),
    "flat softmax": (portable.softmax, 1e-3),
    "exp": (lambda x: portable.exp_minus(x.abs()), 9.0),
    "gelu": (portable.gelu, 2.0),
    "norm": (norm, 3.0),
    "digits": (whole_digits, 3.0),
    "turn": (waves, 2.0),
    "quotient": (lambda x: portable.quotient(x, 0.0371), 40.0),
    "rounded sum": (pieces, 3.0),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("case", CASES)
def test_runtimes_compute_the_same_bits(case: str, runtime: str, tmp_path: Path) -> None:
    function, spread = CASES[case]
    torch.manual_seed(1)
    inputs = [spread * torch.randn(3, 700, 96)]
    if case == "norm":
        inputs += [torch.randn(96), torch.randn(96)]
    graph = Graph("portable", dialect(runtime))
    traced = [given(graph, x, f"x{n}") for n, x in enumerate(inputs)]
    graph.output("y", function(*traced).name, np.float32, inputs[0].shape)
    values = {f"x{n}": x.numpy() for n, x in enumerate(inputs)}
    found = run_graph(graph, runtime, tmp_path, values)[0]
    np.testing.assert_array_equal(found, function(*inputs).numpy())


@pytest.mark.parametrize(
    ("function", "exact", "error"),
    [
        (portable.softmax, lambda x: x.double().softmax(-1), 2e-5),
        (portable.gelu, lambda x: torch.nn.functional.gelu(x.double()), 2e-6),
        (
            lambda x: portable.layer_norm(x, 96, torch.tensor(1.3), torch.tensor(0.2), 1e-6),
            lambda x: torch.nn.functional.layer_norm(x.double(), (96,), eps=1e-6) * 1.3 + 0.2,
            4e-6,
        ),
        (
            lambda x: torch.stack(portable.turn(x)),
            lambda x: torch.stack(
                [(2 * torch.pi * x.double()).sin(), (2 * torch.pi * x.double()).cos()]
            ),
            2e-6,
        ),
    ],
)
def test_functions_are_what_they_are_called(
    function: Function, exact: Function, error: float
) -> None:
    torch.manual_seed(2)
    x = 3 * torch.randn(200, 96)
    assert float((function(x) - exact(x)).abs().max()) < error


@pytest.mark.parametrize("divisor", [0.0371, 1.3e-3, 0.5, 2.7e-5, 3.1])
def test_quotients_are_rounded_right(divisor: float) -> None:
    torch.manual_seed(3)
    scale = torch.tensor(divisor)
    middles = (torch.arange(-300, 300) + 0.5) * scale
    beside = [torch.nextafter(middles, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    x = torch.cat([100 * scale * torch.randn(100_000), middles, *beside])
    assert torch.equal(portable.quotient(x, divisor), x / scale)
    assert float(portable.quotient(torch.tensor(1e30), divisor)) == portable.FIXED


def test_divisors_of_a_tensor_spread() -> None:
    torch.manual_seed(3)
    divisors = torch.tensor([0.0371, 2.7e-5, 3.1])[:, None, None]
    x = 100 * divisors * torch.randn(2, 3, 40, 50)
    assert torch.equal(portable.quotient(x, divisors), x / divisors)


def test_sums_of_pieces_are_rounded_once() -> None:
    torch.manual_seed(4)
    high, low = torch.randint(-(2**23), 2**23, (2, 10_000)).float()
    wanted = (high.double() * 2.0**12 + low.double()).float()
    assert torch.equal(portable.rounded_sum([high * 2.0**12, low]), wanted)


def test_sums_do_not_depend_on_the_order() -> None:
    torch.manual_seed(5)
    x = torch.randn(50, 768) * torch.logspace(-4, 4, 50)[:, None]
    shuffled = x[:, torch.randperm(768)]
    assert torch.equal(portable.whole_sum(x), portable.whole_sum(shuffled))
    exact = x.double().sum(-1, keepdim=True)
    error = (portable.whole_sum(x) - exact).abs() / x.abs().amax(-1, keepdim=True)
    assert float(error.max()) < 1e-5
    order = torch.randperm(768)
    shares = portable.softmax(x)
    assert torch.equal(shares[:, order], portable.softmax(x[:, order]))


def test_points_are_cut_so_that_sums_are_exact() -> None:
    points = torch.tensor([2**30, 759250125, 2**29, 12345, 1, 0])
    pieces = cut_points(points, largest=3.0 * 2**30 * 127, terms=4096, value=127.0)
    assert len(pieces) > 2
    assert torch.equal(sum((p * int(worth) for p, worth in pieces), start=0 * points), points)
    for piece, _ in pieces[1:]:
        assert int(piece.max()) * 4096 * 127 <= 2**24
    assert [worth for _, worth in cut_points(points, 2.0**20, 64, 7.0)] == [1.0]
