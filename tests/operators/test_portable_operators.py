from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.model.insertion import insert_quantizers
from ptq4sam.operators.activation import PortableGELU
from ptq4sam.operators.arithmetic import learning
from ptq4sam.operators.attention import portable_softmax
from ptq4sam.operators.convolution import PortableConv2d
from ptq4sam.operators.norm import LayerNorm2d, PortableLayerNorm, PortableLayerNorm2d
from ptq4sam.quantization import fused
from ptq4sam.quantization.scheme import Scheme
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
    found = in_inference(PortableConv2d(source), x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, source(x), rtol=1e-4, atol=1e-4)
    # Pixels beyond the bound are cut.
    torch.testing.assert_close(
        in_inference(PortableConv2d(source), 100 * x),
        source((100 * x).clamp(-8, 8)),
        rtol=1e-4,
        atol=1e-4,
    )


FORMS = [
    (PortableGELU(), nn.GELU()),
    (PortableGELU("tanh"), nn.GELU(approximate="tanh")),
    (PortableLayerNorm(nn.LayerNorm(8)), nn.LayerNorm(8)),
]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_gelu_is_torchs(approximate: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -1e4, 1e4])])
    own = nn.GELU(approximate=approximate)
    found = in_inference(PortableGELU.of(own), x)
    torch.testing.assert_close(found.double(), own(x.double()), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("module", "own"), FORMS)
def test_while_something_is_learned_they_are_torchs(module: nn.Module, own: nn.Module) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    with learning(module):
        found = module(x)
        assert torch.equal(found, own(x))
        assert found.requires_grad
    with torch.no_grad():
        doubled = copy.deepcopy(module).double()(x.double())
        torch.testing.assert_close(doubled, own.double()(x.double()), rtol=0, atol=0)
        own.float()


@pytest.mark.parametrize(("module", "own"), FORMS)
def test_gradients_of_a_caller_change_no_bits(module: nn.Module, own: nn.Module) -> None:
    x = 3 * torch.randn(400, 8)
    with torch.no_grad():
        expected = module(x)
    assert torch.equal(module(x.requires_grad_()), expected)
    assert not torch.equal(expected, own(x))


@on_devices
@pytest.mark.usefixtures("kernels")
def test_kernels_give_the_same_bits_as_operations_one_by_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(2048, 768).to(device)
    norm = PortableLayerNorm(nn.LayerNorm(768)).to(device)
    gelus = PortableGELU(), PortableGELU("tanh")
    functions: list[Callable[[Tensor], Tensor]] = [norm, *gelus, portable_softmax]
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
    assert isinstance(both.image_encoder.patch_embed.proj, PortableConv2d)
    assert isinstance(both.image_encoder.blocks[0].mlp.act, PortableGELU)
    assert set(sam.state_dict()) <= set(both.state_dict())

    decoder = insert_quantizers(sam, make_scheme(4), quantize_encoder=False)
    assert plain <= kinds(decoder.image_encoder)
    assert not plain & kinds(decoder.mask_decoder)
    assert not isinstance(decoder.image_encoder.patch_embed.proj, PortableConv2d)
