"""Write a quantized model to one packed file and read it back without calibration data.

A file (see `container` for its checksums) holds, under the names of the model's state:

- `LAYER.weight.codes`: the weight's integer codes minus the grid's smallest one, bit-packed (see
  `packing`), and `LAYER.weight_quantizer.scale` and `.zero_point`, one a channel or one in all;
  where groups of input channels have scales, `.octaves`, by which they are larger, one a group;
- what its grid needs of every activation: scale and zero point, scale and tau, ...;
- what stays float, in float32, or in float16 where every value of a tensor is one;
- in its description model, size and normalisation of pictures, scheme, bits and shape of every
  weight, and the versions that wrote it.

What follows from these is not stored: float weights, learned rounding, flags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4sam.deploy.codes import WeightCodes, layer_codes
from ptq4sam.deploy.container import UNPACKED_VERSION, WITH_CORES, read_container, write_container
from ptq4sam.deploy.packing import pack, unpack
from ptq4sam.errors import CheckpointError, ConfigError
from ptq4sam.families import build_sam
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.operators.base import QuantizedLayer, quantized_layers
from ptq4sam.quantization.groups import GROUPED, doubled, octaves_of
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import SIMULATIONS, Scheme
from ptq4sam.sam.geometry import SAM_NORMALIZATION, Normalization
from ptq4sam.skeletons import shapes_alone
from ptq4sam.version import __version__

_ATTENTION_SLOT = re.compile(r"\.(query|key|value|softmax)_quantizer\.")


_SCALE = "weight_quantizer.scale"
_OCTAVES = "weight_quantizer.octaves"
"""Where groups have scales: the scale of a group is that of its channel, doubled so often."""
CODES = "weight.codes"
"""Name of a layer's packed weight, below the layer's path."""


def save(sam: QuantizedSam, path: str | Path) -> None:
    """Write a frozen quantized model, atomically.

    Raises:
        ConfigError: the model is a simulation alone (`SIMULATIONS`).
        DeployError: a weight does not lie on its grid.
        CalibrationError: a quantizer has no scale.
    """
    if why := SIMULATIONS.get(sam.scheme.compat):
        raise ConfigError(
            f"asked to save a model with compat: {sam.scheme.compat}, which {why}: quantize with "
            "compat: faithful to get a file"
        )
    tensors = _kept(sam)
    weights: dict[str, Any] = {}
    for name, layer in quantized_layers(sam):
        codes = layer_codes(layer)
        weights[name] = {"bits": codes.grid.bits, "shape": list(layer.weight.shape)}
        tensors[f"{name}.{CODES}"] = pack(codes.codes - codes.grid.qmin, codes.grid.bits)
        if codes.scale.dim() == GROUPED:
            tensors[f"{name}.{_SCALE}"] = codes.step
            tensors[f"{name}.{_OCTAVES}"] = octaves_of(codes.scale)
    description = {
        "model": sam.name,
        "image_size": sam.image_size,
        "pixel_mean": sam.normalization.mean,
        "pixel_std": sam.normalization.std,
        "encoder_quantized": sam.encoder_quantized,
        "folded": sam.folded,
        "scheme": sam.scheme.to_dict(),
        "weights": weights,
        "versions": {"ptq4sam": __version__, "torch": torch.__version__},
    }
    write_container(Path(path), tensors, description)


def load(path: str | Path, device: str | torch.device = "cpu") -> QuantizedSam:
    """Read a quantized model; it gives the same bits as the one that was saved.

    Raises:
        CheckpointError: the file is missing, damaged, newer, or not of this format.
    """
    path = Path(path)
    tensors, description = read_container(path)
    sam = _skeleton(path, description)
    try:
        if description["format_version"] < WITH_CORES:
            tensors = {_with_core(name): tensor for name, tensor in tensors.items()}
        if description["format_version"] != UNPACKED_VERSION:
            tensors = _expanded(sam, tensors)
        sam.load_state_dict(tensors)
    except (RuntimeError, KeyError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} does not hold the model it names: {problem}") from error
    return sam.to(device)


def _with_core(name: str) -> str:
    """Today's name of a tensor of an earlier file: attentions had no `core` of their own."""
    return _ATTENTION_SLOT.sub(r".core.\1_quantizer.", name)


