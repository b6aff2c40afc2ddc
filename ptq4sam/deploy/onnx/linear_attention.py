"""Quantized linear attention as ONNX nodes; a float one's own forward writes its own.

Products are of steps in every dialect: they are small, and a state has more bits than integer
kernels take.
"""

from __future__ import annotations

import torch

from ptq4sam.deploy.codes import uniform_grid
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.lowering import operator
from ptq4sam.deploy.onnx.sums import factor, sums_of_steps, worth_of_sums
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.onnx.values import codes_of, require_quantizing, steps_of
from ptq4sam.errors import DeployError
from ptq4sam.operators.linear_attention import QuantizedReluLinearAttention, quotients
from ptq4sam.quantization.portable import MOST_TERMS, apart, quotient, rounded_sum
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.quantization.whole import EXACT

_DIGIT = 2.0**11
"""Base of the two digits of a state's steps: sums of 64 products with 8 bits are exact."""


@operator(QuantizedReluLinearAttention)
def relu_linear_attention(
    graph: Graph, core: QuantizedReluLinearAttention, query: Traced, key: Traced, value: Traced
) -> Traced:
    """Queries [batch, heads, n, d] to what attends [batch, heads, n, value_dim].

    Raises:
        DeployError: there are too many keys or channels for exact sums.
    """
    path = graph.path
    places, head_dim = key.shape[2], key.shape[3]
    if places > MOST_TERMS or head_dim > EXACT / 255 / (_DIGIT / 2):
        raise DeployError(
            f"{path} sums {places} places and {head_dim} channels, sums are exact for {MOST_TERMS} "
            "and 64: export a model of smaller pictures"
        )
    q = _steps(query.relu(), core.query_quantizer, f"{path}.query")
    k = _steps(key.relu(), core.key_quantizer, f"{path}.key")
    v = _steps(value, core.value_quantizer, f"{path}.value")
    first, second, worth, unit = core.worths(places, head_dim)
    sums = sums_of_steps(k.transpose(-1, -2), v, first.largest, f"{path}.key_value")
    shape = (*k.shape[:2], head_dim, v.shape[3])
    products = k.new(worth_of_sums(sums, first), shape)
    keys = apart(k.sum(-2, keepdim=True)).transpose(-1, -2)
    state = torch.cat([products, apart(keys * factor(worth))], dim=-1)  # type: ignore[list-item]
    steps = _state_steps(state, core.state_quantizer, f"{path}.state_quantizer")  # type: ignore[arg-type]
    found = _of_queries(q, steps, second.largest, (*q.shape[:3], v.shape[3] + 1))
    attended = quotients(found[..., :-1], found[..., -1:], factor(unit))
    exact = graph.portable and all(x.exact for x in (query, key, value))
    graph.quantized(f"{path}.state_quantizer", exact)
    return Traced(graph, attended.name, attended.shape, exact=exact)


def _steps(x: Traced, quantizer: Quantizer, path: str) -> Traced:
    codes, behind = codes_of(x, quantizer, f"{path}_quantizer")
    return behind.of(steps_of(x.graph, codes, path))


def _state_steps(state: Traced, quantizer: Quantizer, path: str) -> Traced:
    require_quantizing(quantizer, path)
    grid = uniform_grid(quantizer)
    low, high = (float(code - grid.zero_point) for code in (grid.grid.qmin, grid.grid.qmax))
    return quotient(state, grid.scale).round().clamp(low, high)


def _of_queries(q: Traced, steps: Traced, largest: float, shape: tuple[int, ...]) -> Traced:
    """Sums of query steps times state steps; of digits where float32 would round them."""

    def product(digits: Traced) -> Traced:
        name = q.graph.node("MatMul", [q.name, digits.name], f"{q.graph.path}.query_state")
        return q.new(name, shape)

    if largest <= EXACT:
        return product(steps)
    high = (steps * (1 / _DIGIT)).round()
    low = steps - high * _DIGIT
    return rounded_sum([product(high) * _DIGIT, product(low)])
