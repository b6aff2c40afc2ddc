"""Detectors of Hugging Face transformers: whatever AutoModelForObjectDetection reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptq4sam import numerics
from ptq4sam.data.images import ImageRecord, reason
from ptq4sam.errors import CheckpointError, DependencyError
from ptq4sam.prompts.categories import NO_CATEGORY, category_ids_of
from ptq4sam.prompts.detections import file_digest, package_version
from ptq4sam.prompts.record import Prompts, clean

_FOLDER = "give a folder that save_pretrained has written"

_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)


class TransformersDetector:
    """Prompt source: boxes of a detector of transformers (DETR, RT-DETR v2, D-FINE, ...).

    Pictures are prepared and boxes are chosen by the model's own image processor. Nothing is
    downloaded, no code of the folder is run, and weights are read from safetensors alone.

    Args:
        model: folder of `save_pretrained` with config.json, preprocessor_config.json and weights,
            or the name of a model that is in the Hugging Face cache.
        categories: name of each category id of the data set; see `category_ids_of`.
        score_threshold: detections at or below it are dropped.
        limit: keep at most so many boxes a picture.
        device: where it runs.

    Raises:
        CheckpointError: there is no such folder, or, at the first picture, its model cannot be
            read or does not know the data set's categories.
        DependencyError: transformers is not installed.
    """

    name = "transformers"

    def __init__(
        self,
        model: str,
        categories: Mapping[int, str],
        score_threshold: float = 0.01,
        limit: int = 300,
        device: torch.device | str = "cpu",
    ) -> None:
        self.score_threshold, self.limit = score_threshold, limit
        version = _version()
        self.folder = _find(model)
        self._categories = dict(categories)
        self._device = torch.device(device)
        files = sorted([*self.folder.glob("*.json"), *self.folder.glob("*.safetensors")])
        digests = " ".join(f"{file.name} {file_digest(file)}" for file in files)
        self._identity = (
            f"{hashlib.sha256(digests.encode()).hexdigest()[:16]} transformers {version}"
        )

    def fingerprint(self) -> str:
        """Identifies the folder's files, the library, settings and device."""
        categories = hashlib.sha256(str(sorted(self._categories.items())).encode()).hexdigest()[:16]
        place = numerics.fingerprint(self._device)
        return f"{self._identity} {self.score_threshold} {self.limit} {categories} {place}"

    @torch.no_grad()
    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        """Boxes of an RGB picture [height, width, 3], best first.

        Raises:
            CheckpointError: the folder holds no usable detector.
        """
        processor, model, ids = self._loaded
        # Without the hint a picture of three rows would be taken for one of three channels.
        inputs = processor(
            images=np.array(image), return_tensors="pt", input_data_format="channels_last"
        )
        output = model(**inputs.to(self._device))
        (found,) = processor.post_process_object_detection(
            output, threshold=self.score_threshold, target_sizes=[image.shape[:2]]
        )
        boxes, scores, labels = (found[k].float().cpu() for k in ("boxes", "scores", "labels"))
        category_ids = ids[labels.long().numpy()]
        known = category_ids != NO_CATEGORY
        return clean(
            record, boxes.numpy()[known], scores.numpy()[known], category_ids[known], self.limit
        )

    @cached_property
    def _loaded(self) -> tuple[Any, Any, NDArray[np.int64]]:
        """Image processor, model, and the category id of each of its classes."""
        processor, model = _load(self.folder)
        names = model.config.id2label
        labels = [str(names.get(number, "")) for number in range(model.config.num_labels)]
        ids = category_ids_of(labels, self._categories, str(self.folder))
        return processor, model.eval().to(self._device), ids


def _find(model: str) -> Path:
    """The folder itself, or the one in the cache that holds the model of that name."""
    folder = Path(model)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        raise CheckpointError(f"{folder} has no config.json: {_FOLDER}")
    no_folder = f"prompts of transformers:{model}: there is no such folder"
    if is_path(model):
        raise CheckpointError(f"{no_folder}: {_FOLDER}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except HFValidationError:
        raise CheckpointError(f"{no_folder}: {_FOLDER}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{no_folder}, nor such a model in the Hugging Face cache: {_FOLDER}, or fetch the "
            f"model by `hf download {model}`"
        ) from error


def is_path(model: str) -> bool:
    """Whether a folder is meant, and not the name OWNER/MODEL of one on the Hugging Face Hub."""
    folder = Path(model)
    parts = folder.parts
    beside = len(parts) > 1 and folder.parent.is_dir()
    return folder.is_absolute() or len(parts) > 2 or model.startswith((".", "~")) or beside


def _load(folder: Path) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _without_progress_bars():
            processor = AutoImageProcessor.from_pretrained(folder, **local)
            model, info = AutoModelForObjectDetection.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
                **local,
            )
    except ImportError as error:
        raise DependencyError(f"the detector in {folder} needs more: {reason(error)}") from error
    except (*_UNREADABLE, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no detector that transformers {_version()} reads from safetensors: "
            f"{reason(error)}"
        ) from error
    # What is not there is made up at random, with no more than a warning.
    absent = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if absent:
        raise CheckpointError(
            f"{folder}: {len(absent)} tensors of the detector are missing or of another shape, "
            f"{absent[0]} first: save the whole model again"
        )
    return processor, model


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _version() -> str:
    return package_version("transformers", "pip install 'ptq4sam[transformers]'")
