"""Masks for prompts on one picture: resizing, coordinates, and decoding in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ptq4sam.errors import DataError
from ptq4sam.sam.geometry import Geometry
from ptq4sam.sam.model import Features, PromptableModel

ArrayLike: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[Any]

DECODER_BYTES = {"cpu": 384 * 2**20, "cuda": 2**31}
"""Temporary memory that a decoder pass may take by default, by kind of device: 16 prompts at once
for SAM's own on a CPU, 85 on a GPU."""

# Tensors of the image embedding's size that the decoder holds at once for each prompt: 5 were
# measured of a float SAM-B and vit_nano, one more is for quantizers.
_EMBEDDINGS_PER_PROMPT = 6
# Bytes that the temporary full-size logits of `Predictor.full_resolution` may take.
_RESIZE_BYTES = 64 * 2**20
_LABELS = {-1, 0, 1}


@dataclass(frozen=True)
class ImageEmbedding:
    """A picture after the image encoder; encode once, decode for any number of prompts.

    Attributes:
        features: [1, channels, rows, columns].
        input_size: (height, width) in the square that prompts are placed in, in pixels.
        original_size: (height, width) of the picture in pixels.
        others: what the encoder hands over beside it.
    """

    features: Tensor
    input_size: tuple[int, int]
    original_size: tuple[int, int]
    others: tuple[Tensor, ...] = ()

    @classmethod
    def of(
        cls, features: Features, original_size: tuple[int, int], geometry: Geometry
    ) -> ImageEmbedding:
        """Of what an encoder handed over for a picture of a (height, width)."""
        first, *others = features
        return cls(first, geometry.placed(original_size), original_size, tuple(others))


@dataclass(frozen=True)
class Prediction:
    """Masks of N prompts, M each (3 with multimask, else 1).

    Attributes:
        low_res: logits [N, M, height, width] of the padded input at a quarter of its size.
        iou_predictions: the model's own estimate of each mask's IoU [N, M].
    """

    low_res: Tensor
    iou_predictions: Tensor


