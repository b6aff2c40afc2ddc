"""The tiny models of tests/model, and what is in their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ptq4sam.deploy.container import CHECKSUM, DESCRIPTION, signed
from ptq4sam.deploy.export import export
from ptq4sam.deploy.targets import FORMATS
from ptq4sam.deploy.targets.onnxruntime import OnnxRuntimeSession
from ptq4sam.deploy.targets.openvino import OpenVinoSession
from ptq4sam.model.insertion import QuantizedSam
from tests.deploy.sessions import opened_once
from tests.model.conftest import (  # noqa: F401
    forward,
    items,
    make_scheme,
    quantize,
    quantized_before,
    sam,
    tiny_variant,
)


@pytest.fixture(scope="module")
def shared_sessions() -> Iterator[None]:
    """The tests of a module open the same files once."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (OnnxRuntimeSession, OpenVinoSession):
            patch.setattr(kind, "__init__", opened_once(kind.__init__))
        yield


@pytest.fixture(scope="module")
def exported_before() -> dict[str, bytes]:
    """Files of both exports of `quantize(8)`, by name, as soon as a test has made them."""
    return {}


@pytest.fixture
def folder(
    quantize: Callable[..., QuantizedSam],  # noqa: F811
    exported_before: dict[str, bytes],
    tmp_path: Path,
) -> tuple[QuantizedSam, Path]:
    """A model of 8 bits, and both of its exports, a test's own files."""
    model, path = quantize(8), tmp_path / "exported"
    if not exported_before:
        for runtime_format in FORMATS:
            export(model, path, runtime_format)
        exported_before |= {file.name: file.read_bytes() for file in path.iterdir()}
    path.mkdir(exist_ok=True)
    for name, content in exported_before.items():
        (path / name).write_bytes(content)
    return model, path


@pytest.fixture
def describe() -> Callable[..., Any]:
    """The description in a quantized file as text, or its whole metadata."""

    def read(path: Path, *, whole: bool = False) -> Any:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        return metadata if whole else metadata[DESCRIPTION]

    return read


@pytest.fixture
def rewrite(describe: Callable[..., Any]) -> Callable[..., None]:
    """Change entries of the description of a quantized file, with the checksum that fits."""

    def write(path: Path, **changes: object) -> None:
        content = json.loads(describe(path))
        del content[CHECKSUM]
        save_file(load_file(path), path, metadata={DESCRIPTION: signed({**content, **changes})})

    return write
