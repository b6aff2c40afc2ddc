"""Attention over a square grid with decomposed relative positions, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ptq4sam.deploy.onnx.attention import Operands, attend, attention_quantizer
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.layers import array
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.families.sam_vit.image_encoder import Attention
from ptq4sam.operators.bias import of_terms, relative_rows, table_digits, table_of_size

_FLOAT_BYTES = 4
_WHOLE_BYTES = 64 * 2**20
"""Logits up to this size are one tensor."""
_PIECE_BYTES = 16 * 2**20
"""Size of the pieces of larger ones: a global attention at 1024 px has 805 MB for ViT-B."""
_CHAIN_BYTES = 32 * 2**20
"""The same where OpenVINO has a long chain of nodes for each, whose compilation takes a second for
some thousand of them."""


def attend_in_grid(
    graph: Graph, attention: Attention, given: Operands, side: int, grids: int, path: str
) -> str:
    """Attend in square grids of one side; logits of too many bytes piece by piece.

    A piece is some rows of the grid in one head, or some of many small grids.

    Args:
        graph: where nodes go.
        attention: owner of the relative positions and of the softmax quantizer.
        given: the operands, [grids, heads, side * side, head_dim] for query and value.
        side: of a grid.
        grids: how many there are.
        path: of the attention.

    Returns:
        [grids, heads, side * side, head_dim]; one grid where its own logits are too many.
    """
    positions = _positions(graph, attention, given.steps, side, path)
    heads, tokens = attention.num_heads, side * side
    grid_bytes = _FLOAT_BYTES * heads * tokens * tokens
    if grid_bytes <= _WHOLE_BYTES:
        # OpenVINO joins the chain of a softmax's operations, ONNX Runtime goes through memory.
        groups = 1 if graph.signed else _groups(grids, grid_bytes)
        return _attend_in_groups(graph, attention, given, positions, side, groups, path)
    piece = _CHAIN_BYTES if graph.multiplies_steps else _PIECE_BYTES
    allowed = max(1, piece // (_FLOAT_BYTES * side * tokens))
    rows = max(number for number in range(1, side + 1) if side % number == 0 and number <= allowed)
    by_query = [given.query, *positions]
    by_head = [
        graph.split(x, heads, 1, f"{path}.heads.{number}")
        for number, x in enumerate([given.key, given.value, *by_query])
    ]
    attended = []
    for head, (key, value, *parts) in enumerate(zip(*by_head, strict=True)):
        inner = f"{path}.heads.{head}"
        pieces = [
            _attend(graph, attention, Operands(query, key, value), terms, side, f"{inner}.{index}")
            for index, (query, *terms) in enumerate(
                zip(
                    *(
                        graph.split(x, side // rows, 2, f"{inner}.parts.{number}")
                        for number, x in enumerate(parts)
                    ),
                    strict=True,
                )
            )
        ]
        attended.append(graph.node("Concat", pieces, f"{inner}.attended", axis=2))
    return graph.node("Concat", attended, f"{path}.attended", axis=1)


def _groups(grids: int, grid_bytes: int) -> int:
    """The fewest groups of as many grids whose logits are a piece."""
    return next(
        groups
        for groups in range(1, grids + 1)
        if grids % groups == 0 and (grids // groups * grid_bytes <= _PIECE_BYTES or groups == grids)
    )


def _attend_in_groups(
    graph: Graph,
    attention: Attention,
    given: Operands,
    positions: Sequence[str],
    side: int,
    groups: int,
    path: str,
) -> str:
    """Attend in some of the grids after the other."""
    if groups == 1:
        return _attend(graph, attention, given, positions, side, path)
    by_group = [
        graph.split(x, groups, 0, f"{path}.groups.{number}")
        for number, x in enumerate([given.query, given.key, given.value, *positions])
    ]
    attended = [
        _attend(
            graph, attention, Operands(query, key, value), terms, side, f"{path}.groups.{index}"
        )
        for index, (query, key, value, *terms) in enumerate(zip(*by_group, strict=True))
    ]
    return graph.node("Concat", attended, f"{path}.attended", axis=0)


def _attend(
    graph: Graph,
    attention: Attention,
    given: Operands,
    positions: Sequence[str],
    side: int,
    path: str,
) -> str:
    """Attend from some rows of the grid, in one head or all, to all of it."""
    keys = side * side
    if not positions:
        return attend(graph, attention, given, path, keys, parts=side)

    def placed(logits: str) -> str:
        # [grids, heads, queries, key row, key column]
        grid = graph.reshape(logits, (0, 0, 0, side, side), f"{path}.logits.grid")
        bias = graph.node("Add", positions, f"{path}.bias")
        both = graph.node("Add", [grid, bias], f"{path}.logits.placed")
        return graph.reshape(both, (0, 0, 0, side * side), f"{path}.logits.all")

    return attend(graph, attention, given, path, keys, placed, parts=side)


def _positions(
    graph: Graph, attention: Attention, query: str, side: int, path: str
) -> tuple[str, ...]:
    """Relative-position logits of both axes (ViTDet, section 3), from the unscaled query.

    Args:
        graph: where nodes go.
        attention: owner of the tables.
        query: in steps where it is quantized.
        side: of the grid.
        path: of the attention.

    Returns:
        By key row [grids, heads, queries, side, 1] and by key column [.., 1, side], to be added to
        each other and to the logits; nothing where the attention has none.
    """
    if not attention.use_rel_pos:
        return ()
    tokens, head_dim = side * side, attention.proj.in_features // attention.num_heads
    grid = graph.reshape(query, (0, 0, side, side, head_dim), f"{path}.query.grid")
    turned = graph.transpose(grid, (0, 1, 3, 2, 4), f"{path}.query.turned")
    by_row = _terms(graph, attention, grid, attention.rel_pos_h, side, f"{path}.rel_pos_h")
    by_column = _terms(graph, attention, turned, attention.rel_pos_w, side, f"{path}.rel_pos_w")
    by_column = graph.transpose(by_column, (0, 1, 3, 2, 4), f"{path}.bias_w")
    return (
        graph.reshape(by_row, (0, 0, tokens, side, 1), f"{path}.bias_h.flat"),
        graph.reshape(by_column, (0, 0, tokens, 1, side), f"{path}.bias_w.flat"),
    )


def _terms(
    graph: Graph, attention: Attention, query: str, positions: Tensor, side: int, path: str
) -> str:
    """What positions on one axis add, from a query whose grid has that axis third."""
    table, quantizer = table_of_size(positions, side), attention_quantizer(attention, "query")
    if quantizer is None or not graph.exact:
        return graph.node("MatMul", [query, _table(graph, table, side, path)], f"{path}.terms")
    digits, worth = table_digits(table)
    sums = [
        Traced(
            graph,
            graph.node(
                "MatMul", [query, _table(graph, digit, side, f"{path}.{place}")], f"{path}.sums"
            ),
            path,
        )
        for place, digit in enumerate(digits)
    ]
    return of_terms(sums, worth, float(quantizer.step)).name


def _table(graph: Graph, table: Tensor, side: int, path: str) -> str:
    """Positions on one axis: [queries, head_dim, keys].

    The file holds one row a distance; runtimes pick rows out once, when they load it.
    """
    distances = graph.parameter(path, array(table))
    rows = graph.shared(f"distances.{side}", relative_rows(side).cpu().numpy())
    chosen = graph.node("Gather", [distances, rows], f"{path}.rows", axis=0)
    return graph.transpose(chosen, (0, 2, 1), f"{path}.table")
