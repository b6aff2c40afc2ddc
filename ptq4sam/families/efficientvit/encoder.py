"""EfficientViT as the image encoder of a SAM.

Zhang et al., "EfficientViT-SAM: Accelerated Segment Anything Model Without Accuracy Loss" (2024).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

from torch import Tensor, nn

from ptq4sam.families.efficientvit.layers import (
    NORM_EPS,
    ConvNorm,
    FusedMBConv,
    LiteMLA,
    MBConv,
    ResBlock,
)
from ptq4sam.families.efficientvit.sizes import EfficientViTSize
from ptq4sam.operators.norm import LayerNorm2d
from ptq4sam.operators.resizing import BicubicResize
from ptq4sam.sam.stages import Stage, State, run_stages

_FASTER = 4
"""How many times wider the inside of a halving block is than that of others of its stage."""


class Around(nn.Module):
    """A unit, to whose answer its input is added or not."""

    def __init__(self, main: nn.Module, residual: bool = True) -> None:
        super().__init__()
        self.main, self.residual = main, residual

    def stages(self) -> list[Stage]:
        """The unit; the state's first tensor is what it changes."""
        return [Stage("main", self.main, _first, _added if self.residual else _instead)]


class AttentionBlock(nn.Module):
    """Linear attention, then an MBConv, each with its input added."""

    def __init__(
        self, dim: int, head_dim: int, kernel_size: int, expansion: float, folded: bool
    ) -> None:
        super().__init__()
        self.context_module = Around(LiteMLA(dim, head_dim, kernel_size, folded))
        self.local_module = Around(MBConv(dim, dim, 1, expansion, folded))

    def stages(self) -> list[Stage]:
        """Both units; the state's first tensor is what they change."""
        parts = {"context_module": self.context_module, "local_module": self.local_module}
        return [stage.below(name) for name, part in parts.items() for stage in part.stages()]


class Blocks(nn.Module):
    """Blocks one after the other."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(blocks)

    def stages(self) -> list[Stage]:
        """All units; the state's first tensor is what they change."""
        stages: list[Stage] = []
        for index, block in enumerate(self.op_list):
            name = f"op_list.{index}"
            if isinstance(block, Around | AttentionBlock):
                stages += [stage.below(name) for stage in block.stages()]
            else:
                stages.append(Stage(name, block, _first, _instead))
        return stages


class Backbone(nn.Module):
    """[batch, 3, height, width] to a map for each stage, which halves the sides."""

    def __init__(self, size: EfficientViTSize, folded: bool) -> None:
        super().__init__()
        first = size.widths[0]
        stem: list[nn.Module] = [ConvNorm(3, first, 3, 2, activated=True, folded=folded)]
        stem += [Around(ResBlock(first, folded)) for _ in range(size.depths[0])]
        later = [_stage(size, index, folded) for index in range(1, len(size.widths))]
        self.stages = nn.ModuleList(map(Blocks, [stem, *later]))


def _stage(size: EfficientViTSize, index: int, folded: bool) -> list[nn.Module]:
    """The blocks of a stage but the first one."""
    kind, expansion, depth = size.kinds[index], size.expansions[index], size.depths[index]
    before, width = size.widths[index - 1 : index + 1]
    block: type[FusedMBConv] | type[MBConv] = FusedMBConv if kind == "fused" else MBConv
    halving: nn.Module = Around(
        block(before, width, 2, _FASTER * expansion, folded), residual=False
    )
    if kind == "attention":
        make: Callable[[], nn.Module] = partial(
            AttentionBlock, width, size.head_dim, size.attention_kernel, expansion, folded
        )
    else:
        make = lambda: Around(block(width, width, 1, expansion, folded))  # noqa: E731
    return [halving, *(make() for _ in range(depth))]


