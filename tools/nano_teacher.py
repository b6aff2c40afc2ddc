"""Features of a trained detector, which an encoder learns to foretell while it learns masks.

A few thousand photographs teach little of what objects look like; a detector that has seen all of
COCO knows. Its feature maps are a dense target for every place of a picture, annotated or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

_ZOOM = 1.5
_GREY = 114


class DetectorFeatures:
    """Feature maps of a YOLOX, at the stride of a small SAM's embedding."""

    def __init__(self, path: Path, maps: Sequence[str]) -> None:
        """Cut the network behind the maps.

        Args:
            path: YOLOX as ONNX; its input is [1, 3, side, side], BGR, 0 to 255.
            maps: names of the tensors.
        """
        self._model = _cut(onnx.load(path), maps)
        self._session: onnxruntime.InferenceSession | None = None

    def __call__(self, pixels: NDArray[np.int16]) -> Tensor:
        """Feature maps of a window of s pixels, float16 [channels, s / 8, s / 8].

        Args:
            pixels: [3, s, s] RGB, -1 is padding.
        """
        if self._session is None:  # in the worker: sessions do not survive a fork
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(
                self._model, options, providers=["CPUExecutionProvider"]
            )
        cells = pixels.shape[-1] // 8
        image = torch.from_numpy(np.where(pixels < 0, _GREY, pixels)[::-1].astype(np.float32))
        side = 32 * round(_ZOOM * pixels.shape[-1] / 32)
        image = F.interpolate(image[None], (side, side), mode="bilinear", align_corners=False)
        maps = self._session.run(None, {self._session.get_inputs()[0].name: image.numpy()})
        sized = [
            F.interpolate(torch.from_numpy(m), (cells, cells), mode="bilinear", align_corners=False)
            for m in maps
        ]
        return torch.cat(sized, dim=1)[0].half()


def _cut(model: onnx.ModelProto, maps: Sequence[str]) -> bytes:
    """The part of a network from its input, made to take any size, to some of its tensors."""
    (image,) = model.graph.input
    for axis, name in ((2, "height"), (3, "width")):
        image.type.tensor_type.shape.dim[axis].dim_param = name
    del model.graph.value_info[:], model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in maps
    )
    producers = {name: node for node in model.graph.node for name in node.output}
    needed, waiting = set(), list(maps)
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            waiting.extend(node.input)
    kept = [node for node in model.graph.node if id(node) in needed]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return bytes(model.SerializeToString())
