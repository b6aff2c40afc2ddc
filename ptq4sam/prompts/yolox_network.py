"""The networks of YOLOX (Ge et al., 2021, arXiv 2107.08430) for inference.

Parameters have their authors' names, so that the published .pth files are read as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

STRIDES = (8, 16, 32)
"""Pixels of the input that a cell of each output covers."""

_BATCH_NORM_EPS = 1e-3


@dataclass(frozen=True)
class YoloxSize:
    """One of the published sizes.

    Attributes:
        width: channels behind the stem; a multiple of 8.
        depth: bottlenecks in a stage (three times as many in the two middle ones).
        depthwise: 3x3 convolutions are depthwise separable.
        side: height and width in pixels of the inputs that it was trained for.
    """

    width: int
    depth: int
    depthwise: bool = False
    side: int = 640


SIZES = {
    "nano": YoloxSize(16, 1, depthwise=True, side=416),
    "tiny": YoloxSize(24, 1, side=416),
    "s": YoloxSize(32, 1),
    "m": YoloxSize(48, 2),
    "l": YoloxSize(64, 3),
    "x": YoloxSize(80, 4),
}
"""The published sizes by name."""


class ConvBlock(nn.Module):
    """Convolution that keeps height and width (but for its stride), batch norm, SiLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=_BATCH_NORM_EPS)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        activated: Tensor = self.act(self.bn(self.conv(x)))
        return activated


class SeparableBlock(nn.Module):
    """Depthwise block, then a pointwise one."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = ConvBlock(inputs, inputs, kernel, stride, groups=inputs)
        self.pconv = ConvBlock(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """As `ConvBlock.forward`."""
        mixed: Tensor = self.pconv(self.dconv(x))
        return mixed


def _block(size: YoloxSize, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """A 3x3 block of the kind that a size has."""
    kind = SeparableBlock if size.depthwise else ConvBlock
    return kind(inputs, outputs, 3, stride)


class Focus(nn.Module):
    """Every fourth pixel is a channel of its own, at half the resolution."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = ConvBlock(12, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, 3, h, w] to [n, outputs, h / 2, w / 2]."""
        top, bottom = x[..., ::2, :], x[..., 1::2, :]
        quarters = [top[..., ::2], bottom[..., ::2], top[..., 1::2], bottom[..., 1::2]]
        mixed: Tensor = self.conv(torch.cat(quarters, 1))
        return mixed


class Bottleneck(nn.Module):
    """1x1 and 3x3 block of one width, beside a shortcut or not."""

    def __init__(self, size: YoloxSize, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = ConvBlock(channels, channels, 1)
        self.conv2 = _block(size, channels, channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, h, w] to the same shape."""
        changed: Tensor = self.conv2(self.conv1(x))
        return changed + x if self.shortcut else changed


class CspLayer(nn.Module):
    """Cross-stage partial layer: half of the channels take the bottlenecks (Wang et al., 2020)."""

    def __init__(
        self, size: YoloxSize, inputs: int, outputs: int, depth: int, shortcut: bool = False
    ) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = ConvBlock(inputs, half, 1)
        self.conv2 = ConvBlock(inputs, half, 1)
        self.conv3 = ConvBlock(2 * half, outputs, 1)
        self.m = nn.Sequential(*(Bottleneck(size, half, shortcut) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, h, w] to [n, outputs, h, w]."""
        deep, beside = self.conv1(x), self.conv2(x)
        merged: Tensor = self.conv3(torch.cat([self.m(deep), beside], 1))
        return merged


class PyramidPooling(nn.Module):
    """Maxima over 5, 9 and 13 cells beside the cells themselves (He et al., 2015)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = ConvBlock(channels, half, 1)
        self.m = nn.ModuleList(nn.MaxPool2d(side, 1, side // 2) for side in (5, 9, 13))
        self.conv2 = ConvBlock(4 * half, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, h, w] to the same shape."""
        x = self.conv1(x)
        mixed: Tensor = self.conv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))
        return mixed


