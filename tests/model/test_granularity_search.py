"""The quick search for granularities finds what the exact one finds, on vit_nano's activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ptq4sam.data.scenes import generate_scene
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.model.calibration import observing_activations
from ptq4sam.model.insertion import insert_quantizers
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.predictor import Predictor

MakeScheme = Callable[..., Scheme]


def searched(scheme: Scheme) -> dict[str, tuple[float, float]]:
    """Tau and scale of every softmax quantizer of the encoder, by three scenes."""
    sam = insert_quantizers(load_sam("vit_nano"), scheme)
    predictor = Predictor(sam)
    with observing_activations(sam.image_encoder):
        for seed in range(3):
            predictor.embed(generate_scene(seed).image)
    return {
        name: (float(quantizer.tau), float(quantizer.scale))
        for name, quantizer in quantizers(sam.image_encoder)
        if isinstance(quantizer, AdaptiveGranularityQuantizer)
    }


@pytest.mark.parametrize("bits", [4, 6])
def test_quick_search_agrees_with_exact_search(bits: int, make_scheme: MakeScheme) -> None:
    quick, exact = (
        searched(make_scheme(bits, ptq4sam={"AGQ": True, "exact": flag})) for flag in (False, True)
    )
    assert len(exact) == 6
    for name, (tau, scale) in exact.items():
        assert quick[name][0] == tau, name
        assert quick[name][1] == pytest.approx(scale, rel=0.02), name
