"""Biases of logits by relative positions, as ONNX nodes."""

from __future__ import annotations

from torch import Tensor

from ptq4sam.deploy.onnx.attention import BIASES, Terms
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.onnx.values import array
from ptq4sam.operators.bias import (
    RelativePositions,
    TableBias,
    of_terms,
    relative_rows,
    table_digits,
    table_of_size,
)


def relative_positions(bias: RelativePositions, query: Traced, step: Tensor | None) -> Terms:
    """Relative-position logits of both axes (ViTDet, section 3), from the unscaled query.

    Returns:
        By key row [batch, heads, queries, rows, 1] and by key column [.., 1, columns].
    """
    rows, columns = bias.grid
    *batch, tokens, head_dim = query.shape
    grid = query.reshape(*batch, rows, columns, head_dim)
    by_row = _terms(grid, bias.tensors[0], rows, step, "rel_pos_h")
    turned = _terms(grid.permute(0, 1, 3, 2, 4), bias.tensors[1], columns, step, "rel_pos_w")
    by_column = turned.permute(0, 1, 3, 2, 4)
    return (
        by_row.reshape(*batch, tokens, rows, 1),
        by_column.reshape(*batch, tokens, 1, columns),
    )


def table_bias(bias: TableBias, query: Traced, _step: Tensor | None) -> Terms:
    """A logit for each head, query and key: [1, heads, queries, keys]."""
    table = bias.tensors[0][None]
    name = query.graph.tensor(table, f"{query.graph.path}.table")
    return (Traced(query.graph, name, table.shape),)


BIASES[RelativePositions] = relative_positions
BIASES[TableBias] = table_bias


def _terms(query: Traced, positions: Tensor, side: int, step: Tensor | None, name: str) -> Traced:
    """What positions on one axis add, from a query whose grid has that axis third."""
    graph, path = query.graph, f"{query.graph.path}.{name}"
    shape, table = (*query.shape[:4], side), table_of_size(positions, side)
    if step is None:
        product = graph.node(
            "MatMul", [query.name, _table(graph, table, side, path)], f"{path}.terms"
        )
        return Traced(graph, product, shape, exact=False)
    digits, worth = table_digits(table)
    sums = [
        graph.node(
            "MatMul", [query.name, _table(graph, digit, side, f"{path}.{place}")], f"{path}.sums"
        )
        for place, digit in enumerate(digits)
    ]
    traced = [Traced(graph, name, shape) for name in sums]
    # Beside heads the query has two axes of its grid and that of head_dim.
    each = step[..., None] if step.dim() else float(step)
    return of_terms(traced, worth, each).portable(query)


def _table(graph: Graph, table: Tensor, side: int, path: str) -> str:
    """Positions on one axis: [queries, head_dim, keys].

    The file holds one row a distance; runtimes pick rows out once, when they load it.
    """
    distances = graph.parameter(path, array(table))
    rows = graph.shared(f"distances.{side}", relative_rows(side).cpu().numpy())
    chosen = graph.node("Gather", [distances, rows], f"{path}.rows", axis=0)
    return graph.transpose(chosen, (0, 2, 1), f"{path}.table")
