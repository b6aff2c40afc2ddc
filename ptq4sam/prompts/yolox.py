"""YOLOX (Ge et al., 2021) in its authors' formats: ONNX through onnxruntime, .pth by torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ptq4sam import numerics
from ptq4sam.data.images import ImageRecord, reason
from ptq4sam.errors import CheckpointError, DependencyError
from ptq4sam.prompts.categories import category_ids_by_number
from ptq4sam.prompts.detections import candidates, file_digest, suppress
from ptq4sam.prompts.record import Prompts, clean
from ptq4sam.prompts.yolox_network import STRIDES, YoloxNetwork, folded
from ptq4sam.prompts.yolox_weights import load_yolox

_PADDING = 114.0


class Yolox(ABC):
    """Prompt source: boxes of a YOLOX detector, whatever computes its rows.

    A detector with as many classes as the data set has categories gives the data set's ids in
    ascending order; any other with COCO's 80 classes gives COCO's ids; and any other, as one of 91
    classes on COCO, is refused.

    Args:
        path: the file with its weights.
        category_ids: the data set's ids of the detector's classes, in the classes' order; used
            where they are as many as the detector's classes.
        score_threshold: detections at or below it are dropped.
        nms_threshold: overlap (IoU) from which a worse box of the same class is dropped.
        limit: keep at most so many boxes a picture.
        device: where it runs.

    Raises:
        CheckpointError: the file is missing.
    """

    name = "YOLOX"

    def __init__(
        self,
        path: Path,
        category_ids: Sequence[int] = (),
        score_threshold: float = 0.01,
        nms_threshold: float = 0.65,
        limit: int = 100,
        device: torch.device | str = "cpu",
    ) -> None:
        self.path = path
        self.score_threshold, self.nms_threshold, self.limit = score_threshold, nms_threshold, limit
        self._given_ids = tuple(category_ids)
        self._device = torch.device(device)
        self._digest = file_digest(path)

    def fingerprint(self) -> str:
        """Identifies file, settings and device."""
        settings = (self.score_threshold, self.nms_threshold, self.limit, self._given_ids)
        return f"yolox {self._digest} {settings} {numerics.fingerprint(self._device)}"

    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        """Boxes of an RGB picture [height, width, 3], best first.

        Raises:
            CheckpointError: the file is no YOLOX, or not for these categories.
        """
        height, width = self._input_size
        pixels, ratio = letterbox(image, height, width)
        found = self._rows(pixels)
        anchors, sizes = _grid(height, width)
        if found.shape[:2] != (1, len(anchors)) or found.shape[2] < 6:
            raise CheckpointError(
                f"{self.path} gives {list(found.shape)}, YOLOX on {height}x{width} pixels gives "
                f"[1, {len(anchors)}, 5 + classes]: give an undecoded YOLOX"
            )
        boxes, scores, labels = decode(found[0], anchors, sizes)
        ids = category_ids_by_number(found.shape[2] - 5, self._given_ids, str(self.path))
        sure = candidates(scores, self.score_threshold)
        boxes, scores, labels = boxes[sure] / ratio, scores[sure], labels[sure]
        kept = suppress(boxes, scores, labels, self.nms_threshold, self.limit)
        return clean(record, boxes[kept].numpy(), scores[kept].numpy(), ids[labels[kept].numpy()])

    @property
    @abstractmethod
    def _input_size(self) -> tuple[int, int]:
        """Height and width of the detector's input."""

    @abstractmethod
    def _rows(self, pixels: Tensor) -> Tensor:
        """Rows that are not decoded [1, n, 5 + classes] of an input [1, 3, height, width]."""


