"""Write a quantized model to one safetensors file and read it back without calibration data."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import ptq4sam
from ptq4sam.errors import CheckpointError, ConfigError
from ptq4sam.files import replacing
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.registry import build_sam

FORMAT = "ptq4sam"
FORMAT_VERSION = 1


def save(sam: QuantizedSam, path: str | Path) -> None:
    """Write a frozen quantized model, atomically.

    The file holds every weight on its grid, the scale and zero point of every quantizer, and as
    metadata the scheme in JSON.

    Raises:
        ConfigError: the model keeps the published defects; it is no quantized model.
    """
    if sam.scheme.compat == "published":
        raise ConfigError(
            "asked to save a model with compat: published, which is not on its grid: "
            "quantize with compat: faithful to get a file"
        )
    description = {
        "format_version": FORMAT_VERSION,
        "model": sam.name,
        "encoder_quantized": sam.encoder_quantized,
        "folded": sam.folded,
        "scheme": sam.scheme.to_dict(),
        "versions": {"ptq4sam": ptq4sam.__version__, "torch": torch.__version__},
    }
    tensors = {name: value.contiguous() for name, value in sam.state_dict().items()}
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={FORMAT: json.dumps(description)})


def is_quantized_file(path: str | Path) -> bool:
    """Whether a file is one that `save` wrote."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return _metadata(path) is not None


def load(path: str | Path, device: str | torch.device = "cpu") -> QuantizedSam:
    """Read a quantized model; it gives the same bits as the one that was saved.

    Raises:
        CheckpointError: the file is missing, damaged, newer, or not of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"asked to load {path}, which does not exist: check the path")
    text = _metadata(path)
    if text is None:
        raise CheckpointError(
            f"{path} is not a quantized model of ptq4sam: load float weights with --model and "
            "--checkpoint, or write one with ptq4sam quantize"
        )
    description = json.loads(text)
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this ptq4sam reads {FORMAT_VERSION}: "
            "install the version that wrote it or quantize again"
        )
    scheme = Scheme.from_dict(description["scheme"])
    sam = insert_quantizers(
        build_sam(description["model"]), scheme, description["encoder_quantized"]
    )
    sam.folded = list(description["folded"])
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} does not hold the model it names: {problem}") from error
    return sam.to(device)


def _metadata(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): copy it again or quantize again"
        ) from error
    return metadata.get(FORMAT)
