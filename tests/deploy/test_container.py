from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq4sam.deploy.container import (
    CHECKSUM,
    DESCRIPTION,
    is_quantized_file,
    read_container,
    write_container,
)
from ptq4sam.deploy.storage import load, save
from ptq4sam.errors import CheckpointError
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.sam.model import Sam


@pytest.fixture
def saved(quantize: Callable[..., QuantizedSam], tmp_path: Path) -> Path:
    save(quantize(4), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing.safetensors")


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="which is a folder"):
        load(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"<html><title>Not found</title></html>")
    assert not is_quantized_file(path)
    with pytest.raises(CheckpointError, match=r'not a quantized model .* a web page \("Not found"'):
        load(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="it is a PyTorch checkpoint: load float weights"):
        load(path)


@pytest.mark.parametrize("left", [0, 7, 1000, -1])
def test_truncated_file(saved: Path, left: int) -> None:
    saved.write_bytes(saved.read_bytes()[:left])
    with pytest.raises(CheckpointError, match="is damaged"):
        load(saved)


def test_longer_file(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="is damaged"):
        load(saved)


def test_a_flipped_bit_in_any_tensor_is_named(tmp_path: Path) -> None:
    tensors = {"codes": torch.arange(64, dtype=torch.uint8), "scale": torch.ones(3)}
    path = tmp_path / "small.safetensors"
    write_container(path, tensors, {})
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    named = set()
    for place in range(start, len(whole)):
        path.write_bytes(flipped(whole, place, place % 8))
        with pytest.raises(CheckpointError, match="does not have its checksum") as caught:
            read_container(path)
        named.add(str(caught.value).partition("(")[2].split()[0])
    assert named == {"codes", "scale"}


def test_a_flipped_bit_anywhere_is_a_named_error(saved: Path) -> None:
    """Length, header, description and tensors: nothing but a CheckpointError may come of it."""
    whole = saved.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    places = [*range(8), *(draw.randrange(8, end) for _ in range(300))]
    places += [draw.randrange(end, len(whole)) for _ in range(30)]
    for place in places:
        saved.write_bytes(flipped(whole, place, draw.randrange(8)))
        with pytest.raises(CheckpointError):
            read_container(saved)


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_exchanged_tensors_are_seen(tmp_path: Path, describe: Callable[[Path], str]) -> None:
    path = tmp_path / "small.safetensors"
    write_container(path, {"a": torch.zeros(4), "b": torch.ones(4)}, {})
    metadata = describe(path, whole=True)  # type: ignore[call-arg]
    save_file({"a": torch.ones(4), "b": torch.zeros(4)}, path, metadata=metadata)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"\(a does not have its checksum\)"):
        read_container(path)
    save_file({"a": torch.zeros(4)}, path, metadata=metadata)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"\(b is missing or too much\)"):
        read_container(path)


def test_float_weights_are_no_quantized_model(sam: Sam, tmp_path: Path) -> None:
    path = tmp_path / "float.safetensors"
    save_file(sam.state_dict(), path)
    assert not is_quantized_file(path)
    with pytest.raises(CheckpointError, match="is not a quantized model"):
        load(path)


def test_newer_format_version(saved: Path, rewrite: Callable[..., None]) -> None:
    assert is_quantized_file(saved)
    rewrite(saved, format_version=5)
    with pytest.raises(CheckpointError, match="has format version 5, this ptq4sam reads up to 4"):
        load(saved)


def test_a_checksum_in_an_entry_of_its_own_is_read(
    saved: Path, describe: Callable[[Path], str]
) -> None:
    """As ptq4sam wrote it in format version 2."""
    content = json.loads(describe(saved))
    del content[CHECKSUM]
    text = json.dumps({**content, "format_version": 2})
    metadata = {DESCRIPTION: text, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}
    tensors, expected = load_file(saved), read_container(saved)[1]
    save_file(tensors, saved, metadata=metadata)
    assert read_container(saved)[1] == {**expected, "format_version": 2}
    save_file(tensors, saved, metadata={**metadata, CHECKSUM: 64 * "0"})
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        read_container(saved)


def test_equal_contents_make_equal_bytes(tmp_path: Path) -> None:
    tensors = {name: torch.full((3,), float(n)) for n, name in enumerate("dbca")}
    paths = [tmp_path / f"{index}.safetensors" for index in range(8)]
    for path in paths:
        write_container(path, tensors, {"model": "vit", "weights": {"a": 1}})
    assert len({path.read_bytes() for path in paths}) == 1


@pytest.mark.parametrize("version", [0, -1, "two", None])
def test_a_format_version_that_never_was(
    saved: Path, rewrite: Callable[..., None], version: object
) -> None:
    rewrite(saved, format_version=version)
    with pytest.raises(CheckpointError, match="is damaged"):
        load(saved)


def test_contents_are_read_back(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.tensor(True), "e": torch.empty(0)}
    path = tmp_path / "new" / "small.safetensors"
    write_container(path, tensors, {"model": "vit"})
    found, description = read_container(path)
    assert description["model"] == "vit"
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert set(load_file(path)) == set(tensors)