def _skeleton(path: Path, description: Mapping[str, Any]) -> QuantizedSam:
    """The model that a file describes, without its numbers."""
    try:
        scheme = Scheme.from_dict(description["scheme"], path)
        # Made without memory first: random weights that are overwritten take seconds.
        with shapes_alone():
            # Files of earlier versions say neither size nor normalisation: all had the model's own.
            empty = build_sam(description["model"], description.get("image_size"))
        # Made anew, so that the constants of normalisation are real.
        float_sam = empty.to_empty(device="cpu").normalized_by(_normalization(description))
        sam = insert_quantizers(float_sam, scheme, description["encoder_quantized"])
        sam.folded = list(description["folded"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} describes no model that this ptq4sam {__version__} knows ({error}): "
            f"install the version that wrote it ({_writer(description)}) or quantize again"
        ) from error
    return sam


def _normalization(description: Mapping[str, Any]) -> Normalization:
    if "pixel_mean" not in description:
        return SAM_NORMALIZATION
    return Normalization(tuple(description["pixel_mean"]), tuple(description["pixel_std"]))


def _writer(description: Mapping[str, Any]) -> str:
    versions = description.get("versions")
    return str(versions.get("ptq4sam", "unknown")) if isinstance(versions, Mapping) else "unknown"


def _kept(sam: QuantizedSam) -> dict[str, Tensor]:
    """The model's state without what is packed and what follows from the rest."""
    derived = _derived(sam)
    weights = {f"{name}.weight" for name, _ in quantized_layers(sam)}
    zero_points = {f"{name}.weight_quantizer.zero_point" for name, _ in quantized_layers(sam)}
    kept = {}
    for name, tensor in sam.state_dict().items():
        if name in derived or name in weights:
            continue
        kept[name] = _as_bytes(tensor) if name in zero_points else _narrow(tensor)
    return kept


def _derived(sam: QuantizedSam) -> dict[str, Tensor]:
    """The part of a frozen model's state that is the same whatever was calibrated."""
    derived: dict[str, Tensor] = {}
    for name, quantizer in quantizers(sam):
        derived.update({f"{name}.{part}": value for part, value in quantizer.derived().items()})
    return derived


def _expanded(sam: QuantizedSam, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model from what its file holds."""
    parts = (CODES, _OCTAVES)
    packed = {f"{name}.{part}" for name, _ in quantized_layers(sam) for part in parts}
    state = _derived(sam)
    state.update({name: t.to(torch.float32) for name, t in tensors.items() if name not in packed})
    for name, layer in quantized_layers(sam):
        state[f"{name}.{_SCALE}"] = _scale(name, tensors)
        state[f"{name}.weight"] = _weight(name, layer, tensors)
    return state


def _scale(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    scale, octaves = (
        tensors[f"{name}.{_SCALE}"].to(torch.float32),
        tensors.get(f"{name}.{_OCTAVES}"),
    )
    return scale if octaves is None else scale[:, None] * doubled(octaves)


def _weight(name: str, layer: QuantizedLayer, tensors: Mapping[str, Tensor]) -> Tensor:
    grid, shape = layer.weight_quantizer.grid, layer.weight.shape
    codes = unpack(tensors[f"{name}.{CODES}"], grid.bits, shape.numel()).reshape(shape)
    scale = _scale(name, tensors)
    zero_point = tensors[f"{name}.weight_quantizer.zero_point"].to(torch.int32)
    return WeightCodes(codes + grid.qmin, scale, zero_point, grid).weight()


def _as_bytes(zero_point: Tensor) -> Tensor:
    """Zero points, which are codes, in a byte each where they fit."""
    narrow = zero_point.to(torch.uint8)
    return narrow if torch.equal(narrow.to(zero_point.dtype), zero_point) else zero_point


def _narrow(tensor: Tensor) -> Tensor:
    """In float16 where that changes no bit."""
    half = tensor.half()
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor
