"""Channels behind depthwise convolutions that are of very different size: INT8 that holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ptq4sam
from ptq4sam.deploy.onnx.encoder import encoder_graph
from ptq4sam.errors import DeployError
from ptq4sam.families import VARIANTS
from ptq4sam.methods.channel_scales import factors_of
from ptq4sam.methods.channel_sizes import Seen
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.model.switches import Switches
from ptq4sam.operators.activation import PortableChannelGELU
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from tests.deploy.runtime_graphs import RUNTIMES, dialect, run_graph
from tests.families.efficientvit.conftest import TINY, TINY_VARIANT, tiny_sam
from tests.tiny_runs import SCHEMES

SPREAD = 1.5
"""Of the logarithms of channels' sizes behind a depthwise convolution."""


@pytest.fixture(scope="module")
def uneven() -> Sam:
    """The small SAM, with channels behind depthwise convolutions as uneven as trained ones.

    What is small there counts as much as what is large: the weight that reads it is larger.
    """
    with torch.random.fork_rng(), torch.no_grad():
        sam = tiny_sam()
        generator = torch.Generator().manual_seed(3)
        for name, module in sam.named_modules():
            if name.endswith("depth_conv.conv"):
                sizes = (SPREAD * torch.randn(len(module.weight), generator=generator)).exp()
                module.weight.mul_(sizes[:, None, None, None])
                module.bias.mul_(sizes)
                reader = name.replace("depth_conv", "point_conv")
                sam.get_submodule(reader).weight.div_(sizes[:, None, None])
        return sam


def scheme(*more: str) -> Scheme:
    read = Scheme.from_yaml(SCHEMES / "efficientvit_sam" / "int8.yaml")
    return read.with_overrides("float_weights=float32", *more)


@pytest.fixture(scope="module")
def scaled(uneven: Sam, items: list[CalibrationItem]) -> QuantizedSam:
    with torch.enable_grad():
        return quantize_sam(uneven, items, scheme("methods=[channel-scales]"))


XL = replace(
    TINY,
    widths=(8, 8, 16, 16, 32, 32),
    depths=(0, 1, 1, 1, 1, 1),
    kinds=("residual", "fused", "fused", "fused", "attention", "attention"),
    expansions=(1, 2, 2, 2, 2, 2),
    neck_stages=(5, 4, 3),
    neck_expansion=2,
    image_size=128,
    prompt_scale=1,
)
"""As XL0: fused blocks in three stages."""


@pytest.fixture(scope="module")
def uneven_xl() -> Sam:
    """A small XL, with channels inside fused blocks that are uneven."""
    with torch.random.fork_rng(), torch.no_grad():
        sam = tiny_sam(XL)
        generator = torch.Generator().manual_seed(4)
        for name, module in sam.named_modules():
            if name.endswith("spatial_conv.conv"):
                sizes = (SPREAD * torch.randn(len(module.weight), generator=generator)).exp()
                module.weight.mul_(sizes[:, None, None, None])
                module.bias.mul_(sizes)
                reader = name.replace("spatial_conv", "point_conv")
                sam.get_submodule(reader).weight.div_(sizes[:, None, None])
        return sam


@pytest.fixture(scope="module")
def item_of_xl() -> CalibrationItem:
    pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(6))
    return CalibrationItem(pixels, torch.tensor([[8.0, 8, 80, 80]]))


def test_fused_blocks_of_an_xl_hold_too(uneven_xl: Sam, item_of_xl: CalibrationItem) -> None:
    def quantized(*more: str) -> QuantizedSam:
        with torch.enable_grad():
            return quantize_sam(uneven_xl, [item_of_xl], scheme(*more))

    plain, scaled = quantized(), quantized("methods=[channel-scales]")
    # Two of three stages each, and the neck's.
    fused = [name for name in scaled.applied["channel-scales"] if "local_module" not in name]
    assert len([name for name in fused if "inverted" not in name]) >= 7
    before, after = (error(sam, uneven_xl, item_of_xl) for sam in (plain, scaled))
    assert after < 0.5 * before, (before, after)
    # 16-bit activations in these blocks alone spare a part of it, and go to no device.
    wide = quantized("units={mask_decoder.transformer: float, any:all:all:fused: w8a16}")
    spared = error(wide, uneven_xl, item_of_xl)
    assert spared < 0.75 * before, (before, spared)
    bits = {
        quantizer.grid.bits
        for path, quantizer in quantizers(wide)
        if "spatial_conv" in path and "input_quantizer" in path
    }
    assert bits == {16}
    with pytest.raises(DeployError, match="has 16 bits, integer kernels take up to 8"):
        encoder_graph(wide, dialect("onnxruntime"))


