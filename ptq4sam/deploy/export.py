"""Write a SAM, float or quantized, as files that ONNX Runtime or OpenVINO runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

import ptq4sam
from ptq4sam.deploy.manifest import (
    DECODER,
    ENCODER,
    SUFFIXES,
    Format,
    Manifest,
    checksum,
    describe,
)
from ptq4sam.deploy.onnx.decoder import decoder_graph
from ptq4sam.deploy.onnx.encoder import encoder_graph
from ptq4sam.deploy.openvino import write_openvino
from ptq4sam.deploy.runtimes import require
from ptq4sam.errors import ConfigError, DeployError
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.sam.model import Sam


@torch.no_grad()
def export(sam: Sam, folder: str | Path, runtime_format: Format, *, fast: bool = False) -> Manifest:
    """Write the image encoder and the mask decoder, one graph each, and what describes them.

    The graphs compute what the model computes in simulation, quantizers included; see
    `encoder_graph` and `decoder_graph` for their inputs and outputs. The folder may hold both
    formats. Readers never see half of an export: what a description names is checked against it.

    Args:
        sam: the model, float or frozen.
        folder: made if it is missing.
        runtime_format: "onnx" (encoder.onnx, decoder.onnx) or "openvino" (.xml and .bin of each).
        fast: leave what lies between products of codes to OpenVINO's own operators, which takes
            0.6 of the time, but not to the simulation's codes: some of them are the next ones.

    Raises:
        ConfigError: there is no such format, or no fast form of it.
        DeployError: a part has no exact form; its name is given.
        DependencyError: the format's package is not installed.
    """
    if runtime_format not in SUFFIXES:
        raise ConfigError(f"format {runtime_format!r} was asked for: use {' or '.join(SUFFIXES)}")
    signed = runtime_format == "openvino"
    if fast and not signed:
        raise ConfigError(f"asked for a fast export as {runtime_format}: use openvino")
    quantized = isinstance(sam, QuantizedSam)
    if isinstance(sam, QuantizedSam) and sam.scheme.compat == "published":
        raise DeployError(
            "asked to export a model with compat: published, which is not on its grid: quantize "
            "with compat: faithful"
        )
    if signed:
        require("openvino")
    graphs = {
        ENCODER: encoder_graph(sam.image_encoder, signed, not fast),
        DECODER: decoder_graph(sam, signed, not fast),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export.", dir=folder) as temporary:
        for name, graph in graphs.items():
            path = Path(temporary) / f"{name}.onnx"
            graph.write(path, {"ptq4sam": ptq4sam.__version__, "model": sam.name})
            if signed:
                write_openvino(path, path.with_suffix(".xml"), quantized=quantized)
        names = [name + suffix for name in graphs for suffix in SUFFIXES[runtime_format]]
        files = {name: checksum(Path(temporary) / name) for name in names}
        for name in names:
            os.replace(Path(temporary) / name, folder / name)
    manifest = describe(sam, runtime_format, files, exact=quantized and not fast)
    manifest.write(folder)
    return manifest
