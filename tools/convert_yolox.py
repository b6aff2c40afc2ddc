"""Write the ONNX file of a YOLOX in its authors' .pth format (extra onnx).

    python tools/convert_yolox.py ckpt/yolox_l.pth ckpt/yolox_l.onnx

ptq4sam itself needs none: `--prompts yolox:FILE.pth` computes in torch. The file is laid out as the
authors' own export: input "images" [1, 3, 640, 640] (nano and tiny 416), output "output" that is
not decoded, for `--prompts onnx:ckpt/yolox_l.onnx`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ptq4sam.deploy.onnx.functions import lowers
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.lowering import lowered
from ptq4sam.deploy.onnx.traced import Traced, refused
from ptq4sam.deploy.targets.onnxruntime import DIALECT
from ptq4sam.files import replacing
from ptq4sam.prompts.yolox_network import folded
from ptq4sam.prompts.yolox_weights import load_yolox
from ptq4sam.terminal import guarded


@lowers("max_pool2d")
def _max_pool(
    x: Traced, kernel_size: Any, stride: Any = None, padding: Any = 0, **more: Any
) -> Traced:
    if more.get("dilation", 1) != 1 or more.get("ceil_mode") or more.get("return_indices"):
        raise refused(x, "pools otherwise than plainly")
    shape = F.max_pool2d(torch.empty(x.shape, device="meta"), kernel_size, stride, padding).shape

    def pair(side: Any) -> list[int]:
        return [side, side] if isinstance(side, int) else list(side)

    sides: dict[str, Any] = {
        "kernel_shape": pair(kernel_size),
        "strides": pair(stride or kernel_size),
    }
    return x.node("MaxPool", shape=shape, pads=pair(padding) * 2, **sides)


def convert_yolox(source: Path, target: Path, side: int | None = None) -> None:
    """Write the ONNX file of a YOLOX .pth file, at once or not at all.

    Args:
        source: the .pth file; see `load_yolox`.
        target: the ONNX file.
        side: height and width in pixels of the input, a multiple of 32; None for what the size was
            trained for (nano and tiny 416, else 640).

    Raises:
        CheckpointError: the weights are missing, damaged or not those of a YOLOX.
        ConfigError: the side is not possible.
        DependencyError: onnx is not installed.
    """
    network = folded(load_yolox(source, side))
    graph, shape = Graph("yolox", DIALECT), (1, 3, network.size.side, network.size.side)
    images = Traced(graph, graph.input("images", np.float32, shape), shape)
    with lowered(graph, network, "yolox"):
        rows = network(images)
    graph.output("output", rows.name, np.float32, rows.shape)
    with replacing(target) as temporary:
        graph.write(temporary, {})
    sys.stdout.write(f"{target} written: input {list(shape)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert a file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="YOLOX's .pth file, of any size")
    parser.add_argument("target", type=Path, help="the ONNX file to write")
    parser.add_argument(
        "--side", type=int, metavar="PIXELS", help="height and width of the input; multiple of 32"
    )
    parsed = parser.parse_args(arguments)

    def convert() -> int:
        convert_yolox(parsed.source, parsed.target, parsed.side)
        return 0

    return guarded(convert)


if __name__ == "__main__":
    raise SystemExit(main())
