"""Calibration: pictures through the float network while observers collect ranges.

Order of PTQ4SAM: bimodal integration is decided and folded on the first picture (then come methods
from outside that the scheme names), then activation observers see every picture without
quantization, then weight observers see the weights.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq4sam import parallel
from ptq4sam.allocator import release_freed_memory
from ptq4sam.errors import CalibrationError
from ptq4sam.methods.bimodal import channel_signs, fold_signs, is_bimodal
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import observe_weights, weight_quantizers
from ptq4sam.progress import Progress, silent
from ptq4sam.quantization.modes import merge_recorded, quantizer_mode, recording
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.registry import METHODS
from ptq4sam.quantization.scheme import Methods
from ptq4sam.sam.description import TRANSFORMER, Description
from ptq4sam.sam.model import Sam

_log = logging.getLogger(__name__)

BOXES_AT_ONCE = 100
"""Most boxes that the decoder takes at once while it is calibrated and reconstructed.

Not a matter of the memory at hand, as in prediction: observers average over what they see at once.
"""


@dataclass(frozen=True)
class CalibrationItem:
    """One calibration picture.

    Attributes:
        pixels: [1, 3, side, side], normalised and padded.
        boxes: [n, 4] xyxy in pixels of the prompts' square, n >= 1.

    Raises:
        CalibrationError: there are no boxes, without which nothing passes the mask decoder.
    """

    pixels: Tensor
    boxes: Tensor

    def __post_init__(self) -> None:
        if self.boxes.dim() != 2 or self.boxes.shape[1] != 4 or len(self.boxes) == 0:
            raise CalibrationError(
                "a calibration picture needs boxes of shape [n, 4], n at least 1, but found "
                f"{list(self.boxes.shape)}: leave the picture out, or give prompts for it"
            )


def check_calibration(items: Sequence[CalibrationItem]) -> None:
    """Refuse a calibration set that would leave quantizers without a range.

    A picture without boxes is refused where it is made (`CalibrationItem`): a data set reads its
    pictures anew each time they are asked for.

    Raises:
        CalibrationError: no pictures.
    """
    if len(items) == 0:
        raise CalibrationError(
            "calibration needs at least 1 picture, found 0: check the calibration images"
        )


@torch.no_grad()
def run_item(sam: Sam, item: CalibrationItem) -> None:
    """One picture through the image encoder and the decoder's transformer."""
    run_decoder(sam, sam.embed(item.pixels.to(sam.device))[0], item.boxes)


@torch.no_grad()
def run_decoder(sam: Sam, features: Tensor, boxes: Tensor) -> None:
    """The boxes of one picture [n, 4] through the decoder's transformer."""
    positions = sam.prompt_encoder.dense_positions()
    for group in box_groups(boxes):
        sparse, dense = sam.prompt_encoder(boxes=group.to(sam.device))
        sam.mask_decoder.attend(features.to(sam.device), positions, sparse, dense)


def box_groups(boxes: Tensor) -> tuple[Tensor, ...]:
    """Boxes [n, 4] in groups of nearly one size that the decoder takes at once.

    Detectors of the published configurations give up to 100 boxes a picture, or 300. The image's
    tokens for 100 boxes are 420 MB in a SAM's decoder, of which an attention needs several.
    """
    return torch.tensor_split(boxes, -(-len(boxes) // BOXES_AT_ONCE))


def calibrate(
    sam: QuantizedSam,
    items: Sequence[CalibrationItem],
    progress: Progress = silent,
) -> None:
    """Set every quantizer of `sam` from calibration pictures.

    Args:
        sam: a model with inserted quantizers.
        items: the pictures.
        progress: wraps the sequence to show how far it is.

    Raises:
        CalibrationError: no pictures, or a range that is not finite.
    """
    check_calibration(items)
    methods = sam.scheme.ptq4sam
    if methods.BIG:
        with quantizer_mode(sam, Mode.FLOAT):
            sam.folded = integrate_bimodal(
                sam.mask_decoder.transformer,
                TRANSFORMER,
                sam.description,
                methods,
                lambda: run_item(sam, items[0]),
            )
        _log.info("bimodal integration folded %s", ", ".join(sam.folded) or "no attention")
    for name in sam.scheme.methods:
        with quantizer_mode(sam, Mode.FLOAT):
            METHODS[name](sam, items)
    observe_pictures(sam, items, progress)
    observe_weights(sam, progress)


def observe_pictures(
    sam: QuantizedSam, items: Sequence[CalibrationItem], progress: Progress
) -> None:
    """Set activation quantizers; several processes share the pictures and end alike.

    What the pictures gave is merged in their order, however many processes looked at them.
    """
    with observing_activations(sam):
        records = []
        for item in progress(parallel.share(items), "observing activations"):
            with recording(sam) as record:
                run_item(sam, item)
            records.append(record)
            release_freed_memory()
    for record in parallel.gather(records):
        merge_recorded(sam, record)


@contextlib.contextmanager
def observing_activations(module: nn.Module) -> Iterator[None]:
    """Activation quantizers observe, weights stay float, within the `with` block."""
    weights = set(map(id, weight_quantizers(module)))
    with (
        quantizer_mode(module, Mode.FLOAT, lambda q: id(q) in weights),
        quantizer_mode(module, Mode.OBSERVE, lambda q: id(q) not in weights),
    ):
        yield


@torch.no_grad()
def integrate_bimodal(
    network: nn.Module,
    path: str,
    description: Description,
    methods: Methods,
    run_first_picture: Callable[[], None],
) -> list[str]:
    """Fold signs into query and key projections behind bimodal post-key activations.

    Only attentions that the description says are looked at: those from tokens to the image
    (PTQ4SAM, section 3.2).

    Args:
        network: with quantizers in float mode.
        path: of it in the model.
        description: of the model.
        methods: settings of the detection.
        run_first_picture: runs the first calibration picture through the network.

    Returns:
        Names of the attentions that were folded, below the network.
    """
    candidates = {
        name: (module.get_submodule(foldable.query), module.get_submodule(foldable.key))
        for name, module in network.named_modules()
        if (foldable := description.foldable_at(f"{path}.{name}")) is not None
    }
    keys: dict[str, Tensor] = {}
    handles = [
        key.register_forward_hook(
            lambda _module, _inputs, output, name=name: keys.__setitem__(name, output.detach())
        )
        for name, (_, key) in candidates.items()
    ]
    try:
        run_first_picture()
    finally:
        for handle in handles:
            handle.remove()
    folded = [name for name, key in keys.items() if is_bimodal(key, methods)]
    for name in folded:
        fold_signs(*candidates[name], channel_signs(keys[name]))
    return folded
