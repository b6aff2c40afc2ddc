from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ptq4sam.model.insertion import insert_quantizers
from ptq4sam.model.rounding_once import (
    RoundedGELU,
    RoundedLayerNorm,
    RoundedLayerNorm2d,
    RoundedPatches,
)
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.common import LayerNorm2d
from ptq4sam.sam.model import Sam


def test_norms_do_not_depend_on_the_order_of_channels() -> None:
    torch.manual_seed(0)
    x, order = 3 * torch.randn(50, 64) + 1, torch.randperm(64)
    norm = nn.LayerNorm(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    rounded, shuffled = RoundedLayerNorm(norm), RoundedLayerNorm(nn.LayerNorm(64))
    shuffled.weight.data, shuffled.bias.data = norm.weight[order], norm.bias[order]
    assert torch.equal(rounded(x)[:, order], shuffled(x[:, order]))
    torch.testing.assert_close(rounded(x), norm(x))

    square = x[:, :, None, None].expand(-1, -1, 2, 3)
    over_channels = LayerNorm2d(64)
    over_channels.load_state_dict(norm.state_dict())
    found = RoundedLayerNorm2d(over_channels)(square)
    assert found.shape == square.shape
    torch.testing.assert_close(found, over_channels(square))


def test_patches_are_sums_rounded_once() -> None:
    torch.manual_seed(0)
    source = nn.Conv2d(3, 8, 4, 4)
    x = torch.randn(2, 3, 8, 12)
    found = RoundedPatches(source)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, source(x))
    first = (x[0, :, 4:, 8:].double() * source.weight[5].double()).flatten().flip(0).sum()
    assert found[0, 5, 1, 2] == (first + source.bias[5].double()).float()


def test_a_quantized_sam_has_them_under_the_same_names(
    sam: Sam, make_scheme: Callable[..., Scheme]
) -> None:
    def kinds(model: nn.Module) -> set[type[nn.Module]]:
        return {type(module) for module in model.modules()}

    both = insert_quantizers(sam, make_scheme(4))
    plain = {nn.LayerNorm, LayerNorm2d}
    assert not plain & (kinds(both.image_encoder) | kinds(both.mask_decoder))
    assert isinstance(both.image_encoder.patch_embed.proj, RoundedPatches)
    assert isinstance(both.image_encoder.blocks[0].mlp.act, RoundedGELU)
    assert set(sam.state_dict()) <= set(both.state_dict())

    decoder = insert_quantizers(sam, make_scheme(4), quantize_encoder=False)
    assert plain <= kinds(decoder.image_encoder)
    assert not plain & kinds(decoder.mask_decoder)
    assert not isinstance(decoder.image_encoder.patch_embed.proj, RoundedPatches)
