"""Watch the products of tensors that a model computes.

torch compiles nothing while a dispatch mode is on, and gives up what it compiled before. So what
calls a compiled kernel, in which there is no product, does it `unwatched`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_ATTENTIONS = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_native_multi_head_attention",
)
_FIRST_TWO, _AFTER_A_SUM = (0, 1), (1, 2)
_OPERANDS: dict[Any, tuple[int, int]] = {
    _aten.mm: _FIRST_TWO,
    _aten.bmm: _FIRST_TWO,
    _aten.mv: _FIRST_TWO,
    _aten.dot: _FIRST_TWO,
    _aten.vdot: _FIRST_TWO,
    _aten._int_mm: _FIRST_TWO,
    _aten._trilinear: _FIRST_TWO,
    _aten.addmm: _AFTER_A_SUM,
    _aten.addmv: _AFTER_A_SUM,
    _aten.addbmm: _AFTER_A_SUM,
    _aten.baddbmm: _AFTER_A_SUM,
    # Whole attentions, those that this version of torch has.
    **{getattr(_aten, name): _FIRST_TWO for name in _ATTENTIONS if hasattr(_aten, name)},
    # Convolutions and others that torch counts floating-point operations of.
    **dict.fromkeys(set(flop_registry) - {_aten.addmm, _aten.baddbmm}, _FIRST_TWO),
}
"""Which arguments an operation multiplies with each other."""

Saw = Callable[[Tensor, Tensor, bool], None]
"""Receives both operands of a product, and whether it is a convolution."""


class ProductWatch(TorchDispatchMode):
    """Within the `with` block each product is shown to `saw` before it is computed.

    Matrix products, convolutions and attentions, however they were called; not what `unwatched`
    calls.
    """

    active: ClassVar[list[ProductWatch]] = []
    """What is on, the innermost last."""

    def __init__(self, saw: Saw) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._saw = saw

    def __enter__(self) -> ProductWatch:
        """Begin."""
        ProductWatch.active.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        ProductWatch.active.pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Show what is a product; cut up what is made of several operations."""
        kwargs = kwargs or {}
        packet = func.overloadpacket
        operands = _OPERANDS.get(packet)
        if operands is not None:
            first, second = (args[index] for index in operands)
            self._saw(first, second, "conv" in packet.__name__)
        elif _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)


@functools.cache
def _is_composite(operation: Any) -> bool:
    """Whether it reaches the mode in one piece (in inference mode) though it is made of others."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(
            operation.name(), "CompositeImplicitAutograd"
        )
    )


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Nothing is watched within the `with` block, or in the function that this decorates."""
    if not ProductWatch.active:
        yield
        return
    watch = ProductWatch.active[-1]
    watch.__exit__(None, None, None)
    try:
        yield
    finally:
        watch.__enter__()