class Predictor:
    """Predict masks with a SAM, float or quantized, in torch or exported.

    Nothing here keeps gradients, but tensors are ordinary ones (no inference mode), so that what
    hooks collect during calibration can be trained on.
    """

    def __init__(self, sam: PromptableModel, memory_budget: int | None = None) -> None:
        """Wrap a model.

        Args:
            sam: the model: float or quantized, in torch or exported.
            memory_budget: bytes of temporary memory for the decoder, which takes as many prompts
                at once as fit (at least one); None for DECODER_BYTES. Masks do not depend on it
                but for float rounding.
        """
        if memory_budget is None:
            memory_budget = DECODER_BYTES.get(sam.device.type, DECODER_BYTES["cpu"])
        if memory_budget < 1:
            raise ValueError(f"memory_budget must be positive, not {memory_budget}")
        self.sam = sam
        self.memory_budget = memory_budget
        self._embedding: ImageEmbedding | None = None

    @property
    def prompts_at_once(self) -> int:
        """Prompts that the decoder takes at once."""
        per_prompt = _EMBEDDINGS_PER_PROMPT * self.sam.embedding_bytes
        return max(1, self.memory_budget // per_prompt)

    @property
    def embedding(self) -> ImageEmbedding:
        """The picture of the last `set_image`.

        Raises:
            DataError: no picture was set.
        """
        if self._embedding is None:
            raise DataError("masks were asked for before a picture: call set_image first")
        return self._embedding

    def set_image(self, image: npt.NDArray[np.uint8]) -> None:
        """Encode the picture that `predict` is to use; see `embed`."""
        self._embedding = self.embed(image)

    @torch.no_grad()
    def embed(self, image: npt.NDArray[np.uint8]) -> ImageEmbedding:
        """Encode a picture.

        Args:
            image: RGB [height, width, 3], uint8.

        Raises:
            DataError: the array is not such a picture.
        """
        height, width = image.shape[:2]
        features = self.sam.embed(self.pixels(image))
        return ImageEmbedding.of(features, (height, width), self.sam.geometry)

    def pixels(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """The encoder's input of a picture [1, 3, side, side]; arguments as for `embed`."""
        resized = resized_picture(image, self.sam.geometry)
        return self.sam.preprocess(
            torch.from_numpy(resized).permute(2, 0, 1)[None].to(self.sam.device)
        )

    @torch.no_grad()
    def predict(
        self,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        masks: ArrayLike | None = None,
        multimask: bool = False,
        embedding: ImageEmbedding | None = None,
    ) -> Prediction:
        """Predict masks for N prompts; those given together belong together row by row.

        Args:
            points: [N, n, 2] (x, y) in pixels of the original picture.
            labels: [N, n] of 1 (object), 0 (background) or -1 (padding).
            boxes: [N, 4] xyxy in pixels of the original picture.
            masks: [N, 1, height, width] low-resolution logits of an earlier prediction.
            multimask: three masks a prompt instead of one.
            embedding: the picture; None for that of `set_image`.

        Raises:
            DataError: no picture was set, or the prompts do not have these shapes.
        """
        embedding = self.embedding if embedding is None else embedding
        prompts = self._prompts(points, labels, boxes, masks, embedding)
        count = next(len(value) for value in prompts.values())
        # Without prompts nothing passes the decoder, whose observers must not see empty tensors.
        masks_each = 3 if multimask else 1
        mask_size = self.sam.mask_input_size
        low_res = [embedding.features.new_empty(0, masks_each, *mask_size)]
        ious = [embedding.features.new_empty(0, masks_each)]
        at_once = self.prompts_at_once
        for first in range(0, count, at_once):
            part = {key: value[first : first + at_once] for key, value in prompts.items()}
            given = (part["points"], part["labels"]) if "points" in part else None
            features = (embedding.features, *embedding.others)
            mask, iou = self.sam.decode(
                features, given, part.get("boxes"), part.get("masks"), multimask
            )
            low_res.append(mask)
            ious.append(iou)
        return Prediction(torch.cat(low_res), torch.cat(ious))

    @torch.no_grad()
    def full_resolution(self, low_res: Tensor, embedding: ImageEmbedding | None = None) -> Tensor:
        """Resize logits [N, M, height, width] to the original picture: [N, M, *original_size].

        A pixel is in the mask where its logit is above 0. The temporary memory is bounded; the
        result itself takes 4 bytes a pixel: use `binary_masks` where the masks alone are needed.
        """
        embedding = self.embedding if embedding is None else embedding
        result = low_res.new_empty(*low_res.shape[:2], *embedding.original_size)
        return self._resize_into(result, low_res, embedding)

    @torch.no_grad()
    def binary_masks(self, low_res: Tensor, embedding: ImageEmbedding | None = None) -> Tensor:
        """As `full_resolution`, but boolean masks: [N, M, *original_size]."""
        embedding = self.embedding if embedding is None else embedding
        shape = (*low_res.shape[:2], *embedding.original_size)
        result = torch.empty(shape, dtype=torch.bool, device=low_res.device)
        return self._resize_into(result, low_res, embedding)

    def _resize_into(self, result: Tensor, low_res: Tensor, embedding: ImageEmbedding) -> Tensor:
        height, width = embedding.original_size
        mask_bytes = low_res.element_size() * (self.sam.geometry.prompt_side**2 + height * width)
        at_once = max(1, _RESIZE_BYTES // mask_bytes)
        flat, flat_result = low_res.flatten(0, 1), result.flatten(0, 1)
        for first in range(0, len(flat), at_once):
            piece = slice(first, first + at_once)
            logits = self.sam.postprocess_masks(
                flat[piece, None], embedding.input_size, embedding.original_size
            )[:, 0]
            flat_result[piece] = logits > 0 if result.dtype == torch.bool else logits
        return result

    def _prompts(
        self,
        points: ArrayLike | None,
        labels: ArrayLike | None,
        boxes: ArrayLike | None,
        masks: ArrayLike | None,
        embedding: ImageEmbedding,
    ) -> dict[str, Tensor]:
        if (points is None) != (labels is None):
            raise DataError("points and labels must be given together: one label a point")
        prompts: dict[str, Tensor] = {}
        if points is not None and labels is not None:
            coordinates = _tensor("points", points, (None, None, 2))
            prompts["points"] = to_input_pixels(coordinates, embedding).float()
            kinds = _tensor("labels", labels, tuple(coordinates.shape[:2]))
            found = set(kinds.flatten().tolist())
            if not found <= _LABELS:
                raise DataError(f"labels must be -1, 0 or 1, but found {sorted(found - _LABELS)}")
            prompts["labels"] = kinds.int()
        if boxes is not None:
            corners = _tensor("boxes", boxes, (None, 4)).reshape(-1, 2, 2)
            prompts["boxes"] = to_input_pixels(corners, embedding).reshape(-1, 4).float()
        if masks is not None:
            size = self.sam.mask_input_size
            prompts["masks"] = _tensor("masks", masks, (None, 1, *size)).float()
        if not prompts:
            raise DataError("no prompt was given: give points and labels, boxes or masks")
        counts = {key: len(value) for key, value in prompts.items()}
        if len(set(counts.values())) > 1:
            raise DataError(f"prompts given together must be equally many, but found {counts}")
        return {key: value.to(self.sam.device) for key, value in prompts.items()}


def resized_picture(image: npt.NDArray[np.uint8], geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Resize a picture to the encoder's input, before padding (bilinear, antialiased).

    Args:
        image: RGB [height, width, 3], uint8.
        geometry: says how.

    Raises:
        DataError: the array is not such a picture.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise DataError(
            "a picture must be an RGB array [height, width, 3] of uint8, but found "
            f"{list(image.shape)} of {image.dtype}"
        )
    height, width = geometry.resized((image.shape[0], image.shape[1]), geometry.encoder_side)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized)


def to_input_pixels(coordinates: Tensor, embedding: ImageEmbedding) -> Tensor:
    """Scale [..., 2] (x, y) from pixels of the original picture to the prompts' square."""
    height, width = (
        new / old for new, old in zip(embedding.input_size, embedding.original_size, strict=True)
    )
    return coordinates * coordinates.new_tensor([width, height])


def _tensor(name: str, value: ArrayLike, shape: tuple[int | None, ...]) -> Tensor:
    # float64 on the CPU, as the official predictor scales coordinates.
    tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    fits = tensor.ndim == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("N" if size is None else str(size) for size in shape)
        raise DataError(f"{name} must have shape [{wanted}], but found {list(tensor.shape)}")
    if not tensor.isfinite().all():
        raise DataError(f"{name} must be finite numbers, but found nan or infinity")
    return tensor
