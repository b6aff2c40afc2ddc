"""Calibration: pictures through the float network while observers collect ranges.

Order of PTQ4SAM: methods change weights before ranges (bimodal integration is decided and folded on
the first picture, then come those that the scheme names), then activation observers see every
picture without quantization, then weight observers see the weights; then come methods that change
what has ranges.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq4sam import parallel
from ptq4sam.allocator import release_freed_memory
from ptq4sam.errors import CalibrationError, ConfigError
from ptq4sam.methods.method import METHODS, Calibration, Hook, Method
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import observe_weights, weight_quantizers
from ptq4sam.progress import Progress, silent
from ptq4sam.quantization.modes import merge_recorded, quantizer_mode, recording
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.threads import suited_to_model

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
    """One picture through the image encoder and what of the decoder is quantized."""
    run_decoder(sam, sam.embed(item.pixels.to(sam.device))[0], item.boxes)


@torch.no_grad()
def run_decoder(sam: Sam, features: Tensor, boxes: Tensor) -> None:
    """The boxes of one picture [n, 4] through what of the decoder is quantized."""
    positions = sam.prompt_encoder.dense_positions()
    to_masks = isinstance(sam, QuantizedSam) and sam.scheme.upscaling == "quantized"
    decode = sam.mask_decoder.predict_all if to_masks else sam.mask_decoder.attend
    for group in box_groups(boxes):
        sparse, dense = sam.prompt_encoder(boxes=group.to(sam.device))
        decode(features.to(sam.device), positions, sparse, dense)


def box_groups(boxes: Tensor) -> tuple[Tensor, ...]:
    """Boxes [n, 4] in groups of nearly one size that the decoder takes at once.

    Detectors of the published configurations give up to 100 boxes a picture, or 300. The image's
    tokens for 100 boxes are 420 MB in a SAM's decoder, of which an attention needs several.
    """
    return torch.tensor_split(boxes, -(-len(boxes) // BOXES_AT_ONCE))


@suited_to_model
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
    apply_methods(sam, items, "before_ranges")
    observe_pictures(sam, items, progress)
    observe_weights(sam, progress)
    apply_methods(sam, items, "after_ranges")


def methods_with(scheme: Scheme, hook: Hook) -> list[str]:
    """Names of the scheme's methods that have a hook, in their order."""
    return [
        name
        for name in scheme.method_settings
        if getattr(METHODS[name], hook) is not getattr(Method, hook)
    ]


def apply_methods(
    sam: QuantizedSam,
    items: Sequence[CalibrationItem],
    hook: Hook,
    exact: QuantizedSam | None = None,
) -> None:
    """Call a hook of the scheme's methods; before ranges with all quantizers off.

    A method that finds nothing to change says so.

    Args:
        sam: the model.
        items: calibration pictures.
        hook: which.
        exact: the calibrated model with its quantizers off, after reconstruction.

    Raises:
        ConfigError: a hook does not say what it changed.
    """
    reference = sam if exact is None else exact
    calibration = Calibration(
        sam,
        items,
        lambda item: run_item(sam, item),
        reference,
        lambda item: run_item(reference, item),
    )
    for name in methods_with(sam.scheme, hook):
        method = METHODS[name](sam.scheme.method_settings[name])
        with contextlib.ExitStack() as stack, torch.no_grad():
            if hook == "before_ranges":
                stack.enter_context(quantizer_mode(sam, Mode.FLOAT))
            changed = _paths(getattr(method, hook)(calibration), f"{name}: {hook}")
        sam.applied[name] = sam.applied.get(name, []) + changed
        places = "1 place" if len(changed) == 1 else f"{len(changed)} places"
        _log.info("%s %s", name, f"changed {places}" if changed else "found nothing to change")
        _log.debug("%s changed %s", name, ", ".join(changed))


def _paths(changed: object, whose: str) -> list[str]:
    """What a hook says that it changed.

    Raises:
        ConfigError: it is no sequence of paths.
    """
    if isinstance(changed, Iterable) and not isinstance(changed, str):
        paths = list(changed)
        if all(isinstance(path, str) for path in paths):
            return paths
    raise ConfigError(
        f"method {whose} returned {repr(changed)[:60]}: let it return a list of the paths that it "
        "changed, an empty one where it changed nothing"
    )


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