def test_fused_blocks_have_the_simulations_bits(
    uneven_xl: Sam, item_of_xl: CalibrationItem, tmp_path: Path
) -> None:
    with torch.enable_grad():
        model = quantize_sam(uneven_xl, [item_of_xl], scheme("methods=[channel-scales]"))
    graph = encoder_graph(model, dialect("onnxruntime"))
    assert graph.exact
    pixels = item_of_xl.pixels
    (found,) = run_graph(graph, "onnxruntime", tmp_path, {"image": pixels.numpy()})
    np.testing.assert_array_equal(found, model.image_encoder(pixels).numpy())


def test_reconstruction_of_blocks_helps(uneven: Sam, items: list[CalibrationItem]) -> None:
    """Of W4A8 with scales: the rounding of an MBConv's three weights is learned at once."""
    four = ("methods=[channel-scales]", "w_qconfig.bit=4")

    def at(*more: str) -> QuantizedSam:
        with torch.enable_grad():
            return quantize_sam(uneven, items[:1], scheme(*four, *more), seed=1)

    nearest = error(at(), uneven, items[0])
    learned = at(
        "w_qconfig.quantizer=AdaRoundFakeQuantize",
        "recon={learn_scale: false, iters: 60, rounding_lr: 0.02, drop_prob: 0.5}",
    )
    assert error(learned, uneven, items[0]) < 0.9 * nearest


def error(sam: Sam, exact: Sam, item: CalibrationItem) -> float:
    expected = exact.image_encoder(item.pixels)
    found = sam.image_encoder(item.pixels)
    return float((found - expected).norm() / expected.norm())


def test_errors_of_the_embedding_fall(
    uneven: Sam, scaled: QuantizedSam, items: list[CalibrationItem]
) -> None:
    with torch.enable_grad():
        plain = quantize_sam(uneven, items, scheme())
    before, after = error(plain, uneven, items[0]), error(scaled, uneven, items[0])
    assert len([n for n in scaled.applied["channel-scales"] if ".stages.3." in n]) == 2
    assert len([n for n in scaled.applied["channel-scales"] if ".stages.4." in n]) == 2
    assert before > 0.3
    assert after < 0.25 * before, (before, after)


def test_the_float_model_stays_bit_for_bit(
    uneven: Sam, scaled: QuantizedSam, items: list[CalibrationItem]
) -> None:
    factors = [m.factors for m in scaled.modules() if isinstance(m, PortableChannelGELU)]
    assert any((own != 1).any() for own in factors)
    assert all((own.log2() == own.log2().round()).all() for own in factors)
    pixels = items[0].pixels
    with Switches(scaled, uneven).only(()):
        off = scaled.image_encoder(pixels)
    with torch.enable_grad():
        plain = quantize_sam(uneven, items, scheme())
    with Switches(plain, uneven).only(()):
        assert off.equal(plain.image_encoder(pixels))
    torch.testing.assert_close(off, uneven.image_encoder(pixels), atol=1e-4, rtol=0)


def test_it_is_audited_and_saved(
    scaled: QuantizedSam,
    items: list[CalibrationItem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(VARIANTS, "tiny_efficientvit", TINY_VARIANT)
    item = items[0]

    def forward(sam: Sam) -> tuple[Tensor, ...]:
        return sam.decode(sam.embed(item.pixels), None, item.boxes, None, True)

    report = audit(scaled, lambda: forward(scaled))
    assert report.passed, "\n".join(report.lines())
    ptq4sam.save(scaled, tmp_path / "tiny.safetensors")
    again = ptq4sam.load(tmp_path / "tiny.safetensors")
    assert all(a.equal(b) for a, b in zip(forward(again), forward(scaled), strict=True))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtimes_have_the_simulations_bits(
    scaled: QuantizedSam, items: list[CalibrationItem], runtime: str, tmp_path: Path
) -> None:
    pixels = items[1].pixels
    graph = encoder_graph(scaled, dialect(runtime))
    assert graph.exact
    (found,) = run_graph(graph, runtime, tmp_path, {"image": pixels.numpy()})
    np.testing.assert_array_equal(found, scaled.image_encoder(pixels).numpy())


def test_factors_bring_channels_to_one_size() -> None:
    seen = Seen(4)
    seen.add(torch.nn.Identity(), (torch.tensor([[8.0, 0.5, -2.0, 0.0], [1.0, 0.1, 1.0, 0.0]]),))
    # Sizes of 8, 1/2 and 2, whose geometric mean is 2; a channel of zeros keeps its size.
    assert factors_of(seen, 1.0).tolist() == [0.25, 4.0, 1.0, 1.0]
    assert factors_of(seen, 0.5).tolist() == [0.5, 2.0, 1.0, 1.0]
