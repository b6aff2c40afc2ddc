"""Commands on the tiny SAM of tests/model: its pictures, weights and scheme in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TinySam:
    """Files of a command with `--model tiny`."""

    folder: Path

    @property
    def scheme(self) -> Path:
        return self.folder / "scheme.yaml"

    @property
    def weights(self) -> Path:
        return self.folder / "tiny.safetensors"

    def data(self, split: str = "val", prefix: str = "") -> list[str]:
        return [
            *(f"--{prefix}images", str(self.folder / "images" / split)),
            *(f"--{prefix}annotations", str(self.folder / "annotations" / f"{split}.json")),
        ]

    def arguments(self, scheme: Path | None = None) -> list[str]:
        """Model, scheme, pictures and calibration pictures."""
        return [
            *("--model", "tiny", "--checkpoint", str(self.weights)),
            *("--scheme", str(scheme or self.scheme)),
            *self.data(),
            *self.data("train", "calibration-"),
        ]
