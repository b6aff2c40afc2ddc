"""Files that are no weights are called what they are."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ptq4sam.contents import is_pickle, is_safetensors, otherwise

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 375042383\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>\n Virus scan  warning</title></head>"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (bytes(9999), "4096 zeros"),
        (PAGE + 9999 * b"x", 'is a web page ("Virus scan warning"), not weights'),
        (b"\xef\xbb\xbf  <html lang='de'>Zugriff verweigert", "is a web page, not weights"),
        (b"<!-- proxy --><HTML>f\xfcr Sie gesperrt", "is a web page, not weights"),
        (LFS, "a Git LFS pointer to 375,042,383 bytes, not the weights: run git lfs pull"),
        (b"Entry not found", 'a text that begins "Entry not found"'),
        (b'{"error": "Repository not found"}\n', "a text that begins"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a text that begins"),
        (b'<?xml version="1.0"?>\n<net name="Model0" version="11">', "an OpenVINO graph"),
        ("é" * 4000, "a text that begins"),
        (gzip.compress(b"weights"), "is packed (gzip): unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_is_not_weights_is_named(tmp_path: Path, content: bytes | str, told: str) -> None:
    path = tmp_path / "sam_vit_b.pth"
    path.write_bytes(content if isinstance(content, bytes) else b"x" + content.encode())
    found = otherwise(path)
    assert found is not None
    assert told in found
    assert "\n" not in found
    assert not is_safetensors(path)


def test_archives_of_files_are_packed(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as archive:
        archive.write(tmp_path / "a.pth", "weights/a.pth")
    assert "packed (ZIP, with weights/a.pth)" in str(otherwise(tmp_path / "z.pth"))
    with tarfile.open(tmp_path / "t.pth", "w") as packed:
        packed.add(tmp_path / "a.pth")
    assert "packed (tar)" in str(otherwise(tmp_path / "t.pth"))
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "s.pth")
    assert "TorchScript" in str(otherwise(tmp_path / "s.pth"))


def test_a_graph_is_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    for model in (
        onnx.helper.make_model(graph, producer_name="pytorch"),
        onnx.helper.make_model(graph),
    ):
        onnx.save(model, tmp_path / "a.pth")
        assert "ONNX graph" in str(otherwise(tmp_path / "a.pth"))


def test_what_may_be_weights_is_not(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    for zipped in (True, False):
        torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        assert otherwise(tmp_path / "a.pth") is None
        assert not is_safetensors(tmp_path / "a.pth")
        assert is_pickle(tmp_path / "a.pth")
    save_file(tensors, tmp_path / "a.pth")
    assert otherwise(tmp_path / "a.pth") is None
    assert is_safetensors(tmp_path / "a.pth")
    assert not is_pickle(tmp_path / "a.pth")
    for content in (np.random.default_rng(0).bytes(5000), 5000 * b"\xff", b"\x80\x02}q\x00"):
        (tmp_path / "a.pth").write_bytes(content)
        assert otherwise(tmp_path / "a.pth") is None
