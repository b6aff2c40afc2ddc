"""Weights are loaded exactly, or refused in one clear line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ptq4sam.downloads.catalogue import ASSETS
from ptq4sam.errors import CheckpointError, ConfigError
from ptq4sam.families import VARIANTS, build_sam, family
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.sam.model import Sam
from ptq4sam.skeletons import shapes_alone


@pytest.fixture
def state(random_state: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    return random_state(build_sam("vit_nano").state_dict())


def refusal(name: str, path: str | Path | None) -> str:
    """The message with which a file is refused: one line."""
    with pytest.raises(CheckpointError) as caught:
        load_sam(name, path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def official_state(name: str) -> dict[str, Tensor]:
    """Official names and shapes; each tensor holds its place in the list, stored as one number."""
    registry = pytest.importorskip("segment_anything").sam_model_registry
    with shapes_alone():
        official = registry[name]().state_dict()
    return {
        key: torch.tensor(float(index)).expand(tensor.shape)
        for index, (key, tensor) in enumerate(official.items())
    }


OFFICIAL_FILES = {
    name: variant.weights.file
    for name, variant in VARIANTS.items()
    if variant.family.name == "sam_vit" and variant.weights.download
}


def check_equal(sam: Sam, state: dict[str, Tensor]) -> None:
    found = sam.state_dict()
    assert found.keys() == state.keys()
    for key, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(state[key].float()), key


@pytest.mark.parametrize("name", list(OFFICIAL_FILES))
def test_official_files_load(name: str, tmp_path: Path) -> None:
    path = tmp_path / OFFICIAL_FILES[name]
    state = official_state(name)
    torch.save(state, path)
    sam = load_sam(name, path)
    assert sam.name == name
    assert not sam.training
    for index, (key, tensor) in enumerate(sam.state_dict().items()):
        # The ends tell a constant tensor from a misplaced one.
        assert tensor.is_contiguous()
        assert tensor.flatten()[0] == tensor.flatten()[-1] == state[key].flatten()[0], (index, key)


def test_another_official_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(official_state("vit_l"), path)
    message = refusal("vit_b", path)
    assert "asked for vit_b" in message
    assert "vit_l: ask for that" in message


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_load(
    state: dict[str, Tensor], tmp_path: Path, wrapper: str | None, zipped: bool
) -> None:
    path = tmp_path / "nano.pth"
    content = state if wrapper is None else {wrapper: state, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    check_equal(load_sam("vit_nano", path), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(
    state: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    save_file(state, tmp_path / "nano.safetensors")
    check_equal(load_sam("vit_nano", str(tmp_path / "nano.safetensors")), state)


def test_a_loaded_model_is_whole(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "nano.safetensors")
    sam = load_sam("vit_nano", tmp_path / "nano.safetensors", device=torch.device("cpu"))
    built = build_sam("vit_nano")
    for ours, expected in zip(sam.buffers(), built.buffers(), strict=True):
        assert ours.shape == expected.shape
        assert ours.device.type == "cpu"
    assert sam.pixel_mean.equal(built.pixel_mean)
    assert sam.pixel_std.equal(built.pixel_std)
    assert all(parameter.requires_grad for parameter in sam.parameters())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_model_does_not_depend_on_its_file(
    state: dict[str, Tensor], tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"nano{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    sam = load_sam("vit_nano", path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(os.urandom(size))
    check_equal(sam, state)


def test_the_embedded_file_is_the_default(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "ASSETS", tmp_path)
    assert "embedded weights" in refusal("vit_nano", None)
    state = {key: tensor.half() for key, tensor in state.items()}
    save_file(state, tmp_path / "vit_nano.safetensors")
    check_equal(load_sam("vit_nano"), state)


@pytest.mark.parametrize("name", list(OFFICIAL_FILES))
def test_official_models_need_a_file(name: str, tmp_path: Path) -> None:
    for path in (None, tmp_path / "absent.pth"):
        message = refusal(name, path)
        assert OFFICIAL_FILES[name] in message
        assert "facebookresearch/segment-anything" in message


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="vit_b, vit_l"):
        load_sam("vit_x")
    for name, near in (("sam_vit_b", "vit_b"), ("VIT-L", "vit_l"), ("mobilesam", "mobile_sam")):
        with pytest.raises(ConfigError, match=rf"unknown SAM '{name}': did you mean {near}\?"):
            load_sam(name)


NECK = "image_encoder.neck.0.weight"


def _without(state: dict[str, Tensor]) -> None:
    del state[NECK]


def _unexpected(state: dict[str, Tensor]) -> None:
    state["extra.weight"] = torch.zeros(1)


def _reshaped(state: dict[str, Tensor]) -> None:
    state[NECK] = state[NECK][:5]


def _not_finite(state: dict[str, Tensor]) -> None:
    state[NECK][3, 2] = float("inf")


def _sparse(state: dict[str, Tensor]) -> None:
    state[NECK] = state[NECK].to_sparse()


def _without_values(state: dict[str, Tensor]) -> None:
    state[NECK] = state[NECK].to("meta")


def _integer(state: dict[str, Tensor]) -> None:
    state[NECK] = state[NECK].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_without, ("misses", NECK)),
        (_unexpected, ("does not know extra.weight",)),
        (_reshaped, (NECK, "(5, ", "(128, ")),
        (_not_finite, (NECK, "not finite")),
        (_integer, (NECK, "int8")),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_unfit_tensors_are_refused(
    state: dict[str, Tensor],
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor]], None],
    parts: tuple[str, ...],
    suffix: str,
) -> None:
    path = tmp_path / f"nano{suffix}"
    damage(state)
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    message = refusal("vit_nano", path)
    assert str(path) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("damage", "told"), [(_sparse, "is torch.sparse_coo"), (_without_values, "has no values")]
)
def test_tensors_that_are_not_plain_are_refused(
    state: dict[str, Tensor],
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor]], None],
    told: str,
) -> None:
    damage(state)
    torch.save(state, tmp_path / "nano.pth")
    assert f"{NECK} {told}" in refusal("vit_nano", tmp_path / "nano.pth")


def test_bytes_that_changed_within_a_file_are_noticed(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    """As a copy that broke off leaves zeros; torch itself reads them as weights."""
    path = tmp_path / "nano.pth"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    assert "the checksum of its entry" in refusal("vit_nano", path)


def test_a_file_without_checksums_loads(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "nano.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    load_sam("vit_nano", tmp_path / "nano.pth")


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused(
    state: dict[str, Tensor], tmp_path: Path, kind: str, part: float
) -> None:
    path = tmp_path / ("nano.safetensors" if kind == "safetensors" else "nano.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert "download it again" in refusal("vit_nano", path)


@pytest.mark.parametrize("seed", range(8))
def test_noise_is_refused(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (4096,), generator=generator, dtype=torch.uint8)
    for suffix, head in ((".pth", b""), (".pth", b"\x80\x02"), (".safetensors", b"")):
        path = tmp_path / f"noise{suffix}"
        path.write_bytes(head + noise.numpy().tobytes())
        refusal("vit_nano", path)


class _Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_run(
    state: dict[str, Tensor], tmp_path: Path, zipped: bool
) -> None:
    path, trace = tmp_path / "nano.pth", tmp_path / "trace"
    content = {**state, "payload": _Malicious(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "could run code" in refusal("vit_nano", path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": 3}, {"a": "b"}, {"a": 3 * [0.5]}])
def test_what_holds_no_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert "tensor" in refusal("vit_nano", tmp_path / "other.pth")


def test_every_variant_has_a_source() -> None:
    for variant in VARIANTS.values():
        if variant.weights.embedded is None:
            assert variant.weights.download in ASSETS
        else:
            assert variant.weights.embedded.is_file()
