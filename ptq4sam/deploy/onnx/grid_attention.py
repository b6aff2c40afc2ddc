"""Attention over a square grid with decomposed relative positions, as ONNX nodes."""

from __future__ import annotations

from torch import Tensor

from ptq4sam.deploy.onnx.attention import Operands, attend
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.layers import array
from ptq4sam.sam.image_encoder import Attention, relative_rows, table_of_size

_FLOAT_BYTES = 4
_WHOLE_BYTES = 64 * 2**20
"""Logits up to this size are one tensor."""
_PIECE_BYTES = 16 * 2**20
"""Size of the pieces of larger ones: a global attention at 1024 px has 805 MB for ViT-B."""


def attend_in_grid(
    graph: Graph, attention: Attention, given: Operands, side: int, path: str
) -> str:
    """Attend in square grids of one side; logits of too many bytes piece by piece.

    A piece is some rows of the grid in one head.

    Args:
        graph: where nodes go.
        attention: owner of the relative positions and of the softmax quantizer.
        given: the operands, [grids, heads, side * side, head_dim] for query and value.
        side: of a grid.
        path: of the attention.

    Returns:
        [grids, heads, side * side, head_dim]; one grid where there are pieces.
    """
    positions = _Positions(graph, attention, side, path) if attention.use_rel_pos else None
    heads, tokens = attention.num_heads, side * side
    if _FLOAT_BYTES * heads * tokens * tokens <= _WHOLE_BYTES:
        return _attend(graph, attention, given, positions, slice(0, side), path)
    row_bytes = _FLOAT_BYTES * side * tokens
    allowed = max(1, _PIECE_BYTES // row_bytes)
    rows = max(number for number in range(1, side + 1) if side % number == 0 and number <= allowed)
    by_head = zip(
        *(
            graph.split(x, heads, 1, f"{path}.{role}.heads")
            for role, x in (("query", given.query), ("key", given.key), ("value", given.value))
        ),
        strict=True,
    )
    attended = []
    for head, (query, key, value) in enumerate(by_head):
        inner = f"{path}.heads.{head}"
        pieces = []
        for index, part in enumerate(graph.split(query, side // rows, 2, f"{inner}.query")):
            piece = slice(index * rows, (index + 1) * rows)
            operands = Operands(part, key, value)
            pieces.append(_attend(graph, attention, operands, positions, piece, f"{inner}.{index}"))
        attended.append(graph.node("Concat", pieces, f"{inner}.attended", axis=2))
    return graph.node("Concat", attended, f"{path}.attended", axis=1)


def _attend(
    graph: Graph,
    attention: Attention,
    given: Operands,
    positions: _Positions | None,
    rows: slice,
    path: str,
) -> str:
    """Attend from some rows of the grid to all of it."""
    if positions is None:
        return attend(graph, attention, given, path)

    def bias(logits: str, query: str) -> str:
        return positions.add(logits, query, rows, path)

    return attend(graph, attention, given, path, bias)


class _Positions:
    """Relative positions of an attention (ViTDet, section 3), added to its logits.

    Tables hold one row a distance; runtimes pick rows out once, when they load the file.
    """

    def __init__(self, graph: Graph, attention: Attention, side: int, path: str) -> None:
        self._graph, self._side, self._path = graph, side, path
        self._head_dim = attention.proj.in_features // attention.num_heads
        self._rows = self._distances(attention.rel_pos_h, f"{path}.rel_pos_h")
        columns = self._distances(attention.rel_pos_w, f"{path}.rel_pos_w")
        self._by_column = self._table(columns, slice(0, side), f"{path}.rel_pos_w")
        self._by_row: dict[int, str] = {}

    def add(self, logits: str, query: str, rows: slice, path: str) -> str:
        """Logits with positions.

        Args:
            logits: [grids, heads, queries, side * side].
            query: [grids, heads, queries, head_dim], unscaled.
            rows: of the grid, in which the queries are.
            path: of this piece.
        """
        graph, side, count = self._graph, self._side, rows.stop - rows.start
        if rows.start not in self._by_row:
            self._by_row[rows.start] = self._table(
                self._rows, rows, f"{self._path}.rel_pos_h.{rows.start}"
            )
        grid = graph.reshape(query, (0, -1, count, side, self._head_dim), f"{path}.query.grid")
        table = self._by_row[rows.start]
        by_row = graph.node("MatMul", [grid, table], f"{path}.bias_h")
        turned = graph.transpose(grid, (0, 1, 3, 2, 4), f"{path}.query.turned")
        by_column = graph.node("MatMul", [turned, self._by_column], f"{path}.bias_w.turned")
        by_column = graph.transpose(by_column, (0, 1, 3, 2, 4), f"{path}.bias_w")
        queries = count * side
        by_row = graph.reshape(by_row, (0, 0, queries, side, 1), f"{path}.bias_h.flat")
        by_column = graph.reshape(by_column, (0, 0, queries, 1, side), f"{path}.bias_w.flat")
        whole = graph.reshape(logits, (0, 0, queries, side, side), f"{path}.logits.grid")
        bias = graph.node("Add", [by_row, by_column], f"{path}.bias")
        placed = graph.node("Add", [whole, bias], f"{path}.logits.placed")
        return graph.reshape(placed, (0, 0, queries, side * side), f"{path}.logits.all")

    def _distances(self, table: Tensor, path: str) -> str:
        return self._graph.constant(path, array(table_of_size(table, self._side)))

    def _table(self, distances: str, queries: slice, path: str) -> str:
        """Positions of some queries on one axis: [queries, head_dim, keys]."""
        graph = self._graph
        chosen = relative_rows(self._side)[queries].numpy()
        name = f"distances.{self._side}.{queries.start}.{queries.stop}"
        rows = graph.node("Gather", [distances, graph.shared(name, chosen)], f"{path}.rows", axis=0)
        return graph.transpose(rows, (0, 2, 1), f"{path}.table")