class Join(nn.Module):
    """A stage's output, brought to the width and the size of the embedding."""

    def __init__(self, dim: int, out_dim: int, grid: int, folded: bool) -> None:
        super().__init__()
        self.op_list = nn.ModuleList([ConvNorm(dim, out_dim, folded=folded)])
        self.resize = BicubicResize((grid, grid))

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, dim, rows, columns] to [batch, out_dim, grid, grid]."""
        resized: Tensor = self.resize(self.op_list[0](x))
        return resized


class Neck(nn.Module):
    """Maps of several stages, the deepest first, to one.

    Args:
        dims: channels of each.
        out_dim: channels of the result.
        grid: its rows and columns.
        depth: fused MBConvs behind the join.
        expansion: of these.
        folded: without batch normalisations, as for inference.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        out_dim: int,
        grid: int,
        depth: int,
        expansion: float,
        folded: bool,
    ) -> None:
        super().__init__()
        self.input_ops = nn.ModuleList(Join(dim, out_dim, grid, folded) for dim in dims)
        middle = [Around(FusedMBConv(out_dim, out_dim, 1, expansion, folded)) for _ in range(depth)]
        self.middle = Blocks(list(middle))
        self.output_ops = nn.ModuleList([Blocks([ConvNorm(out_dim, out_dim, bias=True)])])

    def stages(self) -> list[Stage]:
        """All units.

        The state before them is (deepest map, *others from the shallowest), behind them (map,).
        """
        joins = [
            Stage(f"input_ops.{index}", join, _first if index == 0 else _last, _joined(index))
            for index, join in enumerate(self.input_ops)
        ]
        output = cast(Blocks, self.output_ops[0])
        return [
            *joins,
            *(stage.below("middle") for stage in self.middle.stages()),
            *(stage.below("output_ops.0") for stage in output.stages()),
        ]


class EfficientViT(nn.Module):
    """[batch, 3, height, width] to [batch, prompt_dim, grid, grid], with random weights.

    Args:
        size: of the model.
        folded: without batch normalisations, as for inference.
    """

    def __init__(self, size: EfficientViTSize, folded: bool = True) -> None:
        super().__init__()
        self.neck_stages = size.neck_stages
        self.backbone = Backbone(size, folded)
        self.neck = Neck(
            tuple(size.widths[stage] for stage in size.neck_stages),
            size.prompt_dim,
            size.grid,
            size.neck_depth,
            size.neck_expansion,
            folded,
        )
        self.norm = LayerNorm2d(size.prompt_dim, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Embed normalised, padded images; see the class for shapes."""
        return run_stages(self.stages(), self.begin(x))[0]

    def begin(self, x: Tensor) -> State:
        """The state before the first stage, from images."""
        return (x,)

    def stages(self) -> list[Stage]:
        """All units in order; the state behind them is the embedding.

        Between them it is the map that is changed, and those that wait for the neck.
        """
        stages: list[Stage] = []
        deepest = self.neck_stages[0]
        for index, blocks in enumerate(self.backbone.stages[: deepest + 1]):
            own = [s.below(f"backbone.stages.{index}") for s in cast(Blocks, blocks).stages()]
            if index in self.neck_stages[1:]:
                own[-1] = _keeping(own[-1])
            stages += own
        stages += [stage.below("neck") for stage in self.neck.stages()]
        return [*stages, Stage("norm", self.norm, _first, _instead)]


def _first(state: State) -> State:
    return state[:1]


def _last(state: State) -> State:
    return state[-1:]


def _instead(state: State, answer: Tensor) -> State:
    return (answer, *state[1:])


def _added(state: State, answer: Tensor) -> State:
    return (state[0] + answer, *state[1:])


def _keeping(stage: Stage) -> Stage:
    """The same stage, whose result also waits for the neck."""

    def leave(state: State, answer: Tensor) -> State:
        changed, *others = stage.leave(state, answer)
        return (changed, *others, changed)

    return Stage(stage.name, stage.unit, stage.enter, leave)


def _joined(index: int) -> Callable[[State, Tensor], State]:
    """What is behind a join: the first one's answer stands alone, others' are added to it."""
    return _instead if index == 0 else lambda state, answer: (state[0] + answer, *state[1:-1])
