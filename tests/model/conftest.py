from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from ptq4sam.families import VARIANTS
from ptq4sam.families.family import Weights
from ptq4sam.families.sam_vit.sizes import SamVariant
from ptq4sam.families.sam_vit.variants import build_variant, variant
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor

TINY = SamVariant(
    32,
    2,
    2,
    (1,),
    image_size=64,
    patch_size=8,
    window_size=3,
    prompt_dim=32,
    decoder_mlp_dim=32,
    decoder_heads=2,
    iou_hidden_dim=16,
)
"""A SAM with a padded window, a global attention and every other part, in a blink."""
TINY_VARIANT = variant("tiny", TINY, Weights("tiny.safetensors"))


@pytest.fixture(autouse=True)
def tiny_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "tiny", TINY_VARIANT)


def tiny_sam() -> Sam:
    """A tiny SAM with random weights."""
    torch.manual_seed(0)
    model = build_variant("tiny", TINY)
    for parameter in model.parameters():
        # Zero-initialised tables would hide mistakes in the relative positions.
        torch.nn.init.normal_(parameter, std=0.15) if parameter.dim() > 1 else None
    return model


@pytest.fixture
def sam() -> Sam:
    return tiny_sam()


def tiny_items() -> list[CalibrationItem]:
    """Four calibration pictures of the tiny SAM."""
    generator = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[4.0, 4, 40, 40], [10, 20, 60, 50], [30, 2, 50, 60]])
    return [
        CalibrationItem(torch.randn(1, 3, 64, 64, generator=generator), boxes[: 1 + index % 3])
        for index in range(4)
    ]


@pytest.fixture
def items() -> list[CalibrationItem]:
    return tiny_items()


def scheme_of(bits: int = 4, steps: int = 0, **more: object) -> Scheme:
    """A scheme with all methods of PTQ4SAM, but ranges of weights that need no search.

    Those of the best grid (MSEObserver) take most of a calibration of 8 bits.
    """
    content: dict[str, object] = {
        "a_qconfig": {
            "quantizer": "LSQFakeQuantize",
            "observer": "AvgMinMaxObserver",
            "bit": bits,
        },
        "w_qconfig": {
            "quantizer": "AdaRoundFakeQuantize",
            "observer": "MinMaxObserver",
            "bit": bits,
            "ch_axis": 0,
        },
        "ptq4sam": {"BIG": True, "AGQ": True},
        # What stays float is compared with the float model.
        "float_weights": "float32",
        **more,
    }
    if steps:
        content["recon"] = {"iters": steps, **content.get("recon", {})}  # type: ignore[dict-item]
    return Scheme.from_dict(content)


@pytest.fixture
def make_scheme() -> Callable[..., Scheme]:
    return scheme_of


@pytest.fixture(scope="session")
def quantized_before() -> dict[str, QuantizedSam]:
    """Models that `quantize` made, by weights and scheme; they are copied, never given away."""
    return {}


@pytest.fixture
def quantize(
    quantized_before: dict[str, QuantizedSam],
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
) -> Callable[..., QuantizedSam]:
    """Quantize the tiny SAM on two pictures: (bits, steps, further content of the scheme).

    What was made of the same weights by the same scheme before is given again, as a copy.
    """

    def run(bits: int = 4, steps: int = 0, *, encoder: bool = True, **more: object) -> QuantizedSam:
        scheme = make_scheme(bits, steps, **more)
        weights = save(dict(sam.state_dict()))
        key = hashlib.sha256(weights + f"{encoder}\n{scheme.to_yaml()}".encode()).hexdigest()
        if key not in quantized_before:
            quantized_before[key] = quantize_sam(sam, items[:2], scheme, quantize_encoder=encoder)
        return copy.deepcopy(quantized_before[key])

    return run


@pytest.fixture
def forward() -> Callable[[Sam], tuple[Tensor, ...]]:
    """A forward pass of a picture with two boxes: features, masks, IoUs."""

    def run(model: Sam) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(2)
        side = model.image_size
        image = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=generator)
        predictor = Predictor(model)
        embedding = predictor.embed(image.numpy())
        boxes = [[5.0, 6, 40, 50], [20, 10, 60, 30]]
        prediction = predictor.predict(boxes=boxes, embedding=embedding)
        return embedding.features, prediction.low_res, prediction.iou_predictions

    return run
