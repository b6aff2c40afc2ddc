"""EfficientViT-SAM with ranges as uneven as trained ones: a published study's schemes, and ours.

    python benchmarks/efficientvit_ranges.py efficientvit_sam_l0
    python benchmarks/efficientvit_ranges.py efficientvit_sam_xl0 --in depthwise fused

Weights are random. Sizes of channels behind each depthwise convolution, and with `--in fused`
inside each fused block of the backbone, are spread by a log-normal factor, and the weight that
reads them is divided by it, so that small channels count as much. Prints the relative error of the
embedding of one random picture, of models that were calibrated on another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import nn

from ptq4sam.families import build_sam, variant_of
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import STUDY, Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.shipped import ROOT

ROWS = (
    ("INT8 of the study", "study-int8", ()),
    ("Mix-MBC-Neck of the study", "study-mix-mbc-neck", ()),
    ("INT8, each tensor once", "int8", ()),
    ("ours, W8A8", "w8a8", ()),
    ("ours, W4A8", "w8a8", ("w_qconfig.bit=4",)),
    ("ours, W4A4", "w8a8", ("w_qconfig.bit=4", "a_qconfig.bit=4", "a_qconfig.symmetric=false")),
)
"""Titles, files in exp/efficientvit_sam, and what is changed of them."""
TITLES = tuple(title for title, _, _ in ROWS)


def uneven_sam(name: str, spread: float, kinds: Sequence[str]) -> Sam:
    """A SAM with batch normalisations, random weights and uneven channels.

    Args:
        name: of the variant.
        spread: deviation of the logarithms of sizes.
        kinds: "depthwise", "fused": where.
    """
    torch.manual_seed(0)
    sam = build_sam(name, folded=False).eval()
    for layer in sam.image_encoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=(1.5 / layer.weight[0].numel()) ** 0.5)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.bias, std=0.1)
    for path, layer in sam.named_modules():
        address = sam.description.address_of(path)
        if isinstance(layer, nn.Conv2d) and address is not None and address.kind in kinds:
            _spread(sam, path, spread)
    return sam


def _spread(sam: Sam, path: str, spread: float) -> None:
    """Multiply the results of a convolution channel by channel, and divide what reads them."""
    block, _, part = path.removesuffix(".conv").rpartition(".")
    if part == "point_conv" or ".neck." in path:
        return
    layer = sam.get_submodule(f"{block}.{part}")
    scaled = layer.conv if layer.norm is None else layer.norm
    sizes = (spread * torch.randn(len(scaled.weight))).exp()
    scaled.weight.mul_(sizes.reshape(-1, *[1] * (scaled.weight.dim() - 1)))
    scaled.bias.mul_(sizes)
    sam.get_submodule(f"{block}.point_conv.conv").weight.div_(sizes[:, None, None])


def folded(sam: Sam) -> Sam:
    """The same network as for inference."""
    same = build_sam(sam.name).eval()
    same.load_state_dict(variant_of(sam.name).family.fold(sam.state_dict()))
    return same


@torch.no_grad()
def errors(
    name: str, spread: float, kinds: Sequence[str], rows: Sequence[str] = TITLES
) -> dict[str, float]:
    """Relative errors of the embedding by title of a row; other arguments as for `uneven_sam`."""
    whole = uneven_sam(name, spread, kinds)
    plain = folded(whole)
    side, prompts = plain.geometry.encoder_side, plain.geometry.prompt_side
    pictures = torch.randn(2, 1, 3, side, side)
    items = [CalibrationItem(pictures[0], torch.tensor([[0.1, 0.1, 0.7, 0.8]]) * prompts)]
    exact = plain.image_encoder(pictures[1])
    found = {}
    for title, file, changes in ROWS:
        if title not in rows:
            continue
        read = Scheme.from_yaml(ROOT / "exp" / "efficientvit_sam" / f"{file}.yaml")
        scheme = read.with_overrides(*changes)
        quantized = quantize_sam(whole if scheme.compat == STUDY else plain, items, scheme)
        found[title] = float((quantized.image_encoder(pictures[1]) - exact).norm() / exact.norm())
        sys.stdout.write(f"{name}, {title}: error {found[title]:.3f}\n")
        sys.stdout.flush()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Quantize by each row, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--spread", type=float, default=1.5, help="of the logarithms of sizes")
    parser.add_argument(
        "--in",
        dest="kinds",
        nargs="+",
        default=["depthwise"],
        choices=["depthwise", "fused"],
        help="where channels are uneven",
    )
    parser.add_argument("--rows", nargs="+", default=TITLES, choices=TITLES, help="some alone")
    given = parser.parse_args(arguments)
    errors(given.model, given.spread, given.kinds, given.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
