"""Write the ONNX file of a YOLOX in its authors' .pth format, with nothing but torch.

    python tools/convert_yolox.py ckpt/yolox_l.pth ckpt/yolox_l.onnx

The file is laid out as their own export: input "images" [1, 3, 640, 640] (nano and tiny 416),
output "output" that is not decoded, for `--prompts onnx:ckpt/yolox_l.onnx`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ptq4sam.prompts.yolox_export import convert_yolox
from ptq4sam.terminal import guarded


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
