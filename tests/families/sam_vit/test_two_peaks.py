"""vit_nano_bimodal: the float model of vit_nano, with keys that bimodal integration folds."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from ptq4sam.families.checkpoint import load_sam
from ptq4sam.methods.bimodal import is_bimodal
from ptq4sam.quantization.published import BimodalIntegration
from ptq4sam.sam.model import Sam


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 16, 16, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (256, 256), mode="bilinear")


def outputs(sam: Sam, pixels: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Masks and predicted IoUs of two boxes, and the keys on the way."""
    keys: dict[str, Tensor] = {}
    handles = [
        module.get_submodule("k_proj").register_forward_hook(
            lambda _module, _inputs, output, name=name: keys.__setitem__(name, output)
        )
        for name, module in sam.named_modules()
        if sam.description.foldable_at(name) is not None
    ]
    boxes = torch.tensor([[30.0, 40.0, 120.0, 200.0], [100.0, 20.0, 220.0, 150.0]])
    with torch.no_grad():
        decoded = sam.decode(sam.embed(sam.preprocess(pixels)), None, boxes, None, True)
    for handle in handles:
        handle.remove()
    return decoded, keys


def test_masks_are_those_of_vit_nano_and_keys_have_two_peaks(pixels: Tensor) -> None:
    expected, plain = outputs(load_sam("vit_nano"), pixels)
    found, keys = outputs(load_sam("vit_nano_bimodal"), pixels)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    settings = BimodalIntegration()
    assert keys
    assert all(is_bimodal(key, settings) for key in keys.values())
    assert all((keys[name] - plain[name]).abs().min() > 0.5 for name in keys)


def test_each_channel_has_one_sign_of_its_own() -> None:
    plain, made = load_sam("vit_nano").state_dict(), load_sam("vit_nano_bimodal").state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], made[name])}
    assert changed
    for name in changed:
        assert re.fullmatch(r".*token_to_image\.k_proj\.bias", name)
        shift = made[name] - plain[name]
        torch.testing.assert_close(shift[::2], -shift[1::2])
        torch.testing.assert_close(shift[::2], shift[:1].expand(len(shift) // 2))