class Darknet(nn.Module):
    """CSPDarknet53 with the widths and depths of a size."""

    def __init__(self, size: YoloxSize) -> None:
        super().__init__()
        width, depth = size.width, size.depth
        self.stem = Focus(width)
        self.dark2 = self._stage(size, width, depth)
        self.dark3 = self._stage(size, 2 * width, 3 * depth)
        self.dark4 = self._stage(size, 4 * width, 3 * depth)
        self.dark5 = nn.Sequential(
            _block(size, 8 * width, 16 * width, stride=2),
            PyramidPooling(16 * width),
            CspLayer(size, 16 * width, 16 * width, depth),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of pixels [n, 3, h, w] at strides 8, 16, 32: 4, 8, 16 times `width` channels."""
        fine = self.dark3(self.dark2(self.stem(x)))
        middle = self.dark4(fine)
        return fine, middle, self.dark5(middle)

    @staticmethod
    def _stage(size: YoloxSize, inputs: int, depth: int) -> nn.Sequential:
        outputs = 2 * inputs
        return nn.Sequential(
            _block(size, inputs, outputs, stride=2),
            CspLayer(size, outputs, outputs, depth, shortcut=True),
        )


class FeaturePyramid(nn.Module):
    """Path aggregation: from coarse to fine and back (Liu et al., 2018), with its backbone."""

    def __init__(self, size: YoloxSize) -> None:
        super().__init__()
        fine, middle, coarse = (factor * size.width for factor in (4, 8, 16))
        self.backbone = Darknet(size)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.lateral_conv0 = ConvBlock(coarse, middle, 1)
        self.C3_p4 = CspLayer(size, 2 * middle, middle, size.depth)
        self.reduce_conv1 = ConvBlock(middle, fine, 1)
        self.C3_p3 = CspLayer(size, 2 * fine, fine, size.depth)
        self.bu_conv2 = _block(size, fine, fine, stride=2)
        self.C3_n3 = CspLayer(size, 2 * fine, middle, size.depth)
        self.bu_conv1 = _block(size, middle, middle, stride=2)
        self.C3_n4 = CspLayer(size, 2 * middle, coarse, size.depth)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Darknet.forward`."""
        fine, middle, coarse = self.backbone(x)
        narrow_coarse = self.lateral_conv0(coarse)
        merged = self.C3_p4(torch.cat([self.upsample(narrow_coarse), middle], 1))
        narrow_middle = self.reduce_conv1(merged)
        fine = self.C3_p3(torch.cat([self.upsample(narrow_middle), fine], 1))
        middle = self.C3_n3(torch.cat([self.bu_conv2(fine), narrow_middle], 1))
        coarse = self.C3_n4(torch.cat([self.bu_conv1(middle), narrow_coarse], 1))
        return fine, middle, coarse


class Head(nn.Module):
    """Decoupled head: classes on one branch, box and objectness on the other."""

    def __init__(self, size: YoloxSize, classes: int) -> None:
        super().__init__()
        inputs, width = [factor * size.width for factor in (4, 8, 16)], 4 * size.width
        self.stems = nn.ModuleList(ConvBlock(channels, width, 1) for channels in inputs)
        self.cls_convs = nn.ModuleList(self._branch(size, width) for _ in STRIDES)
        self.reg_convs = nn.ModuleList(self._branch(size, width) for _ in STRIDES)
        self.cls_preds = nn.ModuleList(nn.Conv2d(width, classes, 1) for _ in STRIDES)
        self.reg_preds = nn.ModuleList(nn.Conv2d(width, 4, 1) for _ in STRIDES)
        self.obj_preds = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in STRIDES)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features at the three strides to [n, cells, 5 + classes]; see `YoloxNetwork.forward`."""
        levels = []
        for level in range(len(STRIDES)):
            x = self.stems[level](features[level])
            classes = self.cls_preds[level](self.cls_convs[level](x))
            boxes = self.reg_convs[level](x)
            place, objectness = self.reg_preds[level](boxes), self.obj_preds[level](boxes)
            rows = torch.cat([place, objectness.sigmoid(), classes.sigmoid()], 1)
            levels.append(rows.flatten(2))
        return torch.cat(levels, 2).transpose(1, 2)

    @staticmethod
    def _branch(size: YoloxSize, width: int) -> nn.Sequential:
        return nn.Sequential(_block(size, width, width), _block(size, width, width))


class YoloxNetwork(nn.Module):
    """YOLOX from pixels to rows that are not decoded."""

    def __init__(self, size: YoloxSize, classes: int = 80) -> None:
        super().__init__()
        self.size, self.classes = size, classes
        self.backbone = FeaturePyramid(size)
        self.head = Head(size, classes)

    def forward(self, images: Tensor) -> Tensor:
        """One row a cell, those of stride 8 first, row by row.

        Args:
            images: BGR 0-255 [n, 3, height, width], multiples of 32.

        Returns:
            [n, cells, 5 + classes]: centre of the box in cells from the cell's corner, logarithm
            of its width and height in cells, objectness, class probabilities.
        """
        rows: Tensor = self.head(self.backbone(images))
        return rows


def folded(network: YoloxNetwork) -> YoloxNetwork:
    """A copy for inference whose batch norms are part of the convolutions before them."""
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, ConvBlock) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return network
