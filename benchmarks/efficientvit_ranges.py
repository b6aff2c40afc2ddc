"""INT8 of EfficientViT-SAM with depthwise ranges as uneven as trained ones; scales or none.

    python benchmarks/efficientvit_ranges.py efficientvit_sam_l0

Weights are random. Sizes of channels behind each depthwise convolution are spread by a log-normal
factor, and the weight that reads them is divided by it, so that small channels count as much.
Prints the relative error of the embedding of one random picture.
"""

from __future__ import annotations

import argparse
import sys

import torch

from ptq4sam.families import build_sam
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.shipped import ROOT


def uneven_sam(name: str, spread: float) -> Sam:
    """A SAM with random weights and uneven channels; the same for the same arguments."""
    torch.manual_seed(0)
    sam = build_sam(name)
    for layer in sam.image_encoder.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.normal_(layer.weight, std=(1.5 / layer.weight[0].numel()) ** 0.5)
    for path, layer in sam.named_modules():
        if path.endswith("depth_conv.conv"):
            sizes = (spread * torch.randn(len(layer.weight))).exp()
            layer.weight.mul_(sizes[:, None, None, None])
            layer.bias.mul_(sizes)
            reader = sam.get_submodule(path.replace("depth_conv", "point_conv"))
            reader.weight.div_(sizes[:, None, None])
    return sam


@torch.no_grad()
def main() -> int:
    """Quantize twice, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--spread", type=float, default=1.5, help="of the logarithms of sizes")
    given = parser.parse_args()
    sam = uneven_sam(given.model, given.spread)
    side, prompts = sam.geometry.encoder_side, sam.geometry.prompt_side
    pictures = torch.randn(2, 1, 3, side, side)
    items = [CalibrationItem(pictures[0], torch.tensor([[0.1, 0.1, 0.7, 0.8]]) * prompts)]
    exact = sam.image_encoder(pictures[1])
    read = Scheme.from_yaml(ROOT / "exp" / "efficientvit_sam" / "int8.yaml")
    for methods in ("[]", "[channel-scales]"):
        quantized = quantize_sam(sam, items, read.with_overrides(f"methods={methods}"))
        error = (quantized.image_encoder(pictures[1]) - exact).norm() / exact.norm()
        sys.stdout.write(f"{given.model}, methods {methods}: error {float(error):.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