class YoloxOnnx(Yolox):
    """YOLOX in an ONNX file through onnxruntime; arguments are those of `Yolox`.

    The file's input is [1, 3, height, width], BGR 0-255, letterboxed; its output
    [1, n, 5 + classes] is not decoded (exported without `--decode_in_inference`). On "cuda" it uses
    onnxruntime's CUDA provider where it has one.

    Raises:
        CheckpointError: the file is missing, or no such detector.
        DependencyError: at the first picture, onnxruntime is not installed.
    """

    def _rows(self, pixels: Tensor) -> Tensor:
        session = self._session
        (output,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
        return torch.from_numpy(np.asarray(output, np.float32))

    @cached_property
    def _session(self) -> Any:
        try:
            import onnxruntime
            from onnxruntime.capi import onnxruntime_pybind11_state as errors
        except ImportError as error:
            raise DependencyError(
                f"{self.path} needs onnxruntime, which is not installed here: "
                "pip install ptq4sam[onnx]"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin while they wait take a processor from whoever else wants it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        here = onnxruntime.get_available_providers()
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._device.type == "cuda" and "CUDAExecutionProvider" in here:
            # Each process of several has a GPU of its own.
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": self._device.index or 0}))
        try:
            return onnxruntime.InferenceSession(str(self.path), options, providers=providers)
        except (
            errors.Fail,
            errors.InvalidArgument,
            errors.InvalidGraph,
            errors.InvalidProtobuf,
            errors.NoSuchFile,
            errors.NotImplemented,
        ) as error:
            raise CheckpointError(
                f"{self.path} is no usable ONNX model: {reason(error)}"
            ) from error

    @property
    def _input_size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        shape = self._session.get_inputs()[0].shape
        sides = shape[2:]
        if len(shape) != 4 or not all(isinstance(s, int) and s % STRIDES[-1] == 0 for s in sides):
            raise CheckpointError(
                f"{self.path} has an input {shape}, [1, 3, height, width] with multiples of "
                f"{STRIDES[-1]} is needed: export YOLOX for a fixed size"
            )
        return sides[0], sides[1]


class YoloxTorch(Yolox):
    """YOLOX in its authors' .pth file, with nothing but torch; arguments are those of `Yolox`.

    Raises:
        CheckpointError: the file is missing, or at the first picture, damaged or no YOLOX.
    """

    @torch.no_grad()
    def _rows(self, pixels: Tensor) -> Tensor:
        rows: Tensor = self._network(pixels.to(self._device))
        return rows.cpu()

    @cached_property
    def _network(self) -> YoloxNetwork:
        return folded(load_yolox(self.path)).to(self._device)

    @property
    def _input_size(self) -> tuple[int, int]:
        return self._network.size.side, self._network.size.side


def letterbox(image: NDArray[np.uint8], height: int, width: int) -> tuple[Tensor, float]:
    """Scale a picture to fit and fill up with grey on the right and at the bottom.

    Args:
        image: RGB [h, w, 3].
        height: of the result.
        width: of the result.

    Returns:
        BGR 0-255, float32 [1, 3, height, width]; and the scale from the picture to it.
    """
    ratio = min(height / image.shape[0], width / image.shape[1])
    rows, columns = max(1, int(image.shape[0] * ratio)), max(1, int(image.shape[1] * ratio))
    bgr = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None].float()
    # Without anti-aliasing, and rounded, as OpenCV does in YOLOX's training.
    scaled = functional.interpolate(bgr, (rows, columns), mode="bilinear", align_corners=False)
    canvas = scaled.new_full((1, 3, height, width), _PADDING)
    canvas[..., :rows, :columns] = scaled.round()
    return canvas, ratio


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cell corners [n, 2] as x, y in cells, and cell sizes [n, 1] in pixels, of all strides."""
    corners, sizes = [], []
    for stride in STRIDES:
        y, x = torch.meshgrid(
            torch.arange(height // stride, device="cpu"),
            torch.arange(width // stride, device="cpu"),
            indexing="ij",
        )
        corners.append(torch.stack([x, y], dim=-1).reshape(-1, 2).float())
        sizes.append(corners[-1].new_full((y.numel(), 1), float(stride)))
    return torch.cat(corners), torch.cat(sizes)


def decode(output: Tensor, anchors: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and classes of YOLOX's output.

    Args:
        output: [n, 5 + classes]: centre in cells from the cell's corner, logarithm of width and
            height in cells, objectness, class probabilities.
        anchors: cell corners [n, 2] in cells.
        sizes: cell sizes [n, 1] in pixels.

    Returns:
        Boxes xyxy [n, 4] in pixels of the input; objectness * probability of the best class [n];
        its index [n].
    """
    centres = (output[:, :2] + anchors) * sizes
    halves = output[:, 2:4].exp() * sizes / 2
    probabilities, labels = output[:, 5:].max(dim=1)
    return torch.cat([centres - halves, centres + halves], 1), output[:, 4] * probabilities, labels
