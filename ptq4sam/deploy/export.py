"""Write a SAM, float or quantized, as files that ONNX Runtime or OpenVINO runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from ptq4sam.deploy.manifest import (
    DECODER,
    ENCODER,
    Format,
    Manifest,
    checksum,
    describe,
)
from ptq4sam.deploy.onnx.decoder import decoder_graph
from ptq4sam.deploy.onnx.encoder import encoder_graph
from ptq4sam.deploy.products import advice, exact_products
from ptq4sam.deploy.targets import FORMATS
from ptq4sam.deploy.targets.target import Products, Target, require
from ptq4sam.errors import ConfigError, DependencyError, DeployError
from ptq4sam.files import temporary_folder
from ptq4sam.locks import alone_in
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.quantization.scheme import SIMULATIONS
from ptq4sam.sam.model import Sam
from ptq4sam.version import __version__

_log = logging.getLogger(__name__)


def export(
    sam: Sam,
    folder: str | Path,
    runtime_format: Format,
    *,
    fast: bool = False,
    products: Products | None = None,
) -> Manifest:
    """Write the image encoder and the mask decoder, one graph each, and what describes them.

    The graphs compute what the model computes in simulation, quantizers included; see
    `encoder_graph` and `decoder_graph` for their inputs and outputs. The folder may hold both
    formats. Readers never see half of an export: what a description names is checked against it.
    One writer has the folder at a time.

    Args:
        sam: the model, float or frozen.
        folder: made if it is missing.
        runtime_format: "onnx" (encoder.onnx, decoder.onnx) or "openvino" (.xml and .bin of each).
        fast: leave what lies between products of codes to OpenVINO's own operators, which takes
            0.6 of the time, but not to the simulation's codes: some of them are the next ones.
        products: how OpenVINO multiplies codes: "int8", or "float32", whose files are exact on
            every processor whatever opens them. By default int8 where that is exact here.

    Raises:
        ConfigError: there is no such format, or no such form of it.
        DeployError: a part has no exact form; its name is given.
        DependencyError: the format's package is not installed.
        StoreError: somebody else writes into the folder.
    """
    _check_form(sam, runtime_format, fast, products)
    with alone_in(Path(folder)):
        return export_alone(sam, Path(folder), runtime_format, fast=fast, products=products)


@torch.no_grad()
def export_alone(
    sam: Sam,
    folder: Path,
    runtime_format: Format,
    *,
    fast: bool = False,
    products: Products | None = None,
) -> Manifest:
    """`export`, for whoever has a right form and has claimed the folder."""
    target = FORMATS[runtime_format]
    dialect = target.fast if fast and target.fast is not None else target.dialect
    quantized = isinstance(sam, QuantizedSam)
    graphs = {
        ENCODER: encoder_graph(sam, dialect),
        DECODER: decoder_graph(sam, dialect),
    }
    doubtful = [place for graph in graphs.values() for place in graph.inexact]
    for place in doubtful:
        _log.debug("the codes of %s may be others than the simulation's", place)
    has_codes = any(graph.quantizers for graph in graphs.values())
    # Products are asked about wherever sums are those of the simulation, whatever is multiplied.
    whole = has_codes and dialect.between == "portable"
    found = _products(target, whole) if has_codes else None
    products = (products or found) if whole else None
    with temporary_folder(folder, "export", folder) as temporary:
        for name, graph in graphs.items():
            path = temporary / f"{name}.onnx"
            graph.write(path, {"ptq4sam": __version__, "model": sam.name})
            if target.convert is not None:
                target.convert(path, quantized, products)
        names = [name + suffix for name in graphs for suffix in target.suffixes]
        files = {name: checksum(temporary / name) for name in names}
        for name in names:
            os.replace(temporary / name, folder / name)
    manifest = describe(sam, runtime_format, files, has_codes and not doubtful, products)
    manifest.write(folder)
    return manifest


def _check_form(sam: Sam, form: Format, fast: bool, products: Products | None) -> None:
    """Refuse what cannot be written, before anything is made; errors as `export`."""
    if form not in FORMATS:
        raise ConfigError(f"format {form!r} was asked for: use {' or '.join(FORMATS)}")
    target = FORMATS[form]
    if fast and target.fast is None:
        others = " or ".join(known for known, other in FORMATS.items() if other.fast)
        raise ConfigError(f"asked for a fast export as {form}: use {others}")
    if products is not None and (fast or not target.held or products not in target.products):
        known = ", ".join(
            f"{known} have {' or '.join(other.products)}"
            for known, other in FORMATS.items()
            if other.held
        )
        raise ConfigError(
            f"asked for {products} products of codes in {'a fast' if fast else 'an'} export as "
            f"{form}: exact exports as {known}"
        )
    compat = sam.scheme.compat if isinstance(sam, QuantizedSam) else "faithful"
    if why := SIMULATIONS.get(compat):
        raise DeployError(
            f"asked to export a model with compat: {compat}, which {why}: quantize with compat: "
            "faithful"
        )
    if sam.geometry.resizing != "longest side":
        raise DeployError(
            f"asked to export {sam.name}, whose pictures are resized to a square: exports have "
            "pictures resized by the longest side"
        )
    if target.convert is not None:
        require(target.name)


def _products(target: Target, whole: bool) -> Products | None:
    """Products of codes that are exact here; None where the runtime cannot be asked, or has none.

    Another machine may have them: that is no reason not to export.
    """
    try:
        told = advice(target)
        found = exact_products(target) if whole else None
    except (DependencyError, DeployError) as error:
        _log.info("how codes are multiplied is left to where the export is opened: %s", error)
        return None
    if told is not None:
        _log.info(told)
    if found is not None:
        _log.info("%s multiplies codes in %s: exact on this processor", target.name, found)
    return found
