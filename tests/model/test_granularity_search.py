"""The quick search for granularities finds what the exact one finds, on vit_nano's activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from ptq4sam.data.scenes import generate_scene
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.methods.granularity_search import ScaleSearch
from ptq4sam.model.calibration import observing_activations
from ptq4sam.model.insertion import insert_quantizers
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.predictor import Predictor

MakeScheme = Callable[..., Scheme]


Seen = dict[str, tuple[Tensor, Tensor]]


def searched(scheme: Scheme) -> tuple[dict[str, tuple[float, float]], Seen]:
    """Tau and scale of every softmax quantizer of the encoder by a scene, and what it saw."""
    sam = insert_quantizers(load_sam("vit_nano"), scheme)
    found = {
        name: quantizer
        for name, quantizer in quantizers(sam.image_encoder)
        if isinstance(quantizer, AdaptiveGranularityQuantizer)
    }
    seen: Seen = {}
    for name, quantizer in found.items():
        quantizer.register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.__setitem__(name, inputs)
        )
    with observing_activations(sam.image_encoder):
        Predictor(sam).embed(generate_scene(0).image)
    return {name: (float(q.tau), float(q.scale)) for name, q in found.items()}, seen


@pytest.mark.parametrize("bits", [4, 6])
def test_quick_search_is_as_good_as_the_exact_one(bits: int, make_scheme: MakeScheme) -> None:
    """Scales of one picture; means over several hide, where the error is flat, which was worse."""
    (quick, seen), (exact, _) = (
        searched(make_scheme(bits, ptq4sam={"AGQ": True, "exact": flag})) for flag in (False, True)
    )
    assert len(exact) == 6
    for name, (tau, scale) in exact.items():
        assert quick[name][0] == tau, name
        assert quick[name][1] == pytest.approx(scale, rel=0.02), name
        search = ScaleSearch(*seen[name], levels=2**bits, tolerance=0.0)
        errors = [search.error(int(tau), chosen) for chosen in (quick[name][1], scale)]
        assert errors[0] < 1.01 * errors[1], name
