from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.model.insertion import insert_quantizers
from ptq4sam.model.portable_layers import (
    PortableGELU,
    PortableLayerNorm,
    PortableLayerNorm2d,
    PortablePatches,
    portable_softmax,
)
from ptq4sam.quantization import fused
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.common import LayerNorm2d
from ptq4sam.sam.model import Sam
from tests.devices import on_devices


@torch.no_grad()
def in_inference(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def test_norms_are_torchs_but_for_last_bits() -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(50, 64) + 1
    norm = nn.LayerNorm(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(in_inference(PortableLayerNorm(norm), x), norm(x))

    square = x[:, :, None, None].expand(-1, -1, 2, 3)
    over_channels = LayerNorm2d(64)
    over_channels.load_state_dict(norm.state_dict())
    found = in_inference(PortableLayerNorm2d(over_channels), square)
    assert found.shape == square.shape
    torch.testing.assert_close(found, over_channels(square))


def test_patches_are_sums_of_digits() -> None:
    torch.manual_seed(0)
    source = nn.Conv2d(3, 8, 4, 4)
    x = torch.randn(2, 3, 8, 12)
    found = in_inference(PortablePatches(source), x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, source(x), rtol=1e-4, atol=1e-4)
    # Pixels beyond the bound are cut.
    torch.testing.assert_close(
        in_inference(PortablePatches(source), 100 * x),
        source((100 * x).clamp(-8, 8)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("make", [PortableGELU, lambda: PortableLayerNorm(nn.LayerNorm(8))])
def test_gradients_and_other_types_are_torchs(make: Callable[[], nn.Module]) -> None:
    module, x = make(), torch.randn(4, 8)
    own = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch."))
    learned = x.clone().requires_grad_()
    assert torch.equal(module(learned), own.forward(module, learned))
    assert module(learned).requires_grad
    with torch.no_grad():
        doubled = module.double()(x.double())
        torch.testing.assert_close(doubled, own.forward(module, x.double()), rtol=0, atol=0)


@on_devices
def test_kernels_give_the_same_bits_as_operations_one_by_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(2048, 768).to(device)
    norm = PortableLayerNorm(nn.LayerNorm(768)).to(device)
    functions: list[Callable[[Tensor], Tensor]] = [norm, PortableGELU(), portable_softmax]
    compiled = [in_inference(function, x) for function in functions]
    monkeypatch.setattr(fused._compiler, "_usable", {device.type: False})
    for function, wanted in zip(functions, compiled, strict=True):
        assert torch.equal(in_inference(function, x), wanted)


def test_a_quantized_sam_has_them_under_the_same_names(
    sam: Sam, make_scheme: Callable[..., Scheme]
) -> None:
    def kinds(model: nn.Module) -> set[type[nn.Module]]:
        return {type(module) for module in model.modules()}

    both = insert_quantizers(sam, make_scheme(4))
    plain = {nn.LayerNorm, LayerNorm2d}
    assert not plain & (kinds(both.image_encoder) | kinds(both.mask_decoder))
    assert isinstance(both.image_encoder.patch_embed.proj, PortablePatches)
    assert isinstance(both.image_encoder.blocks[0].mlp.act, PortableGELU)
    assert set(sam.state_dict()) <= set(both.state_dict())

    decoder = insert_quantizers(sam, make_scheme(4), quantize_encoder=False)
    assert plain <= kinds(decoder.image_encoder)
    assert not plain & kinds(decoder.mask_decoder)
    assert not isinstance(decoder.image_encoder.patch_embed.proj, PortablePatches)
