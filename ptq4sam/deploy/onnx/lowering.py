"""A module's own forward on traced tensors: operators are lowered by a registry keyed by type.

A module whose type is registered is an operator, and its nodes are written by what is registered.
Any other module runs its own forward, whose functions are those of `functions.py`. What is in
neither is an error that names the module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from ptq4sam.deploy.onnx.graph import Graph

OPERATORS: dict[type[nn.Module], Callable[..., Any]] = {}
"""What writes an operator: called with the graph, the module and what its forward is called with.

Types are exact: a subclass may compute something else.
"""

Lower = TypeVar("Lower", bound=Callable[..., Any])


def operator(*types: type[nn.Module]) -> Callable[[Lower], Lower]:
    """Register what writes operators of some types."""

    def register(lower: Lower) -> Lower:
        OPERATORS.update(dict.fromkeys(types, lower))
        return lower

    return register


@contextlib.contextmanager
def lowered(graph: Graph, root: nn.Module, path: str) -> Iterator[None]:
    """Within it a module and all below it write nodes when they are called with traced tensors.

    Args:
        graph: where nodes go.
        root: the module.
        path: of it in the model.
    """
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        graph.names_of_tensors[id(tensor)] = f"{path}.{name}"
    modules = {f"{path}.{name}" if name else path: x for name, x in root.named_modules()}
    try:
        for inner, module in modules.items():
            own: dict[str, object] = module.__dict__
            own["forward"] = functools.partial(_run, graph, module, inner, module.forward)
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)


def _run(
    graph: Graph,
    module: nn.Module,
    path: str,
    forward: Callable[..., Any],
    *inputs: Any,
    **options: Any,
) -> Any:
    lower = OPERATORS.get(type(module))
    outer, graph.path = graph.path, path
    try:
        return (
            forward(*inputs, **options)
            if lower is None
            else lower(graph, module, *inputs, **options)
        )
    finally:
        graph.path = outer
