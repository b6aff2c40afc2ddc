"""What an exported model is: one JSON file beside the graphs."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ptq4sam.deploy.targets import FORMATS
from ptq4sam.deploy.targets.target import Products
from ptq4sam.errors import CheckpointError, DataError
from ptq4sam.files import read_json, write_json
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.sam.geometry import SAM_NORMALIZATION, Geometry, Normalization
from ptq4sam.sam.model import Sam
from ptq4sam.version import __version__

Format = Literal["onnx", "openvino"]

FORMAT = "ptq4sam-export"
FORMAT_VERSION = 1
ENCODER, DECODER = "encoder", "decoder"


@dataclass(frozen=True)
class Manifest:
    """Everything about an exported model that its graphs do not say.

    Attributes:
        runtime_format: "onnx" or "openvino".
        model: name of the SAM.
        image_size: side of the encoder's square input in pixels.
        prompt_size: side of the square that prompts and masks are placed in, in pixels; None in
            older exports, which have one square.
        embedding: channels, rows and columns of the encoder's output.
        mask_input: height and width of a mask prompt.
        pixel_mean: by channel; a picture is normalised, then padded with 0 at the right and bottom.
        pixel_std: by channel.
        origin: fingerprint of what the float and the quantized model share.
        encoder_quantized: whether the encoder is quantized; None for a float model.
        scheme: the quantization; None for a float model.
        files: checksum (SHA-256) by name.
        exact: whether its graphs have codes and all are the simulation's, of the same input and in
            float32 alone.
        products: how codes are multiplied where it was exported, so that sums are exact there. In
            OpenVINO's format float32 means that the files have no other; elsewhere the runtime is
            asked again. None where sums are the runtime's own, or it was not asked.
        nncf: what NNCF was asked for, where it quantized the encoder.
        ptq4sam: version that wrote it.
    """

    runtime_format: Format
    model: str
    image_size: int
    embedding: tuple[int, int, int]
    mask_input: tuple[int, int]
    origin: str
    encoder_quantized: bool | None
    scheme: dict[str, Any] | None
    files: dict[str, str] = field(default_factory=dict)
    exact: bool = False
    products: Products | None = None
    nncf: dict[str, Any] | None = None
    pixel_mean: tuple[float, ...] = SAM_NORMALIZATION.mean
    pixel_std: tuple[float, ...] = SAM_NORMALIZATION.std
    prompt_size: int | None = None
    ptq4sam: str = __version__

    @property
    def geometry(self) -> Geometry:
        """Of its pictures."""
        side, normalization = self.image_size, Normalization(self.pixel_mean, self.pixel_std)
        return Geometry(side, self.prompt_size or side, (self.embedding,), normalization)

    def write(self, folder: Path) -> None:
        """Write it beside the graphs, atomically."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        write_json(content, _path(folder, self.runtime_format))


def describe(
    sam: Sam,
    runtime_format: Format,
    files: dict[str, str],
    exact: bool,
    products: Products | None,
) -> Manifest:
    """The manifest of a model's export; `exact` and `products` as there."""
    quantized = sam if isinstance(sam, QuantizedSam) else None
    encoder = sam.prompt_encoder
    return Manifest(
        runtime_format=runtime_format,
        model=sam.name,
        image_size=sam.image_size,
        embedding=(encoder.embed_dim, *encoder.image_embedding_size),
        mask_input=encoder.mask_input_size,
        origin=origin(sam),
        encoder_quantized=None if quantized is None else quantized.encoder_quantized,
        scheme=None if quantized is None else quantized.scheme.to_dict(),
        files=files,
        exact=exact,
        products=products,
        pixel_mean=sam.normalization.mean,
        pixel_std=sam.normalization.std,
        prompt_size=sam.geometry.prompt_side,
    )


def origin(sam: Sam) -> str:
    """Fingerprint of the weights that quantization leaves alone."""
    state = sam.state_dict()
    digest = hashlib.sha256()
    for name in sam.description.origin:
        if name in state:
            # Schemes may round what stays float to half precision.
            digest.update(state[name].detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()[:16]


def find_export(path: Path) -> tuple[Path, list[str]] | None:
    """The exported model that a path names: its folder, or one of the files in it.

    Returns:
        The folder and the formats that are meant; None where there is no exported model.
    """
    if path.is_dir():
        there = formats(path)
        return (path, there) if there else None
    for known in formats(path.parent):
        graphs = [
            part + suffix for part in (ENCODER, DECODER) for suffix in FORMATS[known].suffixes
        ]
        if path.is_file() and path.name in (f"{known}.json", *graphs):
            return path.parent, [known]
    return None


def formats(folder: Path) -> list[str]:
    """The formats that a folder has."""
    return [known for known in FORMATS if _path(folder, known).is_file()]


def read_manifest(folder: Path, runtime_format: str) -> Manifest:
    """Read a manifest and check that its files are there and whole.

    Raises:
        CheckpointError: the folder has no export of the format, or it is damaged or newer.
    """
    path = _path(folder, runtime_format)
    if not path.is_file():
        found = ", ".join(formats(folder)) or "none"
        raise CheckpointError(
            f"asked for an exported model in {folder}, format {runtime_format}, but found {found}: "
            f"write it with ptq4sam export, format {runtime_format}"
        )
    try:
        content, _ = read_json(path, "manifest")
        if content.pop("format") != FORMAT:
            raise KeyError("format")
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, this ptq4sam reads {FORMAT_VERSION}: "
                "export the model again"
            )
        manifest = Manifest(**_tuples(content))
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): export the model again") from error
    for name, expected in manifest.files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: export the model again")
        if checksum(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name} is not the file that {path.name} describes: export again"
            )
    return manifest


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _path(folder: Path, runtime_format: str) -> Path:
    return folder / f"{runtime_format}.json"


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
    }
